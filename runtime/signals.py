"""Saving and stopping between two steps, the same two on all processes.

    requests = Requests(dist, save_seconds=900)
    for step in ...:
        request = requests.poll(step)          # None, "save" or "stop"

SIGTERM, SIGUSR1 and Ctrl-C, to any process, ask for a save and a stop; the main process's clock
asks for a save. Asking takes no collective, and no process waits for another's answer.
"""

import os
import signal
import time
import uuid
from datetime import timedelta

import torch.distributed

from runtime.errors import say
from runtime.processes import Distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds within which another signal is the same request: a terminal or scheduler that signals
# every process, and a launcher that passes it on, send it twice.
REPEATED = 2.0


class Requests:
    """The requests of one process; all make theirs together.

    Processes agree through the launcher's key-value store, request by request, on the step before
    which they meet it. Its entry says what is wanted, how many processes have seen it and the last
    step that any of them takes. A process that has seen it raises that to each step it begins,
    until all have seen it; then nobody changes it, and it is met after that step. So no process
    waits here for another, which may itself be waiting for this one's next step.
    """

    def __init__(self, dist: Distributed, save_seconds: float):
        self.rank, self.world_size = dist.rank, dist.world_size
        self.save_seconds = save_seconds if dist.is_main else 0.0
        self.last_save = time.monotonic()
        self.signalled_at: float | None = None
        self.number, self.has_seen = 0, False
        self.store = open_store(dist)
        self.handlers = {number: signal.signal(number, self.on_signal) for number in SIGNALS}

    def on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signalled_at is None:
            self.signalled_at = now
            if self.rank == 0:
                say(f"{signal.Signals(number).name}: saving after this step (again: stop at once)")
        elif now - self.signalled_at > REPEATED:
            os._exit(128 + number)

    def saved(self) -> None:
        """Tells the clock that everything up to now is saved."""
        self.last_save = time.monotonic()

    def wanted(self) -> str | None:
        """What this process by itself asks for."""
        if self.signalled_at is not None:
            return "stop"
        is_due = self.save_seconds and time.monotonic() - self.last_save > self.save_seconds
        return "save" if is_due else None

    def poll(self, step: int) -> str | None:
        """Says what all processes do before this step: nothing, "save", or save and "stop"."""
        wanted = self.wanted()
        if self.store is None:
            return wanted
        key = f"request/{self.number}"
        if wanted is None and not self.store.check([key]):
            return None
        entry = self.store.get(key).decode() if self.store.check([key]) else ""
        while True:
            request, seen, last, _ = entry.split() if entry else (wanted, 0, -1, None)
            seen, last = int(seen), int(last)
            if seen == self.world_size:
                if step <= last:
                    return None
                self.number, self.has_seen = self.number + 1, False
                return request
            # The rank makes entries of different processes different.
            mine = f"{request} {seen + (not self.has_seen)} {max(step, last)} {self.rank}"
            now = self.store.compare_set(key, entry, mine).decode()
            if now == mine:
                self.has_seen = True
                return None
            entry = now

    def close(self) -> None:
        """Gives the signals their former meaning back, unless one of them stopped the run.

        Then more of them are expected, from a launcher that makes sure, and change nothing.
        """
        for number, handler in self.handlers.items():
            signal.signal(number, handler if self.signalled_at is None else signal.SIG_IGN)


def open_store(dist: Distributed) -> torch.distributed.Store | None:
    """Connects to the launcher's store; None for a process that is alone."""
    if dist.world_size == 1:
        return None
    start = dist.broadcast(uuid.uuid4().hex)  # a restart must not read the notes of the run before
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False, timeout=timedelta(hours=1),
    )  # fmt: skip
    return torch.distributed.PrefixStore(start, store)
