"""The routed experts as one differentiable operator that saves little for the backward pass.

The forward pass saves x, the rows before the activation (`hidden`) and the routing. The backward
pass gathers the input rows and computes the activation again. With a = activation(hidden), row r of
token s adds weight_r * a_r W_down^T to y_s. Let g_s be the gradient of y_s. Then

    d a_r = weight_r * (g_s W_down),    d weight_r = <a_r, g_s W_down>,

and neither gradient needs the output rows of the second product. Rows are gathered and combined in
a fixed order, forward and backward, so every run gives the same results.

torch.compile captures the operator without a graph break. Two sets of kernels, `torch_kernels` and
`triton_kernels`, compute it with equal results.

Shape legend:
    S tokens, D width, H expert width, E experts, R chosen rows,
    U rows of up_proj: 2H for a SwiGLU expert (gate rows first), H for a GELU expert
"""

import functools
import importlib.util
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_kernels import torch_kernels
from moe_kernels.quantized import QuantizedWeight


def kernels_for(x: Tensor) -> ModuleType:
    """Returns the fastest kernels for x: on CUDA Triton kernels if they run, except for fp64."""
    if x.is_cuda and x.dtype != torch.float64 and triton_runs(x.device):
        from moe_kernels import triton_kernels

        return triton_kernels
    return torch_kernels


@functools.cache
def triton_runs(device: torch.device) -> bool:
    """Returns whether Triton can launch a small kernel; it needs a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from moe_kernels import triton_kernels

        index = torch.zeros(1, dtype=torch.int64, device=device)
        triton_kernels.gather(torch.zeros(1, 16, device=device), index)
    except Exception as error:  # from the C compiler, ptxas or the driver; of many classes
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"Triton does not run here, so experts are computed with slower kernels: {reason}",
            stacklevel=2,
        )
        return False
    return True


@torch.library.custom_op("dit_moe::experts", mutates_args=())
def experts_forward(
    x: Tensor, weight: Tensor, parameters: list[Tensor], rows: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns y (S, D) and hidden (R, U), the rows before the activation.

    rows: the result of `moe_kernels.experts.sort_rows`
    """
    return forward_rows(x, weight, parameters, rows)


def forward_rows(
    x: Tensor, weight: Tensor, parameters: list[Tensor | QuantizedWeight], rows: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Computes `experts_forward`, also for quantised weights."""
    up_proj, down_proj, *biases = parameters
    source, place, start, end = rows
    k = kernels_for(x)
    hidden = k.grouped_linear(k.gather(x, source), up_proj, end)             # (R, U)
    for bias in biases:
        hidden += k.gather(bias.to(x.dtype), expert_of_rows(source, end))
    a = k.activate(*split(hidden, down_proj))                               # (R, H)
    y = k.grouped_linear(a, down_proj, end)                                 # (R, D)
    return k.combine(y, place, start, weight), hidden


@experts_forward.register_fake
def _(x, weight, parameters, rows):
    return torch.empty_like(x), x.new_empty(weight.shape[0], parameters[0].shape[1])


@torch.library.custom_op("dit_moe::quantized_experts", mutates_args=())
def quantized_experts(
    x: Tensor, weight: Tensor, parameters: list[Tensor], rows: list[Tensor]
) -> Tensor:
    """Returns y (S, D) for quantised weights. This operator has no backward pass.

    parameters: values and scale of up_proj, values and scale of down_proj and, optionally, the bias
    """
    up, up_scale, down, down_scale, *biases = parameters
    weights = [QuantizedWeight(up, up_scale), QuantizedWeight(down, down_scale), *biases]
    return forward_rows(x, weight, weights, rows)[0]


@quantized_experts.register_fake
def _(x, weight, parameters, rows):
    return torch.empty_like(x)


@torch.library.custom_op("dit_moe::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor, inputs: list[Tensor], parameters: list[Tensor], rows: list[Tensor],
    with_parameters: bool,
) -> list[Tensor]:
    """Returns the gradients of x, weight and, optionally, the parameters.

    inputs: x, weight and hidden
    with_parameters: whether any parameter needs a gradient
    """
    x, weight, hidden = inputs
    up_proj, down_proj, *biases = parameters
    source, place, start, end = rows
    k = kernels_for(x)
    weight_of_row = torch.empty_like(weight).scatter_(0, place, weight)     # (R,) by expert
    grad_rows = k.gather(grad.contiguous(), source)                          # (R, D) unweighted
    grad_a = k.grouped_linear(grad_rows, down_proj.transpose(1, 2), end)    # (R, H) unweighted
    grad_hidden, a, dot = k.activate_backward(
        *split(hidden, down_proj), grad_a, weight_of_row
    )                                                                       # (R, U) (R, H) (R,)
    grads = [dot.index_select(0, place).to(weight.dtype)]
    if with_parameters:
        dtype = up_proj.dtype
        grad_rows *= weight_of_row[:, None]
        grads.append(k.grouped_outer(grad_hidden, k.gather(x, source), end, dtype))  # (E, U, D)
        grads.append(k.grouped_outer(grad_rows, a, end, dtype))             # (E, D, H)
        grads += [sum_by_expert(grad_hidden, end, k).to(dtype) for _ in biases]
    grad_rows = k.grouped_linear(grad_hidden, up_proj.transpose(1, 2), end)  # (R, D)
    return [k.combine(grad_rows, place, start, None), *grads]


@experts_backward.register_fake
def _(grad, inputs, parameters, rows, with_parameters):
    x, weight, _ = inputs
    needed = [x, weight, *(parameters if with_parameters else [])]
    return [torch.empty_like(tensor) for tensor in needed]


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, parameters, rows = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(x, weight, hidden, *parameters, *rows)


def backward(ctx, grad: Tensor | None, _: Tensor | None) -> tuple:
    saved, n = ctx.saved_tensors, 3 + ctx.num_parameters
    needed, of_rows = ctx.needs_input_grad[2], [None] * (len(saved) - n)
    if grad is None:
        return None, None, [None] * len(needed), of_rows
    grad_x, grad_weight, *grads = experts_backward(
        grad, list(saved[:3]), list(saved[3:n]), list(saved[n:]), any(needed)
    )
    grads = [grads[i] if need else None for i, need in enumerate(needed)]
    return grad_x, grad_weight, grads, of_rows


experts_forward.register_autograd(backward, setup_context=save_for_backward)


@register_flop_formula(torch.ops.dit_moe.experts, get_raw=True)
def flops_of_experts(
    x: Tensor, weight: Tensor, parameters: list[Tensor], *_: Any, **__: Any
) -> int:
    """Returns the FLOPs of `experts_forward`, also for torch's FlopCounterMode."""
    (rows,), (_, u, d), (_, _, h) = weight.shape, *(one.shape for one in parameters[:2])
    return 2 * rows * d * (u + h)


@register_flop_formula(torch.ops.dit_moe.experts_backward, get_raw=True)
def flops_of_backward(
    grad: Tensor, inputs: list[Tensor], parameters: list[Tensor], rows: list[Tensor],
    with_parameters: bool, **_: Any,
) -> int:  # fmt: skip
    return (1 + with_parameters) * flops_of_experts(grad, inputs[1], parameters)


def expert_of_rows(source: Tensor, end: Tensor) -> Tensor:
    """Returns the expert (R,) of each row, in the order of `sort_rows`."""
    return torch.searchsorted(end, torch.arange(len(source), device=end.device), right=True)


def split(hidden: Tensor, down_proj: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Splits SwiGLU rows (R, 2H) into gate and up; returns GELU rows (R, H) with None."""
    gated = hidden.shape[1] == 2 * down_proj.shape[2]
    return tuple(hidden.chunk(2, dim=1)) if gated else (hidden, None)


def sum_by_expert(rows: Tensor, end: Tensor, kernels: ModuleType) -> Tensor:
    """Sums the rows (R, U) of each expert, in a fixed order, as a matrix product with a few columns
    of ones; returns (E, U)."""
    ones = rows.new_ones(len(rows), 16 // rows.element_size())
    return kernels.grouped_outer(rows, ones, end, rows.dtype)[:, :, 0].contiguous()
