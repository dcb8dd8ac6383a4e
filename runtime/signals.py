"""Requests to save or stop, which all processes carry out between the same two steps.

    requests = Requests(dist, save_seconds=900)
    for step in ...:
        request = requests.poll()              # None, "save" or "stop"

SIGTERM, SIGUSR1 or Ctrl-C, sent to any process, requests a save and a stop. The clock of the main
process requests a save every `save_seconds`.
"""

import os
import signal
import time

import torch
import torch.distributed

from runtime.errors import print_safely
from runtime.processes import Distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ANSWERS = (None, "save", "stop")  # in order of urgency; the most urgent request wins
REPEATED = 2.0  # seconds during which a second signal is taken for a repetition of the first


class Requests:
    """The requests of one process. All processes create this object together and poll it before
    each step.

    A poll starts an all-reduce of one number over gloo, which does not wait for a GPU. The next
    poll reads the result, so a process waits only for processes that are a whole step behind.
    """

    def __init__(self, dist: Distributed, save_seconds: float):
        self.is_main, self.save_seconds = dist.is_main, save_seconds
        self.last_save = time.monotonic()
        self.signalled_at: float | None = None
        self.group = torch.distributed.new_group(backend="gloo") if dist.world_size > 1 else None
        self.reduction: tuple[torch.Tensor, torch.distributed.Work] | None = None
        self.handlers = {number: signal.signal(number, self.on_signal) for number in SIGNALS}

    def on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signalled_at is None:
            self.signalled_at = now
            if self.is_main:
                name = signal.Signals(number).name
                print_safely(f"{name}: saving within two steps (again: stop at once)")
        elif now - self.signalled_at > REPEATED:
            os._exit(128 + number)

    def saved(self) -> None:
        """Restarts the clock of `save_seconds` after a save."""
        self.last_save = time.monotonic()

    def local_request(self) -> int:
        """Returns the request of this process, as an index into ANSWERS."""
        is_due = self.is_main and 0 < self.save_seconds < time.monotonic() - self.last_save
        return 2 if self.signalled_at is not None else int(is_due)

    def poll(self) -> str | None:
        """Returns what all processes do before this step: None, "save", or "stop" (save and stop).

        A single process answers its own current request; several processes answer the most urgent
        request of the previous step.
        """
        if self.group is None:
            return ANSWERS[self.local_request()]
        if self.reduction is not None:
            number, work = self.reduction
            work.wait()
            self.reduction = None
            if number > 0:
                return ANSWERS[number]
        number, largest = torch.tensor(self.local_request()), torch.distributed.ReduceOp.MAX
        work = torch.distributed.all_reduce(number, largest, self.group, async_op=True)
        self.reduction = number, work
        return None

    def close(self) -> None:
        """Restores the previous signal handlers, or ignores the signals if one stopped the run.

        After a stop, launchers often repeat the signal; those repetitions must not kill the save.
        """
        for number, handler in self.handlers.items():
            signal.signal(number, handler if self.signalled_at is None else signal.SIG_IGN)
