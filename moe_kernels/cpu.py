"""Expert products on a CPU: in blocks that fit the cache, and padded.

oneDNN compiles every new shape of a half-precision matrix product, which takes about as long as the
product itself, and routing produces new shapes in every step. The rows of each expert are therefore
padded to a multiple of about 1/32 of the mean number of rows per expert: few shapes, little cost.

Shape legend: E experts, R rows, H, I and O widths
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_blocks(rows: Tensor) -> Iterator[slice]:
    """Yields slices of rows (R, H): on a CPU a few, which stay in its cache between consecutive
    operations; on a GPU all."""
    num_rows, width = rows.shape
    block = max(128, 2**18 // width) if rows.device.type == "cpu" else max(1, num_rows)
    for first in range(0, num_rows, block):
        yield slice(first, first + block)


def compiles_shapes(rows: Tensor) -> bool:
    """Returns whether oneDNN compiles each new number of rows: true for bf16 and fp16 on a CPU."""
    return rows.device.type == "cpu" and rows.element_size() == 2


def padded_linear(rows: Tensor, weight: Tensor, end: Tensor) -> Tensor:
    """`moe_kernels.torch_kernels.grouped_linear` with padded rows (R, I); returns (R, O)."""
    out = rows.new_empty(len(rows), weight.shape[1])
    if torch.is_tensor(weight):  # reused, so that it stays in the cache; strides as the weight's
        cast = torch.empty_like(weight[0], dtype=rows.dtype)
    for expert, first, last, padded in padded_ranges(rows, end):
        w = weight[expert]  # (O, I)
        if not torch.is_tensor(w):  # quantised
            w = w.to(rows.dtype)
        elif w.dtype != rows.dtype:
            w = cast.copy_(w)
        if padded <= len(rows):
            # Rows after `last` get results of the wrong expert, which the next product overwrites.
            torch.mm(rows[first:padded], w.t(), out=out[first:padded])
        else:
            block = zero_padded(rows[first:last], padded - first)
            out[first:last] = torch.mm(block, w.t())[: last - first]
    return out


def padded_outer(grad: Tensor, rows: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """`moe_kernels.torch_kernels.grouped_outer` with padded rows; returns (E, O, I)."""
    out = rows.new_empty(len(end), grad.shape[1], rows.shape[1], dtype=dtype)
    product = torch.empty_like(out[0], dtype=rows.dtype)  # reused, so that it stays in the cache
    pad_grad = grad.shape[1] <= rows.shape[1]  # zeros in one factor are enough: the narrower one
    for expert, first, last, padded in padded_ranges(rows, end):
        g, x = grad[first:padded], rows[first:padded]
        if pad_grad or padded > len(rows):
            g = zero_padded(grad[first:last], padded - first)
        if not pad_grad or padded > len(rows):
            x = zero_padded(rows[first:last], padded - first)
        out[expert] = torch.mm(g.t(), x, out=product)
    return out


def padded_ranges(rows: Tensor, end: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yields for each expert: its index, its first row, the end of its rows and the padded end."""
    share = len(rows) // len(end) // 32
    multiple = max(8, 2 ** share.bit_length() // 2)
    first = 0
    for expert, last in enumerate(end.tolist()):
        yield expert, first, last, last + (first - last) % multiple
        first = last


def zero_padded(rows: Tensor, num_rows: int) -> Tensor:
    """Appends rows of zeros to rows (n, I); returns (num_rows, I)."""
    return rows if len(rows) == num_rows else F.pad(rows, (0, 0, 0, num_rows - len(rows)))
