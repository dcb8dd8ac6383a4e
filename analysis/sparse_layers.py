"""The sparse layers of a model: of a `DiT`, and of the sparse transformers in diffusers.

    for layer in sparse_layers(pipeline.transformer):
        layer.listen(lambda output, routing: print(layer.name, routing.expert.bincount()))

To add a transformer of diffusers, write a `GatedLayer` and add it to `TRANSFORMERS`.

Shape legend:
    N images of a batch, T tokens per image, S = N*T tokens, E experts, K experts per token,
    C tokens per expert and image, R rows of a `Routing`, n numbers of an expert's weight
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from analysis.token_places import HiDreamPlaces, NucleusPlaces
from models import DiT, DiTConfig
from moe_kernels.quantized import QuantizedLinear, QuantizedStack, QuantizedWeight
from routers import Routing, expert_load
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


class GatedLayer:
    """A layer of diffusers with a module `gate`, whose output determines the routing."""

    module_name: str  # class of the layer in diffusers
    places: type  # makes the `TokenPlaces` of a pipeline with such layers
    extra_experts = 0

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module

    def routing(self, gated: Any) -> Routing:
        """Converts the output of the gate; rows in any order."""
        raise NotImplementedError

    def quantize(self, kind: str) -> None:
        """Replaces the experts' matrices by integers and scales; kind: int8 or int4."""
        raise NotImplementedError

    def listen(self, listener: Callable[[Tensor, Routing], None]) -> ExitStack:
        gated: list[Any] = []
        after = torch.compiler.disable(
            lambda module, inputs, output: listener(output, self.routing(gated.pop()))
        )
        keep = torch.compiler.disable(lambda gate, inputs, output: gated.append(output))
        hooks = ExitStack()
        hooks.enter_context(self.module.gate.register_forward_hook(keep))
        hooks.enter_context(self.module.register_forward_hook(after))
        return hooks


class HiDreamLayer(GatedLayer):
    """`MOEFeedForwardSwiGLU`: softmax over the experts, top K, weights not renormalised."""

    module_name, names = "MOEFeedForwardSwiGLU", ("w1", "w2", "w3")
    places = HiDreamPlaces

    @property
    def num_experts(self) -> int:
        return len(self.module.experts)

    def routing(self, gated: tuple[Tensor, Tensor, None]) -> Routing:
        expert, weight, _ = gated  # (S, K) each
        token = torch.arange(len(expert), device=expert.device).repeat_interleave(expert.shape[1])
        load = expert_load(expert.flatten(), self.num_experts)
        return Routing(
            token, expert.flatten(), weight.flatten().float(), per_token=expert.shape[1],
            loss=load.new_zeros(()), load=load,
        )  # fmt: skip

    def without(self, expert: int) -> RemovableHandle:
        module = self.module.experts[expert]
        return module.register_forward_hook(lambda module, inputs, rows: torch.zeros_like(rows))

    def weights(self) -> Iterator[Tensor | QuantizedWeight]:
        for name in self.names:
            yield torch.stack([getattr(expert, name).weight for expert in self.module.experts])

    def quantize(self, kind: str) -> None:
        for expert in self.module.experts:
            for name in self.names:
                setattr(expert, name, QuantizedLinear(getattr(expert, name), kind))


class NucleusLayer(GatedLayer):
    """`NucleusMoELayer`: each expert chooses C tokens of every image; a token's weights are
    normalised to the sum `route_scale`."""

    module_name, names = "NucleusMoELayer", ("gate_up_proj", "down_proj")
    places = NucleusPlaces

    @property
    def num_experts(self) -> int:
        return self.module.num_experts

    def routing(self, logits: Tensor) -> Routing:
        images, tokens, experts = logits.shape
        scores = logits.float()
        scores = scores.sigmoid() if self.module.use_sigmoid else scores.softmax(-1)
        capacity = max(1, math.ceil(self.module.capacity_factor * tokens / experts))
        weight, token = scores.to(logits.dtype).mT.topk(capacity)  # (N, E, C)
        token = token + tokens * torch.arange(images, device=token.device)[:, None, None]
        token, weight = (x.transpose(0, 1).flatten() for x in (token, weight))  # (R,)
        total = weight.new_zeros(images * tokens).scatter_add_(0, token, weight)
        weight = weight / (total[token] + 1e-12) * self.module.route_scale
        expert = torch.arange(experts, device=token.device).repeat_interleave(images * capacity)
        load = expert_load(expert, experts)
        return Routing(
            token, expert, weight.float(), per_token=0, loss=load.new_zeros(()), load=load,
            is_even=True,
        )  # fmt: skip

    def without(self, expert: int) -> RemovableHandle:
        def hook(experts: nn.Module, inputs: tuple, rows: Tensor) -> Tensor:
            parts = list(rows.chunk(self.num_experts))  # all of equal size
            parts[expert] = torch.zeros_like(parts[expert])
            return torch.cat(parts)

        return self.module.experts.register_forward_hook(hook)

    def weights(self) -> Iterator[Tensor | QuantizedWeight]:
        for name in self.names:
            yield torch.stack(list(getattr(self.module.experts, name)))

    def quantize(self, kind: str) -> None:
        experts = self.module.experts
        experts.use_grouped_mm = False  # it needs all experts in 16 bit at once
        for name in self.names:
            weight = getattr(experts, name)
            delattr(experts, name)
            setattr(experts, name, QuantizedStack(weight.detach(), kind))


TRANSFORMERS = {
    "HiDreamImageTransformer2DModel": HiDreamLayer,
    "NucleusMoEImageTransformer2DModel": NucleusLayer,
}


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
    return gated_layers(model)


def gated_layers(transformer: nn.Module) -> list[GatedLayer]:
    """Returns the sparse layers of a transformer of diffusers; [] for a dense one."""
    kind = TRANSFORMERS[type(transformer).__name__]
    return [
        kind(name.rpartition(".")[0], module)
        for name, module in transformer.named_modules()
        if type(module).__name__ == kind.module_name
    ]


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
