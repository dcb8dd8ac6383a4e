"""Command lines derived from dataclasses: each field made by `option` becomes a flag.

@dataclass(frozen=True, kw_only=True)
class Config(Config):
    lr: float = option(1e-4, help="learning rate", ge=0, group="optimisation")
    output: Path = option(help="folder of the results")     # without a default: required

config = parse_config(Config, __doc__)                 # from sys.argv
said = parse_flags(flags_of(Config), __doc__)          # the same, only what the command says
said = read_values({"lr": "1e-3"}, flags)              # from Python or a recipe file

The words of a flag are joined by - or _. A component is one word with its options, such as
--router sigmoid:scale=2.5.
"""

import argparse
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from options.parts import LIMITS, Option, options_of, spelled
from options.settings import Flags, Settings, flags_of, read, spelling, word_for
from runtime.errors import UserError, did_you_mean

T = TypeVar("T")


def parse_config(
    kind: type[T], description: str | None, arguments: Sequence[str] | None = None
) -> T:
    """Parses a command line, by default sys.argv, and returns a config.

    The help shows the fields of the class before those of its base class.
    """
    flags = flags_of(kind)
    flags = {name: flags[name] for name in kind.__annotations__ if name in flags} | flags
    said = parse_flags(flags, description, arguments)
    with naming_flags(flags):
        return kind(**said)


def parse_flags(
    flags: Flags, description: str | None, arguments: Sequence[str] | None = None,
    first: Sequence[str] = (), hidden: Sequence[str] = (),
) -> Settings:  # fmt: skip
    """Parses a command line and returns the given flags; see `parse_config` and `read_values`.

    first: the flags that --help shows, while --help all shows all of them; (): all
    hidden: flags that no help shows
    """
    words = []
    for word in sys.argv[1:] if arguments is None else arguments:
        name, *value = word.split("=", 1)  # the name of a flag may contain _ for -
        words.append("=".join([name.replace("_", "-"), *value]) if name[:2] == "--" else word)
    shown = {name: flag for name, flag in flags.items() if name not in hidden}
    if not first and words[-1:] in (["--help"], ["-h"]):
        words += ["all"]
    if words[-1:] in (["--help"], ["-h"]):
        few = {name: shown[name] for name in first if name in shown}
        print(make_parser(few, description, grouped=False).format_help(), end="")
        print(f"\n--help all shows all {len(shown)} flags, --help WORD those with a word")
        sys.exit()
    if words[-2:-1] in (["--help"], ["-h"]):
        chosen = shown if words[-1] == "all" else about(words[-1], shown)
        print(make_parser(chosen, description).format_help() + component_help(chosen), end="")
        sys.exit()
    parser = make_parser(flags, description)
    values, unknown = parser.parse_known_args(words)
    named = [word.split("=", 1)[0][2:] for word in unknown if word.startswith("--")]
    if unknown and not named:
        parser.error(f"got {' '.join(unknown)!r:.200}, expected flags, each with its values")
    return read_values(dict.fromkeys(named) | vars(values), flags)  # reports the unknown flags


def make_parser(flags: Flags, description: str | None, *, grouped: bool = True) -> "Parser":
    usage = ["%(prog)s", *(value_name(name, one) for name, one in flags.items() if one.positional)]
    usage += [
        f"{spelling(name)} {value_name(name, one)}"
        for name, one in flags.items() if one.default is MISSING and not one.positional
    ]  # fmt: skip
    parser = Parser(
        usage=" ".join([*usage, "[flags]"]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # flags that are not given get no entry
        allow_abbrev=False,
    )
    groups, group = {}, parser
    for flag_name, one in flags.items():
        if (title := one.group) and grouped:
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        rules: dict[str, Any] = {"metavar": value_name(flag_name, one)}
        default = " ".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
        is_shown = default is not MISSING and str(default) not in ("None", "False", "")
        rules["help"] = (help_with(default, one) if is_shown else one.help).replace("%", "%%")
        kinds = typing.get_args(one.hint)
        if one.is_list:
            rules["nargs"] = "+" if kinds[-1] is ... else len(kinds)
            may_be_absent = one.positional and one.default is not MISSING
            if one.each_once or may_be_absent:
                rules["nargs"] = "*"
            if flag_name in ("config", "plugin"):  # files add up; of other flags, the last counts
                rules["action"] = "extend"
        elif str not in kinds and tuple in map(typing.get_origin, kinds):  # a number or a pair
            rules["nargs"] = 2 if isinstance(one.metavar, tuple) else "+"
        elif bool in (one.hint, *kinds) or one.const is not None:
            rules |= {"nargs": "?", "const": True if one.const is None else one.const}
        if not one.positional:
            rules |= {"dest": flag_name, "required": one.default is MISSING}
        group.add_argument(flag_name if one.positional else spelling(flag_name), **rules)
    return parser


def value_name(flag_name: str, one: Option) -> str | tuple[str, ...]:
    """Returns the name of a flag's value in the help: its choices, N (an integer), X (a number),
    True|False, PATH, or the last word of the flag."""
    if one.metavar:
        return one.metavar
    if one.table:
        return "NAME[:OPTION=VALUE,...]"
    if allowed := one.choices:
        return f"{{{','.join(map(str, allowed))}}}"
    kinds = {one.hint, *typing.get_args(one.hint)}
    if Path in kinds:
        return "PATH"
    if str in kinds:
        return flag_name.split("_")[-1].upper()
    return "True|False" if bool in kinds else "N" if int in kinds else "X"


def help_with(default: Any, one: Option) -> str:
    """Returns the help of an option with its default, unless the help says it."""
    return one.help if "default" in one.help else f"{one.help} (default: {default})"


def about(word: str, flags: Flags) -> Flags:
    """Returns the flags whose name, group or components contain a word."""
    found, text = {}, word.lower().strip("-").replace("-", "_")
    for name, flag in flags.items():
        if any(text in one for one in (name, (flag.group or "").lower(), *(flag.table or ()))):
            found[name] = flag
    if not found:
        raise UserError(f"--help: got {word}, expected all, a word of a flag, or a group of flags")
    return found


def component_help(flags: Flags) -> str:
    """Lists the components that flags can name, with the options, ranges and defaults."""
    lines = []
    for name, flag in flags.items():
        for component, kind in (flag.table or {}).items():
            lines.append(f"  {spelling(name)} {component}")
            for one in options_of(kind).values():
                word = f"{one.name}={value_name(one.name, one)}"
                has_range = any(getattr(one, limit) is not None for limit in LIMITS)
                text = help_with(spelled(one.default) or "empty", one)
                lines += textwrap.wrap(
                    f"{text}; {one.expected()}" if has_range else text, 100,
                    initial_indent=f"      {word:<28} ", subsequent_indent=" " * 35,
                    break_on_hyphens=False,
                )  # fmt: skip
    title = "\ncomponents, with their options (NAME:OPTION=VALUE,OPTION=VALUE):"
    return "\n".join([title, *lines, ""]) if lines else ""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")


def read_values(values: Mapping[str, Any], flags: Flags) -> Settings:
    """Reads words, or values from YAML or Python, see `options.settings.read`. They may be in the
    sections of a file, which are the mappings that are no fields."""
    found: Settings = {}
    with naming_flags(flags):
        for key, value in values.items():
            flag = flags.get(str(key).replace("-", "_"))
            is_section = isinstance(value, Mapping) and not (flag and flag.table)
            for inner, one in value.items() if is_section else [(key, value)]:
                name = str(inner).replace("-", "_")
                if name in found:
                    raise ValueError(f"{name}: is given twice")
                if name not in flags:
                    raise UserError(f"{spelling(name)}: unknown flag{suggestion(name, flags)}")
                found[name] = one
        return read(found, flags)


def suggestion(name: str, flags: Flags) -> str:
    """Returns "; did you mean ...?" for the name of an unknown flag; "" if no flag is similar.

    Suggests up to 3 flags that contain all of its words, or the flag with the most similar name.
    """
    if name == "device":
        return "; the device is a GPU if there is one, and CUDA_VISIBLE_DEVICES= chooses the CPU"
    if found := word_for(name, flags):
        return f"; it is an option of a component: {spelling(found[0])} {found[1]}"
    words = set(name.split("_"))
    if close := [known for known in flags if words <= set(known.split("_"))][:3]:
        return f"; did you mean {' or '.join(map(spelling, close))}?"
    return did_you_mean(name, {known: spelling(known) for known in flags})


@contextmanager
def naming_flags(flags: Flags) -> Iterator[None]:
    """Turns a ValueError "NAME: ..." into a UserError that spells the name as a flag."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise UserError(f"{spelling(name) if name in flags else name}{colon}{rest}") from None


def refuse_idle(config: Any, names: Iterable[str], why: str) -> None:
    """Refuses the first of the flags `names` that has another value than its default.

    why: when it has no effect, such as "without --ckpt"
    """
    known = options_of(type(config))
    for name in names:
        if getattr(config, name) != known[name].default:
            raise UserError(f"{spelling(name)}: has no effect {why}")
