"""What exists only to be fast on a CPU: memory that is kept, products of few shapes, attention.

oneDNN compiles each new shape of a half precision product, which takes about as long as the
product, and routing brings new shapes in every step. So the rows of an expert are padded to a
multiple: that leaves few shapes. The multiple is about 1/32 of an expert's mean rows, so the rows
that are added cost little.

Shape legend: E experts, R rows, H, I and O widths, N batch, T tokens per image, d width of a head
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
few_tokens = 256  # of an image, up to which attention is two products in bf16


def keep_freed_memory(device: torch.device) -> None:
    """Makes glibc keep freed memory for the next tensor, where a CPU computes.

    Otherwise each step gets every large activation as fresh pages from the system, and filling
    those takes longer than filling the same memory again. Other C libraries are left alone.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cached_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows (R, H): a few rows at a time on a CPU, else all of them at once.

    A few rows stay in the CPU's cache from one operation on them to the next.
    """
    num_rows, width = rows.shape
    block = max(128, 2**18 // width) if rows.device.type == "cpu" else max(1, num_rows)
    for first in range(0, num_rows, block):
        yield slice(first, first + block)


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


def takes_products(v: Tensor) -> bool:
    """Whether two products are faster for values (N, heads, T, d): bf16 on a CPU, few tokens."""
    return v.dtype == torch.bfloat16 and v.device.type == "cpu" and v.shape[2] <= few_tokens


@contextmanager
def fused_attention() -> Iterator[None]:
    """Has a CPU take the attention that a GPU takes: to count what that one keeps."""
    global few_tokens
    kept, few_tokens = few_tokens, 0
    try:
        yield
    finally:
        few_tokens = kept


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q, k and v (N, heads, T, d) as two batched matrix products.

    The backward pass of PyTorch's scaled_dot_product_attention takes two to five times as long up
    to 256 tokens. This keeps T x T weights of each head.
    """
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)  # (N, heads, T, T)
    return weights @ v
