r"""Measures images per second of sampling, without the autoencoder, by precision and back end.

    python -m tools.benchmarks.bench_sample
    python -m tools.benchmarks.bench_sample --model DiT-XL/2 --batch-size 32 --precisions fp16 bf16
    python -m tools.benchmarks.bench_sample --backends grouped --quantize none int8 int4

Each row samples one batch from a model with random weights. With guidance, the model processes
twice the number of images in one pass. The time per step does not depend on the number of steps, so
few steps suffice for a comparison.
"""

from dataclasses import dataclass
from itertools import product

import torch

from models import DiT
from options.parts import option
from quantization import quantize_experts
from runtime.devices import DTYPES
from runtime.errors import run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from sampling.generate import SamplerSettings, generate
from tools.benchmarks.common import ModelBenchmarkConfig, best_times, open_processes, report
from wrappers import wrap_blocks


@dataclass(frozen=True, kw_only=True)
class SampleBenchmarkConfig(ModelBenchmarkConfig):
    num_sampling_steps: int = option(4, group="sampling", ge=1, help="number of DDPM steps")
    cfg_scale: float = option(1.5, help="guidance scale; 1: no guidance")
    quantize: tuple[str, ...] = option(
        ("none",), choices=("none", "int8", "int4"), help="type of the experts' weights"
    )


def measure(config: SampleBenchmarkConfig, precision: str, device: torch.device) -> list[dict]:
    functions, seeds, steps = {}, range(config.batch_size), config.num_sampling_steps
    settings = SamplerSettings("gaussian", num_steps=steps, cfg_scale=config.cfg_scale)
    for backend, kind in product(config.backends, config.quantize):
        torch.manual_seed(0)
        model = DiT(config.dit_config(backend)).eval()
        if kind != "none":
            quantize_experts(model, kind)
        model.to(device, DTYPES[precision])
        wrap_blocks(model, compiled=config.compile)
        functions[backend, kind] = lambda model=model: generate(model, list(seeds), seeds, settings)
    times = best_times(functions, seconds=config.seconds, device=device)
    return [
        {
            "model": config.model, "precision": precision, "experts": backend, "quantize": kind,
            "images": config.batch_size, "steps": steps, "ms_per_step": time / steps * 1e3,
            "images_per_sec_at_250": config.batch_size / time * steps / 250,
        }
        for (backend, kind), time in times.items()
    ]  # fmt: skip


def parse_args() -> SampleBenchmarkConfig:
    return parse_config(SampleBenchmarkConfig, __doc__)


def main(config: SampleBenchmarkConfig) -> None:
    prepare_output("--output", config.output)
    device = open_processes().device
    rows = [row for precision in config.precisions for row in measure(config, precision, device)]
    report(config, rows, device)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
