"""The last layer of a SwiGLU, which saves less for the backward pass.

Shape legend: H hidden width, D width
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from moe_kernels.forward_mode import has_tangent


def gated_linear(gate: Tensor, up: Tensor, linear: nn.Linear) -> Tensor:    # (..., H) to (..., D)
    """linear(silu(gate) * up). For backward it saves gate and up, but not the product.

    The layer is called as any other, and autograd saves the product, where somebody looks at what
    it gets or changes what it computes: an adapter, a quantised layer, a hook, a tracer.
    """
    if not is_plain(linear):
        return linear(F.silu(gate) * up)
    # Plain operations under torch.func.jvp: torch.compile rejects autograd Functions with a jvp
    # method, so `GatedLinearFunction` has none.
    if has_tangent(gate, up, linear.weight):
        y = F.linear(F.silu(gate) * up, linear.weight.to(gate.dtype))
    else:
        y = GatedLinearFunction.apply(gate, up, linear.weight)
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def is_plain(linear: nn.Module) -> bool:
    """Whether a call of the layer is known to be F.linear and nothing else."""
    hooks = (
        linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks,
        linear._backward_pre_hooks, every_module._global_forward_hooks,
        every_module._global_forward_pre_hooks, every_module._global_backward_hooks,
        every_module._global_backward_pre_hooks,
    )  # fmt: skip
    of_torch = type(linear) is nn.Linear and "forward" not in linear.__dict__
    return of_torch and not any(len(some) for some in hooks) and not torch.jit.is_tracing()


class GatedLinearFunction(torch.autograd.Function):
    """linear(silu(gate) * up, weight), computed in the dtype of gate."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.silu(gate) * up, weight.to(gate.dtype))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        silu = F.silu(gate)
        grad_a = grad @ weight.to(grad.dtype)                               # (..., H)
        grad_gate = torch.ops.aten.silu_backward(grad_a * up, gate)
        a, grad = (silu * up).flatten(0, -2), grad.flatten(0, -2)
        grad_weight = (grad.t() @ a).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_gate, grad_a * silu, grad_weight
