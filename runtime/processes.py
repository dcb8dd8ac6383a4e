"""The processes of a distributed run, read from the launcher's environment, and their seeds."""

import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from runtime.errors import UserError, print_safely, printable, run_main

T = TypeVar("T")
PATIENCE = 20  # seconds that a process which failed in a collective action waits for the others
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessError(Exception):
    """An unexpected error of one process, raised by all."""


@dataclass(frozen=True)
class Distributed:
    """Position of this process: `rank` counts over all nodes, `local_rank` within this node."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    hosts: torch.distributed.ProcessGroup | None = None  # gloo, for what does not wait for a GPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier(self.hosts)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes, in place, and returns it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def broadcast(self, value: object) -> object:
        """Sends rank 0's value, which must be picklable, to all processes and returns it."""
        box = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(box, group=self.hosts)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Returns every process's value, by rank, on all processes; anything that pickles."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value, group=self.hosts)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Returns every process's value, by rank, on the main process, and None on the others."""
        values = [value] * self.world_size if self.is_main else None
        if self.world_size > 1:
            torch.distributed.gather_object(value, values, group=self.hosts)
        return values

    def run_on_all(self, action: Callable[[], T], *, has_collectives: bool = False) -> T:
        """Calls action() on every process. All raise the error of one, so that no process waits for
        a failed one: an OSError or UserError as it is, another one as a ProcessError.

        has_collectives: if not all processes fail, the others may wait in a collective of the
            action; a failed one then raises a RuntimeError, and the launcher ends the others
        """
        result = failure = None
        try:
            result = action()
        except (OSError, UserError) as error:
            failure = error
        except Exception as error:
            rank = f"rank {self.rank}: " if self.world_size > 1 else ""
            failure = ProcessError(rank + printable(f"{type(error).__name__}: {error}")[:300])
            failure.__cause__ = error  # shown in the traceback of this process
            if rank:  # the others may wait in a collective of the action
                print_safely(str(failure), file=sys.stderr)
        if has_collectives and self.world_size > 1:
            self.wait_for_others(failure)
        failures = self.gather(failure)
        failures[self.rank] = failure  # with its cause, which does not travel
        for error in filter(None, failures):
            raise error
        return result

    def wait_for_others(self, failure: Exception | None) -> None:
        """Waits until all processes call this method. A process with a failure waits PATIENCE
        seconds and then raises a RuntimeError."""
        arrived = torch.distributed.barrier(self.hosts, async_op=True)
        if failure is None:
            arrived.wait()
            return
        try:
            arrived.wait(timedelta(seconds=PATIENCE))
        except RuntimeError:
            raise RuntimeError(f"{failure}; the other processes wait for this one") from failure

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Calls action() on the main process only. All processes raise its error."""
        return self.run_on_all(lambda: action() if self.is_main else None)

    def from_main(self, action: Callable[[], T]) -> T:
        """Calls action() on the main process only; returns its result, which must be picklable."""
        return self.broadcast(self.on_main(action))


ALONE = Distributed(0, 0, 1, torch.device("cpu"))  # a process that no launcher started


def read_environment() -> Distributed:
    """Reads rank and world size from the launcher's environment, without a process group."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    values = [int(os.environ.get(name, default)) for name, default in defaults.items()]
    return Distributed(*values, device=torch.device("cpu"))


def setup_distributed(
    *, always_group: bool = False, patience: timedelta = timedelta(hours=1)
) -> Distributed:
    """Joins the process group that the launcher describes. Without a launcher there is one process.

    group      backend                    timeout
    default    NCCL, or gloo on a CPU     10 minutes, which ends a run that hangs
    hosts      gloo                       `patience`: processes wait in it while one of them writes
                                          a checkpoint, lists files or samples its last images

    always_group: without a launcher, join a group of one process, as DeepSpeed requires
    """
    dist = read_environment()
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing and dist.world_size > 1:
        raise UserError(
            f"WORLD_SIZE: got {dist.world_size} and no {', '.join(missing)}, expected a launcher "
            f"that sets {', '.join(LAUNCHER_VARIABLES)}, as torchrun does"
        )
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if dist.is_main and shares_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        print_safely(
            "WARNING: --max-restarts: restarted processes may wait for dead ones, expected "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment and --rdzv-backend=c10d"
        )
    device = dist.device
    if dist.world_size > 1:
        raise_descriptor_limit()
    if torch.cuda.is_available():
        device = choose_gpu(dist.local_rank, torch.cuda.device_count())
        torch.cuda.set_device(device)
    if always_group and "RANK" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Do not bind a single process to its device: every new group would split a communicator.
        bound = device if device.type == "cuda" and dist.world_size > 1 else None
        torch.distributed.init_process_group(
            backend, device_id=bound, timeout=timedelta(minutes=10)
        )
    if torch.distributed.is_initialized():
        hosts = torch.distributed.new_group(backend="gloo", timeout=patience)
        dist = replace(dist, hosts=hosts)
    return replace(dist, device=device)


def choose_gpu(local_rank: int, visible: int) -> torch.device:
    """Returns the GPU of a process: number `local_rank`, or the only visible one, as with Slurm's
    --gpus-per-task=1. NCCL reports two processes with the same GPU.
    """
    if visible > 1 and local_rank >= visible:
        raise UserError(f"got local rank {local_rank}, expected a process a GPU ({visible})")
    return torch.device("cuda", local_rank if visible > 1 else 0)


def raise_descriptor_limit() -> None:
    """Allows this process as many open files and sockets as possible: gloo opens a socket to every
    other process for each of two groups."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS permits fewer than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def close_distributed() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_process(main: Callable[[], int | None], interrupted: str = "interrupted") -> NoReturn:
    """Calls the `main` of a distributed script and ends the process with the exit code it returns,
    without `sys.exit`, which a gloo thread that still holds a tensor can abort.

    interrupted: see `run_main`
    """
    try:
        run_main(main, interrupted)
    except SystemExit as error:
        code = error.code if type(error.code) is int else int(error.code is not None)
    except BaseException as error:
        code = 1
        for line in traceback.format_exc().splitlines():
            print_safely(line, file=sys.stderr)
        with suppress(OSError):  # a full disk
            get_error_handler().record_exception(error)  # torchrun prints it
    for child in multiprocessing.active_children():  # DataLoader workers, as a normal exit does
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk, or a closed stream
            stream.flush()
    os._exit(code)


def reseed(*key: int) -> None:
    """Seeds torch's generators with a key such as (seed, step, micro_batch), as EDM2 does. A
    resumed run therefore draws the same random numbers as an uninterrupted one."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
