"""Processes, errors and files: what every script stands on.

This comes before torch is imported, which takes seconds: scripts import this room first.
"""

import ctypes
import os
import signal
import sys

from runtime.errors import say_uncaught

__version__ = "0.1.0"  # of the code; CITATION.cff and CHANGELOG.md have it too
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


def end_with_launcher() -> None:
    """Has Linux end this process with its torchrun, lest it train on and hold the run's lock."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


sys.excepthook = say_uncaught
end_with_launcher()
# How often a thread that waits for others tries before it sleeps. GNU OpenMP's default takes some
# milliseconds, which doubles a step's time on a CPU beside another program.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
