"""One optimizer step: losses and gradients of its micro-batches, then the update.

The update changes the weights, the EMAs and the state of the routers.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from conditions import Conditions, drop_conditions, without_conditions
from diffusion import Objective
from latents.sources import Batch
from models import DiT
from runtime.errors import UserError
from training.auxiliary import Pass, block_at, listening
from training.engine import Engine


def take_step(
    engine: Engine,
    objective: Objective,
    micro_batches: Iterable[Batch],
    count: int,
    *,
    step: int,
    rate: float,
) -> dict[str, Tensor]:
    """Takes one optimizer step.

    micro_batches: `count` batches with "latents" (N, C, h, w) and the conditions of the images,
        consumed lazily: the next batch is fetched after the previous one has been processed
    step: number of the step, from 1
    rate: factor of the optimizer's learning rates

    Returns the terms of the loss, averaged over the micro-batches of this process, and the values
    of `Engine.optimizer_step`, by name: scalars, or one number per layer.
    """
    metrics: dict[str, Tensor] = {}
    observed: list[Tensor | None] = []
    buffers = versions_of_buffers(engine.model)
    for number, batch in enumerate(micro_batches):
        with engine.micro_step(is_last=number + 1 == count):
            terms = losses(engine, objective, batch)
            engine.backward((terms["loss"] + terms["aux_loss"]) / count)
        for name, value in terms.items():
            mean = value.detach() / count
            metrics[name] = metrics[name] + mean if name in metrics else mean
        observed.append(engine.model.observed)
    if changed := versions_of_buffers(engine.model) - buffers:
        raise UserError(
            f"{min(changed)[0]}: was changed by a forward pass, expected it in Router.update: "
            "checkpointing computes a block again, and processes would differ"
        )
    updated = engine.optimizer_step(step, rate)
    # Routers with state are updated from the mean over the micro-batches of all processes.
    if observed[0] is not None:
        total = engine.dist.sum(torch.stack(observed).sum(0))  # (L, ...)
        mean = total / (count * engine.dist.world_size)
        update_routers(engine.model, mean, updated["skipped"])
    return {**metrics, **updated}


def versions_of_buffers(model: DiT) -> set[tuple[str, int, int]]:
    """Returns the name, the object and the number of changes of each buffer."""
    return {(name, id(value), value._version) for name, value in model.named_buffers()}


def update_routers(model: DiT, observed: Tensor, skipped: Tensor | bool = False) -> None:
    """Updates the state of the routers after an optimizer step.

    observed: (L, ...) mean of `DiT.observed` over the micro-batches and processes of the step
    skipped: whether the optimizer step was skipped, as after a non-finite gradient
    """
    gates = [block.moe.gate for block in model.blocks if block.moe is not None]
    for gate, statistics in zip(gates, observed, strict=True):
        gate.update(statistics, skipped)


def losses(engine: Engine, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """Returns the terms of the loss on a batch, by name.

    "loss" and "aux_loss" are scalars whose sum is minimised. "aux_loss" is the routers' loss plus
    the weighted losses of --auxiliary. The other terms, scalars or one number per layer, are only
    logged, among them the unweighted losses of --auxiliary.

    Conditions are dropped once, after times and noise are drawn, so that all conditional calls of
    the network get the same conditions. An objective that trains with classifier-free guidance also
    gets null conditions (`null_y`).

    If the sum is infinite or nan, both scalars and the gradients become nan, so that all processes
    skip the step.
    """
    model, auxiliary = engine.model, engine.config.auxiliary
    depth = len(model.blocks)
    drawn = objective.draw(batch["latents"])
    y = drop_conditions(model.conditions, batch, model.config.dropout)
    if objective.guides_in_training:
        drawn["null_y"] = without_conditions(model.conditions, batch)

    def ema_tokens(share: float, z: Tensor, t: Tensor) -> Tensor:
        """See `Pass.ema_tokens`."""
        tokens: dict[str, Tensor] = {}
        block = {"ema": block_at(share, depth)}
        with torch.no_grad(), engine.ema_weights(), listening(model, block, tokens):
            engine.network(z, t, y)
        return tokens["ema"]

    forward_pass = Pass(objective, batch, drawn.get("noise"), drawn.get("t"), ema_tokens)
    targets = [auxiliary_loss.target(forward_pass) for auxiliary_loss in auxiliary]
    blocks = {a.name: a.block(depth) for a in auxiliary if a.block(depth) is not None}

    def recorded_network(z: Tensor, t: Tensor, y: Conditions) -> tuple[Tensor, Tensor]:
        forward_pass.z = z
        forward_pass.output, aux_loss = engine.network(z, t, y)
        return forward_pass.output, aux_loss

    with listening(model, blocks, forward_pass.tokens, project=True):
        network = recorded_network if auxiliary else engine.network
        terms = objective.losses(network, batch["latents"], y, **drawn)
    for auxiliary_loss, target in zip(auxiliary, targets, strict=True):
        term = auxiliary_loss.loss(forward_pass, target)
        terms[auxiliary_loss.name] = term
        terms["aux_loss"] = terms["aux_loss"] + auxiliary_loss.weight * term
    loss, aux_loss = terms["loss"].mean(), terms["aux_loss"]
    one_or_nan = torch.where((loss + aux_loss).isfinite(), 1.0, math.nan)
    logged = {name: term.detach().mean() for name, term in terms.items()}  # each (N,) or scalar
    logged |= model.router_metrics
    return {**logged, "loss": one_or_nan * loss, "aux_loss": one_or_nan * aux_loss}
