"""Command lines that are read off dataclasses: what `parts.option` or `flag` made is a flag.

@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = option(1e-4, help="learning rate", least=0, group="optimisation")
    output: Path = flag(help="folder of the results")

config = parse_config(Config, __doc__)            # from sys.argv
given = parse_flags(flags_of((Config,)), __doc__) # what the command said, and nothing else

An option that names a part of a table brings the options of all parts there: `router` has
--router, and --router-scale for those routers that have a scale. Words of a flag are joined by - or
by _.
"""

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from parts import choices_of, expectation, is_of_type, is_within, option, options_of, value_kinds
from runtime.errors import UserError, reported_as

T = TypeVar("T")
Given = dict[str, Any]  # what flags said, by the name of the field
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def flag(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    metavar: str | tuple[str, ...] | None = None,
    const: Any = None,
    suffixes: tuple[str, ...] = (),
    positional: bool = False,
    same_as: tuple[str, dict] | None = None,
    **rules: Any,
) -> Any:
    """An `option` of a script; one without a default has to be given.

    metavar: what its value is called in the help
    const: its value if it is given without one
    suffixes: of the file that it names
    positional: an argument without a flag
    same_as: the flag that this one is another spelling of, and what its values are there
    """
    field = option(default, help=help, **rules)
    more = dict(
        metavar=metavar, const=const, suffixes=suffixes, positional=positional, same_as=same_as
    )
    return dataclasses.field(default=default, metadata={**field.metadata, **more}, kw_only=True)


free = partial(flag, binds="free")  # may be another one when a run is resumed
of_command = partial(flag, binds="command")  # obeyed once and not stored


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag: the field that it sets, or the same option of several parts."""

    name: str
    hint: Any
    metadata: Mapping[str, Any]
    default: Any
    help: str


def spelling(name: str) -> str:
    """How a field of that name is written, such as --global-batch-size."""
    return "--" + name.replace("_", "-")


def flags_of(kinds: Sequence[type], left_out: Sequence[str] = ()) -> dict[str, Flag]:
    """The flags of dataclasses in their order; those of parts follow the flag that chooses one.

    left_out: fields that are no flags
    """
    flags: dict[str, Flag] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for name, field in options_of(kind).items():
            if name not in left_out:
                text = with_default(field.metadata["help"], field.default)
                flags[name] = Flag(name, hints[name], field.metadata, field.default, text)
            if table := field.metadata["table"]:
                several = typing.get_origin(hints[name]) is tuple
                flags |= part_flags(name, table, several)
    return flags


def part_flags(kind: str, table: dict[str, type], several: bool) -> dict[str, Flag]:
    """The flags of a table's parts; one serves all parts that have an option of that name.

    several: whether there can be several such parts, for which a flag takes as many values
    """
    flags: dict[str, Flag] = {}
    for part, part_class in table.items():
        hints = typing.get_type_hints(part_class)
        for name, field in options_of(part_class).items():
            key = f"{kind}_{name}"
            text = f"{part}: {with_default(field.metadata['help'], field.default)}"
            metadata = {**field.metadata, "group": None}
            if (other := flags.get(key)) is not None:
                same = other.help.partition(": ")[2] == text.partition(": ")[2]
                text = f"{part}, {other.help}" if same else f"{other.help}; {text}"
                metadata |= {"least": None, "above": None, "most": None, "below": None}
            hint = tuple[hints[name], ...] if several else hints[name]
            flags[key] = Flag(key, hint, metadata, None, text)
    return flags


def with_default(help: str, default: Any) -> str:
    is_plain = default is dataclasses.MISSING or str(default) in ("None", "False", "()")
    if is_plain or "default" in help:
        return help
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{help} (default: {shown})"


def parse_config(
    kind: type[T], description: str | None, arguments: Sequence[str] | None = None
) -> T:
    """Parses a command line, sys.argv's by default, to a config.

    UserError, one line, for a wrong flag.
    """
    return kind(**parse_flags(flags_of((kind,)), description, arguments))


def parse_flags(
    flags: Mapping[str, Flag],
    description: str | None,
    arguments: Sequence[str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Given:
    """Parses a command line to what it says, by the fields' names; see `parse_config`.

    Where there is a flag --config, the recipe file that it names comes before the command.

    renamed: what became of flags of earlier versions
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given stays away
        allow_abbrev=False,
    )
    parser.renamed = renamed or {}
    parser.same_as = {n: same for n, one in flags.items() if (same := one.metadata.get("same_as"))}
    groups: dict[str, Any] = {}
    group: Any = parser
    for one in flags.values():
        if title := one.metadata["group"]:
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            group = groups[title]
        add_flag(group, one)
    given = parser.parse(sys.argv[1:] if arguments is None else arguments)
    if "config" in flags and given.get("config"):
        given = layered(read_recipe(parser, given["config"], flags), given, flags)
    return given


def layered(base: Given, top: Given, flags: Mapping[str, Flag]) -> Given:
    """Both, where `top` wins. Options of a part that it replaces by another one are dropped."""
    replaced = tuple(
        f"{name}_"
        for name, flag in flags.items()
        if flag.metadata["table"] and name in top and top[name] != base.get(name, flag.default)
    )
    return {**{k: v for k, v in base.items() if not k.startswith(replaced)}, **top}


def read_recipe(parser: "Parser", path: str, flags: Mapping[str, Flag]) -> Given:
    """Reads a recipe file: keys are flags without --, values are written as for flags."""
    import yaml

    expected = "a YAML file whose keys are flags"
    with reported_as(
        f"--config: got {path}, expected {expected}", OSError, ValueError, yaml.YAMLError
    ):
        text = Path(path).read_text()
        recipe = yaml.load(text, yaml.BaseLoader) or {}  # words, as on a command line
        if not isinstance(recipe, dict):
            raise ValueError(f"got a {type(recipe).__name__}")
    for key in recipe:
        if key == "config" or key.replace("-", "_") not in flags:
            raise UserError(f"--config {path}: got the key {key}, expected flags (see --help)")
    return parser.parse(words_of(recipe))


def words_of(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that say the same; a list or a tuple has several values."""
    words: list[str] = []
    for name, value in values.items():
        own = list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
        words += [f"--{name}={own[0]}"] if len(own) == 1 else [f"--{name}", *own]
    return words


def add_flag(group: argparse._ActionsContainer, flag: Flag) -> None:
    rules, is_tuple = flag.metadata, typing.get_origin(flag.hint) is tuple
    argument: dict[str, Any] = {"type": converter(flag), "help": flag.help.replace("%", "%%")}
    if rules.get("metavar"):
        argument["metavar"] = rules["metavar"]
    elif (choices := choices_of(rules)) is not None:
        argument["metavar"] = "{" + ",".join(map(str, choices)) + "}"
    if is_tuple:
        parts = typing.get_args(flag.hint)
        argument["nargs"] = "+" if parts[-1] is ... else len(parts)
        if bool in parts:
            argument["nargs"] = "*"  # a bare one is True
    elif bool in value_kinds(flag.hint):
        argument |= {"nargs": "?", "const": True}
    elif rules.get("const") is not None:
        argument |= {"nargs": "?", "const": rules["const"]}
    if rules.get("positional"):
        group.add_argument(flag.name, **argument)
    else:
        is_required = flag.default is dataclasses.MISSING
        group.add_argument(spelling(flag.name), dest=flag.name, required=is_required, **argument)


def converter(flag: Flag) -> Callable[[str], Any]:
    """What makes a value of a word, or says what was expected."""
    rules, suffixes = flag.metadata, flag.metadata.get("suffixes")

    def convert(text: str) -> Any:
        for kind in value_kinds(flag.hint):
            with suppress(ValueError, KeyError):
                value = BOOLEANS[text.lower()] if kind is bool else kind(text)
                is_number = isinstance(value, int | float)
                is_right = (not is_number or is_of_type(value, kind)) and is_within(value, rules)
                if is_right and (not suffixes or text.lower().endswith(suffixes)):
                    return value
        expected = f"a name that ends in {' or '.join(suffixes)}" if suffixes else None
        expected = expected or expectation(flag.hint, rules)
        raise argparse.ArgumentTypeError(f"got {text!r:.200}, expected {expected}")

    return convert


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line, without the usage."""

    renamed: Mapping[str, str] = {}
    same_as: Mapping[str, tuple[str, dict]] = {}

    def parse(self, arguments: Sequence[str]) -> Given:
        """The values of the flags that are there, by name; words of a flag may be joined by _."""
        words = []
        for word in arguments:
            name, *value = word.split("=", 1)
            is_flag = name.startswith("--")
            words.append("=".join([name.replace("_", "-"), *value]) if is_flag else word)
        values, unknown = self.parse_known_args(words)
        known = [spelled for action in self._actions for spelled in action.option_strings]
        for word in unknown:
            name = word.split("=", 1)[0]
            if name.startswith("--"):
                close = difflib.get_close_matches(name, known, 1)
                expected = f", expected {close[0]} perhaps" if close else ""
                if renamed := self.renamed.get(name.removeprefix("--")):
                    expected = f", expected {renamed}"
                self.error(f"{name}: no flag of that name{expected}")
        if unknown:
            self.error(f"got {' '.join(unknown)!r:.200}, expected flags, each with its values")
        given = {k: tuple(v or [True]) if type(v) is list else v for k, v in vars(values).items()}
        for name, (other, meanings) in self.same_as.items():
            if name in given and other not in given:  # both are compared where they are read
                given[other] = meanings[given.pop(name)]
        return given

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UserError(f"{message} (--help lists the flags)")
