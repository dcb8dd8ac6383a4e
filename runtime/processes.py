"""Processes and seeds: who this process is, read from the launcher's environment."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed

from runtime.errors import UserError, run_main, say

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Distributed:
    """This process among all: `rank` counts over every node, `local_rank` on this node only."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    hosts: torch.distributed.ProcessGroup | None = None  # gloo, for what waits on files

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier(self.hosts)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes, in place, and returns it."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        return values

    def broadcast(self, value: object) -> object:
        """Hands rank 0's value, anything that pickles, to all processes, and returns it."""
        box = [value]
        if torch.distributed.is_initialized():
            device = torch.device("cpu") if self.hosts else self.device
            torch.distributed.broadcast_object_list(box, group=self.hosts, device=device)
        return box[0]

    def together(self, action: Callable[[], T]) -> T:
        """Calls action() on every process; raises one's OSError or UserError on all of them.

        So no process waits for one that has failed.
        """
        result = failure = None
        try:
            result = action()
        except (OSError, UserError) as error:
            failure = error
        failures = [failure] * self.world_size  # by rank
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(failures, failure, group=self.hosts)
        for error in filter(None, failures):
            raise error
        return result

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Calls action() on the main process only; raises its OSError or UserError on all."""
        return self.together(lambda: action() if self.is_main else None)


def read_environment() -> Distributed:
    """Reads rank and world size from the launcher's environment; opens no process group."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    values = [int(os.environ.get(name, default)) for name, default in defaults.items()]
    return Distributed(*values, device=torch.device("cpu"))


def setup_distributed() -> Distributed:
    """Joins the process group that the launcher describes; alone when there is no launcher.

    NCCL on CUDA, gloo on CPU. A collective of a step may take ten minutes, after which a process
    that hangs ends the run. One of `hosts`, which is gloo everywhere, may take an hour: the others
    wait in it while a process writes a checkpoint or reads a list of files. Raises UserError for
    more processes on a node than GPUs, and when the environment says that there are others but not
    which of them this process is.
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
        say(
            "WARNING: --max-restarts: restarted processes may wait for dead ones, expected "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment and --rdzv-backend=c10d"
        )
    device, is_hidden = dist.device, "CUDA_VISIBLE_DEVICES" in os.environ
    if torch.cuda.is_available():
        if dist.local_rank >= (count := torch.cuda.device_count()):
            raise UserError(f"got local rank {dist.local_rank}, expected a process a GPU ({count})")
        device = torch.device("cuda", dist.local_rank)
        torch.cuda.set_device(device)
    elif dist.is_main and Path("/dev/nvidia0").exists() and not is_hidden:
        say("WARNING: torch cannot use the GPU that is here (its build or the driver): on the CPU")
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # A process that is alone binds no device: every new group would split a communicator.
        bound = device if device.type == "cuda" and dist.world_size > 1 else None
        torch.distributed.init_process_group(
            backend, device_id=bound, timeout=timedelta(minutes=10)
        )
        hosts = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=1))
        dist = replace(dist, hosts=hosts)
    return replace(dist, device=device)


def close_distributed() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_process(main: Callable[[], int | None]) -> NoReturn:
    """Calls a distributed script's `main` and ends the process with the exit code that it returns.

    It ends at once, because a gloo thread that still holds a tensor can abort `sys.exit`.
    """
    try:
        run_main(main, "interrupted; the same command goes on from what is written")
    except SystemExit as error:
        code = error.code if type(error.code) is int else int(error.code is not None)
    except BaseException:
        code = 1
        say(traceback.format_exc(), file=sys.stderr)
    for child in multiprocessing.active_children():  # of a DataLoader, as at any exit
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # on a full disk, closed
            stream.flush()
    os._exit(code)


def reseed(*key: int) -> None:
    """Seeds torch's generators by a key such as (seed, step, micro_batch), as EDM2 does.

    So a resumed run draws what the uninterrupted one would have drawn.
    """
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
