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
    is_terminal = sys.stderr.isatty()
    bar = tqdm(batches, total=number, disable=not (is_main and is_terminal), unit="batch")
    for done, batch in enumerate(bar, 1):
        yield batch
        is_tenth = done * 10 // number > (done - 1) * 10 // number
        if is_tenth and number > 1 and is_main and not is_terminal:
            say(f"{done:,} of {number:,} batches")
