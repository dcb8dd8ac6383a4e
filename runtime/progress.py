"""Progress bars that also suit a log file, and the progress that a cluster job reads."""

import os
import sys
from pathlib import Path

from tqdm import tqdm

from runtime.errors import print_safely


def progress(*items, **options) -> tqdm:
    """Returns a tqdm bar of the main process, refreshed every 0.1 s on a terminal and every 20 s in
    a file."""
    options.setdefault("disable", int(os.environ.get("RANK", 0)) > 0)
    return tqdm(*items, mininterval=0.1 if sys.stderr.isatty() else 20, **options)


def note_saved(path: Path) -> None:
    """Tells scripts/slurm.sh that the job has made progress: appends a path to a file, where
    several processes may write."""
    if file := os.environ.get("DIT_MOE_SAVED"):
        try:
            with open(file, "a") as saved:
                saved.write(f"{path}\n")
        except OSError as error:
            print_safely(f"WARNING: {file} cannot be written ({error.strerror})", file=sys.stderr)
