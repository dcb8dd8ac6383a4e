"""Initial weights of a model that is too large for one process, one module at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models import DiT, DiTConfig, position_embedding
from runtime.processes import reseed


def build_empty(
    config: DiTConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiT:
    """Makes a DiT of placeholders: parameters with stride 0, which use the memory of one element.

    The state of the routers, in fp32, is 0 as in a new model.
    """
    with torch.device("meta"):
        model = DiT(config)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            data = torch.zeros((1,) * weight.dim(), dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(data.expand(weight.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    model.pos_embed = position_embedding(config).to(device)
    return model


def allocate(weights: Iterable[nn.Parameter]) -> None:
    """Allocates memory for placeholders."""
    for weight in weights:
        weight.data = weight.data.contiguous()


def draw_initial_weights(
    config: DiTConfig, seed: int, write: Callable[[str, Tensor], None]
) -> None:
    """Calls write(name, weight) with the weights of `initialize_weights`, in fp32 on the CPU.

    Every process draws all weights from the same seed, but holds the weights of only one module at
    a time.
    """
    model = build_empty(config)
    names = {weight: name for name, weight in model.named_parameters()}

    @contextmanager
    def whole(weights: list[nn.Parameter]) -> Iterator[None]:
        placeholders = [weight.data for weight in weights]
        for weight in weights:
            weight.data = torch.empty(weight.shape)
        yield
        for weight, placeholder in zip(weights, placeholders, strict=True):
            write(names[weight], weight.data)
            weight.data = placeholder

    reseed(seed)
    model.initialize_weights(gather=whole)
