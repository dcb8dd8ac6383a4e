"""Learning rate schedule, as a factor of the optimizer's learning rates."""

import math

from training.config import StepConfig


def rate_factor(config: StepConfig, done: int, total_steps: int) -> float:
    """Returns the factor for step number `done`, from 1: linear warm-up, then --lr-schedule."""
    warmup = config.warmup_steps
    if done <= warmup or config.lr_schedule == "constant":
        return min(1.0, done / max(1, warmup))
    progress = (done - warmup) / max(1, total_steps - warmup)  # in (0, 1]
    fall = (1 + math.cos(math.pi * progress)) / 2
    if config.lr_schedule == "linear":
        fall = 1 - progress
    if config.lr_schedule == "trapezoid":  # arXiv 2405.18392, with a linear decay
        fall = min(1.0, (total_steps - done) / (config.decay_share * total_steps))
    return config.lr_floor + (1 - config.lr_floor) * fall
