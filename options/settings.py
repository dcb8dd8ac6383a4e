"""Settings from several sources: commands, recipes and checkpoints, and their merge.

    flags = flags_of((DiTConfig, StepConfig))
    recipe = read({"ema": ["power"], "router": {"sigmoid": {"scale": 2.5}}}, flags)
    command = read({"router_scale": "3", "ema_length": ["0.1", "0.05"]}, flags)
    model = build(DiTConfig, merge(recipe, command, flags), flags)   # model.router: Part
    nested(model)                                                    # {"router": {"sigmoid": ...}}

A layer is what one source says, by flag: names of components, and options such as router_scale,
whose component another source or the default may name. Components with options, `Part`s, are made
for a config. Errors are ValueErrors, "NAME: ...".
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from options.parts import LIMITS, Option, Part, options_of

Layer = dict[str, Any]


@dataclass(eq=False, kw_only=True)
class Flag(Option):
    """A flag as the help shows it: a field of a config class, or an option of the components that
    the field names, without the rules that differ between the components.
    """

    field: Option
    options: dict[str, Option]  # by component; {}: the flag sets the field itself

    def read(self, value: Any, name: str | None = None) -> Any:
        """Reads a value; that of an option as the first component does that accepts it."""
        if not self.options:
            return self.field.read(value, name)
        values = value if self.repeats and isinstance(value, list | tuple) else [value]
        found: list[Any] = []
        for number, one in enumerate(values):
            for option in self.options.values():
                with suppress(ValueError):
                    found.append(option.read(one, name))
                    break
            if len(found) == number:
                super().read([one] if self.repeats else one, name)  # raises
        return tuple(found) if self.repeats else found[0]


Flags = Mapping[str, Flag]


def flag_name(choice: Option, component: str, option: Option) -> str:
    if option.is_bare:
        return option.name
    words = (choice.name, component.replace("-", "_") if choice.by_component else "", option.name)
    return "_".join(filter(None, words))


def flags_of(kinds: tuple[type, ...]) -> Flags:
    """Returns the flags of config classes, in order; an option follows the field that chooses it.

    Raises TypeError if two fields or options have the same flag.
    """
    found: dict[str, tuple[Option, dict[str, Option]]] = {}
    for one in (one for kind in kinds for one in options_of(kind).values()):
        if one.name in found:
            raise TypeError(f"{one.name} is a flag of {found[one.name][0].name} and a field")
        found[one.name] = (one, {})
        for component, part in (one.table or {}).items():
            for option in options_of(part).values():
                name = flag_name(one, component, option)
                field, options = found.setdefault(name, (one, {}))
                is_taken = component in options or one.by_component and options
                if field is not one or name == one.name or is_taken:
                    raise TypeError(f"{name} is a flag of {field.name} and of {one.name}")
                options[component] = option
    return {name: joined(field, options) for name, (field, options) in found.items()}


def joined(field: Option, options: dict[str, Option]) -> Flag:
    """Makes the flag of a field, or of the options of its components."""
    first = next(iter(options.values()), field)
    rules = {rule.name: getattr(first, rule.name) for rule in fields(Option)}
    if options:
        texts: dict[str, list[str]] = {}
        for component, one in options.items():
            texts.setdefault(one.help, []).append(component)
        if len(texts) > 1 or not field.by_component and options.keys() != field.table.keys():
            rules["help"] = "; ".join(f"{', '.join(names)}: {one}" for one, names in texts.items())
        for rule in (*LIMITS, "choices", "suffixes"):
            if len({getattr(one, rule) for one in options.values()}) > 1:
                rules[rule] = getattr(Option, rule)
        if field.repeats:  # several values are several components: --ema-decay 0.99 0.999
            rules |= {"hint": tuple[first.hint, ...], "repeats": True}
    return Flag(**rules, field=field, options=options)


def flattened(values: Mapping[str, Any], flags: Flags) -> Layer:
    """Removes the sections of a file: the mappings that are no components."""
    found: Layer = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        is_component = name in flags and flags[name].table
        is_section = isinstance(value, Mapping) and not is_component
        for inner, one in value.items() if is_section else [(name, value)]:
            inner = str(inner).replace("-", "_")
            if inner in found:
                raise ValueError(f"{inner}: is given twice")
            found[inner] = one
    return found


def read(values: Mapping[str, Any], flags: Flags) -> Layer:
    """Reads values by flag; None says nothing. Reading a layer again does not change it."""
    found: Layer = {}
    for name, value in values.items():
        if value is None:
            continue
        choice, one = flags[name].field, flags[name].read(value, name)
        said = unfolded(choice, one) if name == choice.name and choice.table else {name: one}
        for twice in said.keys() & found.keys():
            raise ValueError(f"{twice}: is given twice, alone and as an option of {choice.name}")
        found |= said
    return found


def as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def unfolded(choice: Option, value: Part | tuple[Part, ...]) -> Layer:
    """Returns components as a layer: their names, and each option that one of them says, with the
    values of all that have it."""
    parts, found = as_tuple(value), {}
    has = [
        (part, flag_name(choice, part.name, option), option)
        for part in parts
        for option in options_of(choice.table[part.name]).values()
    ]
    said = {name for part, name, option in has if option.name in part.options}
    for part, name, option in has:
        if name in said:
            one = part.options.get(option.name, option.default)
            found[name] = (*found.get(name, ()), one) if choice.repeats else one
    names = tuple(part.name for part in parts)
    return {choice.name: names if choice.is_list else names[0], **found}


def names_in(layer: Layer, choice: Option) -> tuple[str, ...]:
    """Returns the names of the components that a layer or the default chooses."""
    return tuple(map(str, as_tuple(layer.get(choice.name, choice.default))))


def components(choice: Option, layer: Layer, flags: Flags) -> list[Part]:
    """Returns the components that a layer or the default chooses, with the options of the layer.

    Several values of an option go to one component each; a single component is copied for them.
    Raises ValueError for an option that none of the components has.
    """
    parts = [Part(name) for name in names_in(layer, choice)]
    for name, value in layer.items():
        flag = flags[name]
        if flag.field is not choice or name == choice.name:
            continue
        places = [i for i, part in enumerate(parts) if part.name in flag.options]
        if not places:
            raise ValueError(no_effect(name, parts, flags))
        values = as_tuple(value) if flag.repeats else (value,)
        first, count = places[0], max(len(places), len(values))
        if {len(places), len(values)} - {1, count}:
            raise ValueError(f"{name}: got {len(values)} values, expected one or {len(places)}")
        if len(places) < count:
            parts[first : first + 1] = parts[first : first + 1] * count
            places = [*range(first, first + count)]
        values *= count // len(values)
        for place, one in zip(places, values, strict=True):
            option = flag.options[parts[place].name]
            options = parts[place].options | {option.name: option.read(one, name)}
            parts[place] = replace(parts[place], options=options)
    return parts


def merge(base: Layer, top: Layer, flags: Flags) -> Layer:
    """`top` overrides `base`.

    An option of `base` stays if `top` names again all components that it was for; others go with
    their component. `top` may change how often a component is repeated: then one value of `base`
    for all remains one for all.
    """
    kept: Layer = {}
    changed = {flags[name].field.name for name in top}
    for name, value in base.items():
        choice, options = flags[name].field, flags[name].options
        if options and choice.name in top:
            before, after = ({*names_in(layer, choice)} for layer in (base, top))
            if not options.keys() & before <= after:
                continue
        if choice.repeats and choice.name in changed:
            is_name, is_same = name == choice.name, len({*map(str, value)}) == 1
            value = tuple(dict.fromkeys(value)) if is_name else value[:1] if is_same else value
        if name not in top:
            kept[name] = value
    return kept | top


def build(kind: type, layer: Layer, flags: Flags) -> Any:
    """Makes a config of its part of a layer; the `Part`s of the config have all options."""
    values: Layer = {}
    for name, one in options_of(kind).items():
        if one.table is not None:
            done = tuple(map(one.complete, components(one, layer, flags)))
            values[name] = done if one.is_list else done[0]
        elif name in layer:
            values[name] = layer[name]
        elif one.default is MISSING:
            raise ValueError(f"{name}: is required")
    return kind(**values)


def no_effect(name: str, parts: Sequence[Part], flags: Flags) -> str:
    """Describes the error for an option that none of the chosen components has."""
    choice = flags[name].field
    owners = " or ".join(flags[name].options)
    why = f"{name}: has no effect without {spelling(choice.name)} {owners}"
    if choice.is_list:
        return why
    own = [n for n, flag in flags.items() if flag.field is choice and parts[0].name in flag.options]
    has = ", ".join(map(spelling, own)) or "no options"
    return f"{why}; {choice.name} {parts[0]} has {has}"


def spelling(name: str) -> str:
    """Returns the flag of a field, such as --global-batch-size."""
    return "--" + name.replace("_", "-")


def nested(config: Any) -> Layer:
    """Returns a config as a file stores it: without None, and without flags of one command."""
    found: Layer = {}
    for name, one in options_of(type(config)).items():
        value = getattr(config, name)
        if one.table is not None and value is not None:
            parts = [{part.name: part.options} if part.options else part.name
                     for part in as_tuple(value)]  # fmt: skip
            value = parts if one.is_list else parts[0]
        if value is not None and one.change != "command":
            found[name] = value
    return found


def flat(*configs: Any) -> Layer:
    """Returns the values of configs by flag; of several components tuples of names and values."""
    found: Layer = {}
    for config, one in ((c, one) for c in configs for one in options_of(type(c)).values()):
        value = getattr(config, one.name)
        if one.table is None or value is None:
            found[one.name] = value
        else:
            found |= unfolded(one, tuple(map(one.complete, as_tuple(value))))
    return found


def differences(was: Any, now: Any) -> Iterator[tuple[str, Flag, Any, Any]]:
    """Yields (name, flag, value, value) where two configs of one class differ.

    An option that only one of them has is not listed, but its component is.
    """
    before, after, flags = flat(was), flat(now), flags_of((type(now),))
    for name in [name for name in after if name in before]:
        if before[name] != after[name]:
            yield name, flags[name], before[name], after[name]
