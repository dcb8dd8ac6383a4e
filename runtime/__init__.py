"""Processes, errors and files: what every script stands on.

This comes before torch is imported: scripts import this room first.
"""

import os
import sys

from runtime.errors import say_uncaught
from runtime.launcher import end_with_launcher

__version__ = "0.1.0"  # of the code; CITATION.cff and CHANGELOG.md have it too

sys.excepthook = say_uncaught
end_with_launcher()
# How often a thread that waits for others tries before it sleeps. GNU OpenMP's default takes some
# milliseconds, which doubles a step's time on a CPU beside another program.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
