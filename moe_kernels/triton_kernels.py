"""The steps of `moe_kernels.operators` as Triton kernels, without host sync or loop over experts.

Each function has the name and the result of its counterpart in `torch_kernels`. The kernels run on
every CUDA GPU that Triton supports. With `TRITON_INTERPRET=1`, set before Triton is imported,
they run on CPU tensors, for tests.

Shape legend: S tokens, D width, H expert width, E experts, R rows, I and O input and output width
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import torch_kernels
from moe_kernels.quantized import GROUP, QuantizedWeight

BLOCK = 1024  # elements that one program processes at a time
# Tile of a grouped product (rows, columns, summands) and number of warps, by arithmetic.
TILES = {"half": (128, 128, 64, 8), "tf32": (128, 128, 32, 8), "ieee": (64, 64, 32, 4)}
QUANTIZED_WARPS = 8  # with 4 warps, fp32 tiles spill registers
TILE_GROUP = 8  # row tiles that step through the column tiles together
# The interpreter multiplies the bits of bf16 numbers as if they were integers, so cast them first.
INTERPRETED = triton.knobs.runtime.interpret


def block_of(width: int) -> tuple[int, int]:
    """Returns the rows and columns of one program's block, for a matrix of this width.

    The number of columns is a power of two that divides the width rounded up to a multiple of 128,
    so that few columns of a block lie outside the matrix.
    """
    whole = triton.cdiv(width, 128) * 128
    columns = min(BLOCK, whole & -whole)
    return BLOCK // columns, columns


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launches kernels on the device of the first tensor; Triton launches on the current device."""

    @functools.wraps(function)
    def call(x: Tensor, *others: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(x, *others)
        with torch.cuda.device_of(x):
            return function(x, *others)

    return call


@on_its_device
def gather(x: Tensor, index: Tensor) -> Tensor:
    """As in `torch_kernels`."""
    (num_rows,), width = index.shape, x.shape[1]
    out = x.new_empty(num_rows, width)
    rows, columns = block_of(width)
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(width, columns))
    gather_kernel[grid](x, index, out, num_rows, width, x.stride(0), ROWS=rows, COLUMNS=columns)
    return out


@triton.jit
def gather_kernel(
    x, index, out, num_rows, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < width)
    source = tl.load(index + row, mask=row < num_rows, other=0)
    value = tl.load(x + source * stride + column, mask=inside)
    tl.store(out + row * width + column, value, mask=inside)


@on_its_device
def combine(rows: Tensor, place: Tensor, start: Tensor, weight: Tensor | None) -> Tensor:
    """As in `torch_kernels`."""
    num_tokens, width = len(start) - 1, rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    tokens, columns = block_of(width)
    grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(width, columns))
    combine_kernel[grid](
        rows, place, start, rows if weight is None else weight, out, num_tokens, width,
        WEIGHTED=weight is not None, TOKENS=tokens, COLUMNS=columns,
    )
    return out


@triton.jit
def combine_kernel(
    rows, place, start, weight, out, num_tokens, width,
    WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_token = token < num_tokens
    first = tl.load(start + token, mask=is_token, other=0)
    count = tl.load(start + token + 1, mask=is_token, other=0) - first
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for k in range(tl.max(count, axis=0)):
        has_row = k < count
        row = tl.load(place + first + k, mask=has_row, other=0)
        value = tl.load(
            rows + row[:, None] * width + column,
            mask=has_row[:, None] & (column < width), other=0.0,
        ).to(tl.float32)
        if WEIGHTED:
            scale = tl.load(weight + first + k, mask=has_row, other=0.0).to(tl.float32)
            value *= scale[:, None]
        total += value
    tl.store(
        out + token[:, None] * width + column, total.to(out.dtype.element_ty),
        mask=is_token[:, None] & (column < width),
    )


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh_of_gelu(x):
    # tanh(v) = 2 sigmoid(2 v) - 1, with v = sqrt(2 / pi) (x + 0.044715 x^3)
    return 2.0 * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1.0


@on_its_device
def activate(gate: Tensor, up: Tensor | None) -> Tensor:
    """As in `torch_kernels`, but the result is rounded only once."""
    num_rows, width = gate.shape
    out = gate.new_empty(num_rows, width)
    rows, columns = block_of(width)
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(width, columns))
    activate_kernel[grid](
        gate, gate if up is None else up, out, num_rows, width, gate.stride(0),
        GATED=up is not None, ROWS=rows, COLUMNS=columns,
    )
    return out


@triton.jit
def activate_kernel(
    gate, up, out, num_rows, width, stride,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < width)
    g = tl.load(gate + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        a = g * sigmoid(g) * tl.load(up + row * stride + column, mask=inside, other=0.0)
    else:
        a = 0.5 * g * (1.0 + tanh_of_gelu(g))
    tl.store(out + row * width + column, a.to(out.dtype.element_ty), mask=inside)


@on_its_device
def activate_backward(
    gate: Tensor, up: Tensor | None, grad: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `torch_kernels`, in one pass that reads each row once."""
    num_rows, width = grad.shape
    grad_input = grad.new_empty(num_rows, width if up is None else 2 * width)
    a, dot = torch.empty_like(grad), grad.new_empty(num_rows, dtype=torch.float32)
    activate_backward_kernel[(num_rows,)](
        gate, gate if up is None else up, grad, weight, grad_input, a, dot, width,
        gate.stride(0), GATED=up is not None, COLUMNS=block_of(width)[1],
    )
    return grad_input, a, dot


@triton.jit
def activate_backward_kernel(
    gate, up, grad, weight, grad_input, a, dot, width, stride,
    GATED: tl.constexpr, COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row).to(tl.float32)
    out = grad_input + row * (2 * width if GATED else width)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < width
        g = tl.load(gate + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            u = tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
            s = sigmoid(g)
            value = g * s * u
            grad_gate = scale * da * u * s * (1.0 + g * (1.0 - s))
            grad_up = (scale * da * g * s).to(grad_input.dtype.element_ty)
            tl.store(out + width + column, grad_up, mask=inside)
        else:
            h = tanh_of_gelu(g)
            value = 0.5 * g * (1.0 + h)
            slope = 0.7978845608028654 * (1.0 + 3 * 0.044715 * g * g)
            grad_gate = scale * da * (0.5 * (1.0 + h) + 0.5 * g * (1.0 - h * h) * slope)
        tl.store(out + column, grad_gate.to(grad_input.dtype.element_ty), mask=inside)
        tl.store(a + row * width + column, value.to(a.dtype.element_ty), mask=inside)
        total += value * da
    tl.store(dot + row, tl.sum(total, axis=0))


@on_its_device
def grouped_linear(rows: Tensor, weight: Tensor | QuantizedWeight, end: Tensor) -> Tensor:
    """As in `torch_kernels`. Uses F.grouped_mm where that is a single kernel.

    Quantised weights are dequantised tile by tile.
    """
    if torch_kernels.has_fused_product(rows, weight, end):
        return torch_kernels.grouped_linear(rows, weight, end)
    (num_rows, inputs), (num_experts, outputs, _) = rows.shape, weight.shape
    block_rows, block_outputs, block_inputs, warps = TILES[arithmetic(rows)]
    if isinstance(weight, QuantizedWeight):
        weight, scale = weight.values, weight.scale
        bits = 8 if weight.dtype == torch.int8 else 4
        block_inputs, warps = block_inputs if bits == 8 else GROUP, QUANTIZED_WARPS
    else:
        weight, scale, bits = weight.to(rows.dtype), rows, 16
    out = rows.new_empty(num_rows, outputs)
    most_tiles = triton.cdiv(num_rows, block_rows) + num_experts
    grid = (triton.cdiv(outputs, block_outputs) * most_tiles,)  # other axes have at most 2^16 - 1
    grouped_linear_kernel[grid](
        rows, weight, scale, out, end, num_experts, inputs, outputs, *weight.stride(),
        ROWS=block_rows, OUTPUTS=block_outputs, INPUTS=block_inputs,
        EXPERTS=triton.next_power_of_2(num_experts), GROUP=TILE_GROUP, PRECISION=precision(),
        WIDEN=INTERPRETED, BITS=bits, num_warps=warps,
    )
    return out


def precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def arithmetic(x: Tensor) -> str:
    return "half" if x.element_size() == 2 else precision()


@triton.jit
def grouped_linear_kernel(
    rows, weight, scale, out, end, num_experts, inputs, outputs,
    stride_expert, stride_output, stride_input,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BITS: tl.constexpr,
):
    # Row tiles are numbered expert by expert. The grid has the largest number of tiles that any
    # routing needs, so programs beyond the last tile have nothing to do.
    column_tiles = tl.cdiv(outputs, OUTPUTS)
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(end + experts, mask=experts < num_experts, other=0)
    starts = tl.load(end + experts - 1, mask=(experts > 0) & (experts < num_experts), other=0)
    tiles = (ends - starts + ROWS - 1) // ROWS                  # (EXPERTS,) tiles of rows
    is_before = tl.cumsum(tiles, axis=0) <= program // column_tiles
    expert = tl.sum(is_before.to(tl.int32), axis=0)
    if expert < num_experts:
        first_tile = tl.sum(tl.where(is_before, tiles, 0), axis=0)
        row_tiles = tl.sum(tl.where(experts == expert, tiles, 0), axis=0)
        # A group of row tiles steps through the columns together, so that concurrent programs share
        # few rows and columns, which stay in the L2 cache.
        local = program - first_tile * column_tiles
        group, within = local // (GROUP * column_tiles), local % (GROUP * column_tiles)
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        row_tile, column_tile = group * GROUP + within % group_rows, within // group_rows
        first_row = tl.load(end + expert - 1, mask=expert > 0, other=0)
        last_row = tl.load(end + expert)
        row = first_row + row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * OUTPUTS + tl.arange(0, OUTPUTS)
        summand = tl.arange(0, INPUTS)
        is_row, is_column = row < last_row, column < outputs
        row = row.to(tl.int64)
        source = weight + expert.to(tl.int64) * stride_expert
        total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
        for first in range(0, inputs, INPUTS):
            k = first + summand
            a = tl.load(
                rows + row[:, None] * inputs + k[None, :],
                mask=is_row[:, None] & (k < inputs)[None, :], other=0.0,
            )
            stored = k // 2 if BITS == 4 else k  # int4: two inputs per byte
            b = tl.load(
                source + column[None, :] * stride_output + stored[:, None] * stride_input,
                mask=is_column[None, :] & (k < inputs)[:, None], other=0,
            )
            if BITS == 4:  # the inputs of a tile share one scale
                group_scale = tl.load(
                    scale + (expert.to(tl.int64) * outputs + column) * (inputs // INPUTS)
                    + first // INPUTS, mask=is_column, other=0.0,
                ).to(tl.float32)
                q = ((b >> (k % 2 * 4)[:, None].to(tl.uint8)) & 15).to(tl.float32) - 8.0
                b = q * group_scale[None, :]
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b.to(a.dtype), total, input_precision=PRECISION)
        if BITS == 8:
            output_scale = tl.load(
                scale + expert.to(tl.int64) * outputs + column, mask=is_column, other=0.0
            ).to(tl.float32)
            total *= output_scale[None, :]
        tl.store(
            out + row[:, None] * outputs + column[None, :],
            total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :],
        )


@on_its_device
def grouped_outer(grad: Tensor, rows: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """As in `torch_kernels`. Uses F.grouped_mm where that is a single kernel."""
    if torch_kernels.has_fused_product(grad, rows, end, torch_kernels.OUTER_ON):
        return torch_kernels.grouped_outer(grad, rows, end, dtype)
    outputs, inputs, num_experts = grad.shape[1], rows.shape[1], len(end)
    block_outputs, block_inputs, block_rows, warps = TILES[arithmetic(rows)]
    out = rows.new_empty(num_experts, outputs, inputs)
    grid = (triton.cdiv(inputs, block_inputs), triton.cdiv(outputs, block_outputs), num_experts)
    grouped_outer_kernel[grid](
        grad, rows, out, end, outputs, inputs,
        ROWS=block_rows, OUTPUTS=block_outputs, INPUTS=block_inputs, PRECISION=precision(),
        WIDEN=INTERPRETED, num_warps=warps,
    )
    return out.to(dtype)


@triton.jit
def grouped_outer_kernel(
    grad, rows, out, end, outputs, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    expert = tl.program_id(2)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    i = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    first_row = tl.load(end + expert - 1, mask=expert > 0, other=0)
    last_row = tl.load(end + expert)
    total = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
    for first in range(first_row, last_row, ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = row < last_row
        row = row.to(tl.int64)
        g = tl.load(
            grad + row[None, :] * outputs + o[:, None],
            mask=is_row[None, :] & (o < outputs)[:, None], other=0.0,
        )
        x = tl.load(
            rows + row[:, None] * inputs + i[None, :],
            mask=is_row[:, None] & (i < inputs)[None, :], other=0.0,
        )
        if WIDEN:
            g, x = g.to(tl.float32), x.to(tl.float32)
        total = tl.dot(g, x, total, input_precision=PRECISION)
    tl.store(
        out + expert.to(tl.int64) * outputs * inputs + o[:, None] * inputs + i[None, :],
        total.to(out.dtype.element_ty), mask=(o < outputs)[:, None] & (i < inputs)[None, :],
    )
