"""Initial weights of a model that is too large for one process, one module at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models import DiT, DiTConfig, unset
from runtime.processes import reseed


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


def draw_initial_weights(
    config: DiTConfig, seed: int, write: Callable[[str, Tensor], None]
) -> None:
    """Calls write(name, tensor) with the parameters (fp32, on the CPU) and buffers of a new model.

    Every process draws all weights from the same seed, and holds those of one module at a time.
    """
    model = build_empty(config)
    names = {t: name for name, t in [*model.named_parameters(), *model.named_buffers()]}

    @contextmanager
    def whole(tensors: list[Tensor]) -> Iterator[None]:
        placeholders = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype)
        yield
        for tensor, placeholder in zip(tensors, placeholders, strict=True):
            write(names[tensor], tensor.data)
            tensor.data = placeholder

    reseed(seed)
    model.initialize_weights(gather=whole)
