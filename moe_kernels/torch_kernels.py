"""The steps of `moe_kernels.operators` in plain PyTorch, for any device.

The tests compare the Triton kernels, which have the same names, with these functions.

Shape legend: S tokens, D width, H expert width, E experts, R rows, I and O input and output width
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.cpu import cached_blocks, compiles_shapes, padded_linear, padded_outer
from moe_kernels.quantized import QuantizedWeight


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Returns the rows index (R,) of x (S, D), as (R, D)."""
    return x.index_select(0, index)


def combine(rows: Tensor, place: Tensor, start: Tensor, weight: Tensor | None) -> Tensor:
    """Sums the rows of each token s, rows[place[start[s]:start[s + 1]]], in this order, in fp32.

    Takes rows (R, D), place (R,), start (S + 1,) and weight (R,) or None. Returns (S, D).
    """
    return F.embedding_bag(
        place, rows, start, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


# Compute capabilities on which F.grouped_mm is one kernel and correct. On 10 the weight gradient of
# an expert without rows was not zero (pytorch issue 172439).
LINEAR_ON, OUTER_ON = (9, 10), (9,)
MOST_GROUPS = 1023  # of F.grouped_mm, which starts a thread for each


def has_fused_product(
    rows: Tensor, other: Tensor | QuantizedWeight, end: Tensor,
    capabilities: tuple[int, ...] = LINEAR_ON,
) -> bool:  # fmt: skip
    """Returns whether F.grouped_mm multiplies rows by `other` in one kernel: bf16, on these GPUs.

    The kernel reads 16 bytes at a time, so each row has to start at a multiple of 16 bytes.
    """
    return (
        rows.is_cuda
        and not isinstance(other, QuantizedWeight)
        and rows.dtype == torch.bfloat16
        and len(end) <= MOST_GROUPS
        and torch.cuda.get_device_capability(rows.device)[0] in capabilities
        and starts_at_16_bytes(rows)
        and starts_at_16_bytes(other)
    )


def starts_at_16_bytes(x: Tensor) -> bool:
    """Returns whether every row of x, stored in bf16, starts at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(step == 1 or step % 8 == 0 for step in x.stride())


def grouped_linear(rows: Tensor, weight: Tensor | QuantizedWeight, end: Tensor) -> Tensor:
    """Applies linear layer e, weight[e] (O, I), to the rows end[e-1]:end[e] of rows (R, I).

    The weight (E, O, I) is cast to the dtype of the rows, or dequantised. Returns (R, O).
    """
    if has_fused_product(rows, weight, end):
        # It may pad the rows of its result to 16 bytes.
        return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=end).contiguous()
    if compiles_shapes(rows):
        return padded_linear(rows, weight, end)
    out = rows.new_empty(len(rows), weight.shape[1])
    for expert, (first, last) in enumerate(pairwise([0, *end.tolist()])):
        torch.mm(rows[first:last], weight[expert].to(rows.dtype).t(), out=out[first:last])
    return out


def grouped_outer(grad: Tensor, rows: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the weight gradient of `grouped_linear`: grad (R, O)^T rows (R, I) for each expert.

    The gradient is computed in the dtype of the rows and cast to `dtype`. Returns (E, O, I).
    """
    if has_fused_product(grad, rows, end, OUTER_ON):
        return F.grouped_mm(grad.t(), rows, offs=end).to(dtype)
    if compiles_shapes(rows):
        return padded_outer(grad, rows, end, dtype)
    out = rows.new_empty(len(end), grad.shape[1], rows.shape[1])
    for product, (first, last) in zip(out, pairwise([0, *end.tolist()]), strict=True):
        torch.mm(grad[first:last].t(), rows[first:last], out=product)
    return out.to(dtype)


def activate(gate: Tensor, up: Tensor | None) -> Tensor:
    """Returns silu(gate) * up or, without up, gelu(gate) by the tanh approximation; all (R, H)."""
    return F.gelu(gate, approximate="tanh") if up is None else F.silu(gate).mul_(up)


def activate_backward(
    gate: Tensor, up: Tensor | None, grad: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiates weight * a, where a = activate(gate, up).

    grad: gradient (R, H) of the product weight * a
    weight: (R,)
    Returns the gradient of [gate | up] (R, 2H) or of the GELU's input (R, H); a (R, H); and the
    gradient of the weight (R,) in fp32, which is the row-wise dot product of a and grad.
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
