r"""A whole training step of a preset: images per second, utilisation, memory.

    python -m benchmarks.bench_train
    python -m benchmarks.bench_train --optimizers adamw muon --backends grouped --batch-size 64
    python -m benchmarks.bench_train --model DiT-XL/2 --batch-size 32 --precisions bf16 \
        --gradient-checkpointing

A step is forward, backward, clipping, the optimizer and EMA on latents that are drawn anew each
time, since which experts are busy depends on them; without autoencoder and loader. A row says
    step_ms, images_per_sec     of the shortest step
    speedup                     over the first row's step, in this run
    forward_ms                  of the shortest forward pass without gradients
    tflops, of_peak             of the model's matrix products, 3 times those of a forward pass
                                whatever was recomputed; the peak is a square matrix product's here
    peak_gb                     memory of the device; on a CPU, resident memory of the process
    planned_gb                  of a GPU, with grouped experts, by train.py --dry-run
"""

from dataclasses import dataclass, replace
from itertools import product

import torch

from benchmarks.common import (
    ModelBenchmarkConfig,
    best_times,
    draw_batch,
    make_engine,
    matrix_peaks,
    open_device,
    report,
    train_step,
)
from diffusion.objectives import Gaussian
from engines.flags import DDPFlags
from models import count_macs
from runtime.devices import memory_in_use
from runtime.errors import run_main
from runtime.flags import flag, parse_config
from training.config import resolve
from training.optimizers import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class TrainBenchmarkConfig(ModelBenchmarkConfig):
    optimizers: tuple[str, ...] = flag(
        ("adamw",), choices=tuple(OPTIMIZERS), help="each with its default options"
    )
    gradient_checkpointing: bool = flag(False, help="recompute each block in backward")
    micro_batches: int = flag(1, least=1, help="batches of a step")


def measure(
    config: TrainBenchmarkConfig, precision: str, backend: str, optimizer: str, *, peak: float,
    device: torch.device,
) -> dict:  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model, objective = config.dit_config(backend), Gaussian()
    given = {
        "precision": precision, "optimizer": optimizer, "compile": config.compile, "grad_clip": 1.0,
        "gradient_checkpointing": config.gradient_checkpointing,
    }  # fmt: skip
    engine = make_engine(replace(resolve(given, DDPFlags), model=model), device)
    planned, _, _ = engine.memory(engine.config, 1, config.batch_size)
    images = config.batch_size * config.micro_batches
    flops = 6 * count_macs(model) * images

    @torch.no_grad()
    def forward() -> None:
        x, labels = draw_batch(engine, config.batch_size).values()
        engine.network(x, objective.draw_times(len(x), x.device), labels)

    def step() -> None:
        train_step(engine, objective, config.batch_size, config.micro_batches)

    functions = {"forward": forward, "step": step}
    times = best_times(functions, seconds=config.seconds, device=device)
    forward_time, step_time = times["forward"], times["step"]
    peak_gb = memory_in_use(device)
    return {
        "model": config.model, "precision": precision, "experts": backend,
        "optimizer": optimizer, "images": images, "step_ms": step_time * 1e3,
        "forward_ms": forward_time * 1e3,
        "images_per_sec": images / step_time, "tflops": flops / step_time / 1e12,
        "of_peak": flops / step_time / peak, "peak_gb": peak_gb,
        "planned_gb": sum(planned.values()) / 1e9,
    }  # fmt: skip


def parse_args() -> TrainBenchmarkConfig:
    return parse_config(TrainBenchmarkConfig, __doc__)


def main(config: TrainBenchmarkConfig) -> None:
    device = open_device()
    peaks, rows = matrix_peaks(device, config.precisions), []
    for case in product(config.precisions, config.backends, config.optimizers):
        rows.append(measure(config, *case, peak=peaks[case[0]], device=device))
        rows[-1]["speedup"] = rows[0]["step_ms"] / rows[-1]["step_ms"]
    report(config, rows, device, peaks)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
