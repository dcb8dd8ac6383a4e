"""What a DiT costs: its parameters, multiply-adds and activations, from a model without data.

    total, active = count_parameters(config)
    macs = count_macs(config)

Shape legend: D width, H expert width, E experts, R chosen rows, U rows of up_proj
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (  # private
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints.meta import meta_model
from models import DiTConfig
from moe import width_of
from moe_kernels.attention import fused_attention
from runtime.devices import DTYPES
from wrappers import KEPT_OPERATORS


def count_parameters(config: DiTConfig) -> tuple[int, int]:
    """Returns the number of all parameters and of the parameters active for one token."""
    model = meta_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    stacks = map(model.get_parameter, model.expert_parameters())  # (E, ...)
    idle = sum((len(stack) - config.num_experts_per_tok) * stack[0].numel() for stack in stacks)
    return total, total - idle


def count_macs(
    config: DiTConfig, experts_per_token: Sequence[float] = (), batch: int = 1,
    precision: str = "fp32",
) -> int:  # fmt: skip
    """Returns the number of multiply-adds in the matrix products of one image's forward pass.

    In training mode, so that the products of the router's loss count, too.

    experts_per_token: measured mean of each sparse layer, if a router's state decides it
    batch, precision: of the pass that is counted; a run has planned its memory with one
    """
    costs = pass_costs(config, batch, precision)
    matrix = config.hidden_size * width_of(config.hidden_size, config.mlp_ratio)
    per_row = (2 if config.expert_mlp == "gelu" else 3) * matrix
    counted = costs.experts_per_token
    layers = zip(config.sparse_blocks, experts_per_token or counted, counted, strict=True)
    more = sum(config.tokens_of(layer) * (got - expected) for layer, got, expected in layers)
    return round(costs.flops / 2 / batch + per_row * more)


class PassCosts(NamedTuple):
    """What a forward pass in training mode costs."""

    flops: int  # of the matrix products
    experts_per_token: list[float]  # of each sparse layer
    outside: int  # bytes that it saves for the backward pass outside of the blocks
    # For each block, bytes of its input, of all that it saves, and of what `KEPT_OPERATORS` return
    blocks: list[tuple[int, int, int]]


@lru_cache(maxsize=64)
def pass_costs(config: DiTConfig, batch: int, precision: str) -> PassCosts:
    """Measures a forward pass of `batch` images in training mode, with the attention of a GPU.

    Its tensors are fake: they have a shape, a type and a device but no data. If data decide the
    number of rows, or if the router reads a value, as in `if mask.any()`, this is a pass of topk.
    """
    model, places = meta_model(config), []
    autocast = torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32")
    try:
        with (
            FakeTensorMode(), fused_attention(), ExitStack() as hooks, autocast,
            torch.enable_grad(), saved_tensors() as saved, Operators() as operators,
        ):  # fmt: skip
            weights = {
                name: torch.empty(like.shape, dtype=like.dtype, requires_grad=like.requires_grad)
                for name, like in (*model.named_parameters(), *model.named_buffers())
            }
            x, t = torch.zeros(batch, *config.latent_shape), torch.zeros(batch)
            inputs = x, t, torch.zeros(batch, dtype=torch.long)

            def note(block: nn.Module, inputs: tuple[Tensor, ...], *_: Tensor) -> None:
                places.append((inputs[0].nbytes, {*saved}, {*operators.kept}))

            for block in model.blocks:  # two notes for each: before and after it
                hooks.enter_context(block.register_forward_pre_hook(note))
                hooks.enter_context(block.register_forward_hook(note))
            functional_call(model, weights, inputs)
    except (DynamicOutputShapeException, DataDependentOutputException):
        # The rows of top-k are about as many, K per token.
        return pass_costs(replace(config, router="topk"), batch, precision)
    of_weights = {weight.untyped_storage() for weight in weights.values()}
    blocks, outside = [], saved - of_weights
    for (size, *before), (_, *after) in zip(places[::2], places[1::2], strict=True):
        of_block = [now - then - of_weights for now, then in zip(after, before, strict=True)]
        blocks.append((size, *map(storage_bytes, of_block)))
        outside -= of_block[0]
    return PassCosts(operators.flops, model.experts_per_token, storage_bytes(outside), blocks)


@contextmanager
def saved_tensors() -> Iterator[set[torch.UntypedStorage]]:
    """Collects the storages that autograd saves for the backward pass, including weights."""
    kept: set[torch.UntypedStorage] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def storage_bytes(storages: set[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


class Operators(TorchDispatchMode):
    """Counts the FLOPs of matrix products, and collects the storages of the outputs of
    `KEPT_OPERATORS`."""

    def __init__(self):
        super().__init__()
        self.flops, self.kept, self.formulas = 0, set(), flop_formulas()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if formula := self.formulas.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=outputs)
        if func.name() in KEPT_OPERATORS:
            tensors = [one for one in outputs if torch.is_tensor(one)]
            self.kept.update(tensor.untyped_storage() for tensor in tensors)
        return outputs


@cache
def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Returns functions of the operators' arguments, by operator."""
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count

    def attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {**flop_registry, flash: attention}
