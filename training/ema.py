"""Moving averages of the weights: each is a class in `EMAS`, and several can be kept at once.

    emas = make_emas(("exponential",), {"decay": (0.9999, 0.999)})
    for ema in emas:
        ema.start(weights)                        # a list of fp32 tensors
    ema.update(weights, step, skipped)            # after each optimizer step, from 1
    ema.averages                                  # like the weights

To add one: a subclass of `EMA` with `kept` and `name`, and its name in `EMAS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from parts import Part, make_part, option, options_of


class EMA(Part, ABC):
    """An average of tensors that change; a subclass says how much of it a step keeps."""

    averages: Sequence[Tensor] = ()  # fp32, like the weights

    @property
    @abstractmethod
    def name(self) -> str:
        """What tells it from others: it becomes part of file names and of logged names."""

    @abstractmethod
    def kept(self, step: int) -> float:
        """The share of the average that step number `step`, from 1, keeps."""

    def start(self, weights: Sequence[Tensor]) -> None:
        self.averages = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int, skipped: Tensor | bool = False) -> None:
        """Moves towards the weights; a step that was skipped adds nothing."""
        share = 1 - self.kept(step)
        if torch.is_tensor(skipped):
            share = torch.where(skipped, 0.0, share)
        elif skipped:
            return
        for average, weight in zip(self.averages, weights, strict=True):
            average.lerp_(weight, share)


class ExponentialEMA(EMA):
    """average <- decay average + (1 - decay) weights, as DiT's."""

    decay: float = option(0.9999, help="share of the average that a step keeps", least=0, below=1)

    @property
    def name(self) -> str:
        return f"{self.decay:g}"

    def kept(self, step: int) -> float:
        return self.decay


EMAS: dict[str, type[EMA]] = {"exponential": ExponentialEMA}


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
        raise ValueError(f"ema_{unknown}: got it with {names}, expected {', '.join(known)}")
    labels = [ema.name for ema in emas]
    if len(set(labels)) < len(labels):
        raise ValueError(f"ema: got {', '.join(labels)}, expected different ones")
    return emas
