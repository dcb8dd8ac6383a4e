"""The learning rate over the steps of a run, as a factor of the optimizer's own rates."""

import math

from training.config import StepConfig


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
