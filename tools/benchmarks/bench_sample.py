r"""Measures images per second of sampling, without the autoencoder, by precision and back end.

    python -m tools.benchmarks.bench_sample
    python -m tools.benchmarks.bench_sample --model DiT-XL/2 --batch-size 32 --precisions fp16 bf16
    python -m tools.benchmarks.bench_sample --backends grouped --quantize none int8 int4
    python -m tools.benchmarks.bench_sample --run results/few/flow-900-0 --batch-size 100 \
        --settings euler:16 euler:16:2 heun:4 unipc:8 --output results/seconds.json

Each row samples one batch from a model with random weights. With guidance, the model processes
twice the number of images in one pass. The time per step does not depend on the number of steps, so
few steps suffice for a comparison.

With --run, each row samples a batch from this run with one of --settings, without guidance, which
compares rows of `experiments.samples` at equal time. "ratios" compares its time with that of
the first setting, for each of the --rounds.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from checkpoints.quantizers import quantizer
from models import DiT
from options.parts import option
from runtime.devices import DTYPES
from runtime.errors import UserError, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from sampling.generate import SamplerSettings, generate
from sampling.pipeline import SamplingPipeline, open_pipeline
from sampling.sampling_config import SamplingConfig
from tools.benchmarks.common import ModelBenchmarkConfig, best_times, open_processes, report
from tools.interventions import Reuse
from wrappers import wrap_blocks


@dataclass(frozen=True, kw_only=True)
class SampleBenchmarkConfig(ModelBenchmarkConfig):
    num_sampling_steps: int = option(4, group="sampling", ge=1, help="number of DDPM steps")
    cfg_scale: float = option(1.5, help="guidance scale; 1: no guidance")
    quantize: tuple[str, ...] = option(
        ("none",), choices=("none", "int8", "int4"), help="type of the experts' weights"
    )
    run: str | None = option(
        None, group="settings of a run", help="run folder; the flags of models have no effect"
    )
    settings: tuple[str, ...] = option(
        (), metavar="SAMPLER:STEPS[:REUSE]",
        help="samplers with steps, such as heun:4; with a third number as --reuse of samples.py",
    )  # fmt: skip
    rounds: int = option(5, ge=1, help="number of rounds")


def measure(config: SampleBenchmarkConfig, precision: str, device: torch.device) -> list[dict]:
    functions, seeds, steps = {}, range(config.batch_size), config.num_sampling_steps
    settings = SamplerSettings("gaussian", num_steps=steps, cfg_scale=config.cfg_scale)
    for backend, kind in product(config.backends, config.quantize):
        torch.manual_seed(0)
        model = DiT(config.dit_config(backend)).eval()
        if kind != "none":
            quantizer(kind).replace_experts(model)
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


def measure_settings(
    config: SampleBenchmarkConfig, precision: str, device: torch.device
) -> list[dict]:
    """Returns a row of each of --settings of --run."""
    opened = {text: open_setting(config.run, text, precision) for text in config.settings}
    seeds = range(config.batch_size)
    functions = {
        text: lambda pipeline=pipeline: pipeline.latents(
            [i % pipeline.model.config.num_classes for i in seeds], seeds
        )
        for text, (_, pipeline) in opened.items()
    }
    rounds = [
        best_times(functions, seconds=config.seconds, device=device) for _ in range(config.rounds)
    ]
    first = config.settings[0]
    return [
        row | {
            "ms_per_image": [times[text] / len(seeds) * 1e3 for times in rounds],
            "ratios": [times[text] / times[first] for times in rounds],
        }
        for text, (row, _) in opened.items()
    ]  # fmt: skip


def open_setting(run: str, text: str, precision: str) -> tuple[dict, SamplingPipeline]:
    """Returns a row without times, and its pipeline, which has a model of its own.

    text: sampler, steps and perhaps reuse, such as "heun:4" or "euler:16:2"
    """
    sampler, *numbers = text.split(":")
    if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() for number in numbers):
        raise UserError(f"--settings: got {text}, expected SAMPLER:STEPS or SAMPLER:STEPS:REUSE")
    steps, reuse = map(int, [*numbers, "0"][:2])
    opened = open_pipeline(SamplingConfig(ckpt=run, sampler=sampler, precision=precision))
    if reuse > 1:
        Reuse(opened.model, reuse)
    row = {"run": Path(run).name, "precision": precision, "sampler": sampler, "steps": steps}
    return row | {"reuse": reuse}, opened.with_settings(steps=steps, cfg_scale=1.0)


def parse_args() -> SampleBenchmarkConfig:
    return parse_config(SampleBenchmarkConfig, __doc__)


def main(config: SampleBenchmarkConfig) -> None:
    prepare_output("--output", config.output)
    if bool(config.run) != bool(config.settings):
        raise UserError("--run, --settings: got one of them, expected both or none")
    device, measured = open_processes().device, measure_settings if config.run else measure
    rows = [row for precision in config.precisions for row in measured(config, precision, device)]
    report(config, rows, device)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
