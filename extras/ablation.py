"""What an expert does: the experts are left out one by one, and the results compared.

    with expert_removed(model, layer=3, expert=5):  # its rows add nothing
        images = pipeline.images(labels, seeds)

Shape legend: n held-out images, N drawn images
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from analysis.sparse_layers import SparseLayer, sparse_layers
from checkpoints import Checkpoint
from checkpoints.meta import meta_model
from latents.loading import evenly_spaced
from runtime.errors import UserError, check_same
from runtime.files import write_durably
from runtime.progress import progress
from sampling.pipeline import SamplingPipeline, batches

FORMAT = 1
# Routers whose weights and buffers have one row per expert.
LINEAR_ROUTERS = ("topk", "sigmoid", "expert_choice")


class Outcome(NamedTuple):
    """What a model does on fixed images and noise."""

    losses: Tensor | None  # (n,) held-out losses
    images: Tensor  # (N, 3, H, W) uint8


class Ablation(NamedTuple):
    """Change when an expert is left out."""

    layer: int  # among the sparse layers
    expert: int
    loss: float | None  # mean change of the held-out loss
    loss_error: float | None  # standard error of that mean over the images
    pictures: float  # root mean square change of the pixels, 0 to 1, mean over the pictures


def expert_removed(model: nn.Module, layer: int, expert: int) -> AbstractContextManager:
    """Context in which the rows of an expert add nothing to a layer's output.

    model: a DiT, or a sparse transformer of diffusers
    layer: number among the sparse layers, from 0

    The routing stays the same, so a token keeps the weights of its other experts. Blocks that
    torch.compile has compiled ignore the context.
    """
    return sparse_layers(model)[layer].without(expert)


def leave_one_out(
    layers: Sequence[SparseLayer], measure: Callable[[], Outcome], done: Sequence[Ablation] = ()
) -> Iterator[Ablation]:
    """Yields the change for each routed expert of each layer, in order, without those in `done`."""
    finished = {(row.layer, row.expert) for row in done}
    pairs = [
        (number, expert)
        for number, layer in enumerate(layers)
        for expert in range(layer.num_experts)
    ]
    todo = [pair for pair in pairs if pair not in finished]
    whole = measure() if todo else None
    bar = progress(todo, initial=len(finished), total=len(pairs), unit="expert")
    for layer, expert in bar:
        with layers[layer].without(expert):
            yield Ablation(layer, expert, *change(measure(), whole))


def least_damage(rows: Sequence[Ablation], number: int, shape: tuple[int, int]) -> list[list[int]]:
    """Returns, for each layer, the experts whose removal raises the held-out loss least.

    shape: (sparse layers, experts per layer) of the model; each expert needs a row with a loss
    """
    if any(row.loss is None for row in rows):
        raise UserError("got an ablation of pictures only, expected held-out losses")
    layers, experts = shape
    losses = {(row.layer, row.expert): row.loss for row in rows}
    if losses.keys() != {*product(range(layers), range(experts))}:
        raise UserError(
            f"got an ablation of {len(losses)} experts, expected {layers} layers x {experts}; run "
            "expert_ablation.py again to finish it"
        )
    return [
        sorted(range(experts), key=lambda expert: losses[layer, expert])[:number]
        for layer in range(layers)
    ]


def drop_experts(source: Checkpoint, dropped: Sequence[Sequence[int]]) -> Checkpoint:
    """Returns the model without some routed experts; the router chooses among the others.

    dropped: experts of each sparse layer, the same number in each
    The router must be a linear gate.
    """
    config, state_dict = source.config, dict(source.state_dict)
    if not config.num_experts or config.router.name not in LINEAR_ROUTERS:
        got = config.router.name if config.num_experts else "a dense model"
        raise ValueError(f"router: got {got}, expected {', '.join(LINEAR_ROUTERS)}")
    if (number := len(dropped[0])) > (most := config.num_experts - config.num_experts_per_tok):
        raise ValueError(f"got {number} experts, expected at most {most}")
    smaller = replace(config, num_experts=config.num_experts - number)
    of_experts = {*meta_model(config).expert_parameters()}
    for layer, gone in zip(config.sparse_blocks, dropped, strict=True):
        kept = torch.tensor([i for i in range(config.num_experts) if i not in gone])
        for name, weight in state_dict.items():
            is_gate = name.startswith(f"blocks.{layer}.moe.gate.")
            is_here = name.startswith(f"blocks.{layer}.moe.experts.")
            if is_gate or is_here and name.removesuffix("_scale") in of_experts:
                state_dict[name] = weight[kept]  # (E, ...)
    record = replace(source.record, config=smaller)
    return replace(source, state_dict=state_dict, record=record)


def change(without: Outcome, whole: Outcome) -> tuple[float | None, float | None, float]:
    """Returns the last three fields of `Ablation`."""
    pixels = (without.images.float() - whole.images.float()) / 255
    pictures = pixels.square().flatten(1).mean(1).sqrt().mean().item()
    if whole.losses is None:
        return None, None, pictures
    losses = without.losses - whole.losses
    return losses.mean().item(), (losses.std() / len(losses) ** 0.5).item(), pictures


def checkpoint_outcome(
    pipeline: SamplingPipeline, num_images: int, seed: int, batch_size: int,
    losses: Callable[[], list[float]] | None,
) -> Callable[[], Outcome]:  # fmt: skip
    """Returns a function that draws images of evenly spaced classes and computes the losses.

    losses: returns the loss of each held-out image; None: compare only the images
    """
    classes = evenly_spaced(len(pipeline.class_names), num_images)
    labels = [classes[i * len(classes) // num_images] for i in range(num_images)]
    requests = batches(labels, 1, seed, batch_size)

    def measure() -> Outcome:
        values = None if losses is None else torch.tensor(losses(), dtype=torch.float64)
        return Outcome(values, torch.cat([pipeline.images(*request) for request in requests]))

    return measure


def save_ablation(path: Path, settings: dict, rows: Sequence[Ablation]) -> None:
    """Writes a JSON line with the settings, and one for each row."""
    lines = [{"format": FORMAT, "settings": settings}, *(row._asdict() for row in rows)]
    write_durably(path, "".join(json.dumps(line) + "\n" for line in lines))


def load_ablation(path: Path, expected: dict | None = None) -> tuple[dict, list[Ablation]]:
    """Reads a file of `save_ablation`; returns settings and rows.

    expected: settings that the file must have
    """
    try:
        first, *lines = map(json.loads, path.read_text().splitlines())
        found, settings = first["format"], first["settings"]
        rows = [Ablation(**line) for line in lines] if found == FORMAT else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the file of expert_ablation.py ({error!s:.100})") from None
    if found != FORMAT:
        raise UserError(f"{path}: got format {found}, expected {FORMAT}; run expert_ablation.py")
    if expected is not None:
        message = f"{path} has other settings; delete it, or use another --output"
        check_same(message, json.loads(json.dumps(expected)), settings)
    return settings, rows
