r"""Cost of saving checkpoints in the background: lost steps, and the time to write and to read.

    python -m tools.benchmarks.bench_save
    torchrun --nproc_per_node=8 -m tools.benchmarks.bench_save --model DiT-XL/2 --shard \
        --batch-size 64
    torchrun --nproc_per_node=2 -m tools.benchmarks.bench_save --shard --depth 4 --precisions fp32 \
        --wait-ms 200

Training steps on random latents continue while a checkpoint is written to --folder. One precision,
back end and optimizer is measured; by default fp32, grouped and adamw. Each row has
    step_ms        time of a step without a save, median of ten steps
    copy_ms        time during which training waits, while the state is copied to host memory
    write_s        time from the start of the save until the checkpoint is complete
    steps_lost     number of additional steps that would fit into write_s without a save
    gb             size of the files
    read_s         time in which the engine reads the checkpoint
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from checkpoints import Record
from diffusion.objectives import Gaussian
from options.parts import option
from runtime.files import check_new_folder, prepare_output
from runtime.flags import parse_config
from runtime.processes import Distributed, close_distributed, run_process
from tools.benchmarks.bench_train import TrainBenchmarkConfig, build_engine
from tools.benchmarks.common import open_processes, report, train_step
from training.saving import Saver

STEPS = 10  # measured without a save


@dataclass(frozen=True, kw_only=True)
class SaveConfig(TrainBenchmarkConfig):
    saves: int = option(3, ge=1, group="saves", help="number of saves, one row per save")
    wait_ms: int | None = option(
        None, ge=1, help="after the first step, wait this long instead of computing, as for a GPU"
    )
    folder: Path = option(Path("results/bench_save"), help="new folder, deleted at the end")
    output: Path = option(Path("results/saves.json"), help="JSON file for the rows and the machine")


def measure(config: SaveConfig, dist: Distributed) -> Iterator[dict]:
    """Yields one row per save; all processes call it together."""
    case = config.precisions[0], config.backends[-1], config.optimizers[0]
    engine = build_engine(config, *case, dist)
    objective = Gaussian()
    saver, record = Saver(config.folder, engine), Record(config=engine.model.config)

    def now() -> float:
        if dist.device.type == "cuda":
            torch.cuda.synchronize(dist.device)
        dist.barrier()
        return time.perf_counter()

    def timed_step() -> float:
        start = now()
        if config.wait_ms and engine.optimizer.state:
            time.sleep(config.wait_ms / 1000)
        else:
            train_step(engine, objective, config.batch_size, config.micro_batches)
        return now() - start

    for number in range(1, config.saves + 1):
        step = median([timed_step() for _ in range(STEPS + 2)][2:])
        start, steps = now(), 0
        saver.start(number, record, replaceable=True)
        copied = now()
        while not dist.broadcast(saver.is_done):
            timed_step()
            steps += 1
        written = now()
        saver.wait()
        engine.load_state(saver.folder)
        read = now() - written
        files = [path for path in saver.folder.rglob("*") if path.is_file()]
        yield {
            "model": config.model, "processes": dist.world_size, "step_ms": step * 1e3,
            "copy_ms": (copied - start) * 1e3, "write_s": written - start,
            "steps_lost": (written - start) / step - steps,
            "gb": sum(path.stat().st_size for path in files) / 1e9, "read_s": read,
        }  # fmt: skip


def parse_args() -> SaveConfig:
    return parse_config(SaveConfig, __doc__)


def main(config: SaveConfig) -> None:
    check_new_folder("--folder", config.folder)
    prepare_output("--output", config.output)
    dist = open_processes()
    rows = list(measure(config, dist))
    if dist.is_main:
        shutil.rmtree(config.folder)
        report(config, rows, dist.device)
    close_distributed()


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
