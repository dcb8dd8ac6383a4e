"""A progress bar that also suits a log."""

import sys

from tqdm import tqdm


def progress(*items, **options) -> tqdm:
    """tqdm's, ten times a second on a terminal and every 20 seconds in a file."""
    return tqdm(*items, mininterval=0.1 if sys.stderr.isatty() else 20, **options)
