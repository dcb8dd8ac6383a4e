"""Command lines derived from dataclasses: each field made by `option` or `flag` becomes a flag.

@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = option(1e-4, help="learning rate", ge=0, group="optimisation")
    output: Path = flag(help="folder of the results")

config = parse_config(Config, __doc__)                 # from sys.argv, with defaults
flags = flags_of((Config,))
user_flags = parse_flags(flags, __doc__)               # the same, without defaults
user_flags = read_values({"lr": "1e-3"}, flags)        # from Python or a recipe file

If an option chooses a component, the options of all components of the registry are flags too:
`router` gives --router, and --router-scale for the routers that have a scale. The words of a flag
are joined by - or _.
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
FlagValues = dict[str, Any]  # the values of the flags that were given, by field name
Flags = Mapping[str, Option]

flag = option  # a field of a script's config; without a default, the flag is required
free = partial(option, binds="free")  # may change when a run is resumed
of_command = partial(option, binds="command")  # applies to one command and is not stored


def spelling(name: str) -> str:
    """Returns the flag of a field, such as --global-batch-size."""
    return "--" + name.replace("_", "-")


def flags_of(kinds: Sequence[type]) -> dict[str, Option]:
    """Returns the flags of dataclasses, in order.

    The options of components follow the flag that chooses the component.
    """
    flags: dict[str, Option] = {}
    for kind in kinds:
        for name, one in options_of(kind).items():
            flags |= {name: one} | (component_options(one) if one.table else {})
    return flags


def parse_config(
    kind: type[T], description: str | None, arguments: Sequence[str] | None = None
) -> T:
    """Parses a command line, by default sys.argv, and returns a config.

    Raises UserError, with a message of one line, for a wrong flag.
    """
    return kind(**parse_flags(flags_of((kind,)), description, arguments))


def parse_flags(
    flags: Flags, description: str | None, arguments: Sequence[str] | None = None
) -> FlagValues:
    """Parses a command line and returns the given flags; see `parse_config` and `read_values`."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # flags that are not given get no entry
        allow_abbrev=False,
    )
    groups, group = {}, parser
    for one in flags.values():
        if title := one.group:
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        allowed = ",".join(map(str, one.choices or one.table or ()))
        rules: dict[str, Any] = {"metavar": one.metavar or (f"{{{allowed}}}" if allowed else None)}
        rules["help"] = one.help.replace("%", "%%")
        parts, is_tuple = typing.get_args(one.hint), typing.get_origin(one.hint) is tuple
        if is_tuple:  # argparse counts the words, and `Option.read` converts them
            rules["nargs"] = "*" if bool in parts else "+" if parts[-1] is ... else len(parts)
        elif int in parts and tuple in map(typing.get_origin, parts):  # one number, or a pair
            rules["nargs"] = "+"
        elif bool in (one.hint, *parts) or one.const is not None:
            rules |= {"nargs": "?", "const": True if one.const is None else one.const}
        if not one.positional:
            rules |= {"dest": one.name, "required": one.default is MISSING}
        group.add_argument(one.name if one.positional else spelling(one.name), **rules)
    words = []
    for word in sys.argv[1:] if arguments is None else arguments:
        name, *value = word.split("=", 1)  # the name of a flag may contain _ for -
        words.append("=".join([name.replace("_", "-"), *value]) if name[:2] == "--" else word)
    values, unknown = parser.parse_known_args(words)
    named = [word.split("=", 1)[0][2:] for word in unknown if word.startswith("--")]
    if unknown and not named:
        parser.error(f"got {' '.join(unknown)!r:.200}, expected flags, each with its values")
    # If the command gives a flag without a value, and the flag accepts a tuple of bools, the flag
    # gets the value True.
    found = {name: [True] if value == [] else value for name, value in vars(values).items()}
    return read_values(dict.fromkeys(named) | found, flags)  # reports the unknown flags


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")


def read_values(values: Mapping[str, Any], flags: Flags) -> FlagValues:
    """Converts words, or values from YAML or Python, to typed values by field name.

    Raises UserError for an unknown name or a wrong value.
    """
    found: FlagValues = {}
    with naming_flags(flags):
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in flags:
                raise UserError(f"{spelling(key)}: unknown flag{suggestion(name, flags)}")
            found[name] = flags[name].read(value)
    return found


def layered(base: FlagValues, top: FlagValues, flags: Flags) -> FlagValues:
    """Merges two mappings of flags; `top` overrides `base`.

    Three kinds of flags in `base` are dropped:
        flags that `top` excludes: epochs in `top` drops max_steps (see `Option.needs`)
        flags without effect: lr_schedule cosine in `top` drops decay_share (see `Option.needs`)
        options of a component that `top` replaces: a different router drops router_scale
    """
    gone = {flags[name].needs[0] for name in top if flags[name].needs[1:] == (None,)}
    for name in base:
        one = flags[name]
        if one.needs and one.needs[0] in top and one.is_idle(top):
            gone.add(name)
        elif (chooser := one.belongs_to) in top:
            chosen = base.get(chooser, flags[chooser].default), top[chooser]
            before, after = ({names} if isinstance(names, str) else {*names} for names in chosen)
            before &= one.defaults.keys() or before
            if before and not before & after:
                gone.add(name)
    return {name: value for name, value in base.items() if name not in gone} | top


def with_effect(values: FlagValues, flags: Flags) -> FlagValues:
    """Returns the flags that the other flags do not make useless (see `Option.needs`)."""
    known = {name: one.default for name, one in flags.items()} | values
    return {name: value for name, value in values.items() if not flags[name].is_idle(known)}


def suggestion(name: str, flags: Flags) -> str:
    """Returns "; did you mean ...?" for the name of an unknown flag; "" if no flag is similar.

    Suggests up to 3 flags that contain all of its words, or the flag with the most similar name.
    """
    words = set(name.split("_"))
    close = [known for known in flags if words <= set(known.split("_"))][:3]
    close = close or difflib.get_close_matches(name, flags, 1)
    return f"; did you mean {' or '.join(map(spelling, close))}?" if close else ""


@contextmanager
def naming_flags(flags: Flags) -> Iterator[None]:
    """Turns a ValueError "NAME: ..." into a UserError that spells the name as a flag."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise UserError(f"{spelling(name) if name in flags else name}{colon}{rest}") from None
