"""The first weights of a model that no process holds whole, one module at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models import DiT, DiTConfig, position_embedding
from runtime.processes import reseed


def build_empty(
    config: DiTConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiT:
    """Makes a DiT of placeholders: parameters that have their shape but, all strides being 0, the
    memory of a single number. The routers' state, fp32, is 0 as at the start."""
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
    """Gives placeholders their memory."""
    for weight in weights:
        weight.data = weight.data.contiguous()


def draw_initial_weights(
    config: DiTConfig, seed: int, write: Callable[[str, Tensor], None]
) -> None:
    """Calls write(name, fp32 weight on the CPU) with what a DiT gets from `initialize_weights`.

    The draws follow only from the seed, and every process makes them all, but only one module's
    weights exist at a time.
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
