"""Processes and seeds: who this process is, read from the launcher's environment.

dist = setup_distributed()
reseed(args.global_seed, step, micro_step)
"""

import hashlib
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed

from runtime.errors import STOPPED, USER_ERROR, UserError, printable, say

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

LOST_CONNECTION = re.compile(r"\bgloo\b.*(closed by peer|reset by peer|Broken pipe)")


@dataclass(frozen=True)
class Distributed:
    """This process among all: `rank` counts over every node, `local_rank` on this node alone."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes, in place, and returns it."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        return values

    def broadcast(self, value: object) -> object:
        """Hands rank 0's value, anything that pickles, to all processes, and returns it."""
        box = [value]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: object) -> list:
        """Hands the value of each process, anything that pickles, to all, by rank."""
        values = [value] * self.world_size
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Calls action() on every process; raises one's OSError or UserError on all of them.

        So that none waits for another that has failed. The action does not talk to the others, or
        does so to its end before it raises.
        """
        result, failure = None, None
        try:
            result = action()
        except (OSError, UserError) as error:
            failure = error
        failures = [error for error in self.gather(failure) if error is not None]
        if failures:
            raise failures[0]
        return result


def read_environment() -> Distributed:
    """Who this process is as the launcher says, alone if there is none; it joins nobody."""
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    return Distributed(rank, local_rank, world_size, torch.device("cpu"))


def setup_distributed(timeout: float = 0) -> Distributed:
    """Joins the process group that the launcher describes; alone when there is no launcher.

    NCCL on CUDA, gloo on CPU. A collective may take `timeout` seconds, and an hour in any case:
    the others wait in one while a process writes a checkpoint. Raises UserError when a node has
    more processes than GPUs, and when the environment says that there are others but not which of
    them this process is.
    """
    dist = read_environment()
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing and dist.world_size > 1:
        raise UserError(
            f"WORLD_SIZE: got {dist.world_size} and no {', '.join(missing)}, expected a launcher "
            f"that sets {', '.join(LAUNCHER_VARIABLES)}, as torchrun does"
        )
    device = dist.device
    if torch.cuda.is_available():
        if dist.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"got local rank {dist.local_rank}, expected at most one process for each of this "
                f"node's {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", dist.local_rank)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        timeout = max(3600.0, timeout)
        place = {}
        if launcher_may_restart():
            store = untouched_store(dist.rank, dist.world_size, timeout)
            place = {"store": store, "rank": dist.rank, "world_size": dist.world_size}
        torch.distributed.init_process_group(
            backend, device_id=device_id, timeout=timedelta(seconds=timeout), **place
        )
    return replace(dist, device=device)


def launcher_may_restart() -> bool:
    """Whether this is under a torchrun with --max-restarts that hosts the store."""
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return hosted and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def untouched_store(rank: int, world_size: int, timeout: float) -> torch.distributed.Store:
    """Finds a part of torchrun's store that no earlier start of these processes wrote to.

    torchrun keeps one store over its restarts (seen in torch 2.13), where processes would find the
    addresses of dead ones and wait for those. Its count of restarts is no way out: each node has
    its own. So every process writes a name that it has just made up, until all have read the same
    names of all, which nobody who is dead can have read.
    """
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False, timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    deadline = time.monotonic() + timeout
    store.set(f"ditmoe/name/{rank}", uuid.uuid4().hex)
    while time.monotonic() < deadline:
        names = store.multi_get([f"ditmoe/name/{other}" for other in range(world_size)])
        agreed = hashlib.sha256(b"".join(names)).hexdigest()
        store.set(f"ditmoe/read/{rank}", agreed)
        read = store.multi_get([f"ditmoe/read/{other}" for other in range(world_size)])
        if set(read) == {agreed.encode()}:
            return torch.distributed.PrefixStore(agreed, store)
        time.sleep(0.2)
    raise UserError(f"rank {rank} waited {timeout:g} s for the other {world_size - 1} processes")


def close_distributed() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def refuse_restart(code: int) -> None:
    """Stops a torchrun that would start its processes again (--max-restarts), which cannot help.

    It takes no notice of exit codes (torch 2.13) and has no other way to be told, but on SIGTERM it
    ends its processes and itself. The first process of a node tells it, or the only one that met a
    mistake: the others are ended while they wait.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    )
    if left <= 0 or code not in (USER_ERROR, STOPPED):
        return
    if os.environ.get("LOCAL_RANK") != "0":
        time.sleep(2)
        if code == STOPPED:  # as all are
            return
    os.kill(os.getppid(), signal.SIGTERM)


def run_process(main: Callable[[], int | None]) -> NoReturn:
    """Calls a distributed script's `main` and ends the process with the exit code that it returns.

    With that of a SystemExit if it raises one, 130 after Ctrl-C, and 1 for any other exception,
    with its traceback, or one line if gloo lost the connection to another process.
    """
    try:
        code = main() or 0
    except SystemExit as error:
        code = error.code if type(error.code) is int else int(error.code is not None)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from what is written", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BaseException as error:
        if LOST_CONNECTION.search(str(error)):  # what ended the other one is what matters
            say(f"error: another process is gone: {printable(str(error))}", file=sys.stderr)
        else:
            say(traceback.format_exc(), file=sys.stderr)
        code = 1
    refuse_restart(code)
    leave_process(code)


def leave_process(code: int = 0) -> NoReturn:
    """Ends a process at once; what it had to write is written.

    Not by `sys.exit`: a thread of gloo that still holds the tensor of the last collective aborts a
    process whose interpreter is being taken down, even after `destroy_process_group`.
    """
    for child in multiprocessing.active_children():  # of a DataLoader, as at any exit
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # on a full disk, closed
            stream.flush()
    os._exit(code)


def reseed(*key: int) -> None:
    """Seeds torch's generators by a key such as (seed, step, micro_batch).

    Every random draw of a step follows from its key, so no generator state has to be saved and a
    resumed run draws what the uninterrupted one would have drawn (as EDM2 does).
    """
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
