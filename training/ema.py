"""Exponential moving average of weights."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def update_ema(averages: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """averages <- decay * averages + (1 - decay) * weights, in place, in one fused pass."""
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
