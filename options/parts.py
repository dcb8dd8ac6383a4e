"""Components, such as routers and objectives, which can be swapped, and their options.

    class MyRouter(Router):                       # `Router` is a `Component`
        temperature: float = option(1.0, help="temperature of the softmax", gt=0)

    ROUTERS["mine"] = MyRouter                    # a registry: {name: class}
    router = ROUTERS["mine"](temperature=0.5, hidden_size=64, ...)

An option is declared once, as a typed field with default, help and range. Flag, config.yaml,
metadata of checkpoints and error messages follow from the field.
"""

import math
import operator
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal

Registry = dict[str, type]
Size = int | tuple[int, int]  # side of a square, or height and width
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
WORDS = {float: "a number", int: "an integer", bool: "True or False", str: "text"}
MAX_VALUES = 10_000  # of a list, which a file may forge
LIMITS = {
    "ge": ("at least", operator.ge), "gt": ("above", operator.gt),
    "le": ("at most", operator.le), "lt": ("below", operator.lt),
}  # fmt: skip


def option(default: Any = MISSING, **rules: Any) -> Any:
    """Declares a dataclass field that users can set; for the rules see `Option`."""
    return field(default=default, metadata={"option": Option(**rules)}, kw_only=True)


@dataclass(frozen=True)
class Part:
    """A chosen component: its name, and its options (in a config all, elsewhere those given)."""

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False, kw_only=True)
class Option:
    """Properties of a field that users can set."""

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
    # The components that the field can name; the field is then a `Part` or a tuple of them. Their
    # options are flags too: router_scale, or with by_component auxiliary_repa_weight.
    table: Registry | None = None
    by_component: bool = False  # several components, each at most once
    is_bare: bool = False  # an option of a component whose flag is its name alone
    # What a resumed run may change, by default what the class says: "state" shapes the weights or
    # the optimizer's state and never changes. "result" decides the result and changes if a flag
    # beside --resume says so. "how" changes freely. "command" holds for one command and is not
    # stored.
    change: Literal["state", "result", "how", "command"] | None = None
    const: Any = None  # value of the flag if it is given without a value
    positional: bool = False  # a positional argument, not a flag
    # Filled in by `options_of`:
    name: str = ""
    hint: Any = None  # the annotation
    default: Any = None
    is_list: bool = False  # whether the field names several components
    repeats: bool = False  # and one of them several times, with other options

    def read(self, value: Any, name: str | None = None) -> Any:
        """Converts a value and checks its limits; a string is converted like a word of a command.

        Raises ValueError, "NAME: got VALUE, expected ...", for a wrong type or value.
        """
        if isinstance(value, list | tuple) and len(value) > MAX_VALUES:
            got = f"got {len(value):,} values"
            raise ValueError(f"{name or self.name}: {got}, expected at most {MAX_VALUES:,}")
        if self.table is not None:
            return self.read_parts(value, name or self.name)
        allowed, found = self.choices, value
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
                return found
        is_list = isinstance(found, list | tuple)
        got = " ".join(map(str, found)) if is_list else found
        got = got.__fspath__() if hasattr(got, "__fspath__") else got
        raise ValueError(f"{name or self.name}: got {got!r:.200}, expected {self.expected()}")

    def expected(self) -> str:
        """Describes the allowed values, such as "a number above 0 and below 1"."""
        if self.table:
            return f"one of {', '.join(self.table)}, or one of your own with --plugin FILE.py"
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.suffixes:
            return f"a name that ends in {' or '.join(self.suffixes)}"
        limits = [(word, getattr(self, limit)) for limit, (word, _) in LIMITS.items()]
        ranges = " and ".join(f"{word} {bound:,}" for word, bound in limits if bound is not None)
        return f"{words_for(self.hint)} {ranges}".strip()

    def read_parts(self, value: Any, name: str) -> Part | tuple[Part, ...]:
        """Reads "sigmoid", {"sigmoid": {"scale": 2.5}}, a `Part`, or for `is_list` several of them.

        Only the given options are in the result; `complete` adds the others.
        """
        pairs: list[tuple[Any, Any]] = []
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Part):
                pairs.append((item.name, item.options))
            else:
                pairs += item.items() if isinstance(item, Mapping) else [(item, {})]
        found = []
        for kind, given in pairs:
            if not isinstance(kind, str) or kind not in self.table:
                raise ValueError(f"{name}: got {kind!r:.200}, expected {self.expected()}")
            if not isinstance(given or {}, Mapping):
                raise ValueError(f"{name}: got {given!r:.80} for {kind}, expected its options")
            has, options = options_of(self.table[kind]), {}
            prefix = f"{name}_{kind}".replace("-", "_") if self.by_component else name
            for key, one in (given or {}).items():
                key = str(key).replace("-", "_")
                if key not in has:
                    known = ", ".join(has) or "none"
                    raise ValueError(f"{prefix}_{key}: unknown option; {name} {kind} has {known}")
                options[key] = has[key].read(one, key if has[key].is_bare else f"{prefix}_{key}")
            found.append(Part(kind, options))
        kinds = [one.name if self.by_component else one for one in found]
        # A layer, which has tuples, repeats a name: the options of the components stand apart.
        may_repeat = self.repeats and isinstance(value, tuple)
        if not may_repeat and any(one in kinds[:number] for number, one in enumerate(kinds)):
            raise ValueError(f"{name}: got {', '.join(map(str, found))}, expected different ones")
        if self.by_component:  # their order has no meaning
            found.sort(key=lambda part: [*self.table].index(part.name))
        if not self.is_list and len(found) != 1:
            raise ValueError(f"{name}: got {len(found)} components, expected one")
        return tuple(found) if self.is_list else found[0]

    def complete(self, part: Part) -> Part:
        """Returns a component with all options, with defaults for missing ones."""
        has = options_of(self.table[part.name])
        return replace(part, options={k: part.options.get(k, has[k].default) for k in has})


class Component:
    """Base class of the swappable components.

    Users set fields made by `option`; other fields are constructor arguments. Every subclass is a
    dataclass, initialised in `__post_init__`, which calls that of the base class first.
    """

    change: ClassVar = "result"  # see `Option.change`

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclass(cls, eq=False, repr=False, kw_only=True)

    def __post_init__(self):
        super().__init__()  # required for components that are torch.nn.Modules
        for name, one in options_of(type(self)).items():
            setattr(self, name, one.read(getattr(self, name)))


def sides(size: Size) -> tuple[int, int]:
    """Returns the height and width of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@cache
def options_of(kind: type) -> dict[str, Option]:
    """Returns the options of a component or config class, by name. The help shows the default,
    unless the default is None, False or empty."""
    hints, found = typing.get_type_hints(kind), {}
    for one in fields(kind):
        if rules := one.metadata.get("option"):
            default, help = one.default, rules.help
            if str(default) not in ("None", "False", "()") and default is not MISSING:
                shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
                help += "" if "default" in help else f" (default: {shown})"
            hint = hints[one.name]
            is_list = rules.table is not None and typing.get_origin(hint) is tuple
            found[one.name] = replace(
                rules, name=one.name, hint=hint, default=default, help=help,
                change=rules.change or getattr(kind, "change", "how"),
                is_list=is_list, repeats=is_list and not rules.by_component,
            )  # fmt: skip
    return found


def words_for(hint: Any) -> str:
    """Describes the values of a type, such as "2 integers" for `tuple[int, int]`."""
    parts = [part for part in typing.get_args(hint) if part not in (types.NoneType, ...)]
    if typing.get_origin(hint) is tuple and ... not in typing.get_args(hint):
        return f"{len(parts)} {words_for(parts[0]).split()[-1]}s"
    return " or ".join(dict.fromkeys(map(words_for, parts))) or WORDS.get(hint, "a path")


def convert(value: Any, hint: Any) -> Any:
    """Converts a value to a type; a string is converted if the type is a number, bool or path.

    Numbers must be finite.
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
        raise ValueError(f"got {value!r:.80}, expected {words_for(hint)}")
    return value
