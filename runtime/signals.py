"""Saving and stopping between two steps, the same two on all processes.

    requests = Requests(dist, save_seconds=900)
    for step in ...:
        request = requests.poll()              # None, "save" or "stop"

SIGTERM, SIGUSR1 and Ctrl-C, to any process, ask for a save and a stop; the main process's clock
asks for a save.
"""

import os
import signal
import time

import torch
import torch.distributed

from runtime.errors import say
from runtime.processes import Distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ANSWERS = (None, "save", "stop")  # the most urgent that any process asks for wins
REPEATED = 2.0  # seconds in which schedulers and launchers send the same request once more


class Requests:
    """The requests of one process; all make theirs together and poll before each step.

    A poll begins to reduce one number over gloo, which waits for no GPU, and the next poll reads
    the result. So a process waits for another only where that is a whole step behind.
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
                say(f"{signal.Signals(number).name}: saving within two steps (again: stop at once)")
        elif now - self.signalled_at > REPEATED:
            os._exit(128 + number)

    def saved(self) -> None:
        """Tells the clock that everything up to now is saved."""
        self.last_save = time.monotonic()

    def wanted(self) -> int:
        """What this process asks for, as a place in ANSWERS."""
        is_due = self.is_main and 0 < self.save_seconds < time.monotonic() - self.last_save
        return 2 if self.signalled_at is not None else int(is_due)

    def poll(self) -> str | None:
        """Returns what all processes do before this step: nothing, "save", or save and "stop".

        One process does what it now asks for, several do what one of them asked for a step ago.
        """
        if self.group is None:
            return ANSWERS[self.wanted()]
        if self.reduction is not None:
            number, work = self.reduction
            work.wait()
            self.reduction = None
            if number > 0:
                return ANSWERS[number]
        number, largest = torch.tensor(self.wanted()), torch.distributed.ReduceOp.MAX
        work = torch.distributed.all_reduce(number, largest, self.group, async_op=True)
        self.reduction = number, work
        return None

    def close(self) -> None:
        """Gives the signals their former meaning back, unless one of them stopped the run.

        Then more of them are expected, from a launcher that makes sure, and change nothing.
        """
        for number, handler in self.handlers.items():
            signal.signal(number, handler if self.signalled_at is None else signal.SIG_IGN)
