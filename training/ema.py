"""Moving averages of the weights, one class per kind; a run can track several at once.

    ema = EMAS["exponential"](decay=0.999)
    ema.start(weights)                            # fp32 tensors
    ema.update(weights, step, skipped)            # after each optimizer step, from 1
    ema.averages                                  # like the weights

To add a kind of average, write a subclass of `EMA` with `decay_at` and `name`, and add it to
`EMAS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from options.parts import Component, option

PIECE = 2**26  # elements that are swapped at a time


class EMA(Component, ABC):
    """Base class of moving averages; a subclass defines the decay of each step."""

    averages: Sequence[Tensor] = ()  # fp32, with the shapes of the weights
    start_share = 1.0  # fraction of the averages that the weights of `start` make up

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique name of this EMA, used in file names and metric names."""

    @abstractmethod
    def decay_at(self, step: int) -> float:
        """Returns the fraction of the average that step number `step`, from 1, keeps."""

    def initial_fraction(self, steps: int) -> float:
        """Returns the fraction of the average that the initial weights make up after `steps`."""
        fraction = 1.0
        for step in range(1, steps + 1):
            if fraction < 1e-9:  # ends the loop early for runs of millions of steps
                return 0.0
            fraction *= self.decay_at(step)
        return fraction

    def start(self, weights: Iterable[Tensor]) -> None:
        self.averages = [weight.detach().clone() for weight in weights]
        self.start_share = 1.0

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor], step: int, skipped: Tensor | None = None) -> None:
        """Moves the averages towards the weights.

        skipped: bool on the device; True leaves the averages unchanged
        """
        decay = self.decay_at(step)
        self.start_share *= decay
        new = 1 - decay
        if skipped is not None:
            new = torch.where(skipped, 0.0, new)
        for average, weight in zip(self.averages, weights, strict=True):
            average.lerp_(weight, new)

    @torch.no_grad()
    def exchange(self, weights: Iterable[Tensor]) -> None:
        """Swaps the weights with the averages, in pieces to save memory."""
        for weight, average in zip(weights, self.averages, strict=True):
            pieces = (tensor.view(-1).split(PIECE) for tensor in (weight, average))
            for a, b in zip(*pieces, strict=True):
                copy = a.clone()
                a.copy_(b)
                b.copy_(copy)


class ExponentialEMA(EMA):
    """average <- decay average + (1 - decay) weights, as in DiT."""

    decay: float = option(0.9999, help="fraction of the average that a step keeps", ge=0, lt=1)
    warmup: bool = option(
        False, help="limit the decay to (1 + step) / (10 + step), as diffusers does"
    )

    @property
    def name(self) -> str:
        return f"{self.decay:g}"

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class PowerEMA(EMA):
    """Power-function average, in which the weights after step s count as s^gamma.

    The averaging window is a fixed fraction of the run so far (Karras et al. 2024, arXiv
    2312.02696, section 3.1).
    """

    length: float = option(
        0.1, help="width sigma_rel of the averaging window, as a fraction of the run",
        gt=0, lt=0.28,
    )  # fmt: skip

    @property
    def name(self) -> str:
        return f"power-{self.length:g}"

    def decay_at(self, step: int) -> float:
        return (1 - 1 / step) ** (gamma_of(self.length) + 1)


@cache
def gamma_of(length: float) -> float:
    """Returns the exponent of a power-function average of this relative length (equation 6)."""
    return np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max().item()


class Weights(EMA):
    """The weights themselves, which a checkpoint has instead of an average with --ema none."""

    name = "none"

    def decay_at(self, step: int) -> float:
        return 0.0

    def start(self, weights: Iterable[Tensor]) -> None:
        self.averages, self.start_share = [weight.detach() for weight in weights], 0.0

    def update(self, weights: Iterable[Tensor], step: int, skipped: Tensor | None = None) -> None:
        pass

    def exchange(self, weights: Iterable[Tensor]) -> None:
        pass


EMAS: dict[str, type[EMA]] = {"exponential": ExponentialEMA, "power": PowerEMA}
