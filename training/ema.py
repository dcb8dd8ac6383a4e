"""Exponential moving average of weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether no number is infinite or nan: a bool scalar on the tensors' device."""
    largest = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()], math.inf)
    return torch.stack(largest).isfinite().all()


@torch.no_grad()
def update_ema(
    averages: Iterable[Tensor],
    weights: Iterable[Tensor],
    decay: float,
    skipped: Tensor | None = None,
) -> None:
    """averages <- decay * averages + (1 - decay) * weights, in place, in one call.

    Where skipped, a bool scalar on the weights' device, is true, nothing changes; the device
    decides, so the host waits for nothing.
    """
    averages = list(averages)
    if skipped is None:
        torch._foreach_lerp_(averages, list(weights), 1 - decay)
    else:
        weight = torch.where(skipped, 0.0, 1 - decay)
        torch._foreach_lerp_(averages, list(weights), [weight] * len(averages))
