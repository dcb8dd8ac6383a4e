r"""A whole training step of a preset: images per second, utilisation, memory.

    python -m benchmarks.bench_train
    python -m benchmarks.bench_train --model DiT-XL/2 --batch-size 32 --precisions bf16 \
        --gradient-checkpointing

A step is forward, backward, clipping, AdamW and EMA on latents that are drawn anew each time, since
which experts are busy depends on them; without autoencoder and loader. A row says
    step_ms, images_per_sec     of the shortest step
    speedup                     over the first row's step, in this run
    forward_ms                  of the shortest forward pass without gradients
    tflops, of_peak             of the model's matrix products, 3 times those of a forward pass
                                whatever was recomputed; the peak is a square matrix product's here
    peak_gb                     memory of the device; on a CPU, resident memory of the process
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import profile

from benchmarks.common import ModelBenchmarkConfig, best_times, matrix_peaks, open_device, report
from diffusion import create_diffusion
from models import DiT, count_macs
from runtime.devices import DTYPES, memory_in_use
from runtime.errors import exit_on_user_error
from runtime.flags import flag, parse_config


@dataclass(frozen=True, kw_only=True)
class TrainBenchmarkConfig(ModelBenchmarkConfig):
    gradient_checkpointing: bool = flag(False, help="recompute each block in backward")
    profile: bool = flag(False, help="print the operators that take the most time")


class Training:
    """A model with its optimizer and EMA."""

    def __init__(
        self, config: TrainBenchmarkConfig, precision: str, backend: str, device: torch.device
    ):
        torch.manual_seed(0)
        self.model = DiT(**vars(config.dit_config(backend))).to(device).train()
        self.model.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            self.model.compile_blocks()
        self.ema = [weight.detach().clone() for weight in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.diffusion, self.batch_size = create_diffusion(), config.batch_size
        self.dtype, self.device = DTYPES[precision], device

    def autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def batch(self) -> tuple:
        """New latents (N, C, h, w), times (N,) and labels (N,)."""
        c, n = self.model.config, self.batch_size
        x = torch.randn(n, c.in_channels, c.input_size, c.input_size, device=self.device)
        t = torch.randint(1000, (n,), device=self.device)
        return x, t, torch.randint(c.num_classes, (n,), device=self.device)

    def step(self) -> None:
        x, t, y = self.batch()
        with self.autocast():
            terms = self.diffusion.training_losses(self.model, x, t, {"y": y})
        (terms["loss"].mean() + terms["aux_loss"]).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1e-4)

    @torch.no_grad()
    def forward(self) -> None:
        with self.autocast():
            self.model(*self.batch())


def measure(
    config: TrainBenchmarkConfig, precision: str, backend: str, peak: float, device: torch.device
) -> dict:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = Training(config, precision, backend, device)
    flops = 6 * count_macs(training.model.config) * config.batch_size
    functions = {"forward": training.forward, "step": training.step}
    times = best_times(functions, seconds=config.seconds, device=device)
    forward, step = times["forward"], times["step"]
    peak_gb = memory_in_use(device)
    if config.profile:
        with profile() as found:
            training.step()
        order = f"self_{device.type}_time_total"
        print(found.key_averages().table(sort_by=order, row_limit=20))
    return {
        "model": config.model, "precision": precision, "experts": backend,
        "images": config.batch_size, "step_ms": step * 1e3, "forward_ms": forward * 1e3,
        "images_per_sec": config.batch_size / step, "tflops": flops / step / 1e12,
        "of_peak": flops / step / peak, "peak_gb": peak_gb,
    }  # fmt: skip


def parse_args() -> TrainBenchmarkConfig:
    return parse_config(TrainBenchmarkConfig, __doc__)


@exit_on_user_error
def main(config: TrainBenchmarkConfig) -> None:
    device = open_device()
    peaks, rows = matrix_peaks(device, config.precisions), []
    for precision in config.precisions:
        for backend in config.backends:
            rows.append(measure(config, precision, backend, peaks[precision], device))
            rows[-1]["speedup"] = rows[0]["step_ms"] / rows[-1]["step_ms"]
    report(config, rows, device, peaks)


if __name__ == "__main__":
    main(parse_args())
