"""Processes, errors and files, which every script uses.

Scripts import this package before torch, whose import takes seconds, so that Ctrl-C during that
import is already handled.
"""

import ctypes
import os
import signal
import sys

from runtime.errors import print_uncaught

__version__ = "0.1.0"  # version of the code; also in CITATION.cff and CHANGELOG.md
PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h


def end_with_launcher() -> None:
    """Asks Linux to kill this process when torchrun dies, so that it does not keep training and
    hold the run's lock."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


sys.excepthook = print_uncaught
end_with_launcher()
# How often a waiting OpenMP thread polls before it sleeps. GNU OpenMP's default polls for some
# milliseconds, which doubles the time of a step on a CPU that also runs another program.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The numbers of rows per expert change in every layer and step; growing segments fit all sizes.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's earlier name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
