"""Requests to save or stop, which all processes carry out between the same two steps.

    requests = Requests(dist, save_seconds=900)
    for step in ...:
        request = requests.poll()              # None, "save" or "stop"

SIGTERM, SIGUSR1, Ctrl-C or SIGHUP (a closed terminal), sent to any process, requests a save and a
stop. The clock of the main process requests a save every `save_seconds`.
"""

import os
import signal
import threading
import time

import torch
import torch.distributed

from runtime.errors import print_safely
from runtime.processes import Distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
ANSWERS = (None, "save", "stop")  # in order of urgency; the most urgent request wins
POLL_SECONDS, MOST_STEPS = 1.0, 16  # time between two polls, if that is at most so many steps
REPEATED = 2.0  # seconds during which a second signal is taken for a repetition of the first


class Requests:
    """The requests of one process. All processes create this object together and call `poll` before
    each step.

    A poll starts an all-reduce over gloo, which does not wait for a GPU. The next poll reads the
    result, so a process waits only for processes that are a whole poll behind. The ring of N
    processes takes 2 (N - 1) hops, so fast steps share a poll. Each poll also agrees on the number
    of steps to the one after the next, from the slowest process.
    """

    def __init__(self, dist: Distributed, save_seconds: float):
        self.dist, self.save_seconds = dist, save_seconds
        self.last_save = time.monotonic()
        self.is_signalled = False
        self.has_step = True  # if there is none to save, a signal ends the process at once
        self.early_exit: int | None = None  # with this exit code; None: that of the signal
        self.reduction: tuple[torch.Tensor, torch.distributed.Work] | None = None
        self.every, self.steps = 1, 0  # steps between two polls, and since the last one
        self.last_poll = time.monotonic()
        obeyed = set(SIGNALS)
        # nohup ignores SIGHUP. torchrun does not, and passes it on before it kills its processes.
        is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        if is_ignored and "TORCHELASTIC_RUN_ID" not in os.environ:
            obeyed.remove(signal.SIGHUP)
        self.handlers = {number: signal.signal(number, self.on_signal) for number in obeyed}
        numbers, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        self.earlier_wakeup = signal.set_wakeup_fd(self.wakeup)
        threading.Thread(target=self.watch, args=(numbers,), daemon=True).start()

    def on_signal(self, number: int, frame: object) -> None:
        self.is_signalled = True

    def watch(self, numbers: int) -> None:
        """Reads the numbers of signals from a pipe, and ends the process at the second signal, or
        at the first one before there is something to save.

        Unlike a handler, this thread also runs while the main thread waits in C++, for example for
        a collective.
        """
        first: float | None = None
        while content := os.read(numbers, 1):
            (number,) = content
            now = time.monotonic()
            if number in SIGNALS and first is None:
                first, name = now, signal.Signals(number).name
                if not self.has_step:
                    print_safely(f"{name}: stopped before the end of the first step, not saved")
                    os._exit(self.early_exit or 128 + number)
                if self.dist.is_main:
                    print_safely(
                        f"{name}: saving within two steps or seconds (again, after {REPEATED:g} "
                        "seconds: stop at once, also if a step hangs)"
                    )
            elif number in SIGNALS and now - first > REPEATED:
                os._exit(128 + number)
        os.close(numbers)

    def saved(self) -> None:
        """Restarts the clock of `save_seconds` after a save."""
        self.last_save = time.monotonic()

    def poll(self) -> str | None:
        """Returns what all processes do before this step: None, "save", or "stop" (save and stop).

        A single process answers its own current request; several processes answer the most urgent
        request of the previous poll.
        """
        self.steps += 1
        if self.steps < self.every:
            return None
        is_due = self.dist.is_main and 0 < self.save_seconds < time.monotonic() - self.last_save
        own = 2 if self.is_signalled else int(is_due)  # index into ANSWERS
        if self.dist.world_size == 1:
            return ANSWERS[own]
        if self.reduction is not None:
            numbers, work = self.reduction
            work.wait()
            self.reduction = None
            number, self.every = numbers[0], -int(numbers[1])
            if number > 0:
                return ANSWERS[number]
        now = time.monotonic()
        fitting = int(POLL_SECONDS * self.steps / max(1e-6, now - self.last_poll))
        self.last_poll, self.steps = now, 0
        numbers = torch.tensor([own, -min(MOST_STEPS, max(1, fitting))])
        largest = torch.distributed.ReduceOp.MAX
        work = torch.distributed.all_reduce(numbers, largest, self.dist.hosts, async_op=True)
        self.reduction = numbers, work
        return None

    def close(self) -> None:
        """Restores the previous signal handlers; after a stop, ignores the signals, which launchers
        often repeat and which must not kill the save."""
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_IGN if self.is_signalled else handler)
        signal.set_wakeup_fd(self.earlier_wakeup)
        os.close(self.wakeup)
