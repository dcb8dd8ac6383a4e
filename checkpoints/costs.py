"""What a DiT costs: its parameters and multiply-adds, from a model without data.

    total, active = count_parameters(config)
    macs = count_macs(config)

The model consists of fake tensors, which have a shape, a type and a device. It is built once for
each config, and whoever changes it restores it, as `initial_weights` does.

Shape legend: D width, H expert width, E experts, R chosen rows, U rows of up_proj
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, wraps
from typing import Any

import torch
from torch._subclasses.fake_tensor import (  # private
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from conditions import CONDITIONS, split_condition
from models import DiT, DiTConfig
from moe import Experts, width_of
from moe_kernels.attention import fused_attention
from options.parts import Part
from routers import ROUTERS


@cache
def fake_mode() -> FakeTensorMode:
    """Returns the mode in which the tensors of `fake_model` can be used."""
    return FakeTensorMode()


def fake_model(config: DiTConfig) -> DiT:
    """Returns the model of a config, the same one until its router or a condition is another class,
    as after the cell of a notebook that defines it ran again."""
    names = [split_condition(word)[0] for word in config.conditions]
    kinds = (config.router and ROUTERS[config.router.name], *(CONDITIONS[name] for name in names))
    return build_fake(config, kinds)


@lru_cache(maxsize=16)
def build_fake(config: DiTConfig, kinds: tuple[type | None, ...]) -> DiT:
    with fake_mode():
        return DiT(replace(config, expert_backend="grouped")).train()


def with_fixed_rows(measure: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates measure(config, ...): top-k replaces a router that reads its tensors."""

    @wraps(measure)
    def measured(config: DiTConfig, *arguments: Any) -> Any:
        try:
            return measure(config, *arguments)
        except (DynamicOutputShapeException, DataDependentOutputException):
            # The rows are about as many, K per token.
            return measure(replace(config, router=Part("topk")), *arguments)

    return measured


def fake_forward(config: DiTConfig, batch: int) -> None:
    """Runs a forward pass in training mode, with the attention of a GPU.

    Raises DynamicOutputShapeException if the data decide the number of rows, and
    DataDependentOutputException if the router reads a value, as in `if mask.any()`.
    """
    with fake_mode(), fused_attention():
        x, t = torch.zeros(batch, *config.latent_shape), torch.zeros(batch)
        fake_model(config)(x, t, torch.zeros(batch, dtype=torch.long))


def count_parameters(config: DiTConfig) -> tuple[int, int]:
    """Returns the number of all parameters and of the parameters active for one token."""
    model = fake_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        (len(stack) - config.num_experts_per_tok) * stack[0].numel()
        for module in model.modules() if isinstance(module, Experts)
        for stack in module.parameters()
    )  # fmt: skip
    return total, total - idle


def count_macs(config: DiTConfig, experts_per_token: Sequence[float] = ()) -> int:
    """Returns the number of multiply-adds in the matrix products of one image's forward pass.

    In training mode, so that the products of the router's loss count, too.

    experts_per_token: measured mean of each sparse layer, if a router's state decides it
    """
    macs, counted = macs_and_experts(config)
    matrix = config.hidden_size * width_of(config.hidden_size, config.mlp_ratio)
    per_row = (2 if config.mlp_type == "gelu" else 3) * matrix
    layers = zip(config.sparse_layers, experts_per_token or counted, counted, strict=True)
    more = sum(config.tokens_of(layer) * (got - expected) for layer, got, expected in layers)
    return macs + round(per_row * more)


@lru_cache(maxsize=64)
@torch.no_grad()
@with_fixed_rows
def macs_and_experts(config: DiTConfig) -> tuple[int, list[float]]:
    """Returns the multiply-adds, and the experts per token of each sparse layer in this count."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    formulas = {
        torch.ops.dit_moe.experts: flops_of_experts,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
            sdpa_flop_count(q, k, v)
        ),
    }
    with fake_mode(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        fake_forward(config, 1)
    return counter.get_total_flops() // 2, fake_model(config).experts_per_token


def flops_of_experts(
    x: Sequence[int], weight: Sequence[int], parameters: Sequence[Sequence[int]], *_, **__
) -> int:
    """Returns the FLOPs of `moe_kernels.experts.experts_forward`, from the shapes of its inputs."""
    (rows,), (_, u, d), (_, _, h) = weight, *parameters[:2]
    return 2 * rows * d * (u + h)
