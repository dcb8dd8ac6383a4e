"""The routed experts as one differentiable operator that keeps little for its backward pass.

    y = compute_experts(x, weight, up_proj, down_proj, rows)

Of the forward pass stay the input x, the rows before the activation (`hidden`) and the routing; the
gathered input and the activation are made again. With a = activation(hidden), the row r of token s
adds weight_r * a_r W_down^T to y_s, so with g_s the gradient of y_s

    d a_r = weight_r * (g_s W_down),    d weight_r = <a_r, g_s W_down>,

and neither needs what the second product returned. Gather and combine are permutations of rows:
the backward pass of each is again a gather, so nothing is accumulated in an order that varies.

The gradients have no derivatives of their own, and there is no forward mode: `moe.experts_loop` has
both. The operator is opaque to torch.compile (no graph break) and has two sets of kernels, which
agree: "torch" below, and "triton" in `moe_kernels.triton_kernels`.

Shape legend:
    S tokens, D width, H expert width, E experts, K experts per token, R chosen rows (S*K),
    U rows of up_proj: 2H of a SwiGLU expert (gate rows first), H of a GELU expert
"""

import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import torch_kernels

HAS_TRITON = importlib.util.find_spec("triton") is not None


class SortedRows(NamedTuple):
    """The chosen rows in the order of their experts; the rows of expert e end at end[e].

    Row r is of token[r]. `place` says where in this order the row that the router named n-th went,
    so place[K*s : K*s + K] are the rows of token s if `per_token` is K. 0: any number per token.
    """

    token: Tensor  # (R,) int64
    place: Tensor  # (R,) int64
    end: Tensor  # (E,) int32
    per_token: int


def kernels_named(name: str) -> ModuleType:
    if name == "triton":
        from moe_kernels import triton_kernels

        return triton_kernels
    return torch_kernels


@torch.library.custom_op("dit_moe::sort_rows", mutates_args=())
def sort_rows(expert: Tensor, num_experts: int, kernels: str) -> tuple[Tensor, Tensor]:
    """Sorts rows by expert, stably. Takes expert (R,); returns place (R,) and end (E,), see
    `SortedRows`."""
    return kernels_named(kernels).sort_rows(expert, num_experts)


@sort_rows.register_fake
def _(expert: Tensor, num_experts: int, kernels: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(expert), expert.new_empty(num_experts, dtype=torch.int32)


def compute_experts(
    x: Tensor,
    weight: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    rows: SortedRows,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    kernels: str = "torch",
) -> Tensor:
    """Computes the chosen rows of x and adds them up, weighted, per token.

    Takes x (S, D), weight (R,) in the router's order, up_proj (E, U, D), down_proj (E, D, H) and
    biases (E, U) and (E, D). They are computed with in x's type: what they are cast to exists only
    while it is used. Returns y (S, D).
    """
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()  # kernels take rows side by side
    y, _ = experts_forward(
        x, weight, up_proj, down_proj, up_bias, down_bias,
        rows.token, rows.place, rows.end, rows.per_token, activation, kernels,
    )  # fmt: skip
    return y


@torch.library.custom_op("dit_moe::experts", mutates_args=())
def experts_forward(
    x: Tensor,
    weight: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    token: Tensor,
    place: Tensor,
    end: Tensor,
    per_token: int,
    activation: str,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """Returns y (S, D) and hidden (R, U), the rows before the activation. See `compute_experts`."""
    k = kernels_named(kernels)
    up_bias, down_bias = cast(x.dtype, up_bias, down_bias)
    hidden = k.grouped_linear(k.gather(x, token), up_proj, end)             # (R, U)
    if up_bias is not None:
        hidden += k.gather(up_bias, expert_of_rows(end, len(token)))
    a = k.activate(*split(hidden, activation))                              # (R, H)
    rows = k.grouped_linear(a, down_proj, end)                              # (R, D)
    if down_bias is not None:
        rows += k.gather(down_bias, expert_of_rows(end, len(token)))
    if per_token:
        return k.combine(rows, place.view(-1, per_token), weight), hidden
    rows *= torch.empty_like(weight).scatter_(0, place, weight)[:, None]
    return torch.zeros_like(x).index_add_(0, token, rows), hidden


@experts_forward.register_fake
def _(x, weight, up_proj, down_proj, up_bias, down_bias, token, place, end, *options):
    return torch.empty_like(x), x.new_empty(len(token), up_proj.shape[1])


@torch.library.custom_op("dit_moe::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden: Tensor,
    token: Tensor,
    place: Tensor,
    end: Tensor,
    per_token: int,
    activation: str,
    kernels: str,
    with_experts: bool,
) -> list[Tensor]:
    """The gradients of x, weight, up_proj, down_proj, up_bias and down_bias.

    Empty tensors stand for those of biases that there are not and, without `with_experts`, of the
    expert parameters.
    """
    k = kernels_named(kernels)
    dtype, grad = up_proj.dtype, grad.contiguous()
    up_bias, down_bias = cast(x.dtype, up_bias, down_bias)
    grad_up, grad_down, grad_up_bias, grad_down_bias = (x.new_empty(0) for _ in range(4))
    weight_of_row = torch.empty_like(weight).scatter_(0, place, weight)     # (R,) by expert
    grad_rows = k.gather(grad, token)                                       # (R, D) before weights
    grad_a = k.grouped_linear(grad_rows, down_proj.transpose(1, 2), end)    # (R, H) before weights
    grad_hidden, a, dot = k.activate_backward(
        *split(hidden, activation), grad_a, weight_of_row
    )                                                                       # (R, U) (R, H) (R,)
    if down_bias is not None:
        bias = k.gather(down_bias, expert_of_rows(end, len(token)))         # (R, D)
        dot += (bias * grad_rows).sum(dim=1, dtype=dot.dtype)
    grad_weight = dot.index_select(0, place).to(weight.dtype)
    if with_experts:
        grad_rows *= weight_of_row[:, None]
        grad_down = k.grouped_outer(grad_rows, a, end, dtype)                # (E, D, H)
        grad_up = k.grouped_outer(grad_hidden, k.gather(x, token), end, dtype)  # (E, U, D)
        if up_bias is not None:
            grad_up_bias = sum_by_expert(grad_hidden, end, k).to(dtype)
        if down_bias is not None:
            grad_down_bias = sum_by_expert(grad_rows, end, k).to(dtype)
    grad_rows = k.grouped_linear(grad_hidden, up_proj.transpose(1, 2), end)  # (R, D)
    if per_token:
        grad_x = k.combine(grad_rows, place.view(-1, per_token), None)      # (S, D)
    else:
        grad_x = torch.zeros_like(x).index_add_(0, token, grad_rows)
    return [grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias]


@experts_backward.register_fake
def _(
    grad, x, weight, up_proj, down_proj, up_bias, down_bias, hidden, token, place, end,
    per_token, activation, kernels, with_experts,
):  # fmt: skip
    outputs = [torch.empty_like(x), torch.empty_like(weight)]
    for parameter in (up_proj, down_proj, up_bias, down_bias):
        is_needed = with_experts and parameter is not None
        outputs.append(torch.empty_like(parameter) if is_needed else up_proj.new_empty(0))
    return outputs


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.per_token, ctx.activation, ctx.kernels = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, hidden)


def backward(ctx, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    *parameters, token, place, end, hidden = ctx.saved_tensors
    with_experts = any(ctx.needs_input_grad[2:6])
    grads = experts_backward(
        grad, *parameters, hidden, token, place, end,
        ctx.per_token, ctx.activation, ctx.kernels, with_experts,
    )  # fmt: skip
    needed = ctx.needs_input_grad
    grads = [g if need else None for g, need in zip(grads, needed[:6], strict=True)]
    return (*grads, *(None,) * 6)


experts_forward.register_autograd(backward, setup_context=save_for_backward)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def split(hidden: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """The gate and up halves of SwiGLU rows; GELU rows whole."""
    return tuple(hidden.chunk(2, dim=1)) if activation == "swiglu" else (hidden, None)


def expert_of_rows(end: Tensor, num_rows: int) -> Tensor:
    return torch.searchsorted(end, torch.arange(num_rows, device=end.device), right=True)


def sum_by_expert(rows: Tensor, end: Tensor, kernels: ModuleType) -> Tensor:
    """Sums rows (R, U) of each expert to (E, U), in a fixed order: a product with a few ones."""
    ones = rows.new_ones(len(rows), 16 // rows.element_size())
    return kernels.grouped_outer(rows, ones, end, rows.dtype)[:, :, 0].contiguous()
