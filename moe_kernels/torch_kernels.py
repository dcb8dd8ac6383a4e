"""The steps of `moe_kernels.experts` in plain PyTorch, for any device; the Triton kernels, which
have the same names, are tested against them.

Shape legend: S tokens, D width, H expert width, E experts, R rows, I and O input and output width
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cpu import cached_blocks, compiles_shapes, padded_linear, padded_outer
from moe_kernels.quantized import QuantizedWeight


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows index (R,) of x (S, D); returns (R, D)."""
    return x.index_select(0, index)


def combine(rows: Tensor, place: Tensor, start: Tensor, weight: Tensor | None) -> Tensor:
    """Adds up the rows of each token, rows[place[start[s]:start[s + 1]]], in this order, in fp32.

    Takes rows (R, D), place (R,), start (S + 1,) and perhaps weight (R,); returns (S, D).
    """
    return F.embedding_bag(
        place, rows, start, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


# Compute capabilities whose F.grouped_mm is one kernel, and right: on 10 it gave experts without
# rows a weight gradient (pytorch issue 172439).
LINEAR_ON, OUTER_ON = (9, 10), (9,)


def has_fused_product(
    rows: Tensor, other: Tensor | QuantizedWeight, capabilities: tuple[int, ...] = LINEAR_ON
) -> bool:
    """Whether F.grouped_mm multiplies rows by `other` in one kernel: bf16, on these GPUs.

    It reads 16 bytes at a time, so each row has to start at a multiple of them.
    """
    return (
        rows.is_cuda
        and not isinstance(other, QuantizedWeight)
        and rows.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(rows.device)[0] in capabilities
        and starts_at_16_bytes(rows)
        and starts_at_16_bytes(other)
    )


def starts_at_16_bytes(x: Tensor) -> bool:
    """Whether every row does, if x is stored in bf16."""
    return x.data_ptr() % 16 == 0 and all(step == 1 or step % 8 == 0 for step in x.stride())


def grouped_linear(rows: Tensor, weight: Tensor | QuantizedWeight, end: Tensor) -> Tensor:
    """Linear layer e on rows end[e-1]:end[e]; rows (R, I), weight (E, O, I), which is cast to the
    rows' type, or dequantised; returns (R, O)."""
    if has_fused_product(rows, weight):
        return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=end)
    if compiles_shapes(rows):
        return padded_linear(rows, weight, end)
    out = rows.new_empty(len(rows), weight.shape[1])
    for w, (first, last) in zip(weight, pairwise([0, *end.tolist()]), strict=True):
        torch.mm(rows[first:last], w.to(rows.dtype).t(), out=out[first:last])
    return out


def grouped_outer(grad: Tensor, rows: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight gradient of `grouped_linear`: grad (R, O)^T rows (R, I), expert by expert.

    It is computed in their type and cast to `dtype`; returns (E, O, I).
    """
    if has_fused_product(grad, rows, OUTER_ON):
        return F.grouped_mm(grad.t(), rows, offs=end).to(dtype)
    if compiles_shapes(rows):
        return padded_outer(grad, rows, end, dtype)
    out = rows.new_empty(len(end), grad.shape[1], rows.shape[1])
    for product, (first, last) in zip(out, pairwise([0, *end.tolist()]), strict=True):
        torch.mm(grad[first:last].t(), rows[first:last], out=product)
    return out.to(dtype)


def activate(gate: Tensor, up: Tensor | None) -> Tensor:
    """silu(gate) * up, or gelu(gate) by the tanh approximation without up; all (R, H)."""
    return F.gelu(gate, approximate="tanh") if up is None else F.silu(gate).mul_(up)


def activate_backward(
    gate: Tensor, up: Tensor | None, grad: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through a row's weight and activation.

    With a = activate(gate, up) (R, H) and grad the gradient of weight (R,) * a before the weight,
    returns the gradient of [gate | up] (R, 2H) or of the GELU's input (R, H); a; and the row-wise
    dot product of a and grad (R,) fp32, the gradient of the weight.
    """
    num_rows, h = grad.shape
    result = grad.new_empty(num_rows, h if up is None else 2 * h)
    a, dot = torch.empty_like(grad), grad.new_empty(num_rows, dtype=torch.float32)
    for part in cached_blocks(grad):
        g, d, a_part, out = gate[part], grad[part], a[part], result[part]
        if up is None:
            a_part.copy_(F.gelu(g, approximate="tanh"))
        else:
            silu = F.silu(g)
            torch.mul(silu, up[part], out=a_part)
        torch.sum(a_part * d, dim=1, dtype=dot.dtype, out=dot[part])
        d = d * weight[part, None]
        if up is None:
            torch.ops.aten.gelu_backward.grad_input(d, g, approximate="tanh", grad_input=out)
        else:
            torch.mul(d, silu, out=out[:, h:])
            torch.ops.aten.silu_backward.grad_input(d.mul_(up[part]), g, grad_input=out[:, :h])
    return result, a, dot
