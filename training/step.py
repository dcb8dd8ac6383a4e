"""One optimizer step: losses and gradients of its micro-batches, then the update.

The update changes the weights, the EMAs and the state of the routers.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from conditions import Conditions
from diffusion import Objective
from latents.sources import Batch
from runtime.errors import reported_as
from runtime.processes import Distributed
from training.auxiliary import AuxiliaryLoss, Pass, block_at, listening
from training.engine import Engine


def take_step(
    engine: Engine,
    objective: Objective,
    micro_batches: Iterable[Batch],
    count: int,
    *,
    step: int,
    rate: float,
    dist: Distributed,
    auxiliary: Sequence[AuxiliaryLoss] = (),
) -> dict[str, Tensor]:
    """Takes one optimizer step.

    micro_batches: `count` batches with "latents" (N, C, h, w) and the conditions of the images,
        consumed lazily: the next batch is fetched after the previous one has been processed
    step: number of the step, from 1
    rate: factor of the optimizer's learning rates

    Returns the metrics of the step, scalars averaged over the micro-batches of this process.
    """
    metrics: dict[str, Tensor] = {}
    observed: list[Tensor | None] = []
    for number, batch in enumerate(micro_batches):
        with engine.micro_step(is_last=number + 1 == count):
            terms = losses(engine, objective, batch, auxiliary)
            engine.backward((terms["loss"] + terms["aux_loss"]) / count)
        for name, value in terms.items():  # each (N,) or scalar
            mean = value.detach().mean() / count
            metrics[name] = metrics[name] + mean if name in metrics else mean
        observed.append(engine.model.observed)
    updated = engine.optimizer_step(step, rate)
    if observed[0] is not None:  # routers with state use the mean over all processes
        total = dist.sum(torch.stack(observed).sum(0))  # (L, ...)
        engine.model.update_routers(total / (count * dist.world_size), updated["skipped"])
    return {**metrics, **updated}


def losses(
    engine: Engine, objective: Objective, batch: Batch, auxiliary: Sequence[AuxiliaryLoss] = ()
) -> dict[str, Tensor]:
    """Returns the terms of the loss on a batch, by name.

    "loss" and "aux_loss" are scalars whose sum is minimised. The other terms, (N,) or scalar, are
    only logged. "aux_loss" includes the weighted auxiliary losses, which are logged unweighted.

    This function draws times and noise, and then drops conditions. It drops them only once, so that
    all calls of the network on the batch get the same conditions.

    If the sum is infinite or nan, both scalars become nan. The gradients are then nan too, which
    makes all processes skip the step.
    """
    drawn = objective.draw(batch["latents"])
    y = engine.model.drop_conditions(batch)
    if objective.guides_in_training:
        drawn["none"] = engine.model.without_conditions(batch)

    def ema_tokens(share: float, z: Tensor, t: Tensor) -> Tensor:
        tokens: dict[str, Tensor] = {}
        block = {"": block_at(share, depth)}
        with torch.no_grad(), engine.ema_weights(), listening(engine.model, block, tokens):
            engine.network(z, t, y)
        return tokens[""]

    depth = len(engine.model.blocks)
    seen = Pass(objective, batch, drawn.get("noise"), drawn.get("t"), ema_tokens)
    targets = [one.target(seen) for one in auxiliary]
    blocks = {one.name: one.block(depth) for one in auxiliary if one.block(depth) is not None}

    def network(z: Tensor, t: Tensor, y: Conditions) -> tuple[Tensor, Tensor]:
        seen.z = z
        seen.output, aux_loss = engine.network(z, t, y)
        return seen.output, aux_loss

    with (
        reported_as("--objective: this PyTorch cannot compute its loss", NotImplementedError),
        listening(engine.model, blocks, seen.tokens, project=True),
    ):
        called = network if auxiliary else engine.network
        terms = objective.losses(called, batch["latents"], y, **drawn)
    for one, target in zip(auxiliary, targets, strict=True):
        terms[one.name] = one.loss(seen, target)
        terms["aux_loss"] = terms["aux_loss"] + one.weight * terms[one.name]
    loss, aux_loss = terms["loss"].mean(), terms["aux_loss"]
    one_or_nan = torch.where((loss + aux_loss).isfinite(), 1.0, math.nan)
    routers = engine.model.router_metrics
    return {**terms, **routers, "loss": one_or_nan * loss, "aux_loss": one_or_nan * aux_loss}
