"""Learning rate schedules: factors of the optimizer's learning rates, one class per schedule.

    schedule = SCHEDULES["cosine"](lr_floor=0.1)
    rate_factor(schedule, warmup_steps, done, total_steps)

To add a schedule, write a subclass of `Schedule` with `factor`, and add its name to `SCHEDULES`.
"""

import math

from options.parts import Component, option


class Schedule(Component):
    """Constant after the warm-up; the base class of the other schedules."""

    def factor(self, done: int, warmup: int, total: int) -> float:
        """Returns the factor in step number `done`, from 1, with `warmup` < `done` <= `total`."""
        return 1.0


class Decaying(Schedule):
    """Decays to `lr_floor` at the last step; a subclass defines how, from 1 to 0."""

    lr_floor: float = option(
        0.0, ge=0, lt=1, metavar="FRACTION",
        help="final learning rate, as a fraction of --lr",
    )  # fmt: skip

    def factor(self, done: int, warmup: int, total: int) -> float:
        return self.lr_floor + (1 - self.lr_floor) * self.fall(done, warmup, total)

    def fall(self, done: int, warmup: int, total: int) -> float:
        raise NotImplementedError


class Cosine(Decaying):
    def fall(self, done: int, warmup: int, total: int) -> float:
        return (1 + math.cos(math.pi * progress(done, warmup, total))) / 2


class Linear(Decaying):
    def fall(self, done: int, warmup: int, total: int) -> float:
        return 1 - progress(done, warmup, total)


class Trapezoid(Decaying):
    """Constant, then a linear decay at the end (arXiv 2405.18392)."""

    decay_share: float = option(
        0.2, gt=0, le=1,
        help="fraction of the steps over which the learning rate decays",
    )  # fmt: skip

    def fall(self, done: int, warmup: int, total: int) -> float:
        return min(1.0, (total - done) / (self.decay_share * total))


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Schedule, "cosine": Cosine, "linear": Linear, "trapezoid": Trapezoid,
}  # fmt: skip


def progress(done: int, warmup: int, total: int) -> float:
    """Returns the fraction of the steps after the warm-up, in (0, 1]."""
    return (done - warmup) / max(1, total - warmup)


def rate_factor(schedule: Schedule, warmup: int, done: int, total: int) -> float:
    """Returns the factor for step number `done`, from 1: linear warm-up, then the schedule."""
    if done <= warmup:
        return min(1.0, done / max(1, warmup))
    return schedule.factor(done, warmup, total)
