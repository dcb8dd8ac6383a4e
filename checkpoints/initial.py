"""Initial weights of a model that is too large for one process, one module at a time."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from checkpoints.costs import fake_model
from models import DiT, DiTConfig, initialize, unset
from runtime.errors import reported_as


def build_empty(
    config: DiTConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiT:
    """Makes a DiT of placeholders: parameters with stride 0, which use the memory of one element.

    All are nan: one that is never written shows in the first loss. Buffers keep their dtype.
    """
    with torch.device("meta"):
        model = DiT(config)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            data = torch.full((1,) * weight.dim(), unset(dtype), dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(data.expand(weight.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            data = torch.full(buffer.shape, unset(buffer.dtype), dtype=buffer.dtype, device=device)
            setattr(module, name, data)
    return model


def allocate(weights: Iterable[nn.Parameter]) -> None:
    """Allocates memory for placeholders."""
    for weight in weights:
        weight.data = weight.data.contiguous()


@torch.no_grad()
def initial_weights(config: DiTConfig) -> Iterator[tuple[str, Tensor]]:
    """Draws the parameters (fp32, on the CPU) and buffers of a new model, with their names.

    They are those of `DiT(config)`, but only one module's weights are held at a time.
    """
    model = fake_model(config)
    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    for module, _ in model.owners():
        fakes = dict(module.named_parameters(recurse=False))
        fakes |= dict(module.named_buffers(recurse=False))
        drawn = {}
        for attribute, fake in fakes.items():
            tensor = torch.empty(fake.shape, dtype=fake.dtype)
            tensor = nn.Parameter(tensor) if isinstance(fake, nn.Parameter) else tensor
            drawn[names[module] + attribute] = tensor
            setattr(module, attribute, tensor)
        try:
            with reported_as("the model cannot be built", ValueError):
                initialize(module, {tensor: name for name, tensor in drawn.items()})
        finally:
            for attribute, fake in fakes.items():
                setattr(module, attribute, fake)
        yield from ((name, tensor.data) for name, tensor in drawn.items())
