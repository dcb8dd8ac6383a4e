"""Components, such as routers and objectives, which can be swapped, and their options.

    class MyRouter(Router):                       # `Router` is a `Component`
        temperature: float = option(1.0, help="temperature of the softmax", gt=0)

    ROUTERS["mine"] = MyRouter                    # a registry: {name: class}
    router = make_component(ROUTERS, "router", "mine", {"temperature": 0.5}, hidden_size=64, ...)

An option is declared once, as a typed field with default, help and range. The declaration
determines the flag, the entries in config.yaml and in the metadata of checkpoints, and the error
messages. This module reads no command lines and no files.
"""

import math
import operator
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal

Registry = dict[str, type]
Size = int | tuple[int, int]  # side of a square, or height and width
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
WORDS = {float: "a number", int: "an integer", bool: "True or False", str: "text"}
LIMITS = {
    "ge": ("at least", operator.ge), "gt": ("above", operator.gt),
    "le": ("at most", operator.le), "lt": ("below", operator.lt),
}  # fmt: skip


def option(default: Any = MISSING, **rules: Any) -> Any:
    """Declares a dataclass field that users can set; for the rules see `Option`."""
    return field(default=default, metadata={"option": Option(**rules)}, kw_only=True)


@dataclass(eq=False, kw_only=True)
class Option:
    """Properties of a field that users can set.

    If several components have options of the same name, `component_options` merges these options
    into one `Option`.
    """

    help: str
    group: str | None = None  # title in the help, for this option and the following ones
    metavar: str | tuple[str, ...] | None = None  # name of a value in the help
    # Limits of the value, or of each item of a tuple: `ge`, `gt`, `le` and `lt` are bounds (>=, >,
    # <=, <), `choices` are the allowed values, and `suffixes` are the allowed ends of a name.
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple = ()
    suffixes: tuple[str, ...] = ()
    # The components that the value can name. Users can also set the options of these components,
    # under names such as router_scale or, with by_component, auxiliary_repa_weight.
    table: Registry | None = None
    by_component: bool = False
    # The chooser: the option that chooses the component, such as "router" for router_scale.
    # aux_loss_alpha is a field of DiTConfig and belongs to "router", too, because its default
    # depends on the router. With by_component, this is CHOOSER_COMPONENT, such as auxiliary_repa.
    belongs_to: str | None = None
    # "resume": a resumed run must have the same value. "branch": a branch, which is a new run that
    # starts with --resume from a checkpoint of another run, must have the same value too.
    # "free": the value may change. "command": the value applies to one command and is not stored.
    # None: the attribute `binds` of a class decides. This is the class that declares the field or,
    # for an option of a component, the class that declares the chooser (`belongs_to`). If the class
    # has no `binds`: "resume".
    binds: Literal["resume", "branch", "free", "command"] | None = None
    # (other option, value, value, ...): this option has an effect only if the other option has one
    # of these values; ("data_path", None) excludes data_path. An option of a component needs the
    # component.
    needs: tuple = ()
    const: Any = None  # value of the flag if it is given without a value
    positional: bool = False  # a positional argument, not a flag
    # Filled in by `options_of` and `component_options`:
    name: str = ""
    hint: Any = None  # the annotation
    default: Any = None
    # The dataclass that has the field. For an option of a component: the dataclass that has the
    # chooser. DiTConfig has the field `router`, so DiTConfig is the owner of router_scale.
    owner: type | None = None
    # For an option of a component: the default in each component that has it, by name.
    defaults: dict[str, Any] = field(default_factory=dict)
    # The last valid value, which avoids checking the same value for every layer of a model.
    checked: Any = field(default_factory=object, init=False)

    def read(self, value: Any, name: str | None = None) -> Any:
        """Converts a value and checks its limits; a string is converted like a word of a command.

        Raises ValueError, "NAME: got VALUE, expected ...", for a wrong type or value.
        """
        if value is self.checked:
            return value
        allowed, found = self.choices or self.table, value
        limits = [(holds, getattr(self, limit)) for limit, (_, holds) in LIMITS.items()]
        with suppress(ValueError, OverflowError):
            found = convert(value, self.hint)
            if all(
                all(bound is None or holds(one, bound) for holds, bound in limits)
                and (not allowed or one in allowed)
                and (not self.suffixes or str(one).lower().endswith(self.suffixes))
                for one in (found if isinstance(found, tuple) else [found])
                if one is not None
            ):
                self.checked = found
                return found
        is_list = isinstance(found, list | tuple)
        got = " ".join(map(str, found)) if is_list else found
        got = got.__fspath__() if hasattr(got, "__fspath__") else got
        raise ValueError(f"{name or self.name}: got {got!r:.200}, expected {self.expected()}")

    def expected(self) -> str:
        """Describes the allowed values, such as "a number above 0 and below 1"."""
        if self.table:
            return component_names(self.table)
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.suffixes:
            return f"a name that ends in {' or '.join(self.suffixes)}"
        limits = [(word, getattr(self, limit)) for limit, (word, _) in LIMITS.items()]
        ranges = " and ".join(f"{word} {bound:,}" for word, bound in limits if bound is not None)
        return f"{describe(self.hint)} {ranges}".strip()

    def default_beside(self, values: Mapping[str, Any]) -> Any:
        """Returns the default. `values` contains the names of the chosen components; the first
        chosen component that has this option determines the default of the option."""
        chosen = values.get(self.belongs_to)
        names = chosen if isinstance(chosen, list | tuple) else [chosen]
        return next((self.defaults[n] for n in names if n in self.defaults), self.default)

    def is_idle(self, values: Mapping[str, Any]) -> bool:
        """Returns whether these values make the option useless (see `needs`)."""
        value = values.get(self.needs[0]) if self.needs else None
        found = value if isinstance(value, list | tuple) else [value]
        return bool(self.needs) and not set(self.needs[1:]) & set(found)


class Component:
    """Base class of the swappable components.

    Users can set fields made by `option`. The code that creates the object passes the other
    annotated fields. Every subclass is a dataclass, initialised in `__post_init__`, which calls the
    `__post_init__` of the base class first.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclass(cls, eq=False, repr=False, kw_only=True)

    def __post_init__(self):
        super().__init__()  # required for components that are torch.nn.Modules
        for name, one in options_of(type(self)).items():
            setattr(self, name, one.read(getattr(self, name)))

    def option_values(self) -> dict[str, Any]:
        """Returns the values of all options by name."""
        return {name: getattr(self, name) for name in options_of(type(self))}


def sides(size: Size) -> tuple[int, int]:
    """Returns the height and width of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@cache
def options_of(kind: type) -> dict[str, Option]:
    """Returns the options of a component or config class, by name. The help shows the default,
    unless the default is None, False or empty."""
    hints, binds, found = typing.get_type_hints(kind), getattr(kind, "binds", None), {}
    for one in fields(kind):
        if rules := one.metadata.get("option"):
            default, help = one.default, rules.help
            if str(default) not in ("None", "False", "()") and default is not MISSING:
                shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
                help += "" if "default" in help else f" (default: {shown})"
            found[one.name] = replace(
                rules, name=one.name, hint=hints[one.name], default=default, owner=kind,
                binds=rules.binds or binds, help=help,
            )  # fmt: skip
    return found


def component_options(chooser: Option) -> dict[str, Option]:
    """Returns the options of all components in a registry; equally named options are merged.

    chooser: the option that chooses one or several components

    If `chooser` can choose several components, every option accepts several values. With
    `by_component`, options are not merged: each component has separate options.
    """
    owners: dict[str, dict[str, Option]] = {}  # option name: component: option
    for component, kind in chooser.table.items():
        prefix = f"{chooser.name}_{component}" if chooser.by_component else chooser.name
        for name, one in options_of(kind).items():
            owners.setdefault(f"{prefix}_{name}", {})[component] = one
    found, several = {}, typing.get_origin(chooser.hint) is tuple and not chooser.by_component
    for key, ones in owners.items():
        texts: dict[str, list[str]] = {}
        for component, one in ones.items():
            texts.setdefault(one.help, []).append(component)
        # A merged option omits the rules that differ between the components. The chosen component
        # later checks the value with all rules.
        rules = (*LIMITS, "choices", "suffixes")
        differing = [rule for rule in rules if len({getattr(o, rule) for o in ones.values()}) > 1]
        found[key] = replace(
            one, name=key, hint=tuple[one.hint, ...] if several else one.hint,
            default=one.default if chooser.by_component else None,
            help="; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items()),
            belongs_to=key.removesuffix(f"_{one.name}"), owner=chooser.owner, group=None,
            needs=(chooser.name, *ones), binds=one.binds or getattr(chooser.owner, "binds", None),
            defaults={k: (one.default,) if several else one.default for k, one in ones.items()},
            **{rule: getattr(Option, rule) for rule in differing},
        )  # fmt: skip
    return found


def component_names(table: Registry) -> str:
    return f"one of {', '.join(table)}, or one of your own with --plugin FILE.py"


def complete_options(
    table: Registry, kind: str, name: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the values of all options of a component, with defaults for missing ones.

    table: registry of the components
    kind: kind of the components, such as "router"
    name: name of the component
    Raises ValueError for an unknown name, an option that the component does not have, and an
    invalid value.
    """
    if name not in table:
        raise ValueError(f"{kind}: got {name!r}, expected {component_names(table)}")
    has = options_of(table[name])
    for unknown in options.keys() - has.keys():
        raise ValueError(
            f"{kind}_{unknown}: unknown option; {kind} {name} has {', '.join(has) or 'none'}"
        )
    return {k: one.read(options.get(k, one.default), f"{kind}_{k}") for k, one in has.items()}


def make_component(
    table: Registry, kind: str, name: str, options: Mapping[str, Any], **facts: Any
) -> Any:
    """Creates a component from its options and further fields; see `complete_options`."""
    return table[name](**facts, **complete_options(table, kind, name, options))


def describe(hint: Any) -> str:
    """Describes the values of a type, such as "2 integers" for `tuple[int, int]`."""
    parts = [part for part in typing.get_args(hint) if part not in (types.NoneType, ...)]
    if typing.get_origin(hint) is tuple and ... not in typing.get_args(hint):
        return f"{len(parts)} {describe(parts[0]).split()[-1]}s"
    return " or ".join(dict.fromkeys(map(describe, parts))) or WORDS.get(hint, "a path")


def convert(value: Any, hint: Any) -> Any:
    """Converts a value to a type; a string is converted if the type is a number, bool or path.

    Raises ValueError if the value does not fit. Numbers must be finite.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    is_list = isinstance(value, list | tuple)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a number of NumPy or PyTorch
    if origin is tuple:
        items = value if is_list else [value]
        kinds = parts[:1] * len(items) if parts[-1] is ... else parts
        return tuple(convert(item, kind) for item, kind in zip(items, kinds, strict=True))
    if parts and origin is not dict:  # a union: the first type that fits
        if value is None and types.NoneType in parts:
            return None
        is_size = hint in (Size, Size | None)
        if is_size and is_list and len(value) in (1, 2) and value[0] == value[-1]:
            value = value[0]  # equal sides
        *others, last = (part for part in parts if part is not types.NoneType)
        for part in others:
            with suppress(ValueError):
                return convert(value, part)
        return convert(value, last)
    kind = origin or hint
    if isinstance(value, str) and kind is bool:
        value = BOOLEANS.get(value.lower())
    elif isinstance(value, str) and kind is not str:
        value = kind(value)
    elif type(value) is int and kind is float:
        value = float(value)
    fits = type(value) is kind if kind in WORDS else isinstance(value, kind)
    if not fits or kind is float and not math.isfinite(value):
        raise ValueError(f"got {value!r:.80}, expected {describe(hint)}")
    return value
