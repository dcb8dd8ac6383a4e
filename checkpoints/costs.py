"""What a DiT costs: its parameters and multiply-adds, from a model without data.

    total, active = count_parameters(config)
    macs = count_macs(config)

Shape legend: D width, H expert width, E experts, R chosen rows, U rows of up_proj
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (  # private
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call

from checkpoints.meta import meta_model
from models import DiTConfig
from moe import width_of
from moe_kernels.attention import fused_attention

NEEDS_DATA = (DynamicOutputShapeException, DataDependentOutputException)


@contextmanager
def fake_pass(
    config: DiTConfig, batch: int
) -> Iterator[tuple[Callable[[], Any], dict[str, Tensor]]]:
    """Prepares a forward pass in training mode of fake tensors, which have a shape, a type and a
    device but no data, with the attention of a GPU. Yields the pass, a function, and its weights.

    The pass raises one of `NEEDS_DATA` if data decide the number of rows, or if the router reads a
    value, as in `if mask.any()`.
    """
    model = meta_model(config)
    with FakeTensorMode(), fused_attention():
        weights = {
            name: torch.empty(like.shape, dtype=like.dtype, requires_grad=like.requires_grad)
            for name, like in (*model.named_parameters(), *model.named_buffers())
        }
        x, t = torch.zeros(batch, *config.latent_shape), torch.zeros(batch)
        inputs = x, t, torch.zeros(batch, dtype=torch.long)
        yield partial(functional_call, model, weights, inputs), weights


def count_parameters(config: DiTConfig) -> tuple[int, int]:
    """Returns the number of all parameters and of the parameters active for one token."""
    model = meta_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    stacks = map(model.get_parameter, model.expert_parameters())  # (E, ...)
    idle = sum((len(stack) - config.num_experts_per_tok) * stack[0].numel() for stack in stacks)
    return total, total - idle


def count_macs(config: DiTConfig, experts_per_token: Sequence[float] = ()) -> int:
    """Returns the number of multiply-adds in the matrix products of one image's forward pass.

    In training mode, so that the products of the router's loss count, too.

    experts_per_token: measured mean of each sparse layer, if a router's state decides it
    """
    macs, counted = macs_and_experts(config)
    matrix = config.hidden_size * width_of(config.hidden_size, config.mlp_ratio)
    per_row = (2 if config.expert_mlp == "gelu" else 3) * matrix
    layers = zip(config.sparse_blocks, experts_per_token or counted, counted, strict=True)
    more = sum(config.tokens_of(layer) * (got - expected) for layer, got, expected in layers)
    return macs + round(per_row * more)


@lru_cache(maxsize=64)
@torch.no_grad()
def macs_and_experts(config: DiTConfig) -> tuple[int, list[float]]:
    """Returns the multiply-adds, and the experts per token of each sparse layer in this count."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    formulas = {
        torch.ops.dit_moe.experts: flops_of_experts,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
            sdpa_flop_count(q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    try:
        with fake_pass(config, 1) as (forward, _), counter:
            forward()
    except NEEDS_DATA:  # the rows of top-k are about as many, K per token
        return macs_and_experts(replace(config, router="topk"))
    return counter.get_total_flops() // 2, meta_model(config).experts_per_token


def flops_of_experts(
    x: Sequence[int], weight: Sequence[int], parameters: Sequence[Sequence[int]], *_, **__
) -> int:
    """Returns the FLOPs of `moe_kernels.operators.experts_forward`, from its inputs' shapes."""
    (rows,), (_, u, d), (_, _, h) = weight, *parameters[:2]
    return 2 * rows * d * (u + h)
