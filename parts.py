"""Parts: classes that a researcher swaps (router, objective, optimizer, EMA), and their options.

    class MyRouter(Router):                       # `Router` is a `Part`
        temperature: float = option(1.0, help="of the softmax", above=0)

    ROUTERS["mine"] = MyRouter                    # a part is a class in a table
    router = make_part(ROUTERS, "router", "mine", {"temperature": 0.5}, hidden_size=64, ...)

An option is declared once, as a typed field with default, help and range. Command lines, run
folders, the metadata of a checkpoint and the error for a wrong value follow from that. This module
knows nothing of command lines or files.
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

Table = dict[str, type]
Size = int | tuple[int, int]  # of a square, or height and width
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
LIMITS = {
    "least": ("at least", operator.ge), "above": ("above", operator.gt),
    "most": ("at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip


def option(default: Any = MISSING, **rules: Any) -> Any:
    """A dataclass field that a user can set; for the rules see `Option`."""
    return field(default=default, metadata={"option": Option(**rules)}, kw_only=True)


@dataclass(eq=False, kw_only=True)
class Option:
    """One thing that a user can set: a field, or what several parts have under one name."""

    help: str
    group: str | None = None  # title in the help, of this option and of those after it
    metavar: str | tuple[str, ...] | None = None  # what a value is called there
    # The allowed values, of a tuple each of its values: >=, >, <=, <, one of these, an ending.
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple = ()
    suffixes: tuple[str, ...] = ()
    # Parts that the value names: their options are options too, such as router_scale. With by_part
    # they have the name of their part in them, such as auxiliary_repa_weight.
    table: Table | None = None
    by_part: bool = False
    belongs_to: str | None = None  # the option that chooses the part which this one is about
    # Whether a resumed run must have the same value, a branch from a checkpoint too, or neither;
    # "command": obeyed once and not stored. None: as `binds` of the class says, or "resume".
    binds: Literal["resume", "branch", "free", "command"] | None = None
    instead_of: str | None = None  # an option that cannot be combined with this one
    needs: tuple | None = None  # an option and its values without which this one has no effect
    same_as: tuple[str, dict] | None = None  # this spells another option: which, and its values
    formerly: tuple[str, ...] = ()  # names that it had
    const: Any = None  # the value of a flag without one
    positional: bool = False  # an argument without a flag
    # Filled in by `options_of` and `part_options`:
    name: str = ""
    hint: Any = None  # the annotation
    default: Any = None
    owner: type | None = (
        None  # the dataclass that has the field, or the field that chooses the part
    )
    defaults: dict[str, Any] = field(default_factory=dict)  # of an option of parts, by part
    # The last value that was right, which the layers of a model share.
    checked: Any = field(default_factory=object, init=False)

    def read(self, value: Any) -> Any:
        """Converts words of a command line, or values of YAML or Python; ValueError as `check`."""
        is_list = isinstance(value, list | tuple)
        kinds = value_kinds(self.hint, in_tuple=is_list)
        values = []
        for word in value if is_list else [value]:
            for kind in kinds if isinstance(word, str) else ():
                with suppress(ValueError, KeyError):
                    word = BOOLEANS[word.lower()] if kind is bool else kind(word)
                    break
            values.append(float(word) if type(word) is int and kinds == (float,) else word)
        is_one = len(values) == 1 and int in typing.get_args(self.hint)  # a `Size` of one number
        is_tuple = is_list and not is_one or typing.get_origin(self.hint) is tuple
        self.check(found := tuple(values) if is_tuple else values[0])
        return found

    def check(self, value: Any, name: str | None = None) -> None:
        """Raises ValueError, "NAME: got VALUE, expected ...", for a wrong type or range."""
        if value is self.checked:
            return
        fits, allowed = is_of_type(value, self.hint), self.choices or self.table
        for one in value if isinstance(value, list | tuple) else [value]:
            if fits and one is not None:
                bounds = ((holds, getattr(self, name)) for name, (_, holds) in LIMITS.items())
                fits = all(bound is None or holds(one, bound) for holds, bound in bounds)
                fits = fits and (not allowed or one in allowed)
                fits = fits and (not self.suffixes or str(one).lower().endswith(self.suffixes))
        if not fits:
            raise ValueError(f"{name or self.name}: got {value!r:.200}, expected {self.expected()}")
        self.checked = value

    def expected(self) -> str:
        """The allowed values in words: "a number above 0 and below 1"."""
        if allowed := self.choices or self.table:
            return f"one of {', '.join(map(str, allowed))}"
        if self.suffixes:
            return f"a name that ends in {' or '.join(self.suffixes)}"
        words = {float: "a number", int: "an integer", bool: "True or False", str: "text"}
        text = " or ".join(words.get(kind, "a path") for kind in value_kinds(self.hint))
        length = len(typing.get_args(self.hint)) if typing.get_origin(self.hint) is tuple else 0
        if length and ... not in typing.get_args(self.hint):
            text = f"{length} times {text}"
        limits = [(word, getattr(self, limit)) for limit, (word, _) in LIMITS.items()]
        ranges = " and ".join(f"{word} {bound:,}" for word, bound in limits if bound is not None)
        return f"{text} {ranges}".strip()

    def full_help(self) -> str:
        """The help with the default, where that says something."""
        default = self.default
        is_plain = default is MISSING or str(default) in ("None", "False", "()")
        if is_plain or "default" in self.help:
            return self.help
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        return f"{self.help} (default: {shown})"

    def default_beside(self, values: Mapping[str, Any]) -> Any:
        """The default where nothing is said: of a part's option that of the part that is chosen."""
        if self.by_part and self.defaults:  # an option of one part
            return next(iter(self.defaults.values()))
        chosen = values.get(self.belongs_to)
        if isinstance(chosen, list | tuple):
            found = [self.defaults[part] for part in chosen if part in self.defaults]
            return list(dict.fromkeys(found))
        return self.defaults.get(chosen, self.default)


class Part:
    """Base class of what can be swapped. Fields made by `option` can be set by the user; other
    annotated fields are passed in by the code that makes the part.

    Every subclass is a dataclass: it begins in `__post_init__`, which calls that of its base first.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclass(cls, eq=False, repr=False, kw_only=True)

    def __post_init__(self):
        super().__init__()  # of torch.nn.Module, where a part is one
        check_options(self)

    def option_values(self) -> dict[str, Any]:
        """Every option with its value."""
        return {name: getattr(self, name) for name in options_of(type(self))}


def sides(size: Size) -> tuple[int, int]:
    """Height and width of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def as_size(sides: Any) -> Any:
    """Height and width as a `Size`: one number where they are equal; None and a number stay."""
    if sides is None or isinstance(sides, int):
        return sides
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


@cache
def options_of(kind: type) -> dict[str, Option]:
    """The fields of a part or a config that a user can set, by name."""
    hints, binds, found = typing.get_type_hints(kind), getattr(kind, "binds", None), {}
    for one in fields(kind):
        if rules := one.metadata.get("option"):
            facts = dict(name=one.name, hint=hints[one.name], default=one.default, owner=kind)
            found[one.name] = replace(rules, **facts, binds=rules.binds or binds)
    return found


def part_options(chooser: Option) -> dict[str, Option]:
    """The options of all parts of a table; one stands for those of one name.

    Where several such parts can be chosen, it has as many values, or its part is in its name.
    """
    owners: dict[str, dict[str, Option]] = {}  # name: part: option
    for part, part_class in chooser.table.items():
        for name, one in options_of(part_class).items():
            key = f"{chooser.name}_{part}_{name}" if chooser.by_part else f"{chooser.name}_{name}"
            owners.setdefault(key, {})[part] = one
    found, several = {}, typing.get_origin(chooser.hint) is tuple and not chooser.by_part
    for key, ones in owners.items():
        texts: dict[str, list[str]] = {}
        for part, one in ones.items():
            texts.setdefault(one.full_help(), []).append(part)
        found[key] = replace(
            one, name=key, hint=tuple[one.hint, ...] if several else one.hint, default=None,
            help="; ".join(f"{', '.join(parts)}: {text}" for text, parts in texts.items()),
            belongs_to=chooser.name, owner=chooser.owner, group=None, by_part=chooser.by_part,
            binds=one.binds or getattr(chooser.owner, "binds", None),
            defaults={part: own.default for part, own in ones.items()},
            **({} if len(ones) == 1 else dict.fromkeys(LIMITS)),
        )  # fmt: skip
    return found


def complete_options(
    table: Table, kind: str, name: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All options of the part of that name, with defaults for those that are not given.

    kind: what the table holds, such as "router"
    Raises ValueError for a name that is not in the table, an option that this part does not have,
    or a value out of its range.
    """
    if name not in table:
        raise ValueError(f"{kind}: got {name!r}, expected one of {', '.join(table)}")
    has = options_of(table[name])
    for unknown in options.keys() - has.keys():
        owners = [other for other, part in table.items() if unknown in options_of(part)]
        of = f"is an option of {kind} {', '.join(owners)}" if owners else "no part has it"
        raise ValueError(f"{kind}_{unknown}: {of}; {kind} {name} has {', '.join(has) or 'none'}")
    complete = {key: options.get(key, one.default) for key, one in has.items()}
    for key, value in complete.items():
        has[key].check(value, f"{kind}_{key}")
    return complete


def make_part(table: Table, kind: str, name: str, options: Mapping[str, Any], **facts: Any) -> Any:
    """Makes the part of that name from its options and from facts; see `complete_options`."""
    return table[name](**facts, **complete_options(table, kind, name, options))


def make_parts(table: Table, kind: str, names: tuple, options: Mapping[str, Any]) -> tuple:
    """Makes the parts of these names, whose options are PART_OPTION; see by_part of `Option`."""
    own = {
        part: {
            k.removeprefix(f"{part}_"): v for k, v in options.items() if k.startswith(f"{part}_")
        }
        for part in names
    }
    if unknown := options.keys() - {f"{part}_{key}" for part in names for key in own[part]}:
        raise ValueError(f"{kind}_{min(unknown)}: has no effect without {kind} of that name")
    return tuple(make_part(table, f"{kind}_{part}", part, own[part]) for part in names)


def check_options(instance: object) -> None:
    """Raises ValueError for a value that is not of its field's type, or out of its range."""
    for name, one in options_of(type(instance)).items():
        one.check(getattr(instance, name))


def value_kinds(hint: Any, in_tuple: bool = False) -> tuple[type, ...]:
    """The types that one value can have: (float,) of `tuple[float, float]`.

    in_tuple: only those within a tuple, such as int of `str | tuple[int, ...]`
    """
    if not typing.get_args(hint):
        return () if in_tuple else (hint,)
    is_tuple = typing.get_origin(hint) is tuple
    parts = [part for part in typing.get_args(hint) if part not in (types.NoneType, ...)]
    kinds = (kind for part in parts for kind in value_kinds(part, in_tuple and not is_tuple))
    return tuple(dict.fromkeys(kinds))


def is_of_type(value: object, hint: Any) -> bool:
    """Whether a value fits an annotation; numbers are finite, and a list will do for a tuple."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or parts[-1] is not ... and len(value) != len(parts):
            return False
        return all(is_of_type(number, parts[0]) for number in value)
    if parts and typing.get_origin(hint) is not dict:
        return any(is_of_type(value, part) for part in parts)
    if hint in (int, float):
        return type(value) in {int, hint} and math.isfinite(value)
    kind = typing.get_origin(hint) or hint
    return type(value) is kind or (kind not in (bool, str) and isinstance(value, kind))
