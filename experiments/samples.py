r"""Measures the KID of samples by number of steps, guidance scale and precision of the experts.

    python -m experiments.samples --runs results/few/mean-flow-600-* --steps 1 2 4 8 25 \
        --choosing data/choosing.npz --reporting data/reporting.npz --output results/few.jsonl

Each setting gets several disjoint groups of samples. The first group is compared with the choosing
images, to choose sampler and guidance scale; the other groups with the reporting images. Their
deviation is the noise of sampling (`report.py` makes the tables). Runs with different seeds
sample different images. "passes" counts the forward passes per image; guidance doubles them.

A finished setting adds a row to OUTPUT. Run the same command again to measure the missing rows. A
picture for each run, next to OUTPUT, has a line of images for each number of steps.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn import Module

from evaluation.extractors import load_extractor
from evaluation.image_sets import ImageSet
from evaluation.metrics import Statistics, collect, load_statistics, score
from evaluation.sampled_images import sample_labels
from experiments.rows import measure_missing, read_log
from latents.features import FeatureNetwork
from latents.image_grid import captioned_rows, enlarge, write_png
from options.parts import option
from runtime.devices import DTYPES
from runtime.errors import UserError, pluralize, reported_as, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from sampling.pipeline import SamplingPipeline, open_pipeline
from sampling.sampling_config import SamplingConfig
from tools.benchmarks.common import open_processes
from tools.interventions import DropSmall, Reuse

PICTURED = 10  # images per line of a picture


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    runs: tuple[str, ...] = option(
        group="what is sampled", help="run folders, with names that end in the seed, as in flow-0"
    )
    steps: tuple[int, ...] = option((1, 2, 4, 8, 25), ge=1, help="numbers of sampling steps")
    scales: tuple[float, ...] = option((1.0, 1.5, 2.0), help="guidance scales to choose from")
    intervals: tuple[str, ...] = option(
        (), metavar="LOW-HIGH",
        help="guidance intervals, such as 0-1 0.1-0.9 (default: that of the run's objective)",
    )  # fmt: skip
    sampler: str | None = option(None, help="sampler (default: the default of the run's objective)")
    quantize: tuple[str, ...] = option(
        ("none",), choices=("none", "int8", "int4"), help="precisions of the experts' weights"
    )
    experts_per_token: tuple[int, ...] = option(
        (), ge=1, help="numbers of experts per token in sampling (default: as in training)"
    )
    min_weights: tuple[float, ...] = option(
        (0.0,), ge=0, help="leave out the experts of a token whose weight is smaller"
    )
    reuse: tuple[int, ...] = option(
        (0,), ge=0,
        help="compute the routed experts only in every N-th forward pass, and reuse their output "
        "in between; 0: compute them in all",
    )  # fmt: skip
    precision: str | None = option(
        None, choices=tuple(DTYPES), help="precision of sampling (default: as for sample.py)"
    )
    num_images: int = option(500, ge=1, help="number of samples per group")
    groups: int = option(5, ge=1, help="groups of samples that are reported, besides the first one")
    batch_size: int = option(100, ge=1, help="number of images that are sampled together")
    choosing: Path = option(
        group="real images",
        help="statistics of the images that choose the guidance scale, written by evaluate.py "
        "--precompute-reference",
    )
    reporting: Path = option(help="statistics of the images on which the result is reported")
    kid_subset_size: int = option(500, ge=1, help="images per KID subset")
    backbone: str = option("efficientnet-lite0", metavar="NETWORK", help="as for evaluate.py")
    output: Path = option(
        Path("results/samples/samples.jsonl"), group="output",
        help="file of the rows, for experiments.report",
    )  # fmt: skip


def open_settings(config: SamplesConfig) -> Iterator[tuple[dict, SamplingPipeline, DropSmall]]:
    """Yields the settings of rows without steps and scale, a pipeline, and the hook of its routers.

    Without a minimum weight, the routers have no hook, so that sampling takes the fast path.
    """
    for run, kind in product(config.runs, config.quantize):
        opened = open_pipeline(
            SamplingConfig(
                ckpt=run, sampler=config.sampler, precision=config.precision,
                quantize=None if kind == "none" else kind,
            )
        )  # fmt: skip
        experts = opened.model.config.num_experts
        if max(config.experts_per_token, default=0) > experts:
            got = max(config.experts_per_token)
            raise UserError(f"--experts-per-token: got {got}, expected at most {experts} for {run}")
        gates = [block.moe.gate for block in opened.model.blocks if block.moe is not None]
        numbers = config.experts_per_token or (opened.model.config.num_experts_per_tok,)
        for number, least, every in product(numbers, config.min_weights, config.reuse):
            hook = DropSmall(least)
            for gate in gates:
                gate.num_experts_per_tok = number
            handles = [gate.register_forward_hook(hook) for gate in gates if least]
            handles += [Reuse(opened.model, every)] if every > 1 else []
            shared = {
                "run": Path(run).name, "sampler": opened.settings.sampler, "quantize": kind,
                "experts_per_token": number, "min_weight": least, "reuse": every,
            }  # fmt: skip
            yield shared, opened, hook
            for handle in handles:
                handle.remove()


def as_in(pipeline: SamplingPipeline, row: dict) -> SamplingPipeline:
    """Returns the pipeline with the steps and the guidance of a row."""
    return pipeline.with_settings(
        steps=row["steps"], cfg_scale=row["scale"], guidance_interval=tuple(row["interval"])
    )


class Passes:
    """Forward hook of a block that counts the images which pass through the network."""

    images = 0

    def __call__(self, block: Module, args: tuple, output: object) -> None:
        self.images += len(args[0])


def sample(pipeline: SamplingPipeline, seeds: range, batch_size: int) -> Tensor:
    """Samples images (N, 3, H, W) uint8 of all classes in turn, one for each seed."""
    labels = sample_labels("equal", len(seeds), pipeline.model.config.num_classes, 0)
    batches = [slice(i, i + batch_size) for i in range(0, len(seeds), batch_size)]
    return torch.cat([pipeline.images(labels[batch], seeds[batch]) for batch in batches])


def seeds_of_groups(run: str, num_groups: int, num_images: int) -> list[range]:
    """Returns the image seeds of each group; runs with different seeds share none."""
    (number,) = re.findall(r"-(\d+)$", run) or (0,)
    first = int(number) * num_groups * num_images
    return [range(first + i * num_images, first + (i + 1) * num_images) for i in range(num_groups)]


def border_contrast(images: Tensor, patch: int) -> float:
    """Returns the mean difference between neighbouring pixels of two patches, relative to that
    between neighbours in one patch: 1 if the borders of patches are invisible.

    images: (N, 3, H, W) uint8
    patch: pixels per side
    """
    ratios = []
    for dim in (2, 3):
        steps = images.float().diff(dim=dim).abs().mean(dim=[d for d in range(4) if d != dim])
        is_border = torch.arange(1, len(steps) + 1) % patch == 0
        ratios.append(steps[is_border].mean() / steps[~is_border].mean())
    return float(sum(ratios) / 2)


def patch_pixels(pipeline: SamplingPipeline) -> int:
    return pipeline.model.config.patch_size * pipeline.vae.downsampling


def intervals_of(config: SamplesConfig, pipeline: SamplingPipeline) -> list[list[float]]:
    """Returns the guidance intervals. Raises UserError for other text than LOW-HIGH."""
    if not config.intervals:
        return [list(pipeline.settings.guidance_interval)]
    message = f"--intervals: got {' '.join(config.intervals)}, expected LOW-HIGH, such as 0.1-0.9"
    with reported_as(message, ValueError):
        pairs = [list(map(float, text.split("-"))) for text in config.intervals]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(message)
    return pairs


def measure(
    config: SamplesConfig, extractor: FeatureNetwork, real: dict[str, Statistics],
    opened: SamplingPipeline, hook: DropSmall, row: dict,
) -> dict:  # fmt: skip
    """Returns the passes, the KIDs, the border contrast and the mean experts per token of a row.

    "reporting" is the mean and the standard deviation of "groups", the KIDs of the groups.
    "choosing", and "reporting" of a single group, have the deviation between subsets.
    """
    counter, kids, contrasts, pipeline = Passes(), [], [], as_in(opened, row)
    hook.rows_per_token.clear()
    handle = pipeline.model.blocks[0].register_forward_hook(counter)
    groups = seeds_of_groups(row["run"], config.groups + 1, config.num_images)
    for group, seeds in enumerate(groups):
        pixels = sample(pipeline, seeds, config.batch_size)
        images = ImageSet(len(pixels), tuple(pixels.shape[2:]), lambda i, j, x=pixels: x[i:j])
        samples = collect(images, extractor, config.batch_size)
        statistics = real["reporting" if group else "choosing"]
        found = score(samples, statistics, ["kid"], config.kid_subset_size)
        kids.append((found["kid"], found["kid_std"]))
        contrasts.append(border_contrast(pixels, patch_pixels(pipeline)))
    handle.remove()
    values = [kid for kid, _ in kids[1:]]
    spread = stdev(values) if len(values) > 1 else kids[1][1]
    used = hook.rows_per_token or [row["experts_per_token"]]
    return {
        "passes": counter.images / (len(groups) * config.num_images),
        "choosing": list(kids[0]),
        "reporting": [mean(values), spread],
        "groups": values,
        "border_contrast": mean(contrasts),
        "mean_experts_per_token": sum(used) / len(used),
    }


def facts_of(config: SamplesConfig, pipeline: SamplingPipeline) -> dict:
    return {
        "images": config.num_images, "num_groups": config.groups,
        "kid_subset_size": config.kid_subset_size,
        "precision": str(next(pipeline.model.parameters()).dtype).removeprefix("torch."),
        "choose_by": str(config.choosing), "report_by": str(config.reporting),
        "checkpoint": pipeline.checkpoint.record.step,
        "checkpoint_sha256": pipeline.digests["checkpoint_sha256"],
    }  # fmt: skip


def draw(pipeline: SamplingPipeline, rows: list[dict], path: Path) -> None:
    """Draws a line of images for each number of steps, at the scale that the rows choose."""
    lines: dict[str, SamplingPipeline] = {}
    for row in sorted(rows, key=lambda row: (row["steps"], -row["choosing"][0])):
        lines[pluralize(row["steps"], "step")] = as_in(pipeline, row)
    seeds = range(PICTURED)
    images = torch.cat([sample(settings, seeds, PICTURED) for settings in lines.values()])
    write_png(captioned_rows(enlarge(images), list(lines)), path)


def open_statistics(name: str, path: Path, backbone: str, subset: int) -> Statistics:
    """Reads a file of real images."""
    message = f"--{name}: got {path}, expected a file of evaluate.py --precompute-reference"
    with reported_as(message, OSError):
        statistics = load_statistics(path)
    if statistics is None or "pool" not in statistics.features:
        raise UserError(message)
    if (got := statistics.info["backbone"]) != backbone:
        raise UserError(f"--{name} {path}: got statistics of {got}, expected {backbone}")
    if (got := len(statistics.features["pool"])) < subset:
        raise UserError(f"--{name} {path}: got {got} images, expected at least {subset}")
    return statistics


def parse_args() -> SamplesConfig:
    return parse_config(SamplesConfig, __doc__)


def main(config: SamplesConfig) -> None:
    if config.num_images < config.kid_subset_size:
        raise UserError(
            f"--num-images: got {config.num_images}, expected at least --kid-subset-size "
            f"({config.kid_subset_size})"
        )
    if max(config.reuse) > 1 and min(config.steps) == 1:
        raise UserError("--steps: got 1, expected at least 2 steps, so that --reuse has an effect")
    prepare_output("--output", config.output)
    for run in config.runs:
        read_log(Path(run))  # refuses a run that was changed
    extractor = load_extractor(config.backbone, None, open_processes().device)
    real = {
        name: open_statistics(name, getattr(config, name), extractor.name, config.kid_subset_size)
        for name in ("choosing", "reporting")
    }
    for shared, opened, hook in open_settings(config):
        grid = product(config.steps, intervals_of(config, opened), config.scales)
        settings = [
            shared | {"steps": steps, "scale": scale, "interval": interval}
            for steps, interval, scale in grid
        ]
        measured = partial(measure, config, extractor, real, opened, hook)
        rows = measure_missing(config.output, settings, measured, facts_of(config, opened))
        name = "-".join(map(str, filter(None, shared.values())))  # without a minimum weight of 0
        of_setting = [row for row in rows if shared.items() <= row.items()]
        draw(opened, of_setting, config.output.with_name(f"{name}.png"))


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
