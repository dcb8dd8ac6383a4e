"""One optimizer step: its rate, the losses and gradients of its micro-batches, the update, the
routers' state."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion import Objective
from runtime.processes import Distributed
from training.config import StepConfig
from training.engine import Engine


def take_step(
    engine: Engine,
    objective: Objective,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    *,
    step: int,
    rate: float,
    dist: Distributed,
) -> dict[str, Tensor] | None:
    """Takes step number `step`, from 1; returns the scalars that it came to, over its micro-batches
    on this process, or None where fp16 gradients overflowed (see `Engine.optimizer_step`).

    micro_batches: `count` times latents (N, C, h, w) and labels (N,); one is asked for when the one
        before is done
    rate: what the optimizer's own rates are multiplied by
    """
    metrics: dict[str, Tensor] = {}
    observed: list[Tensor | None] = []
    for number, (x, labels) in enumerate(micro_batches):
        with engine.micro_step(is_last=number + 1 == count):
            terms = losses(engine, objective, x, labels)
            engine.backward((terms["loss"] + terms["aux_loss"]) / count)
        for name, value in terms.items():  # each (N,) or scalar
            mean = value.detach().mean() / count
            metrics[name] = metrics[name] + mean if name in metrics else mean
        observed.append(engine.model.observed)
    updated = engine.optimizer_step(step, rate, metrics["loss"])
    if updated is None:
        return None
    if observed[0] is not None:  # routers with a state: of all processes' micro-batches
        total = dist.sum(torch.stack(observed).sum(0))  # (L, ...)
        engine.model.update_routers(total / (count * dist.world_size), updated["skipped"])
    return {**metrics, **updated}


def losses(engine: Engine, objective: Objective, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The objective's terms on latents x (N, C, h, w), labels (N,): "loss" and "aux_loss", scalars
    whose sum is minimised, and what else is logged, (N,) or scalar.

    Where the sum is infinite or nan both are nan, and so are the gradients, which tells the other
    processes.
    """
    terms = objective.losses(engine.network, x, labels)
    loss, aux_loss = terms["loss"].mean(), terms["aux_loss"]
    one_or_nan = torch.where((loss + aux_loss).isfinite(), 1.0, math.nan)
    routers = engine.model.router_metrics
    return {**terms, **routers, "loss": one_or_nan * loss, "aux_loss": one_or_nan * aux_loss}


def rate_factor(config: StepConfig, done: int, total_steps: int) -> float:
    """The factor of step number `done`, from 1: linear warm-up, then --lr-schedule."""
    warmup = config.warmup_steps
    if done <= warmup or config.lr_schedule == "constant":
        return min(1.0, done / max(1, warmup))
    share = (done - warmup) / max(1, total_steps - warmup)  # in (0, 1]
    if config.lr_schedule == "linear":
        return 1 - share
    if config.lr_schedule == "trapezoid":  # arXiv 2405.18392, with a straight fall
        return min(1.0, (total_steps - done) / (config.decay_share * total_steps))
    return (1 + math.cos(math.pi * share)) / 2


def jump_note(config: StepConfig, done: int, before: int, total_steps: int) -> str | None:
    """A line where a run of `before` steps goes on to more of them, and its rate jumps up.

    done: the steps that it has taken
    """
    fallen, now = (rate_factor(config, done, total) for total in (before, total_steps))
    if not done or now <= 1.01 * fallen:
        return None
    return (
        f"note: the rate fell to {config.lr * fallen:.2g} by step {done}, as in a run of {before} "
        f"steps; for {total_steps} it jumps to {config.lr * now:.2g}"
    )
