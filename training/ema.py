"""Moving averages of the weights: each is a class in `EMAS`, and several can be kept at once.

    emas = make_emas(("exponential",), {"decay": (0.9999, 0.999)})
    for ema in emas:
        ema.start(weights)                        # a list of fp32 tensors
    ema.update(weights, step, skipped)            # after each optimizer step, from 1
    ema.averages                                  # like the weights
    emas = make_emas(("power",), {"length": (0.05, 0.1)})   # of which others can be rebuilt

To add one: a subclass of `EMA` with `kept` and `name`, and its name in `EMAS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.record import NOTED_SHARE
from parts import Part, make_part, option, options_of

PIECE = 2**26  # numbers that are swapped at a time


class EMA(Part, ABC):
    """An average of tensors that change; a subclass says how much of it a step keeps."""

    averages: Sequence[Tensor] = ()  # fp32, like the weights
    is_rebuilt_from = False  # whether its snapshots are kept, so as to rebuild others from them

    @property
    @abstractmethod
    def name(self) -> str:
        """What tells it from others: it becomes part of file names and of logged names."""

    @abstractmethod
    def kept(self, step: int) -> float:
        """The share of the average that step number `step`, from 1, keeps."""

    def start_share(self, steps: int) -> float:
        """The share of the average that after so many steps is still what it started from."""
        share = 1.0
        for step in range(1, steps + 1):
            if share < 1e-9:  # long before the last of millions of steps
                return 0.0
            share *= self.kept(step)
        return share

    def start(self, weights: Sequence[Tensor]) -> None:
        self.averages = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int, skipped: Tensor | None = None) -> None:
        """Moves towards the weights; a skipped step, a bool on the device, adds nothing."""
        share = 1 - self.kept(step)
        if skipped is not None:
            share = torch.where(skipped, 0.0, share)
        for average, weight in zip(self.averages, weights, strict=True):
            average.lerp_(weight, share)

    @torch.no_grad()
    def exchange(self, weights: Sequence[Tensor]) -> None:
        """Swaps the weights with the averages, a piece at a time."""
        for mine, average in zip(weights, self.averages, strict=True):
            parts = (tensor.view(-1).split(PIECE) for tensor in (mine, average))
            for own, other in zip(*parts, strict=True):
                kept = own.clone()
                own.copy_(other)
                other.copy_(kept)


class ExponentialEMA(EMA):
    """average <- decay average + (1 - decay) weights, as DiT's."""

    decay: float = option(0.9999, help="share of the average that a step keeps", least=0, below=1)
    warmup: bool = option(False, help="keep at most (1 + step) / (10 + step), as diffusers does")

    @property
    def name(self) -> str:
        return f"{self.decay:g}"

    def kept(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class PowerEMA(EMA):
    """Weights of step s count as s^gamma: its memory is a share of the run, however long that is.

    Karras et al. 2024 (arXiv 2312.02696), section 3.1. From two lengths, and snapshots of them in
    checkpoints, rebuild_ema.py makes any other length.
    """

    length: float = option(
        0.1, help="of the memory, sigma_rel: its standard deviation as a share of the run",
        above=0, below=0.28,
    )  # fmt: skip

    is_rebuilt_from = True

    @property
    def name(self) -> str:
        return f"power-{self.length:g}"

    def kept(self, step: int) -> float:
        return (1 - 1 / step) ** (gamma_of(self.length) + 1)


@cache
def gamma_of(length: float) -> float:
    """The exponent of a power-function average of that relative length (equation 6)."""
    return np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max().item()


EMAS: dict[str, type[EMA]] = {"exponential": ExponentialEMA, "power": PowerEMA}


def start_notes(emas: Sequence[EMA], steps: int) -> list[str]:
    """Notes on the EMAs that the initial weights still dominate after a number of steps."""
    return [
        f"after {steps:,} steps {share:.0%} of EMA {ema.name} will still be the initial weights, "
        "so samples look like noise (use a smaller --ema-decay, or --ema-warmup True)"
        for ema in emas
        if (share := ema.start_share(steps)) >= NOTED_SHARE
    ]


def make_emas(names: Sequence[str], options: Mapping[str, Sequence[Any]]) -> list[EMA]:
    """Makes the averages of those names: of each, one for every value of its options.

    ValueError for wrong names or options, and for two averages of one name.
    """
    emas: list[EMA] = []
    for name in names:
        own = {k: v for k, v in options.items() if k in options_of(EMAS[name])}
        for values in product(*own.values()):
            emas.append(make_part(EMAS, "ema", name, dict(zip(own, values, strict=True))))
    for unknown in options.keys() - {k for name in names for k in options_of(EMAS[name])}:
        known = sorted(f"ema_{k}" for name in names for k in options_of(EMAS[name]))
        raise ValueError(
            f"ema_{unknown}: given with {', '.join(names)}, expected {', '.join(known)}"
        )
    labels = [ema.name for ema in emas]
    if len(set(labels)) < len(labels):
        raise ValueError(f"ema: got {', '.join(labels)}, expected different ones")
    return emas
