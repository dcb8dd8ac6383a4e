r"""Checks all processes of a cluster together: limits, collectives, steps, a save, and the plan.

    bash scripts/check_cluster.sh                                           # all GPUs of one node
    sbatch --nodes=4 --time=15 scripts/slurm.sh scripts/check_cluster.sh    # of any number of nodes

The table has one row per check. A check that has an expected value passes or fails; the exit code
is 1 if one fails. Collectives are measured in each dimension of the layout of G: the processes that
share one copy of the model, the copies, and the processes that share the experts. The steps are
those of `train.py --shard`, with and without --expert-parallel, compiled as in the recipes.
"""

import gc
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as td

from options.parts import option
from presets import PRESETS
from runtime.devices import DTYPES
from runtime.files import check_new_folder, prepare_output
from runtime.flags import parse_config
from runtime.processes import Distributed, close_distributed, run_process
from tools.benchmarks import bench_save, bench_train
from tools.benchmarks.bench_train import TrainBenchmarkConfig
from tools.benchmarks.common import open_processes, report
from training.config import TrainConfig
from training.engine import node_size
from training.engines.fsdp import make_meshes

Row = dict[str, object]
CALLS = 10  # of each collective
SHARED_MEMORY = 0.1  # GiB per process in /dev/shm: batches of reader processes, NCCL's buffers
NCCL_LOG = "nccl.{}.log"  # by rank, in the folder


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    model: str = option("DiT-G/2", choices=tuple(PRESETS), group="model", help="preset")
    num_experts: int = option(16, ge=1, help="routed experts per block")
    depth: int = option(4, ge=1, help="number of blocks")
    image_size: int = option(256, ge=1, help="pixels per side")
    batch_size: int = option(16, ge=1, help="images per process")
    precision: str = option("bf16", choices=tuple(DTYPES), help="precision of the steps")
    compile: bool = option(True, help="compile the blocks")
    seconds: float = option(2.0, group="measurement", help="duration of each measurement")
    megabytes: int = option(64, ge=1, help="size of the collectives")
    folder: Path = option(
        Path("results/check_cluster"), help="new folder that all nodes share, deleted at the end"
    )
    output: Path = option(
        Path("results/cluster.json"), help="JSON file for the rows and the machine"
    )

    def steps(self, expert_parallel: int) -> TrainBenchmarkConfig:
        return TrainBenchmarkConfig(
            model=self.model, num_experts=self.num_experts, depth=self.depth, shard=True,
            image_size=self.image_size, batch_size=self.batch_size, compile=self.compile,
            precisions=(self.precision,), backends=("grouped",), seconds=self.seconds,
            expert_parallel=expert_parallel,
        )  # fmt: skip


def row(check: str, value: object, expected: str = "", ok: bool | None = None) -> Row:
    result = {None: "", True: "pass", False: "FAIL"}[ok]
    return {"check": check, "value": value, "expected": expected, "result": result}


def measure(config: ClusterConfig, dist: Distributed) -> Iterator[Row]:
    """Yields the rows; all processes call this function together."""
    yield from limits(dist)
    node = node_size(TrainConfig.default(), dist.world_size)
    spread = next(n for n in range(min(8, node, config.num_experts), 0, -1) if node % n == 0)
    for expert_parallel in dict.fromkeys((1, spread)):
        yield from steps(config, expert_parallel, dist)
    layout = config.steps(spread)
    engine = bench_train.build_engine(layout, config.precision, "grouped", "adamw", dist)
    meshes = make_meshes(dist, engine.config)
    del engine
    gc.collect()
    dimensions = {name: meshes.model[name] for name in meshes.model.mesh_dim_names}
    if meshes.spread is not None:
        dimensions["experts"] = meshes.spread
    for name, mesh in dimensions.items():
        speeds = collectives(config.megabytes, dist.device, mesh.get_group())
        for collective, speed in speeds.items():
            what = f"{collective} of {config.megabytes} MB, {name}, {mesh.size()} processes"
            yield row(f"{what}, GB/s", speed)
    save = bench_save.SaveConfig(**vars(layout), saves=1, folder=config.folder / "saves")
    (saved,) = bench_save.measure(save, dist)
    for name in ("gb", "copy_ms", "write_s", "read_s", "steps_lost"):
        yield row(f"save, {name}", saved[name])
    yield transport(config.folder, dist)


def limits(dist: Distributed) -> Iterator[Row]:
    yield row("processes", dist.world_size)
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = min(dist.gather(1e9 if allowed == resource.RLIM_INFINITY else allowed))
    # A socket to every other process for each of two groups of gloo (hosts, saves), and 500 files
    # and sockets of NCCL, reader processes and libraries.
    needed = 2 * dist.world_size + 500
    yield row("ulimit -n", int(allowed), f"at least {needed}", allowed >= needed)
    if os.path.isdir("/dev/shm"):
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size))
        free = shutil.disk_usage("/dev/shm").free / 2**30 / local
        free = min(dist.gather(free))
        expected = f"at least {SHARED_MEMORY:g}"
        yield row("/dev/shm, GiB free per process", free, expected, free >= SHARED_MEMORY)


def steps(config: ClusterConfig, expert_parallel: int, dist: Distributed) -> Iterator[Row]:
    """Measures steps of --shard, and their memory next to the plan."""
    benchmark = config.steps(expert_parallel)
    name = f"--expert-parallel {expert_parallel}" if expert_parallel > 1 else "--shard"
    engine = bench_train.build_engine(benchmark, config.precision, "grouped", "adamw", dist)
    measured = bench_train.measure(benchmark, engine, peak=1.0)
    for value in ("step_ms", "images_per_sec", "tflops"):
        yield row(f"{name}, {value}", measured[value])
    del engine
    gc.collect()
    peak, planned = max(dist.gather(measured["peak_gb"])), measured["planned_gb"]
    fits = peak <= 1.1 * planned if dist.device.type == "cuda" else None  # a CPU counts libraries
    expected = f"at most 1.1 x {planned:.3g}, as planned"
    yield row(f"{name}, peak GB of a process", peak, expected, fits)


def collectives(megabytes: int, device: torch.device, group: td.ProcessGroup) -> dict[str, float]:
    """Returns the GB/s that a process sends in each collective, in the median of ten calls.

    megabytes: the larger of a process's input and output
    """
    processes = group.size()
    whole = torch.ones(megabytes * 2**20 // 4 // processes * processes, device=device)
    shard, other = whole.chunk(processes)[0].clone(), torch.empty_like(whole)
    sent = whole.numel() * 4 * (processes - 1) / processes
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "all_gather": (lambda: td.all_gather_into_tensor(other, shard, group), sent),
        "reduce_scatter": (lambda: td.reduce_scatter_tensor(shard, whole, group=group), sent),
        "all_reduce": (lambda: td.all_reduce(other, group=group), 2 * sent),
        "all_to_all": (lambda: td.all_to_all_single(other, whole, group=group), sent),
    }
    speeds = {}
    for name, (call, num_bytes) in calls.items():
        seconds = []
        for _ in range(CALLS + 2):  # the first two calls are a warm-up
            td.barrier(group)
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        speeds[name] = num_bytes / median(seconds[2:]) / 1e9
    return speeds


def transport(folder: Path, dist: Distributed) -> Row:
    """Returns how NCCL connects processes, from its logs; TCP sockets between nodes are slow."""
    path, found = folder / NCCL_LOG.format(dist.rank), set()
    if path.is_file():
        found = {re.sub(r"/\d+", "", way) for way in re.findall(r" via (\S+)", path.read_text())}
    ways = sorted(set().union(*dist.gather(found)))
    if not ways:
        return row("transport", td.get_backend())
    is_fast = not any("Socket" in way for way in ways)
    return row("transport", ", ".join(ways), "no NET/Socket", is_fast)


def parse_args() -> ClusterConfig:
    return parse_config(ClusterConfig, __doc__)


def main(config: ClusterConfig) -> int:
    rank = os.environ.get("RANK", "0")
    os.environ.setdefault("NCCL_DEBUG", "INFO")
    os.environ.setdefault("NCCL_DEBUG_FILE", str(config.folder / NCCL_LOG.format(rank)))
    if rank == "0":
        check_new_folder("--folder", config.folder)
        prepare_output("--output", config.output)
    config.folder.mkdir(parents=True, exist_ok=True)
    dist = open_processes()
    rows = list(measure(config, dist))
    if dist.is_main:
        shutil.rmtree(config.folder, ignore_errors=True)
        report(config, rows, dist.device)
    close_distributed()
    return int(any(one["result"] == "FAIL" for one in rows))


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
