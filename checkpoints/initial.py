"""Initial weights of a model that is too large for one process, one module at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from checkpoints.costs import fake_model
from models import DiTConfig, initialize, own_tensors
from runtime.errors import reported_as


@torch.no_grad()
def initial_weights(config: DiTConfig) -> Iterator[tuple[str, Tensor]]:
    """Draws the parameters (fp32, on the CPU) and buffers of a new model, with their names.

    They are those of `DiT(config)`, but only one module's weights are held at a time.
    """
    for prefix, module in fake_model(config).initialization_order():
        fakes = own_tensors(module)
        for name, fake in fakes.items():
            tensor = torch.empty(fake.shape, dtype=fake.dtype)
            tensor = nn.Parameter(tensor) if isinstance(fake, nn.Parameter) else tensor
            setattr(module, name, tensor)
        try:
            with reported_as("the model cannot be built", ValueError):
                initialize(module, prefix)
            drawn = own_tensors(module, prefix)
        finally:
            for name, fake in fakes.items():
                setattr(module, name, fake)
        yield from ((name, tensor.detach()) for name, tensor in drawn.items())
