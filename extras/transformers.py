"""The sparse layers of the transformers in diffusers: HiDream-I1 and Nucleus-Image.

To add one, write a `GatedLayer` and add it to `analysis.sparse_layers.TRANSFORMERS`.

Shape legend:
    N conditional images of a batch, B images in the model's batch, T tokens per image, S = N*T
    tokens, E experts, K experts per token, C tokens per expert and image, R rows of a `Routing`
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from analysis.sparse_layers import TRANSFORMERS
from analysis.token_places import OTHER, PADDING
from moe_kernels.quantized import QuantizedWeight, quantize
from routers import Routing, expert_load


class NucleusPlaces(ExitStack):
    """Every token is a patch. With guidance, the first of two calls is conditional."""

    def __init__(self, pipeline: Any):
        super().__init__()
        self.grid = (0, 0)
        hook = pipeline.transformer.register_forward_pre_hook(self.note, with_kwargs=True)
        self.enter_context(hook)

    def note(self, model: nn.Module, inputs: tuple, values: dict) -> None:
        self.grid = tuple(values["img_shapes"][0][1:])
        self.device = values["hidden_states"].device

    def start_batch(self) -> None:
        pass

    def first_conditional(self, batch: int, images: int) -> int:
        return 0

    def places(self, tokens: int) -> Tensor:
        return torch.arange(tokens, device=self.device)


class HiDreamPlaces(ExitStack):
    """A guided batch is [unconditional; conditional].

    The tokens are the patches, padded to the model's largest number unless the image is square. In
    the single-stream blocks the text follows: T5's tokens, and twice Llama's, padded as the masks
    of the text encoders show.
    """

    def __init__(self, pipeline: Any):
        super().__init__()
        self.grid, self.padded, self.masks = (0, 0), 0, {}
        self.enter_context(
            pipeline.transformer.register_forward_pre_hook(self.note, with_kwargs=True)
        )
        self.encoders = (pipeline.text_encoder_3, pipeline.text_encoder_4)
        for encoder in self.encoders:
            hook = encoder.register_forward_pre_hook(self.note_mask, with_kwargs=True)
            self.enter_context(hook)

    def start_batch(self) -> None:
        self.masks.clear()

    def note_mask(self, encoder: nn.Module, inputs: tuple, values: dict) -> None:
        self.masks.setdefault(encoder, values["attention_mask"])  # the prompts come first

    def note(self, model: nn.Module, inputs: tuple, values: dict) -> None:
        x, patch = values["hidden_states"], model.config.patch_size
        height, width = x.shape[-2:]
        self.grid, self.device = (height // patch, width // patch), x.device
        self.padded = math.prod(self.grid) if height == width else model.max_seq

    def first_conditional(self, batch: int, images: int) -> int:
        return batch - images

    def places(self, tokens: int) -> Tensor:
        patches = torch.arange(self.padded, device=self.device)
        patches[math.prod(self.grid) :] = PADDING
        if tokens == self.padded:
            return patches
        t5, llama = (self.masks[encoder].to(self.device) for encoder in self.encoders)
        text = torch.cat([t5, llama, llama], dim=1)  # (N, T - padded)
        text = torch.where(text > 0, OTHER, PADDING)
        return torch.cat([patches.expand(len(text), -1), text], dim=1)


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


KINDS = {
    "HiDreamImageTransformer2DModel": HiDreamLayer,
    "NucleusMoEImageTransformer2DModel": NucleusLayer,
}


def gated_layers(kind: type[GatedLayer], transformer: nn.Module) -> list[GatedLayer]:
    """Returns the sparse layers of a transformer of diffusers; [] for a dense one."""
    return [
        kind(name.rpartition(".")[0], module)
        for name, module in transformer.named_modules()
        if type(module).__name__ == kind.module_name
    ]


TRANSFORMERS.update({name: partial(gated_layers, kind) for name, kind in KINDS.items()})


class QuantizedStack(nn.Module):
    """In place of a parameter (E, I, O): stack[expert] is the dequantised matrix (I, O).

    The matrix has the dtype of the scales, which `.to(dtype)` casts.
    """

    def __init__(self, weight: Tensor, kind: str):
        super().__init__()
        quantized = quantize(weight.mT, kind)
        self.register_buffer("values", quantized.values)
        self.register_buffer("scale", quantized.scale.to(weight.dtype))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, expert: int) -> Tensor:
        weight = QuantizedWeight(self.values[expert], self.scale[expert])
        return weight.to(self.scale.dtype).mT


class QuantizedLinear(nn.Module):
    """In place of a linear layer without bias; dequantises its weight in each call."""

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.stack = QuantizedStack(linear.weight.mT[None], kind)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight (O, I)."""
        return self.stack[0].mT

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
