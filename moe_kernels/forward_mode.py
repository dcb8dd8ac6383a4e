"""The routed experts under torch.func.jvp: derivatives along tangents.

Shape legend:
    S tokens, D width, H expert width, R chosen rows, U rows of up_proj: 2H or H, see operators.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from moe_kernels.operators import expert_of_rows, experts_forward, kernels_for, split


def has_tangent(*tensors: Tensor | None) -> bool:
    """Returns whether forward-mode differentiation (torch.func.jvp) tracks one of the tensors."""
    if torch.compiler.is_compiling():
        return False
    return any(t is not None and unpack_dual(t).tangent is not None for t in tensors)


class ForwardModeExperts(torch.autograd.Function):
    """`experts_forward` with a derivative along tangents, for use under no_grad.

    A custom operator silently drops tangents, and torch.compile rejects a Function with a `jvp`
    method, so forward mode has this Function of its own. The routing is held constant.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, source: Tensor, place: Tensor, start: Tensor, end: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return experts_forward(x, weight, list(parameters), [source, place, start, end])

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the tangents of y (S, D) and of hidden (R, U)."""
        x, weight, source, place, start, end, *parameters, hidden = ctx.saved_tensors
        x_t, weight_t, _, _, _, _, *parameters_t = tangents
        (up, down), (up_t, down_t), k = parameters[:2], parameters_t[:2], kernels_for(x)
        hidden_t = torch.zeros_like(hidden)                                 # (R, U)
        if x_t is not None:
            hidden_t += k.grouped_linear(k.gather(x_t.contiguous(), source), up, end)
        if up_t is not None:
            hidden_t += k.grouped_linear(k.gather(x, source), up_t.contiguous(), end)
        for bias_t in parameters_t[2:]:
            if bias_t is not None:
                hidden_t += k.gather(bias_t.to(x.dtype), expert_of_rows(source, end))
        (gate, value), (gate_t, value_t) = split(hidden, down), split(hidden_t, down)
        a = k.activate(gate, value)                                         # (R, H)
        if value is None:
            a_t = torch.ops.aten.gelu_backward(gate_t, gate, approximate="tanh")
        else:
            a_t = torch.ops.aten.silu_backward(gate_t * value, gate) + F.silu(gate) * value_t
        rows_t = k.grouped_linear(a_t, down, end)                           # (R, D)
        if down_t is not None:
            rows_t += k.grouped_linear(a, down_t.contiguous(), end)
        y_t = k.combine(rows_t, place, start, weight)                       # (S, D)
        if weight_t is not None:
            rows = k.grouped_linear(a, down, end)                           # (R, D)
            y_t = y_t + k.combine(rows, place, start, weight_t.contiguous())
        return y_t, hidden_t
