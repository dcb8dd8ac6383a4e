"""Components, such as routers and objectives, which can be swapped, and their options.

    class MyRouter(Router):                       # `Router` is a `Component`
        temperature: float = option(1.0, help="temperature of the softmax", gt=0)

    ROUTERS["mine"] = MyRouter                    # a `Registry`: {name: class}

A component is one word: "mine:temperature=0.5", with options after the colon. It is the same word
in a command, a recipe, config.yaml and the metadata of a checkpoint. A config holds it as a `Word`:

    word = Word.parse("mine:temperature=0.5", ROUTERS).complete(ROUTERS)
    str(word)                                            # "mine:input=modulated,temperature=0.5"
    router = word.make(ROUTERS, hidden_size=64, ...)

An option is declared once, as a typed field with default, help and range.
"""

import math
import operator
import re
import types
import typing
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

Size = int | tuple[int, int]  # side of a square, or height and width
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
QUOTES = ("'", '"')
TYPE_NAMES = {float: "a number", int: "an integer", bool: "True or False", str: "text"}
LIMITS = {
    "ge": ("at least", operator.ge), "gt": ("above", operator.gt),
    "le": ("at most", operator.le), "lt": ("below", operator.lt),
}  # fmt: skip


def option(default: Any = MISSING, **rules: Any) -> Any:
    """Declares a dataclass field that users can set; for the rules see `Option`."""
    return field(default=default, metadata={"option": Option(**rules)}, kw_only=True)


class UnknownComponent(ValueError):
    """A word names a component that no imported file defines."""


class UnknownOption(ValueError):
    """A word has an option that its component does not have."""


class Registry(UserDict):
    """Components by name. Assignment adds one, as a file of --plugin does.

    elsewhere: names of modules that add further components, by the name of the component. A module
        is imported when its component is first asked for, and adds nothing if it does not exist.
    """

    def __init__(
        self, entries: Mapping[str, Any] | None = None, elsewhere: Mapping[str, str] | None = None
    ):
        super().__init__(entries)
        self.elsewhere = {n: module for n, module in (elsewhere or {}).items() if exists(module)}
        self.names = [*self.data, *self.elsewhere]  # their order, whichever module is imported

    def __missing__(self, name: str) -> Any:
        import_module(self.elsewhere[name])
        return self.data[name]

    def __delitem__(self, name: str) -> None:
        del self.data[name]
        self.elsewhere.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.data or name in self.elsewhere

    def __iter__(self) -> Iterator[str]:
        return (name for name in dict.fromkeys([*self.names, *self.data]) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def exists(module: str) -> bool:
    """Returns whether a module can be imported."""
    with suppress(ModuleNotFoundError):  # of the package
        return find_spec(module) is not None
    return False


@dataclass(frozen=True)
class Word:
    """The word of a component: its name, and options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        text = ",".join(f"{key}={spelled(value)}" for key, value in self.options.items())
        return f"{self.name}:{text}" if text else self.name

    @classmethod
    def parse(cls, text: "str | Word | Mapping", table: Registry) -> "Word":
        """Reads text such as "muon:betas=0.9,0.95,momentum=0.9", or checks a `Word`, which may be
        the mapping that dataclasses.asdict makes of it.
        """
        if isinstance(text, Mapping) and {*text} == {"name", "options"}:
            text = cls(**text)
        if isinstance(text, Word):
            name, said = text.name, text.options
        elif isinstance(text, str):
            name, said = split_word(text)
        else:
            example = f"{next(iter(table), 'NAME')}:OPTION=VALUE"
            raise ValueError(f"got {text!r:.200}, expected a word such as {example}")
        if name not in table:
            if "=" in name:  # of a list in one line, YAML splits the words
                raise ValueError(
                    f"got {name!r:.200} without its component: write a component without spaces, "
                    "and in YAML in quotes or on a line of its own"
                )
            known = ", ".join(table)
            raise UnknownComponent(
                f"got {name!r:.200}, expected one of {known}, or --plugin FILE.py that defines it"
            )
        has, found = options_of(table[name]), {}
        for key, value in said.items():
            if (key := key.replace("-", "_")) not in has:
                known = ", ".join(has) or "no options"
                raise UnknownOption(f"got {name}:{key}, but {name} has {known}")
            hint = has[key].hint
            may_be_tuple = tuple in map(typing.get_origin, (hint, *typing.get_args(hint)))
            if isinstance(text, str) and len(value) == 1 and typing.get_origin(hint) is not tuple:
                value = value[0]
            elif isinstance(text, str) and not value and not may_be_tuple:
                value = ""
            found[key] = has[key].read(value, f"{name}:{key}")
        return cls(name, found)

    def over(self, beneath: "Word | Sequence[Word]") -> "Word":
        """Adds the options that only `beneath` says, if it is, or has once, the same component."""
        words = [beneath] if isinstance(beneath, Word) else beneath
        same = [word for word in words if word.name == self.name]
        return replace(self, options=same[0].options | self.options) if len(same) == 1 else self

    def complete(self, table: Registry) -> "Word":
        """Adds the defaults of the other options, in their order."""
        has = options_of(table[self.name])
        return replace(self, options={k: self.options.get(k, has[k].default) for k in has})

    def make(self, table: Registry, **arguments: Any) -> Any:
        return table[self.name](**self.options, **arguments)


def split_word(word: str) -> tuple[str, dict[str, list[str]]]:
    """Splits "muon:betas=0.9,0.95,momentum=0.9" into a name and the values of its options.

    Text with a comma or an equals sign is quoted: "name:path='a,b'". "name:betas=" is an empty text
    or tuple.
    """
    name, _, text = word.partition(":")
    pieces = re.findall(r"""(?:^|,)((?:[^,'"]|'[^']*'|"[^"]*")*)""", text) if text else []
    if ",".join(pieces) != text:
        raise ValueError(f"got {word!r:.200}, which has a quote without its end")
    options: dict[str, list[str]] = {}
    values: list[str] | None = None
    for piece in pieces:
        if named := re.match(r"\s*([\w-]+)\s*=", piece):
            if named[1] in options:
                raise ValueError(f"got {word!r:.200}, which has {named[1]} twice")
            values = options[named[1]] = []
            piece = piece[named.end() :]
        if values is None:
            raise ValueError(f"got {word!r:.200}, expected {name}:OPTION=VALUE,OPTION=VALUE")
        values.append(piece.strip())
    found = {key: [] if values == [""] else values for key, values in options.items()}
    return name, {key: list(map(unquoted, values)) for key, values in found.items()}


def unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES
    return text[1:-1] if is_quoted else text


def spelled(value: Any) -> str:
    """Returns the text that `split_word` reads as this value of an option."""
    if isinstance(value, tuple):
        return ",".join(spelled(one) or "''" for one in value)
    text = str(value)
    if not re.search(r"""[,=:'"]|^\s|\s$""", text):
        return text
    quote = next((one for one in QUOTES if one not in text), None)
    if quote is None:
        raise ValueError(f"got {text!r:.200}, expected text without both kinds of quotes")
    return f"{quote}{text}{quote}"


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
    # The components that the field can name: a `Word`, a tuple of them, or text that is read later.
    table: Registry | None = None
    each_once: bool = False  # of several components, each at most once; their order has no meaning
    const: Any = None  # value of the flag if it is given without a value
    positional: bool = False  # a positional argument, not a flag
    script: str | None = None  # the only script that has the flag
    # Filled in by `options_of`:
    name: str = ""
    hint: Any = None  # the annotation
    default: Any = None

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is tuple

    def read(self, value: Any, name: str | None = None) -> Any:
        """Converts a value and checks its limits; a string is converted like a word of a command.

        Raises ValueError, "NAME: got VALUE, expected ...", for a wrong type or value.
        """
        if Word in (self.hint, *typing.get_args(self.hint)):
            return self.read_words(value, name or self.name)
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
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.suffixes:
            return f"a name that ends in {' or '.join(self.suffixes)}"
        limits = [(word, getattr(self, limit)) for limit, (word, _) in LIMITS.items()]
        ranges = " and ".join(f"{word} {bound:,}" for word, bound in limits if bound is not None)
        return f"{type_name(self.hint)} {ranges}".strip()

    def read_words(self, value: Any, name: str) -> Word | tuple[Word, ...]:
        """Reads a word, or for a list several, which must differ, or "none"."""
        try:
            if not self.is_list:
                return Word.parse(value, self.table)
            items = value if isinstance(value, list | tuple) else [value]
            items = [] if [*items] == ["none"] else items
            if "none" in items:
                raise ValueError("got none beside others, expected none alone")
            found = [Word.parse(item, self.table) for item in items]
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from None
        kinds = [word.name if self.each_once else str(word) for word in found]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"{name}: got {', '.join(kinds)}, expected different ones")
        if self.each_once:
            found.sort(key=lambda word: [*self.table].index(word.name))
        return tuple(found)


class Config:
    """Base class of configs: frozen dataclasses, whose fields are read and checked."""

    def __post_init__(self):
        for name, one in options_of(type(self)).items():
            if (value := getattr(self, name)) is not None:
                value = one.read(value)
                if one.table is not None:
                    complete = partial(Word.complete, table=one.table)
                    value = tuple(map(complete, value)) if one.is_list else complete(value)
                object.__setattr__(self, name, value)


class Component:
    """Base class of the swappable components.

    Users set fields made by `option`; other fields are constructor arguments. Every subclass is a
    dataclass, initialised in `__post_init__`, which calls that of the base class first.
    """

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
    """Returns the options of a component or config class, by name."""
    hints, found = typing.get_type_hints(kind), {}
    for one in fields(kind):
        if rules := one.metadata.get("option"):
            found[one.name] = replace(
                rules, name=one.name, hint=hints[one.name], default=one.default
            )
    return found


def type_name(hint: Any) -> str:
    """Describes the values of a type, such as "2 integers" for `tuple[int, int]`."""
    inner = [one for one in typing.get_args(hint) if one not in (types.NoneType, ...)]
    if typing.get_origin(hint) is tuple and ... not in typing.get_args(hint):
        return f"{len(inner)} {type_name(inner[0]).split()[-1]}s"
    return " or ".join(dict.fromkeys(map(type_name, inner))) or TYPE_NAMES.get(hint, "a path")


def convert(value: Any, hint: Any) -> Any:
    """Converts a value to a type; a string is converted if the type is a number, bool or path.

    Numbers must be finite.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    is_list = isinstance(value, list | tuple)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a number of NumPy or PyTorch
    if origin is tuple:
        items = value if is_list else [value]
        kinds = inner[:1] * len(items) if inner[-1] is ... else inner
        return tuple(convert(item, kind) for item, kind in zip(items, kinds, strict=True))
    if inner and origin is not dict:  # a union: the first type that fits
        if value in (None, "None") and types.NoneType in inner:
            return None
        is_size = hint in (Size, Size | None)
        if is_size and is_list and len(value) in (1, 2) and value[0] == value[-1]:
            value = value[0]  # equal sides
        *others, last = (one for one in inner if one is not types.NoneType)
        for one in others:
            with suppress(ValueError):
                return convert(value, one)
        return convert(value, last)
    kind = origin or hint
    if kind is str and hasattr(value, "__fspath__"):
        value = value.__fspath__()
    if isinstance(value, str) and kind is bool:
        value = BOOLEANS.get(value.lower())
    elif isinstance(value, str) and kind is not str:
        value = kind(value)
    elif type(value) is int and kind is float:
        value = float(value)
    fits = type(value) is kind if kind in TYPE_NAMES else isinstance(value, kind)
    if not fits or kind is float and not math.isfinite(value):
        raise ValueError(f"got {value!r:.80}, expected {type_name(hint)}")
    return value
