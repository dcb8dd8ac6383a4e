"""Processes and seeds: who this process is, read from the launcher's environment.

dist = setup_distributed()
reseed(args.global_seed, step, micro_step)
"""

import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
import torch.distributed

from training.errors import UserError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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


def read_environment() -> Distributed:
    """Who this process is as the launcher says, alone if there is none; it joins nobody."""
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    return Distributed(rank, local_rank, world_size, torch.device("cpu"))


def setup_distributed() -> Distributed:
    """Joins the process group that the launcher describes; alone when there is no launcher.

    NCCL on CUDA, gloo on CPU. Raises UserError when a node has more processes than GPUs, and when
    the environment says that there are others but not which of them this process is.
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
        if device.type == "cuda":
            # Longer than NCCL's 10 minutes: the others wait while one process writes a checkpoint.
            torch.distributed.init_process_group(
                "nccl", device_id=device, timeout=timedelta(hours=1)
            )
        else:
            torch.distributed.init_process_group("gloo")
    return replace(dist, device=device)


def close_distributed() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave_process(code: int = 0) -> NoReturn:
    """Ends a process whose work is done and written, the last line of a distributed script.

    Not by `sys.exit`: a thread of gloo that still holds the tensor of the last collective aborts a
    process whose interpreter is being taken down, even after `destroy_process_group`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def reseed(*key: int) -> None:
    """Seeds torch's generators by a key such as (seed, step, micro_batch).

    Every random draw of a step follows from its key, so no generator state has to be saved and a
    resumed run draws what the uninterrupted one would have drawn (as EDM2 does).
    """
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
