"""Command lines that are read off a frozen dataclass: each field says its flag, default and help.

@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = flag(1e-4, help="learning rate", group="optimisation")
    rf: bool = flag(False, help="rectified flow instead of Gaussian diffusion")

config = parse_config(Config, __doc__)    # from sys.argv
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from runtime.errors import USER_ERROR, printable

T = TypeVar("T")


def flag(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    group: str | None = None,
    spelling: str | None = None,
    may_change: bool = False,
    **argument: Any,
) -> Any:
    """A dataclass field that is a flag; one without a default has to be given.

    group: title in the help, of this flag and of those after it
    spelling: "--num_experts", or several with a space between them; None: "--" and the field's
        name with dashes; the name itself for an argument without a flag
    may_change: whether a run that goes on may have another value
    argument: what else `ArgumentParser.add_argument` takes, such as choices, nargs or type
    """
    metadata = dict(help=help, group=group, spelling=spelling, may_change=may_change)
    metadata["argument"] = argument
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


changeable = partial(flag, may_change=True)  # a flag that does not decide what a step computes


def spellings_of(field: dataclasses.Field) -> list[str]:
    """The ways to write a field on the command line, such as ["--global-batch-size"]."""
    return (field.metadata["spelling"] or "--" + field.name.replace("_", "-")).split()


def spelling(config: Any, name: str) -> str:
    """How a config's field of that name is written, for messages; any other name as it is."""
    return next((spellings_of(f)[0] for f in dataclasses.fields(config) if f.name == name), name)


def parse_config(
    config_type: type[T], description: str | None, arguments: Sequence[str] | None = None
) -> T:
    """Parses a command line, sys.argv's by default, to a config.

    A wrong flag ends the process with one line on standard error and exit code 2.
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given keeps the field's default
        allow_abbrev=False,
    )
    add_flags(parser, config_type)
    given = vars(parser.parse_args(arguments))
    return config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def add_flags(parser: argparse.ArgumentParser, config_type: type) -> None:
    """Adds a flag for each field of a dataclass, in its order."""
    group, groups, hints = parser, {}, typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if title := field.metadata["group"]:
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            group = groups[title]
        argument = dict(field.metadata["argument"])
        kind = value_type(hints[field.name])
        if kind is bool:
            argument = {"type": parse_bool, "nargs": "?", "const": True, **argument}
        help, default = field.metadata["help"], field.default
        is_plain = default is dataclasses.MISSING or str(default) in ("None", "False", "()")
        if not is_plain and "default" not in help:
            help = f"{help} (default: {default})"
        names = spellings_of(field)
        if names[0].startswith("-"):  # else it is an argument without a flag, named as its field
            argument |= {"dest": field.name, "required": default is dataclasses.MISSING}
        group.add_argument(*names, **{"type": kind, "help": help, **argument})


def value_type(hint: Any) -> Callable[[str], Any]:
    """What makes a value of one word: int of `int`, `int | None` and `tuple[int, ...]`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is tuple:
        return value_type(typing.get_args(hint)[0])
    return hint


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        print(f"error: {printable(message)} (--help lists the flags)", file=sys.stderr)
        sys.exit(USER_ERROR)


def parse_bool(text: str) -> bool:
    """Reads `--flag True` and `--flag False`, as the published commands write them."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return values[text.lower()]


def natural(text: str, least: int = 0) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {least}")
    return int(text)


positive_int = partial(natural, least=1)


def real(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of at least 0")
    return value


def positive_real(text: str) -> float:
    value = real(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def file_name(*suffixes: str) -> Callable[[str], Path]:
    """What reads a file name that ends in one of the suffixes, such as ".png"."""

    def parse(text: str) -> Path:
        if not text.lower().endswith(suffixes):
            expected = f"a name that ends in {' or '.join(suffixes)}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return Path(text)

    return parse
