"""The sparse layers of a model: of a `DiT`, and of the sparse transformers in diffusers.

    for layer in sparse_layers(pipeline.transformer):
        layer.listen(lambda output, routing: print(layer.name, routing.expert.bincount()))

`TRANSFORMERS` has the transformers of diffusers; extras/transformers.py has examples.

Shape legend:
    N images of a batch, T tokens per image, E experts, n numbers of an expert's weight
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models import DiT, DiTConfig
from moe_kernels.quantized import QuantizedWeight
from options.parts import Registry
from routers import Routing
from runtime.errors import UserError


class SparseLayer(Protocol):
    """A layer with experts, in whichever model."""

    name: str  # of the block in the model, such as "block 3"
    num_experts: int  # routed experts
    extra_experts: int  # of the router; the last ones of a `Routing`

    def listen(self, listener: Callable[[Tensor, Routing], None]) -> ExitStack:
        """Calls listener(output (N, T, D), routing) after each pass. Closing removes the hook."""

    def without(self, expert: int) -> RemovableHandle:
        """Sets the contribution of an expert's rows to 0 until the handle is removed."""

    def weights(self) -> Iterator[Tensor | QuantizedWeight]:
        """Yields the weights of all experts, each (E, ...)."""


class DiTLayer:
    """A sparse block of a `DiT`."""

    def __init__(self, name: str, block: nn.Module, config: DiTConfig):
        self.name, self.block, self.num_experts = name, block, config.num_experts
        self.extra_experts = config.experts_per_layer - config.num_experts

    def listen(self, listener: Callable[[Tensor, Routing], None]) -> ExitStack:
        # If the hook were compiled with its block, every layer and step would need a new graph.
        hook = torch.compiler.disable(lambda module, inputs, output: listener(*output))
        hooks = ExitStack()
        hooks.enter_context(self.block.register_forward_hook(hook))
        return hooks

    def without(self, expert: int) -> RemovableHandle:
        def hook(gate: nn.Module, inputs: tuple, routing: Routing) -> Routing:
            return routing._replace(weight=routing.weight.masked_fill(routing.expert == expert, 0))

        return self.block.moe.gate.register_forward_hook(hook)

    def weights(self) -> Iterator[Tensor | QuantizedWeight]:
        return (weight for weight in self.block.moe.experts.weights() if weight is not None)


# Functions from a transformer of diffusers, by class, to its sparse layers, in order.
TRANSFORMERS = Registry(
    elsewhere=dict.fromkeys(
        ("HiDreamImageTransformer2DModel", "NucleusMoEImageTransformer2DModel"),
        "extras.transformers",
    )
)


def sparse_layers(model: nn.Module) -> list[SparseLayer]:
    """Returns the sparse layers of a DiT, or of a transformer of diffusers, in the order of the
    forward pass; [] for a dense model.
    """
    if isinstance(model, DiT):
        config = model.config
        return [DiTLayer(f"block {i}", model.blocks[i], config) for i in config.sparse_blocks]
    if type(model).__name__ not in TRANSFORMERS:
        known = ", ".join(["DiT", *TRANSFORMERS])
        raise UserError(f"got a {type(model).__name__}, expected a model with experts: {known}")
    return TRANSFORMERS[type(model).__name__](model)


def weight_similarity(layer: SparseLayer) -> Tensor:
    """Returns the cosines (E, E), fp32, between the flattened weights of the routed experts."""
    product = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
    for weight in layer.weights():
        if isinstance(weight, QuantizedWeight):
            weight = torch.stack([expert.to(torch.bfloat16) for expert in weight])
        routed = weight.detach()[: layer.num_experts].flatten(1)
        for part in routed.split(2**20, dim=1):  # (E, n) in pieces
            part = part.float()
            product += (part @ part.T).cpu()
    norm = product.diagonal().sqrt().clamp_min(1e-30)
    return (product / norm / norm[:, None]).float()
