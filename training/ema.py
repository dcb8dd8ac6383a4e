"""Exponential moving average of weights, in one call."""

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # numbers; grouped products on a GPU want weights that start at 16 bytes


@torch.no_grad()
def flatten_parameters(model: nn.Module) -> Tensor:
    """Moves all parameters of a model into one tensor, of which they become parts; returns it.

    They must be of one type and on one device. What is done to all of them, such as their moving
    average, is then one operation on the flat tensor.
    """
    parameters = list(model.parameters())
    flat = parameters[0].new_zeros(sum(padded(p.numel()) for p in parameters))
    for parameter, part in zip(parameters, parts_of(flat, model), strict=True):
        parameter.data = part.copy_(parameter)
    return flat


def parts_of(flat: Tensor, model: nn.Module) -> list[Tensor]:
    """The parts of a flat tensor that stand for the parameters of a model, in their shapes."""
    parts, start = [], 0
    for parameter in model.parameters():
        parts.append(flat[start : start + parameter.numel()].view_as(parameter))
        start += padded(parameter.numel())
    return parts


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@torch.no_grad()
def update_ema(average: Tensor, weights: Tensor, decay: float, skipped: Tensor | bool) -> None:
    """average <- decay * average + (1 - decay) * weights, in place.

    Where skipped is true, nothing changes. A bool scalar on the weights' device is not waited for.
    """
    if isinstance(skipped, bool):
        average.lerp_(weights, 0.0 if skipped else 1 - decay)
    else:
        average.lerp_(weights, torch.where(skipped, 0.0, 1 - decay))
