"""Progress bars that also suit a log file, and the progress that a cluster job reads."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from runtime.errors import print_safely

T = TypeVar("T")


def progress(*items, **options) -> tqdm:
    """Returns a tqdm bar, refreshed every 0.1 s on a terminal and every 20 s in a file."""
    return tqdm(*items, mininterval=0.1 if sys.stderr.isatty() else 20, **options)


def progress_bar(batches: Sequence[T], *, is_main: bool = True) -> Iterator[T]:
    """Yields the batches with a bar on a terminal, or a line at each tenth without a terminal."""
    is_shown = is_main and sys.stderr.isatty()
    bar = tqdm(batches, disable=not is_shown, unit="batch")
    for done, batch in enumerate(bar, 1):
        yield batch
        if len(batches) > 1 and is_main:
            print_progress(done, len(batches), "batches")


def print_progress(done: int, number: int, things: str) -> None:
    """Prints progress at each tenth, unless a terminal already shows a bar.

    done: number of finished things, counting the one just finished
    """
    if not sys.stderr.isatty() and done * 10 // number > (done - 1) * 10 // number:
        print_safely(f"{done:,} of {number:,} {things}")


def note_saved(path: Path) -> None:
    """Tells scripts/slurm.sh that the job has made progress: appends a path to a file, where
    several processes may write."""
    if file := os.environ.get("DIT_MOE_SAVED"):
        try:
            with open(file, "a") as saved:
                saved.write(f"{path}\n")
        except OSError as error:
            print_safely(f"WARNING: {file} cannot be written ({error.strerror})", file=sys.stderr)
