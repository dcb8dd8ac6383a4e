r"""Measures how the held-out loss changes without some experts of each layer.

    python expert_ablation.py --ckpt assets/demo --latents-path data/choosing-latents \
        --output results/demo-ablation.jsonl
    python -m experiments.dropping --ckpt assets/demo --ablation results/demo-ablation.jsonl \
        --choosing-latents data/choosing-latents --latents-path data/reporting-latents \
        --output results/dropping.jsonl

The experts to drop are those with the least damage (`expert_ablation.py`), the smallest of a score
on the choosing images (`Scores`), or random ones. The smaller models are those of export.py
--drop-experts; --silence takes the routers that this does not know. Each adds a row to OUTPUT, and
`report.py` makes the table.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.sparse_layers import sparse_layers
from checkpoints import Checkpoint, build_model
from evaluation.heldout import held_out_losses, latent_batches, open_held_out
from experiments.rows import measure_missing, read_log
from extras.ablation import drop_experts, least_damage, load_ablation
from latents.sources import Batch
from models import DiT
from moe import Experts
from options.parts import option
from routers import Routing
from runtime.errors import UserError, run_main
from runtime.files import atomic_folder, prepare_output
from runtime.flags import parse_config
from sampling.formats import FORMATS, public_checkpoint
from sampling.generate import objective_of
from sampling.pipeline import SamplingPipeline, open_checkpoint, open_pipeline
from sampling.sampling_config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class DroppingConfig(SamplingConfig):
    ckpt: str = option(group="model", help="a sparse model")
    ablation: Path = option(group="experts", help="file of expert_ablation.py on choosing images")
    dropped: tuple[int, ...] = option((1, 2, 3), ge=1, help="numbers of experts per layer to drop")
    draws: int = option(3, ge=1, help="number of random choices")
    silence: bool = option(
        False, help="the router still chooses these experts, but their rows add nothing"
    )
    save: Path | None = option(None, help="folder for the smaller models, RUN-CHOICE-DROPPED")
    choosing_latents: str = option(group="images", help="cached latents that determine the scores")
    latents_path: str = option(help="other cached latents, on which the losses are reported")
    num_images: int = option(500, ge=20, help="number of images of each")
    output: Path = option(group="output", help="file of the rows")


def open_batches(pipeline: SamplingPipeline, path: str, config: DroppingConfig) -> list[Batch]:
    images, indices, _ = open_held_out(pipeline, None, path, config.num_images)
    names = pipeline.class_names
    return [*latent_batches(images, indices, pipeline.vae, names, batch_size=config.batch_size)]


class Scores(NamedTuple):
    """Scores (L, E) of the routed experts, from their rows during some forward passes."""

    load: np.ndarray  # number of rows
    output: np.ndarray  # sum over the rows of |weight * output|
    reap: np.ndarray  # mean over the rows of |weight * output| (REAP, arXiv 2510.13999)


@torch.no_grad()
def scores_of(model: DiT, losses: Callable[[], object]) -> Scores:
    """Returns the scores while `losses` computes."""
    layers = [block.moe.experts for block in model.blocks if block.moe is not None]
    load, output = torch.zeros(2, len(layers), model.config.experts_per_layer, dtype=torch.double)

    def add(layer: int, experts: Experts, x: Tensor, routing: Routing) -> None:
        rows = torch.arange(len(routing.token), device=x.device)
        alone = routing._replace(token=rows, per_token=1)
        norm = experts.forward(x[routing.token], alone).norm(dim=1)  # (R,)
        expert = routing.expert.cpu()
        load[layer] += expert.bincount(minlength=len(load[layer]))
        output[layer].index_add_(0, expert, norm.cpu().double())

    with ExitStack() as hooks:
        for layer, experts in enumerate(layers):
            hook = experts.register_forward_hook(lambda m, inputs, _, n=layer: add(n, m, *inputs))
            hooks.enter_context(hook)
        losses()
    found = load, output, output / load.clamp_min(1)
    return Scores(*(score[:, : model.config.num_experts].numpy() for score in found))


def choices_of(
    number: int, ablation: list, scores: Scores, draws: int
) -> dict[tuple[str, int], list[list[int]]]:
    """Returns the experts of each layer to drop, by kind of choice and draw."""
    ranked = {(name, 0): score for name, score in scores._asdict().items()}
    for draw in range(draws):
        ranked["random", draw] = np.random.default_rng(draw).random(scores.load.shape)
    found = {("damage", 0): least_damage(ablation, number, scores.load.shape)}
    return found | {kind: one.argsort(1)[:, :number].tolist() for kind, one in ranked.items()}


def losses_without(
    dropped: list[list[int]], pipeline: SamplingPipeline, source: Checkpoint | None,
    batches: list[Batch],
) -> np.ndarray:  # fmt: skip
    """Returns the loss of each image without these experts of each layer.

    source: checkpoint of the model; None: the experts' rows add nothing
    """
    objective = objective_of(pipeline.settings)
    if source is not None:
        weight = next(pipeline.model.parameters())
        smaller = build_model(drop_experts(source, dropped), weight.device, weight.dtype)
        return np.array(held_out_losses(smaller, objective, batches)[0])
    with ExitStack() as silenced:
        for layer, experts in zip(sparse_layers(pipeline.model), dropped, strict=True):
            for expert in experts:
                silenced.enter_context(layer.without(expert))
        return np.array(held_out_losses(pipeline.model, objective, batches)[0])


def parse_args() -> DroppingConfig:
    return parse_config(DroppingConfig, __doc__)


def main(config: DroppingConfig) -> None:
    if config.save and config.silence:
        raise UserError("--save: has no effect with --silence, which leaves the model as it is")
    prepare_output("--output", config.output)
    read_log(Path(config.ckpt))  # refuses a run that was changed
    settings, ablation = load_ablation(config.ablation)
    pipeline = open_pipeline(config)
    digest = pipeline.digests["checkpoint_sha256"]
    is_comparable = not config.quantize and settings.get("precision") == pipeline.precision
    if is_comparable and settings.get("checkpoint_sha256", digest) != digest:
        raise UserError(f"--ablation: {config.ablation} is of other weights than {config.ckpt}")
    objective = objective_of(pipeline.settings)
    chosen_by, batches = (
        open_batches(pipeline, path, config)
        for path in (config.choosing_latents, config.latents_path)
    )
    scores = scores_of(
        pipeline.model, lambda: held_out_losses(pipeline.model, objective, chosen_by)
    )
    whole = np.array(held_out_losses(pipeline.model, objective, batches)[0])
    source = None if config.silence else open_checkpoint(config)
    run, names = Path(config.ckpt).name, ("choice", "draw", "dropped")
    choices = {
        (*kind, number): dropped for number in config.dropped
        for kind, dropped in choices_of(number, ablation, scores, config.draws).items()
    }  # fmt: skip

    def measure(row: dict) -> dict:
        choice, draw, number = key = tuple(row[name] for name in names)
        change = losses_without(choices[key], pipeline, source, batches) - whole
        if config.save and not draw:
            smaller = public_checkpoint(drop_experts(source, choices[key]))
            with atomic_folder(config.save / f"{run}-{choice}-{number}") as folder:
                FORMATS["safetensors"](smaller, folder)
        return {
            "of_layers": choices[key], "experts": pipeline.model.config.num_experts,
            "loss": whole.mean(), "change": change.mean(),
            "error": change.std(ddof=1) / len(change) ** 0.5,
        }  # fmt: skip

    shared = {"run": run, "quantize": config.quantize or "none", "silenced": config.silence}
    rows = [shared | dict(zip(names, key, strict=True)) for key in choices]
    facts = {
        "images": len(whole), "chosen_on": settings.get("images"),
        "reported_on": config.latents_path, "checkpoint_sha256": digest,
    }  # fmt: skip
    measure_missing(config.output, rows, measure, facts)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
