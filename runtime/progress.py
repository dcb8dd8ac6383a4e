"""Progress that also suits a log."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from runtime.errors import say

T = TypeVar("T")


def progress(*items, **options) -> tqdm:
    """tqdm's, ten times a second on a terminal and every 20 seconds in a file."""
    return tqdm(*items, mininterval=0.1 if sys.stderr.isatty() else 20, **options)


def tell_batches(batches: Iterable[T], number: int, *, is_main: bool = True) -> Iterator[T]:
    """Passes batches on under a bar on a terminal; without one a line tells of each tenth."""
    is_shown = is_main and sys.stderr.isatty()
    bar = tqdm(batches, total=number, disable=not is_shown, unit="batch")
    for done, batch in enumerate(bar, 1):
        yield batch
        if number > 1 and is_main:
            tell_tenth(done, number, "batches")


def tell_tenth(done: int, number: int, things: str) -> None:
    """Says how many of a number of things are done, at each tenth and where no terminal has a bar.

    done: after the last of them
    """
    if not sys.stderr.isatty() and done * 10 // number > (done - 1) * 10 // number:
        say(f"{done:,} of {number:,} {things}")
