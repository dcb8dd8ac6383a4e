"""Parts: what a researcher swaps (router, objective, optimizer, EMA), and the options of each.

    class MyRouter(Router):                       # `Router` is a `Part`
        temperature: float = option(1.0, help="of the softmax", above=0)

    ROUTERS["mine"] = MyRouter                    # a part is a class in a table
    router = make_part(ROUTERS, "router", "mine", {"temperature": 0.5}, hidden_size=64, ...)

An option stands once, as a typed field with default, help and range. Command lines, settings, the
record in a checkpoint and the line for a wrong value follow from that. Nothing here knows of
command lines or files.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

Table = dict[str, type]
Binds = Literal["resume", "branch", "free", "command"]


def option(
    default: Any,
    *,
    help: str,
    choices: tuple | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    table: Table | None = None,
    binds: Binds | None = None,
    group: str | None = None,
) -> Any:
    """A dataclass field that a user can set.

    choices, least (>=), above (>), most (<=), below (<): what is allowed, of each number of a tuple
    table: of the parts that the value names; further options are those of the chosen part
    binds: what has to have the value of the run that it goes on with: a resumed run ("resume", the
        default), a branch from one of its checkpoints too ("branch"), or neither ("free");
        "command" is for a flag that is obeyed once and not stored. The options of a part are bound
        as the class of the field that chooses the part says in its attribute `binds`.
    group: title in the help, of this option and of those after it
    """
    metadata = dict(
        help=help, choices=choices, least=least, above=above, most=most, below=below, table=table,
        binds=binds, group=group,
    )  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


class Part:
    """A class whose annotated fields are its options, and facts that its maker gives it.

    Every subclass is a dataclass: it begins in `__post_init__`, which calls that of its base first.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(cls, eq=False, repr=False, kw_only=True)

    def __post_init__(self):
        super().__init__()  # of torch.nn.Module, where a part is one
        check_options(self)

    def option_values(self) -> dict[str, Any]:
        """Every option with its value."""
        return {name: getattr(self, name) for name in options_of(type(self))}


def options_of(kind: type) -> dict[str, dataclasses.Field]:
    """The fields of a part or a config that a user can set, by name."""
    return {f.name: f for f in dataclasses.fields(kind) if "help" in f.metadata}


def complete_options(
    table: Table, kind: str, name: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All options of the part of that name, with defaults for those that are not given.

    kind: what the table holds, such as "router"
    ValueError for a name that is not in the table, an option that this part does not have, or a
    value out of its range.
    """
    if name not in table:
        raise ValueError(f"{kind}: got {name!r}, expected one of {', '.join(table)}")
    has, hints = options_of(table[name]), typing.get_type_hints(table[name])
    for unknown in options.keys() - has.keys():
        known = ", ".join(f"{kind}_{option}" for option in has) or "none"
        raise ValueError(f"{kind}_{unknown}: given with {kind} {name}, expected {known}")
    complete = {option: options.get(option, field.default) for option, field in has.items()}
    for option, value in complete.items():
        check_value(f"{kind}_{option}", value, hints[option], has[option].metadata)
    return complete


def make_part(table: Table, kind: str, name: str, options: Mapping[str, Any], **facts: Any) -> Any:
    """Makes the part of that name from its options and from facts; see `complete_options`."""
    return table[name](**facts, **complete_options(table, kind, name, options))


def check_options(instance: object) -> None:
    """Raises ValueError for a value that is not of its field's type, or out of its range."""
    hints = typing.get_type_hints(type(instance))
    for name, field in options_of(type(instance)).items():
        check_value(name, getattr(instance, name), hints[name], field.metadata)


def check_value(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError: "NAME: got VALUE, expected ..."."""
    is_right = is_of_type(value, hint)
    if is_right and value is not None:
        numbers = value if isinstance(value, list | tuple) else [value]
        is_right = all(is_within(number, metadata) for number in numbers)
    if not is_right:
        raise ValueError(f"{name}: got {value!r:.80}, expected {expectation(hint, metadata)}")


def choices_of(metadata: Mapping[str, Any]) -> tuple | None:
    """What a value has to be one of: the parts that are in a table now, or the choices."""
    return metadata["choices"] if metadata["table"] is None else tuple(metadata["table"])


def is_within(value: Any, metadata: Mapping[str, Any]) -> bool:
    choices = choices_of(metadata)
    least, above, most, below = (metadata[name] for name in ("least", "above", "most", "below"))
    return (
        (choices is None or value in choices)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )


def expectation(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What a value should be, in words: "a number above 0 and below 1"."""
    if (choices := choices_of(metadata)) is not None:
        return f"one of {', '.join(map(str, choices))}"
    words = {float: "a number", int: "an integer", bool: "True or False", str: "text"}
    kinds = value_kinds(hint)
    text = " or ".join(words.get(kind, "nothing") for kind in kinds)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        text = f"{'' if parts[-1] is ... else f'{len(parts)} times '}{text}"
    limits = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    ranges = [f"{word} {metadata[name]:,}" for name, word in limits.items()
              if metadata[name] is not None]  # fmt: skip
    return " ".join(filter(None, (text, " and ".join(ranges))))


def value_kinds(hint: Any) -> tuple[Any, ...]:
    """The types that one word or number of a value can have: (float,) of `tuple[float, float]`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) in (tuple, typing.Union):
        parts = [part for part in typing.get_args(hint) if part not in (types.NoneType, ...)]
        return tuple(dict.fromkeys(kind for part in parts for kind in value_kinds(part)))
    return (hint,)


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
    return type(value) is (typing.get_origin(hint) or hint)
