"""Command lines that are read off dataclasses: a field made by `option` or `flag` is a flag.

@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = option(1e-4, help="learning rate", least=0, group="optimisation")
    output: Path = flag(help="folder of the results")

config = parse_config(Config, __doc__)            # from sys.argv
given = parse_flags(flags_of((Config,)), __doc__) # the flags that were given, and no defaults
given = read_values({"lr": "1e-3"}, flags)        # the same for Python and a recipe file

An option that names a part of a table brings the options of all parts there: `router` has
--router, and --router-scale for those routers that have a scale. Words of a flag are joined by - or
by _.
"""

import argparse
import difflib
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from functools import partial
from typing import Any, NoReturn, TypeVar

from parts import Option, component_options, option, options_of
from runtime.errors import UserError

T = TypeVar("T")
Given = dict[str, Any]  # the values of the flags that were given, by field name
Flags = Mapping[str, Option]

flag = option  # a field of a script's config; one without a default has to be given
free = partial(option, binds="free")  # may change when a run is resumed
of_command = partial(option, binds="command")  # obeyed once and not stored


def spelling(name: str) -> str:
    """The flag of a field of that name, such as --global-batch-size."""
    return "--" + name.replace("_", "-")


def flags_of(kinds: Sequence[type], left_out: Sequence[str] = ()) -> dict[str, Option]:
    """The flags of dataclasses in their order; those of parts follow the flag that chooses one.

    left_out: fields that are no flags
    """
    flags: dict[str, Option] = {}
    for kind in kinds:
        for name, one in options_of(kind).items():
            if name not in left_out:
                flags[name] = one
            if one.table:
                flags |= component_options(one)
    return flags


def parse_config(
    kind: type[T], description: str | None, arguments: Sequence[str] | None = None
) -> T:
    """Parses a command line, sys.argv's by default, to a config.

    UserError, one line, for a wrong flag.
    """
    return kind(**parse_flags(flags_of((kind,)), description, arguments))


def parse_flags(
    flags: Flags, description: str | None, arguments: Sequence[str] | None = None
) -> Given:
    """Parses a command line to the flags that it gives; see `parse_config` and `read_values`."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given stays away
        allow_abbrev=False,
    )
    groups, group = {}, parser
    for one in flags.values():
        if title := one.group:
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        allowed = ",".join(map(str, one.choices or one.table or ()))
        rules: dict[str, Any] = {"metavar": one.metavar or (f"{{{allowed}}}" if allowed else None)}
        rules["help"] = one.full_help().replace("%", "%%")
        parts, is_tuple = typing.get_args(one.hint), typing.get_origin(one.hint) is tuple
        if is_tuple:  # argparse counts words; `Option.read` converts them
            rules["nargs"] = "*" if bool in parts else "+" if parts[-1] is ... else len(parts)
        elif int in parts and tuple in map(typing.get_origin, parts):  # one number, or a pair
            rules["nargs"] = "+"
        elif bool in (one.hint, *parts) or one.const is not None:
            rules |= {"nargs": "?", "const": True if one.const is None else one.const}
        if not one.positional:
            rules |= {"dest": one.name, "required": one.default is MISSING}
        group.add_argument(one.name if one.positional else spelling(one.name), **rules)
    words = sys.argv[1:] if arguments is None else arguments
    return read_values(parser.values_of(words), flags)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line, without the usage."""

    def values_of(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The words of the flags that are there; words of a flag's name may be joined by _."""
        words = []
        for word in arguments:
            name, *value = word.split("=", 1)
            is_flag = name.startswith("--")
            words.append("=".join([name.replace("_", "-"), *value]) if is_flag else word)
        values, unknown = self.parse_known_args(words)
        named = [word.split("=", 1)[0][2:] for word in unknown if word.startswith("--")]
        if unknown and not named:
            self.error(f"got {' '.join(unknown)!r:.200}, expected flags, each with its values")
        given = {k: [True] if v == [] else v for k, v in vars(values).items()}  # a bare flag
        return dict.fromkeys(named) | given

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")


def read_values(values: Mapping[str, Any], flags: Flags) -> Given:
    """The typed values of flags by field name, of words or of the values of YAML or Python.

    UserError for an unknown name or a wrong value.
    """
    given: Given = {}
    with naming_flags(flags):
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in flags:
                raise UserError(f"{spelling(key)}: unknown flag{suggestion(name, flags)}")
            given[name] = flags[name].read(value)
        for name in given.keys() & {name for name, one in flags.items() if one.same_as}:
            other, meanings = flags[name].same_as
            meaning = meanings[given.pop(name)]
            if given.setdefault(other, meaning) != meaning:
                raise ValueError(f"{other}: got {given[other]}, but --{name} stands for {meaning}")
    return given


def layered(base: Given, top: Given, flags: Flags) -> Given:
    """Both, where `top` wins. What it replaces takes along its options, and what excludes it."""
    gone = {one.instead_of for name, one in flags.items() if name in top}
    for name in base:
        chooser = flags[name].belongs_to
        is_replaced = chooser in top and top[chooser] != base.get(chooser, flags[chooser].default)
        if is_replaced or flags[name].instead_of in top:
            gone.add(name)
    return {name: value for name, value in base.items() if name not in gone} | top


def suggestion(name: str, flags: Flags) -> str:
    """The flags whose words contain those of a name, or else the most similar one."""
    words = set(name.split("_"))
    close = [known for known, one in flags.items() if name in one.formerly]
    close = close or [known for known in flags if words <= set(known.split("_"))][:3]
    close = close or difflib.get_close_matches(name, flags, 1)
    return f"; did you mean {' or '.join(map(spelling, close))}?" if close else ""


@contextmanager
def naming_flags(flags: Flags) -> Iterator[None]:
    """Turns a ValueError, "NAME: ...", into a UserError that spells the name as a flag."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise UserError(f"{spelling(name) if name in flags else name}{colon}{rest}") from None
