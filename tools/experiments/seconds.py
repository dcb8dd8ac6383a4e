"""Measures the seconds of sampling, to compare the rows of `samples.py` at equal time.

    python -m tools.experiments.seconds --run results/few/flow-900-0 \
        --settings euler:16 euler:16:2 heun:4 unipc:8 --output results/seconds.json

The settings take turns on batches of latents, without the autoencoder, and the shortest time of
each in a round counts. "ratios" compares it with that of the first setting, for each round.
"""

from dataclasses import dataclass
from pathlib import Path

from options.parts import option
from runtime.devices import DTYPES
from runtime.errors import UserError, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from sampling.config import SamplingConfig
from sampling.pipeline import SamplingPipeline, open_pipeline
from tools.benchmarks.common import best_times, matrix_peaks, open_processes, report
from tools.experiments.interventions import Reuse


@dataclass(frozen=True, kw_only=True)
class SecondsConfig:
    run: str = option(group="what is sampled", help="run folder")
    settings: tuple[str, ...] = option(
        metavar="SAMPLER:STEPS[:REUSE]",
        help="samplers with steps, such as heun:4; with a third number as --reuse of samples.py",
    )
    batch_size: int = option(100, ge=1, help="images per batch")
    precision: str = option("fp32", choices=tuple(DTYPES), help="precision of sampling")
    seconds: float = option(
        12.0, gt=0, group="measurement", help="duration of each setting's turns in a round"
    )
    rounds: int = option(5, ge=1, help="number of rounds")
    output: Path = option(
        Path("results/seconds.json"), help="file for the rows and the facts of the machine"
    )


def read_setting(text: str) -> tuple[str, int, int]:
    """Returns sampler, steps and reuse (0: none) of a text such as "heun:4" or "euler:16:2"."""
    name, *numbers = text.split(":")
    if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() for number in numbers):
        raise UserError(f"--settings: got {text}, expected SAMPLER:STEPS or SAMPLER:STEPS:REUSE")
    return name, *map(int, [*numbers, "0"][:2])


def open_setting(config: SecondsConfig, text: str) -> tuple[dict, SamplingPipeline]:
    """Returns a row without times, and its pipeline, which has a model of its own."""
    sampler, steps, reuse = read_setting(text)
    opened = open_pipeline(
        SamplingConfig(ckpt=config.run, sampler=sampler, precision=config.precision)
    )
    if reuse > 1:
        Reuse(opened.model, reuse)
    row = {"run": Path(config.run).name, "sampler": sampler, "steps": steps, "reuse": reuse}
    return row, opened.with_settings(steps=steps, cfg_scale=1.0)


def parse_args() -> SecondsConfig:
    return parse_config(SecondsConfig, __doc__)


def main(config: SecondsConfig) -> None:
    prepare_output("--output", config.output)
    device = open_processes().device
    opened = {text: open_setting(config, text) for text in config.settings}
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
    rows = [
        row | {
            "ms_per_image": [times[text] / len(seeds) * 1e3 for times in rounds],
            "ratios": [times[text] / times[first] for times in rounds],
        }
        for text, (row, _) in opened.items()
    ]  # fmt: skip
    report(config, rows, device, matrix_peaks(device, (config.precision,)))


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
