r"""Measures how long a token keeps its experts while images are sampled.

    python -m experiments.persistence --runs results/experiments/runs/*-0 \
        --val-path data/test-latents --output results/experiments/persistence.jsonl

Each run adds two rows to OUTPUT, for its trained router and for newly initialised gates in the same
model. Each row has a number for each layer, the share of a token's experts that it also has
    next     at the next step
    ends     at the last step, of those at the first step
    other    in another image, of another class, at the same place and step
    chance   if all tokens chose independently of each other, by the load of the experts
`report.py` makes the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from analysis.recorder import listen
from evaluation.heldout import latent_batches
from experiments.rows import measure_missing, read_log
from experiments.specialisation import randomise_gates
from latents.cache import CachedLatents
from latents.loading import evenly_spaced
from options.parts import option
from routers import Routing
from runtime.errors import run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from sampling.pipeline import SamplingPipeline, open_pipeline
from sampling.sampling_config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class PersistenceConfig:
    runs: tuple[str, ...] = option(help="run folders of sparse flows")
    val_path: str = option(help="held-out latents, to which new thresholds are fitted")
    steps: int = option(25, ge=2, help="sampling steps, by Euler without guidance")
    num_images: int = option(100, ge=2, help="images to sample, of all classes in turn")
    output: Path = option(
        Path("results/experiments/persistence.jsonl"), help="file of the rows"
    )  # fmt: skip


def choices(pipeline: SamplingPipeline, num_images: int) -> Tensor:
    """Samples images; returns which experts the tokens have, (S, L, N, T, E) bool.

    S steps, L sparse layers, N images, T tokens, E experts
    """
    classes, experts = pipeline.model.config.num_classes, pipeline.model.config.experts_per_layer
    steps: list[list[Tensor]] = [[]]

    def count(layer: int, x: Tensor, routing: Routing) -> None:
        chosen = torch.zeros(x.shape[0] * x.shape[1], experts, dtype=torch.bool)
        chosen[routing.token.cpu(), routing.expert.cpu()] = True
        steps[-1].append(chosen.view(*x.shape[:2], experts))

    labels = [image % classes for image in range(num_images)]
    with listen(pipeline.model, count):
        pipeline.latents(labels, range(num_images), callback=lambda _: steps.append([]))
    return torch.stack([torch.stack(layers) for layers in steps if layers])


def shares(chosen: Tensor) -> Iterator[tuple[str, list[float]]]:
    """Yields the numbers of a row, each a list over the layers, from choices (S, L, N, T, E)."""
    pairs = {
        "next": (chosen[:-1], chosen[1:]),
        "ends": (chosen[:1], chosen[-1:]),
        "other": (chosen, chosen.roll(1, dims=2)),
    }
    for name, (one, two) in pairs.items():
        yield name, ((one & two).sum((0, 2, 3, 4)) / one.sum((0, 2, 3, 4))).tolist()
    has = chosen.float().mean((0, 2, 3))  # (L, E)
    yield "chance", (has.square().sum(1) / has.sum(1)).tolist()


def measure(run: str, images: CachedLatents, config: PersistenceConfig, row: dict) -> dict:
    settings = {"sampler": "euler", "num_sampling_steps": config.steps, "cfg_scale": 1.0}
    pipeline = open_pipeline(SamplingConfig(ckpt=run, precision="fp32", **settings))
    if row["router"] == "random":
        chosen = evenly_spaced(len(images), 200)
        images.norm = pipeline.vae.norm
        (batch,) = latent_batches(images, chosen, None, pipeline.class_names, batch_size=200)
        device = next(pipeline.model.parameters()).device
        latents, labels = (batch[name].to(device) for name in ("latents", "label"))
        with torch.no_grad():
            randomise_gates(pipeline.model, latents, labels, spans=False)
    return dict(shares(choices(pipeline, config.num_images)))


def parse_args() -> PersistenceConfig:
    return parse_config(PersistenceConfig, __doc__)


def main(config: PersistenceConfig) -> None:
    prepare_output("--output", config.output)
    for run in config.runs:
        read_log(Path(run))  # refuses a run that was changed
    images = CachedLatents(config.val_path, "--val-path")
    facts = {"steps": config.steps, "images": config.num_images}
    for run in config.runs:
        rows = [{"run": Path(run).name, "router": router} for router in ("trained", "random")]
        measure_missing(config.output, rows, partial(measure, run, images, config), facts)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
