"""The first weights of a model: each module sets what it owns in `reset_parameters`.

    initialize(model)
    for name, tensor in draw_weights(meta_model):              # one module at a time, on the CPU

A parameter or buffer that no module sets is an error with its name. Layers of torch start as in
DiT: linear and convolutional ones with Xavier's weights and no bias, embeddings with the standard
deviation 0.02. A layer that starts in another way has a class of its own, such as `ZeroLinear`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from routers import Router


def xavier(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.xavier_uniform_(layer.weight.flatten(1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# Where DiT initialises a layer of torch in another way than torch: torch's method -> DiT's.
INITIAL = {
    nn.Linear.reset_parameters: xavier,
    nn.Conv2d.reset_parameters: xavier,
    nn.Embedding.reset_parameters: lambda layer: nn.init.normal_(layer.weight, std=0.02),
}


def initialize(model: nn.Module) -> None:
    """Initialises all parameters and buffers, unless they have no data: meta and fake tensors."""
    if next(model.parameters()).untyped_storage().device.type != "meta":
        for _ in draw_weights(model):
            pass


@torch.no_grad()
def draw_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Initialises one module after the other; yields parameters and buffers with their names.

    Raises ValueError with the name of a tensor that its module does not set. If the model is on the
    meta device, only one module at a time has data, on the CPU.
    """
    is_meta = next(model.parameters()).is_meta
    routers = [module for module in model.modules() if isinstance(module, Router)]
    in_routers = {module for router in routers for module in router.modules()}
    optional = [module for module in model.modules() if getattr(module, "drawn_last", False)]
    in_optional = {module for one in optional for module in one.modules()}
    # Routers last: the same seed gives the same other weights (except with `prototype`, whose extra
    # expert draws too). After them, what is optional.
    places = [(module in in_optional, module in in_routers) for module in model.modules()]
    modules = zip(places, model.named_modules(), strict=True)
    for _, (prefix, module) in sorted(modules, key=lambda one: one[0]):
        if is_meta:
            module.to_empty(device="cpu", recurse=False)
        own = dict(module.named_parameters(prefix, recurse=False))
        own |= module.named_buffers(prefix, recurse=False)
        for tensor in own.values():
            tensor.fill_(unset_value(tensor.dtype))
        try:
            if reset := getattr(type(module), "reset_parameters", None):
                INITIAL.get(reset, reset)(module)
        finally:
            if is_meta:
                module.to_empty(device="meta", recurse=False)
        for name, tensor in own.items():
            unset = unset_value(tensor.dtype)
            is_unset = tensor.isnan() if math.isnan(unset) else tensor == unset
            if tensor.dtype.is_signed and is_unset.any():
                raise ValueError(
                    f"{name}: has no initial value, expected {type(module).__name__}."
                    "reset_parameters to set every parameter and buffer of the module"
                )
            yield name, tensor.detach()


def unset_value(dtype: torch.dtype) -> float | int:
    """Returns the value that marks an element as not initialised; 0, no mark, if unsigned."""
    if dtype.is_floating_point:
        return math.nan
    return torch.iinfo(dtype).min if dtype.is_signed else 0
