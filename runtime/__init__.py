"""Processes, errors and files: what every script stands on.

Both calls come before torch is imported: the training scripts import this room first.
"""

from cpu.threads import let_threads_sleep
from runtime.launcher import end_with_launcher

end_with_launcher()
let_threads_sleep()
