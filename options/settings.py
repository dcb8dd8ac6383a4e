"""Settings from several sources: commands, recipes and checkpoints, and their merge.

    flags = flags_of((DiTConfig, StepConfig))
    recipe = read({"step": {"ema": ["power"]}, "router": {"sigmoid": {"scale": 2.5}}}, flags)
    command = read({"router_scale": "3", "ema_length": ["0.1", "0.05"]}, flags)
    model = build(DiTConfig, merge(recipe, command, flags), flags)   # model.router: Part
    nested(model)                                                    # {"router": {"sigmoid": ...}}

A layer is what one source says, by flag. A field that names components holds `Part`s. An option
without its component, such as router_scale, is loose: it waits for a component that has it, which
another source or the default may name. Errors are ValueErrors, "NAME: ...".
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, NamedTuple

from options.parts import LIMITS, Option, Part, complete_options, options_of

Layer = dict[str, Any]


@dataclass(eq=False)
class Flag:
    """What a flag sets: a field of a config class, or an option of the components that it names."""

    kind: type
    field: Option
    options: dict[str, Option] = field(default_factory=dict)  # by component; {}: the field itself

    @property
    def option(self) -> Option:
        return next(iter(self.options.values()), self.field)

    @property
    def takes_several(self) -> bool:
        """Whether several values are several components, as in --ema-decay 0.99 0.999."""
        return bool(self.options) and self.field.is_list and not self.field.by_component

    @property
    def shown(self) -> Option:
        """The option as the help shows it. Rules that differ between components are left out."""
        if not self.options:
            return self.field
        texts: dict[str, list[str]] = {}
        for component, one in self.options.items():
            texts.setdefault(one.help, []).append(component)
        help = "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
        if len(texts) == 1 and (
            self.field.by_component or set(self.options) == {*self.field.table}
        ):
            help = self.option.help  # of all components, or of the one in the flag's name
        ones, rules = [*self.options.values()], (*LIMITS, "choices", "suffixes")
        unlike = [rule for rule in rules if len({getattr(one, rule) for one in ones}) > 1]
        hint = tuple[self.option.hint, ...] if self.takes_several else self.option.hint
        return replace(
            self.option, hint=hint, help=help,
            **{rule: getattr(Option, rule) for rule in unlike},
        )  # fmt: skip


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
    flags: dict[str, Flag] = {}
    for kind, one in ((owner, one) for owner in kinds for one in options_of(owner).values()):
        if one.name in flags:
            raise TypeError(f"{one.name} is a flag of {flags[one.name].kind} and of {kind}")
        flags[one.name] = Flag(kind, one)
        for component, part in (one.table or {}).items():
            for option in options_of(part).values():
                name = flag_name(one, component, option)
                flag = flags.setdefault(name, Flag(kind, one))
                is_taken = component in flag.options or one.by_component and flag.options
                if flag.field is not one or name == one.name or is_taken:
                    raise TypeError(f"{name} is a flag of {flag.field.name} and of {one.name}")
                flag.options[component] = option
    return flags


def flattened(values: Mapping[str, Any], flags: Flags) -> dict[str, Any]:
    """Removes the sections of a file: the mappings that are no components."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        is_component = name in flags and flags[name].field.table and not flags[name].options
        if isinstance(value, Mapping) and not is_component:
            found |= {str(k).replace("-", "_"): v for k, v in value.items()}
        else:
            found[name] = value
    return found


def read(values: Mapping[str, Any], flags: Flags) -> Layer:
    """Reads values by flag, flat or nested as in a file; None says nothing.

    A loose option has to be valid for one component. Reading a layer again does not change it.
    """
    return {
        name: read_value(flags[name], name, value)
        for name, value in flattened(values, flags).items()
        if value is not None
    }


def read_value(flag: Flag, name: str, value: Any) -> Any:
    if not flag.options:
        return flag.field.read(value, name)
    if flag.takes_several:
        values = value if isinstance(value, list | tuple) else [value]
        found = tuple(read_value_of_any(flag, name, one) for one in values)
        if len(set(found)) < len(found):
            raise ValueError(f"{name}: got {' '.join(map(str, found))}, expected different values")
        return found
    return read_value_of_any(flag, name, value)


def read_value_of_any(flag: Flag, name: str, value: Any) -> Any:
    """Reads the value of a loose option as the first component does that accepts it."""
    for option in flag.options.values():
        try:
            return option.read(value, name)
        except ValueError:
            pass
    return flag.shown.read([value] if flag.takes_several else value, name)  # raises


def settle(parts: Sequence[Part], loose: Layer, flags: Flags) -> tuple[list[Part], Layer]:
    """Gives loose options to the components that have them.

    Several values multiply a component. Returns the different components, and the other options.
    """
    rest, found = {}, [*parts]
    for name, value in loose.items():
        flag = flags[name]
        values = value if flag.takes_several else (value,)
        if not any(part.name in flag.options for part in found):
            rest[name] = value
            continue
        found = [
            replace(part, options=part.options | {flag.options[part.name].name: one})
            if part.name in flag.options else part
            for part in found for one in (values if part.name in flag.options else (None,))
        ]  # fmt: skip
    return [part for number, part in enumerate(found) if part not in found[:number]], rest


def chosen(choice: str, layer: Layer, flags: Flags) -> tuple[list[Part], Layer]:
    """Returns the components that a layer or the default names, and the options that none has."""
    one = flags[choice].field
    loose = {name: layer[name] for name in layer if name != choice and flags[name].field is one}
    parts = layer.get(choice, one.default)
    return settle(parts if isinstance(parts, tuple) else [parts], loose, flags)


def merge(base: Layer, top: Layer, flags: Flags) -> Layer:
    """`top` overrides `base`. A component that `top` names again keeps the options of `base`."""
    base, top = dict(base), dict(top)
    for choice in [name for name in top if flags[name].field.table and not flags[name].options]:
        one = flags[choice].field
        below, waiting = chosen(choice, base, flags)
        base = {name: value for name, value in base.items() if flags[name].field is not one}
        parts = [
            replace(part, options=kept.options | part.options)
            for part in as_parts(top[choice])
            for kept in settle(
                [p for p in below if p.name == part.name] or [Part(part.name)], waiting, flags
            )[0]
        ]
        top[choice] = tuple(parts) if one.is_list else parts[0]
    return base | top


def as_parts(value: Part | tuple[Part, ...] | None) -> tuple[Part, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def build(kind: type, layer: Layer, flags: Flags) -> Any:
    """Makes a config of its part of a layer; the `Part`s of the config have all options."""
    values: dict[str, Any] = {}
    for name, one in options_of(kind).items():
        if one.table is not None:
            parts, rest = chosen(name, layer, flags)
            refuse(rest, one, parts, flags)
            done = [completed(one, part) for part in parts]
            values[name] = tuple(done) if one.is_list else done[0]
        elif name in layer:
            values[name] = layer[name]
        elif one.default is MISSING:
            raise ValueError(f"{name}: is required")
    return kind(**values)


def completed(choice: Option, part: Part) -> Part:
    """Returns a component with all options."""
    kind = choice.name
    if choice.by_component:
        kind = f"{kind}_{part.name}".replace("-", "_")
    return Part(part.name, complete_options(choice.table, kind, part.name, part.options))


def check_loose(layer: Layer, flags: Flags) -> None:
    """Refuses options that no component has, of those named and the defaults."""
    for name, flag in flags.items():
        if flag.field.table and not flag.options:
            parts, rest = chosen(name, layer, flags)
            refuse(rest, flag.field, parts, flags)


def refuse(rest: Iterable[str], choice: Option, parts: Sequence[Part], flags: Flags) -> None:
    """Refuses options that no chosen component has."""
    for name in rest:
        owners = " or ".join(flags[name].options)
        why = f"has no effect without {spelling(choice.name)} {owners}"
        if not choice.is_list:
            (part,) = parts
            own = [n for n, f in flags.items() if f.field is choice and part.name in f.options]
            has = ", ".join(map(spelling, own)) or "no options"
            why += f"; {choice.name} {part.name} has {has}"
        raise ValueError(f"{name}: {why}")


def spelling(name: str) -> str:
    """Returns the flag of a field, such as --global-batch-size."""
    return "--" + name.replace("_", "-")


def change_of(kind: type, one: Option) -> str:
    """Returns what a resumed run may change: what the option or else the config class says.

    "state" shapes the weights or the optimizer's state and never changes. "result" decides the
    result and changes if a flag beside --resume says so. "how" changes freely. "command" holds for
    one command and is not stored.
    """
    return one.change or getattr(kind, "change", "how")


def nested(config: Any) -> dict[str, Any]:
    """Returns a config as a file stores it: without None, and without flags of one command."""
    found: dict[str, Any] = {}
    for name, one in options_of(type(config)).items():
        value = getattr(config, name)
        if one.table is not None and value is not None:
            parts = [{part.name: part.options} if part.options else part.name
                     for part in as_parts(value)]  # fmt: skip
            value = parts if one.is_list else parts[0]
        if value is not None and change_of(type(config), one) != "command":
            found[name] = value
    return found


class Value(NamedTuple):
    """The value of one flag in a config; of several components all values, each once."""

    value: Any
    change: str  # see `change_of`
    field: str  # the field of the config
    default: Any = None  # of an option of a component


def values_of(config: Any) -> dict[str, Value]:
    """Returns the values of a config by flag, also those of the options of its components."""
    found: dict[str, Value] = {}
    for name, one in options_of(type(config)).items():
        value, change = getattr(config, name), change_of(type(config), one)
        if one.table is None:
            found[name] = Value(value, change, name)
            continue
        if value is None:
            continue
        names = [part.name for part in as_parts(value)]
        found[name] = Value([*dict.fromkeys(names)] if one.is_list else names[0], change, name)
        for part in as_parts(value):
            for option in options_of(one.table[part.name]).values():
                flag = flag_name(one, part.name, option)
                given = part.options.get(option.name, option.default)
                change = option.change or getattr(type(config), "change", "how")
                default = option.default
                if one.is_list and not one.by_component:
                    before = found[flag].value if flag in found else []
                    given = before if given in before else [*before, given]
                    default = [default]
                found[flag] = Value(given, change, name, default)
    return found


def flat(config: Any) -> dict[str, Any]:
    """Returns the values of a config by flag."""
    return {name: one.value for name, one in values_of(config).items()}


def differences(was: Any, now: Any) -> Iterator[tuple[str, Value, Value]]:
    """Yields the flags of which two configs of one class have different values.

    An option that only one of them has is not listed, but its component is.
    """
    before, after = values_of(was), values_of(now)
    for name in dict.fromkeys([*after, *before]):
        one, other = before.get(name), after.get(name)
        if one is None or other is None:
            missing = one or other
            if missing.field == name:  # a router, which a dense model does not have
                yield name, one or Value(None, *missing[1:]), other or Value(None, *missing[1:])
        elif one.value != other.value:
            yield name, one, other
