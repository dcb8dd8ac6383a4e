"""Processes, errors and files: what every script stands on.

This comes before torch is imported: scripts import this room first.
"""

import sys

from cpu.threads import let_threads_sleep
from runtime.errors import say_uncaught
from runtime.launcher import end_with_launcher

__version__ = "0.1.0"  # of the code; CITATION.cff and CHANGELOG.md have it too

sys.excepthook = say_uncaught
end_with_launcher()
let_threads_sleep()
