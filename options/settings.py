"""Settings by name: reading, changing, comparing and storing the fields of config classes.

    flags = flags_of(DiTConfig, StepConfig)                        # {name: Option}
    said = read({"router": "sigmoid:scale=2.5", "lr": "1e-3"}, flags)
    config = changed(config, said)

Errors are ValueErrors, "NAME: ...".
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from options.parts import Option, Word, options_of

T = TypeVar("T")
Flags = Mapping[str, Option]
Settings = dict[str, Any]  # values by field name


@cache
def flags_of(*kinds: type) -> Flags:
    """Returns the fields of config classes, each of which is a flag, with their groups."""
    found: dict[str, Option] = {}
    group = None
    for one in (one for kind in kinds for one in options_of(kind).values()):
        if one.name in found:
            raise TypeError(f"{one.name} is a field of two classes")
        group = one.group or group
        found[one.name] = replace(one, group=group)
    return found


def word_for(name: str, flags: Flags) -> tuple[str, str] | None:
    """Returns flag and word of an option that was a flag until version 0.3: ("router",
    "sigmoid:scale=VALUE") for router_scale."""
    for known, flag in flags.items():
        for component, kind in (flag.table or {}).items():
            for option in options_of(kind):
                if name in (option, f"{known}_{option}", f"{known}_{component}_{option}"):
                    return known, f"{component}:{option}=VALUE"
    return None


def check_names(values: Mapping[str, Any], kind: type) -> None:
    """Raises ValueError if a value is no field of a config class."""
    flags = flags_of(kind)
    for name in sorted(values.keys() - flags.keys()):
        expected = f"fields of {kind.__name__}"
        if found := word_for(name, flags):
            expected = '{}="{}"'.format(*found)
        raise ValueError(f"{name:.200}: unknown, expected {expected}")


def read(values: Mapping[str, Any], flags: Flags) -> Settings:
    """Reads values by name; None says nothing."""
    return {name: flags[name].read(value) for name, value in values.items() if value is not None}


def over(top: Mapping[str, Any], beneath: Mapping[str, Any]) -> Settings:
    """Changes settings. A component keeps its options beneath, if it is the same one."""
    found = {**beneath, **top}
    for name, value in top.items():
        below = beneath.get(name) or ()
        if isinstance(value, Word):
            found[name] = value.over(below)
        elif isinstance(value, tuple):
            found[name] = tuple(one.over(below) if isinstance(one, Word) else one for one in value)
    return found


def changed(config: T, values: Mapping[str, Any]) -> T:
    """Returns a config with other values. A component keeps its options, if it is the same one."""
    check_names(values, type(config))
    flags = options_of(type(config))
    top = {n: value if value is None else flags[n].read(value) for n, value in values.items()}
    return replace(config, **over(top, {name: getattr(config, name) for name in top}))


def stored(config: Any) -> Settings:
    """Returns the fields of a config as a file has them, without None."""
    found = {name: getattr(config, name) for name in options_of(type(config))}
    return {name: in_file(value) for name, value in found.items() if value is not None}


def in_file(value: Any) -> Any:
    if isinstance(value, tuple):
        return [in_file(one) for one in value]
    return str(value) if isinstance(value, Word) else value


def differences(
    was: Any, now: Any, meanings: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yields (name, "NAME: was X, is Y") for the fields that differ between two configs.

    meanings: attributes that say what a field means if its default follows from others, by name
    """
    for name in options_of(type(now)):
        said, meant = (
            [getattr(config, attribute) for config in (was, now)]
            for attribute in (name, (meanings or {}).get(name, name))
        )
        if said[0] != said[1] and meant[0] != meant[1]:
            yield name, difference(name, *(meant if None in said else said))


def difference(name: str, was: Any, now: Any) -> str:
    return f"{spelling(name)}: was {in_words(was):.300}, is {in_words(now):.300}"


def in_words(value: Any) -> str:
    """Returns a value as a command gives it."""
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple | list) else str(value)


def spelling(name: str) -> str:
    """Returns the flag of a field, such as --global-batch-size."""
    return "--" + name.replace("_", "-")
