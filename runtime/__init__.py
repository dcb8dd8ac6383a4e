"""Processes, errors and files, which every script uses.

Scripts import this package before torch, whose import takes seconds, so that Ctrl-C during that
import is already handled.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress

from runtime.errors import end_while_importing

__version__ = "0.3.0"  # version of the code; also in CITATION.cff and CHANGELOG.md
PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h


def end_with_launcher() -> None:
    """Asks Linux to kill this process when torchrun dies, so that it does not keep training and
    hold the run's lock."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def handle_interrupts() -> None:
    """Makes Ctrl-C end a script of this repository, also while it imports packages."""
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    is_ours = os.path.abspath(script).startswith(os.path.join(ours, ""))
    if is_ours and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, end_while_importing)


handle_interrupts()
end_with_launcher()
# How often a waiting OpenMP thread polls before it sleeps. GNU OpenMP's default polls for some
# milliseconds, which doubles the time of a step on a CPU that also runs another program.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The numbers of rows per expert change in every layer and step; growing segments fit all sizes.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's earlier name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
