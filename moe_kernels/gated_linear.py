"""The last layer of a SwiGLU, which saves less for the backward pass.

Shape legend: H hidden width, D width
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.forward_mode import has_tangent


class GatedLinear(nn.Linear):
    """Linear layer on silu(gate) * up. For backward it saves gate and up, but not the product."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:                  # (..., H) to (..., D)
        # Plain operations under torch.func.jvp: torch.compile rejects autograd Functions with a jvp
        # method, so `GatedLinearFunction` has none.
        if has_tangent(gate, up, self.weight):
            y = F.linear(F.silu(gate) * up, self.weight.to(gate.dtype))
        else:
            y = GatedLinearFunction.apply(gate, up, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


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
