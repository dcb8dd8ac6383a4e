"""Products in half precision with few shapes, for rows whose numbers change in every step.

oneDNN compiles each new shape of a half precision product, which takes about as long as the
product, and routing brings new shapes in every step. So the rows of an expert are padded to a
multiple: that leaves few shapes. The multiple is about 1/32 of an expert's mean rows, so the rows
that are added cost little.

Shape legend: E experts, R rows, I and O input and output width
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def compiles_shapes(rows: Tensor) -> bool:
    """Whether each new number of rows would be compiled: on a CPU in bf16 or fp16."""
    return rows.device.type == "cpu" and rows.element_size() == 2


def padded_linear(rows: Tensor, weight: Tensor, end: Tensor) -> Tensor:
    """`moe_kernels.torch_kernels.grouped_linear` with padded rows (R, I); returns (R, O)."""
    out = rows.new_empty(len(rows), weight.shape[1])
    cast = torch.empty_like(weight[0], dtype=rows.dtype)  # stays in the processor's cache
    for expert, first, last, padded in padded_ranges(rows, end):
        w = weight[expert] if weight.dtype == rows.dtype else cast.copy_(weight[expert])  # (O, I)
        if padded <= len(rows):
            # The rows after `last` get results of the wrong expert; the next products replace them.
            torch.mm(rows[first:padded], w.t(), out=out[first:padded])
        else:
            block = zero_padded(rows[first:last], padded - first)
            out[first:last] = torch.mm(block, w.t())[: last - first]
    return out


def padded_outer(grad: Tensor, rows: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """`moe_kernels.torch_kernels.grouped_outer` with padded rows; returns (E, O, I)."""
    out = rows.new_empty(len(end), grad.shape[1], rows.shape[1], dtype=dtype)
    product = torch.empty_like(out[0], dtype=rows.dtype)  # stays in the processor's cache
    pad_grad = grad.shape[1] <= rows.shape[1]  # zeros in the narrower factor are enough
    for expert, first, last, padded in padded_ranges(rows, end):
        g, x = grad[first:padded], rows[first:padded]
        if pad_grad or padded > len(rows):
            g = zero_padded(grad[first:last], padded - first)
        if not pad_grad or padded > len(rows):
            x = zero_padded(rows[first:last], padded - first)
        out[expert] = torch.mm(g.t(), x, out=product)
    return out


def padded_ranges(rows: Tensor, end: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yields the number of each expert, its first row, the end of its rows and their padded end."""
    share = len(rows) // len(end) // 32
    multiple = max(8, 2 ** share.bit_length() // 2)
    first = 0
    for expert, last in enumerate(end.tolist()):
        yield expert, first, last, last + (first - last) % multiple
        first = last


def zero_padded(rows: Tensor, num_rows: int) -> Tensor:
    """The rows (n, I) and rows of zeros behind them; returns (num_rows, I)."""
    return rows if len(rows) == num_rows else F.pad(rows, (0, 0, 0, num_rows - len(rows)))
