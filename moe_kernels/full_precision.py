"""A linear layer in true fp32 where others may take TF32, whose numbers have 10 bits: for gates, of
which a rounded score may choose another expert."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@torch.library.custom_op("dit_moe::fp32_linear", mutates_args=())
def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (S, D) fp32 times weight (E, D) fp32, transposed; returns (S, E)."""
    with without_tf32():
        return F.linear(x, weight)


@torch.library.custom_op("dit_moe::fp32_linear_backward", mutates_args=())
def fp32_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with without_tf32():
        return grad @ weight, grad.t() @ x


@fp32_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


@fp32_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


fp32_linear.register_autograd(
    lambda ctx, grad: fp32_linear_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
