"""The steps of `moe_kernels.experts` in plain PyTorch, for any device: also the reference of the
Triton kernels, which have the same names.

Shape legend: S tokens, D width, H expert width, E experts, K experts per token, R rows, I and O
input and output width
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sort_rows(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where each row goes when rows are sorted by expert, stably, and where each expert's rows end.

    Takes expert (R,) in [0, E); returns place (R,) and end (E,) int32.
    """
    in_order, order = expert.sort(stable=True)
    experts = torch.arange(num_experts, device=expert.device)
    end = torch.searchsorted(in_order, experts, right=True).int()
    return invert(order), end


def invert(order: Tensor) -> Tensor:
    """The inverse of a permutation (R,)."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows index (R,) of x (S, D); returns (R, D)."""
    return x.index_select(0, index)


def grouped_linear(rows: Tensor, weight: Tensor, end: Tensor) -> Tensor:
    """Linear layer e on rows end[e-1]:end[e]; rows (R, I), weight (E, O, I), which is cast to the
    rows' type; returns (R, O)."""
    weight = weight.to(rows.dtype)
    if weight.data_ptr() % 16:  # torch 2.10 asks for it
        weight = weight.clone()
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=end)


def grouped_outer(grad: Tensor, rows: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight gradient of `grouped_linear`: grad (R, O)^T rows (R, I), expert by expert.

    It is computed in their type and cast to `dtype`.
    """
    return F.grouped_mm(grad.t(), rows, offs=end).to(dtype)                 # (E, O, I)


def activate(gate: Tensor, up: Tensor | None) -> Tensor:
    """silu(gate) * up, or gelu(gate) by the tanh approximation without up; all (R, H)."""
    if up is None:
        return F.gelu(gate, approximate="tanh")
    return F.silu(gate).mul_(up)


def activate_backward(
    gate: Tensor, up: Tensor | None, grad: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through a row's weight and activation; `grad` (R, H) is overwritten.

    With a = activate(gate, up) (R, H) and grad the gradient of weight (R,) * a before the weight,
    returns the gradient of [gate | up] (R, 2H) or of the GELU's input (R, H); a; and the row-wise
    dot product of a and grad (R,) fp32, the gradient of the weight.
    """
    if up is None:
        a = F.gelu(gate, approximate="tanh")
        dot = (a * grad).sum(dim=1, dtype=torch.float32)
        grad *= weight[:, None]
        return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh"), a, dot
    silu = F.silu(gate)
    a = silu * up
    dot = (a * grad).sum(dim=1, dtype=torch.float32)
    grad *= weight[:, None]
    result = grad.new_empty(len(grad), 2 * grad.shape[1])
    grad_gate, grad_up = result.chunk(2, dim=1)
    torch.mul(grad, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return result, a, dot


def combine(rows: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
    """Adds up the rows (R, D) of each token, place (S, K) of them, weighted by weight (S*K,)."""
    picked = rows.index_select(0, place.flatten()).view(*place.shape, rows.shape[1])  # (S, K, D)
    if weight is None:
        return picked.sum(dim=1)
    return torch.bmm(weight.view(place.shape).unsqueeze(1), picked).squeeze(1)     # (S, D)
