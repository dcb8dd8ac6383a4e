r"""Bandwidth of the collectives that sharding and expert parallelism use, over all processes.

    torchrun --nproc_per_node=8 -m benchmarks.bench_collectives --megabytes 16 256

There is one row per collective and size. The size is the larger of a process's input and output.
    ms                         median time of ten calls, on the first process
    gb_per_sec                 bytes that a process sends, divided by that time
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as td

from benchmarks.common import report
from runtime.errors import UserError
from runtime.files import prepare_output
from runtime.flags import flag, parse_config
from runtime.processes import close_distributed, run_process, setup_distributed

CALLS = 10


@dataclass(frozen=True, kw_only=True)
class CollectivesConfig:
    megabytes: tuple[int, ...] = flag(
        (16, 256), ge=1, help="sizes: the larger of a process's input and output"
    )
    output: Path = flag(Path("results/collectives.json"), help="file for the rows")


def measure(megabytes: int, device: torch.device) -> list[dict]:
    """Measures each collective; all processes call this function together."""
    processes = td.get_world_size()
    whole = torch.ones(megabytes * 2**20 // 4 // processes * processes, device=device)
    shard, other = whole.chunk(processes)[0].clone(), torch.empty_like(whole)
    sent = whole.numel() * 4 * (processes - 1) / processes
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "all_gather": (lambda: td.all_gather_into_tensor(other, shard), sent),
        "reduce_scatter": (lambda: td.reduce_scatter_tensor(shard, whole), sent),
        "all_reduce": (lambda: td.all_reduce(other), 2 * sent),
        "all_to_all": (lambda: td.all_to_all_single(other, whole), sent),
    }
    rows = []
    for name, (call, num_bytes) in calls.items():
        seconds = []
        for _ in range(CALLS + 2):  # the first two calls are a warm-up
            td.barrier()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        best = median(seconds[2:])
        rows.append({"collective": name, "megabytes": megabytes, "processes": processes,
                     "ms": 1000 * best, "gb_per_sec": num_bytes / best / 1e9})  # fmt: skip
    return rows


def main(config: CollectivesConfig) -> None:
    if "RANK" not in os.environ:
        raise UserError("got one process, expected torchrun with one process per GPU")
    prepare_output("--output", config.output)
    dist = setup_distributed()
    rows = [row for size in config.megabytes for row in measure(size, dist.device)]
    if dist.is_main:
        report(config, rows, dist.device)
    close_distributed()


if __name__ == "__main__":
    run_process(lambda: main(parse_config(CollectivesConfig, __doc__)))
