r"""Writes the experts that runs choose most, by layer, class and position.

    python -m experiments.choice_tables --runs results/router/runs/topk-8e-3-400-0 \
        --latents-path data/train-latents

RUN/choices.safetensors has the tensor "experts" (L, C + 1, T, K); the last class stands for images
without a class. The router `table` of plugins.py reads the file. Each image is noised to ten times
of equal probability in training, and passed with its class and without.

The table is not balanced: the printed load of the busiest expert, relative to the mean, tells how
far it is from that.

Shape legend:
    N batch, L layers, C classes, T tokens per image, E experts, K experts per token
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from analysis.recorder import listen
from checkpoints import build_model, read_checkpoint
from evaluation.heldout import latent_batches
from experiments.rows import read_log
from experiments.specialisation import middles
from latents.cache import CachedLatents
from latents.loading import evenly_spaced
from models import DiT
from options.parts import option
from routers import Routing, expert_load
from runtime.errors import run_main
from runtime.flags import parse_config
from runtime.tensor_file import write_tensors


@dataclass(frozen=True, kw_only=True)
class ChoiceTablesConfig:
    runs: tuple[Path, ...] = option(help="run folders of flows whose tokens have K experts each")
    latents_path: str = option(help="the training latents")
    num_images: int = option(1000, ge=1, help="number of latents to use, evenly spaced")


@torch.no_grad()
def count_by_class_and_position(
    model: DiT, latents: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the counts of the choices of a model on latents (N, C, h, w), and the sums of their
    weights: (L, C + 1, T, E)."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    layers, tokens = len(config.sparse_blocks), config.num_patches
    shape = layers, config.num_classes + 1, tokens, config.num_experts
    counts, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for y in (labels, torch.full_like(labels, config.num_classes)):

        def count(layer: int, _: Tensor, routing: Routing, y: Tensor = y) -> None:
            expert = routing.expert.view(len(y), tokens, -1)  # (N, T, K)
            places = y[:, None, None], torch.arange(tokens)[:, None], expert
            counts[layer].index_put_(places, torch.tensor(1), accumulate=True)
            weight = routing.weight.view_as(expert)
            weights[layer].index_put_(places, weight, accumulate=True)

        with listen(model, count):
            for time in middles(spans=False):
                noise = torch.randn(latents.shape, generator=generator)
                model((1 - time) * latents + time * noise, time.expand(len(y)), y)
    return counts, weights


def main(config: ChoiceTablesConfig) -> None:
    images = CachedLatents(config.latents_path, "--latents-path")
    chosen, norm = evenly_spaced(len(images), config.num_images), images.norm
    for run in config.runs:
        read_log(run)  # refuses a run that was changed
        checkpoint = read_checkpoint(run)
        images.norm = checkpoint.record.norm or norm
        model, names = build_model(checkpoint), list(checkpoint.record.class_names)
        batches = latent_batches(images, chosen, None, names, batch_size=250)
        counts = sum(
            count_by_class_and_position(model, one["latents"], one["label"])[0] for one in batches
        )
        experts = counts.topk(model.config.num_experts_per_tok, dim=-1).indices  # (L, C + 1, T, K)
        write_tensors(run / "choices.safetensors", {"experts": experts}, {})
        loads = (expert_load(layer.flatten(), model.config.num_experts) for layer in experts)
        print(f"{run}: load of the busiest expert", *(f"{load.max():.2f}" for load in loads))


def parse_args() -> ChoiceTablesConfig:
    return parse_config(ChoiceTablesConfig, __doc__)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
