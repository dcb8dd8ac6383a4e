"""Processes, errors and files: what every script stands on.

Both calls come before torch is imported: the training scripts import this room first.
"""

from cpu.threads import let_threads_sleep
from runtime.launcher import end_with_launcher

__version__ = "0.1.0"  # of the code; CITATION.cff and CHANGELOG.md have it too

end_with_launcher()
let_threads_sleep()
