r"""Measures a complete training step of a preset: images per second, utilisation, memory.

    python -m tools.benchmarks.bench_train
    python -m tools.benchmarks.bench_train --optimizers adamw muon --backends grouped \
        --batch-size 64
    python -m tools.benchmarks.bench_train --model DiT-XL/2 --batch-size 32 --precisions bf16 \
        --gradient-checkpointing
    torchrun --nproc_per_node=8 -m tools.benchmarks.bench_train --model DiT-XL/2 --batch-size 64 \
        --precisions bf16 --backends grouped --compile --shard

A step consists of forward, backward, clipping, optimizer and EMA, without autoencoder and loader.
Each step uses new random latents, because the load of the experts depends on them. The columns of a
row:
    step_ms, images_per_sec     of the shortest step, over all processes
    speedup                     relative to the first row of this run
    forward_ms                  shortest forward pass without gradients
    tflops, of_peak             per process, counted as 3 times the matrix products of a forward
                                pass, without recomputation; the peak is the speed of square matrix
                                products on this machine
    peak_gb                     memory of the device; on a CPU, resident memory of the process
    planned_gb                  GPU memory according to train.py --dry-run, with grouped experts
"""

from dataclasses import dataclass, replace
from itertools import product

import torch

from checkpoints.costs import count_macs
from diffusion.objectives import Gaussian
from options.parts import option
from runtime.devices import memory_in_use
from runtime.files import prepare_output
from runtime.flags import parse_config
from runtime.processes import Distributed, close_distributed, reseed, run_process
from tools.benchmarks.common import (
    ModelBenchmarkConfig,
    best_times,
    draw_batch,
    make_engine,
    matrix_peaks,
    open_processes,
    report,
    train_step,
)
from training.config import TrainConfig
from training.engines.ddp import DDPEngine
from training.optimizers import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class TrainBenchmarkConfig(ModelBenchmarkConfig):
    optimizers: tuple[str, ...] = option(
        ("adamw",), choices=tuple(OPTIMIZERS), help="optimizers to measure, with default options"
    )
    gradient_checkpointing: bool = option(False, help="recompute each block in backward")
    micro_batches: int = option(1, ge=1, help="micro-batches per step")
    shard: bool = option(False, help="shard the model over the processes, as train.py --shard")
    expert_parallel: int = option(
        1, ge=1, help="with --shard: number of processes that the experts are distributed over"
    )


def build_engine(
    config: TrainBenchmarkConfig, precision: str, backend: str, optimizer: str, dist: Distributed
) -> DDPEngine:
    """Makes the engine, and seeds each process differently, so that their images differ."""
    if dist.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(dist.device)
    user_flags = {
        "precision": precision, "optimizer": optimizer, "compile": config.compile, "grad_clip": 1.0,
        "gradient_checkpointing": config.gradient_checkpointing, "shard": config.shard,
        "expert_parallel": config.expert_parallel, "accum_iter": config.micro_batches,
        "global_batch_size": config.batch_size * config.micro_batches * dist.world_size,
    }  # fmt: skip
    training = TrainConfig.default().changed(user_flags)
    engine = make_engine(replace(training, model=config.dit_config(backend)), dist)
    reseed(dist.rank)
    return engine


def measure(config: TrainBenchmarkConfig, engine: DDPEngine, peak: float) -> dict:
    """Returns one row of the table; all processes call it together."""
    dist, objective, trained = engine.dist, Gaussian(), engine.config
    planned, _, _ = engine.memory(trained, dist.world_size)
    images = config.batch_size * config.micro_batches
    flops = 6 * count_macs(trained.model) * images

    @torch.no_grad()
    def forward() -> None:
        x, labels = draw_batch(engine, config.batch_size).values()
        engine.network(x, objective.draw_times(len(x), x.device), labels)

    def step() -> None:
        train_step(engine, objective, config.batch_size, config.micro_batches)

    functions = {"forward": forward, "step": step}
    times = best_times(functions, seconds=config.seconds, device=dist.device, dist=dist)
    forward_time, step_time = times["forward"], times["step"]
    peak_gb = memory_in_use(dist.device)
    return {
        "model": config.model, "precision": trained.step.precision,
        "experts": trained.model.expert_backend, "optimizer": trained.step.optimizer.name,
        "processes": dist.world_size, "images": images * dist.world_size,
        "step_ms": step_time * 1e3, "forward_ms": forward_time * 1e3,
        "images_per_sec": images * dist.world_size / step_time, "tflops": flops / step_time / 1e12,
        "of_peak": flops / step_time / peak, "peak_gb": peak_gb,
        "planned_gb": sum(planned.values()) / 1e9,
    }  # fmt: skip


def parse_args() -> TrainBenchmarkConfig:
    return parse_config(TrainBenchmarkConfig, __doc__)


def main(config: TrainBenchmarkConfig) -> None:
    prepare_output("--output", config.output)
    dist, rows = open_processes(), []
    peaks = dist.from_main(lambda: matrix_peaks(dist.device, config.precisions))
    for case in product(config.precisions, config.backends, config.optimizers):
        rows.append(measure(config, build_engine(config, *case, dist), peaks[case[0]]))
        rows[-1]["speedup"] = rows[0]["step_ms"] / rows[-1]["step_ms"]
    if dist.is_main:
        report(config, rows, dist.device, peaks)
    close_distributed()


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
