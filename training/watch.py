"""Keeps watch beside the training loop: for signals that ask it to stop, and for hung processes.

    watch = Watch(dist, timeout=1800, start_step=0)
    while watch.may_start(step):
        ...
    watch.close()

A thread of each process does it, over a connection of its own to the launcher's key-value store,
so a step waits for nothing and the thread goes on while the loop is inside a collective.

Stopping: SIGTERM or SIGUSR1 to any process stops all of them after the same step. The thread of
each holds its loop before the next step and says which step is the earliest that its loop can stop
after; the latest of those is where all stop.

Hanging: each thread says again and again that it lives and where its loop is, and listens to the
next rank. A process that is silent for `timeout`, or a loop that stays in one step for as long,
ends the run with a line that names the rank. Saving and drawing samples may take any time: there
only silence counts.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta
from typing import NoReturn

import torch.distributed

from runtime.errors import say
from runtime.processes import Distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Seconds within which the same signal again is the same request: a scheduler that signals every
# process and a launcher that passes it on send it twice.
REPEATED = 5.0
# Seconds for all threads to hear of a wish to stop. They need one or two, on a busy machine more;
# torchrun kills after 30.
ANSWER = 20.0
READING, COMPUTING = "reading images", "computing"  # in this order within a step
SAVING, DRAWING = "saving", "drawing samples"


class Watch:
    """The watch of one process; all processes make and close theirs together.

    timeout: seconds; start_step: the first step that the loop will do
    """

    def __init__(self, dist: Distributed, timeout: float, start_step: int):
        self.rank, self.world_size, self.timeout = dist.rank, dist.world_size, timeout
        self.interval = min(1.0, timeout / 10)
        self.step, self.doing = start_step - 1, COMPUTING
        self.condition = threading.Condition()
        self.heard: dict[int, float] = {}  # signals, and when they first came
        self.holding, self.stop_at = False, None
        self.closing = False
        self.silence, self.stillness, self.asking = 0.0, 0.0, 0.0  # seconds
        self.beats, self.neighbour_sign, self.place = 0, b"", None
        self.store = open_store(dist, timeout)
        if self.store is not None:
            name = f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"
            self.store.set(f"name/{self.rank}", name)
            self.give_sign()
            dist.barrier()
        self.ear, self.mouth = os.pipe()
        os.set_blocking(self.mouth, False)
        self.handlers = {number: signal.signal(number, do_nothing) for number in SIGNALS}
        self.wakeup = signal.set_wakeup_fd(self.mouth, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    def may_start(self, step: int) -> bool:
        """Says whether the loop goes on with a step; all processes get False at the same one."""
        with self.condition:
            while self.holding and self.stop_at is None:
                self.condition.wait()
            if self.stop_at is not None and step >= self.stop_at:
                return False
            self.step, self.doing = step, READING
            return True

    def close(self) -> None:
        """Ends the thread; the signals get their former meaning back, unless one stopped the run.

        Then more of them are expected, from a launcher that makes sure, and change nothing.
        """
        self.closing = True
        os.write(self.mouth, b"\0")
        self.thread.join()
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_IGN if self.holding else handler)
        os.close(self.ear)
        os.close(self.mouth)

    def run(self) -> None:
        try:
            while True:
                waiting = self.holding and self.stop_at is None
                patience = self.interval / 10 if waiting else self.interval
                ready, _, _ = select.select([self.ear], [], [], patience)
                if self.closing:
                    return
                if ready:
                    self.hear(os.read(self.ear, 64))
                self.agree()
                if not ready:
                    self.look_round(patience)
        except RuntimeError as error:  # of the store, whose errors have no closer common class
            reason = (str(error).splitlines() or [""])[0]
            give_up(f"rank {self.rank} lost the connection to the launcher ({reason})")

    def hear(self, numbers: bytes) -> None:
        for number in numbers:
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if now - self.heard.setdefault(number, now) > REPEATED:
                name = signal.Signals(number).name
                say(f"{name} for the second time: stopped at once, nothing saved")
                os._exit(128 + number)

    def agree(self) -> None:
        """Hands the wish to stop to all processes, and once it is known finds the common step."""
        if self.stop_at is not None:
            return
        wanted = bool(self.heard)
        if self.store is not None:
            wanted = self.store.add("wish", int(wanted)) > 0
        if wanted and not self.holding:
            with self.condition:
                self.holding, earliest = True, self.step + 1
            if self.store is None:
                self.announce(earliest)
            else:
                self.store.set(f"earliest/{self.rank}", str(earliest))
        if self.holding and self.store is not None:
            keys = [f"earliest/{rank}" for rank in range(self.world_size)]
            if self.store.check(keys):
                self.announce(max(int(value) for value in self.store.multi_get(keys)))

    def announce(self, stop_at: int) -> None:
        with self.condition:
            self.stop_at = stop_at
            self.condition.notify()

    def give_sign(self) -> None:
        self.beats += 1
        self.store.set(f"sign/{self.rank}", f"{self.beats}|{self.step}|{self.doing}")

    def look_round(self, seconds: float) -> None:
        """Gives a sign of life, and ends the process if the next rank or the own loop hangs.

        seconds: of this tick; they are added up, so a process that was itself stopped for a while
        blames nobody.
        """
        place = self.step, self.doing
        moves = place != self.place or self.doing not in (READING, COMPUTING)
        self.stillness, self.place = 0.0 if moves else self.stillness + seconds, place
        if self.store is not None:
            self.give_sign()
            neighbour = (self.rank + 1) % self.world_size
            sign = self.store.get(f"sign/{neighbour}")
            self.silence = 0.0 if sign != self.neighbour_sign else self.silence + seconds
            self.neighbour_sign = sign
            if self.silence >= self.timeout:
                step, doing = parse_sign(sign)
                give_up(
                    f"{self.name(neighbour)} has given no sign of life for {self.timeout:g} s; it "
                    f"was {doing} in step {step + 1}"
                )
        if self.stillness >= self.timeout:
            self.report_stillness()
        if self.holding and self.stop_at is None:
            self.asking += seconds
            if self.asking >= ANSWER:
                self.report_unanswered()

    def report_stillness(self) -> NoReturn:
        """Ends the process with a line that names the loops that are furthest behind."""
        if self.store is None:
            give_up(f"the process has been {self.doing} in step {self.step + 1} {self.for_long()}")
        if self.rank:
            time.sleep(2)  # all of them notice: one speaks, unless it is the one that cannot
        keys = [f"sign/{rank}" for rank in range(self.world_size)]
        places = [parse_sign(sign) for sign in self.store.multi_get(keys)]
        order = [(step, (READING, COMPUTING, DRAWING, SAVING).index(do)) for step, do in places]
        step, doing = places[order.index(min(order))]
        behind = [self.name(rank) for rank in range(self.world_size) if order[rank] == min(order)]
        who = ", ".join(behind) if len(behind) < self.world_size else "every rank"
        give_up(f"no step was finished {self.for_long()}: {who}: {doing} in step {step + 1}")

    def report_unanswered(self) -> NoReturn:
        """Ends the process with a line that names who has died; a launcher had to tell the rest."""
        missing = [
            self.name(rank)
            for rank in range(self.world_size)
            if not self.store.check([f"earliest/{rank}"])
        ]
        give_up(f"asked to stop, and {', '.join(missing)} does not answer")

    def for_long(self) -> str:
        return f"for {self.timeout:g} s"

    def name(self, rank: int) -> str:
        return self.store.get(f"name/{rank}").decode()


def do_nothing(number: int, frame: object) -> None:
    """A signal's handler: the thread has already read of it from the pipe."""


def parse_sign(sign: bytes) -> tuple[int, str]:
    _, step, doing = sign.decode().split("|")
    return int(step), doing


def give_up(message: str) -> NoReturn:
    """Ends the process from a thread; the launcher then ends the others, or starts all again."""
    say(f"error: {message}; all processes stop", file=sys.stderr)
    os._exit(1)


def open_store(dist: Distributed, timeout: float) -> torch.distributed.Store | None:
    """Connects to the launcher's store, which no collective of the loop then has to share."""
    if dist.world_size == 1:
        return None
    token = dist.broadcast(uuid.uuid4().hex)  # a restart must not read the signs of the run before
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False, timeout=timedelta(seconds=max(60.0, timeout)),
    )  # fmt: skip
    return torch.distributed.PrefixStore(f"watch-{token}", store)
