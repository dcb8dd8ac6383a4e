"""The routed experts, computed fast.

    y = compute_experts(x, routing.token, routing.expert, routing.weight, [up_proj, down_proj])

Rows are sorted by expert, and one operator computes them (operators.py). torch.func.jvp under
no_grad has an operator of its own (forward_mode.py). Second derivatives and the rest of torch.func
need `moe.experts_loop`.

Shape legend:
    S tokens, D width, H expert width, E experts, R chosen rows,
    U rows of up_proj: 2H for a SwiGLU expert (gate rows first), H for a GELU expert
"""

import torch
from torch import Tensor

from moe_kernels.forward_mode import ForwardModeExperts, has_tangent
from moe_kernels.operators import experts_forward, quantized_experts
from moe_kernels.quantized import QuantizedWeight


def compute_experts(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor,
    parameters: list[Tensor | QuantizedWeight],
) -> Tensor:
    """Applies expert[r] to token[r] for each row r; sums the rows of a token, scaled by weight[r].

    x: tokens (S, D)
    token, expert, weight: (R,), sorted by token
    parameters: up_proj (E, U, D), down_proj (E, D, H) and, optionally, the bias of up_proj (E, U)

    Returns y (S, D). The computation uses the dtype of x: parameters are cast or dequantised when
    they are used. Quantised parameters have no backward pass.
    """
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    rows = sort_rows(token, expert, x.shape[0], len(parameters[0]))
    if isinstance(parameters[0], QuantizedWeight):
        if has_tangent(x, weight):
            raise NotImplementedError("quantised experts have no derivatives")
        up_proj, down_proj, *biases = parameters
        tensors = [up_proj.values, up_proj.scale, down_proj.values, down_proj.scale, *biases]
        return quantized_experts(x, weight, tensors, rows)
    if has_tangent(x, weight, *parameters):
        return ForwardModeExperts.apply(x, weight, *rows, *parameters)[0]
    return experts_forward(x, weight, parameters, rows)[0]


def sort_rows(token: Tensor, expert: Tensor, num_tokens: int, num_experts: int) -> list[Tensor]:
    """Sorts rows (R,) by expert. The rows are given in the order of their tokens.

    The sort is stable. Returns int64 tensors, except `end`, which is int32:
    source (R,)      token of each row, in the new order
    place (R,)       new index of each row
    start (S + 1,)   the rows of token s have the new indices place[start[s]:start[s + 1]]
    end (E,)         the rows of expert e are source[end[e - 1]:end[e]]
    """
    num_rows = token.shape[0]  # len() would specialise a traced graph to this number
    numbers = torch.arange(num_rows + num_tokens + 1 + num_experts, device=token.device)
    # A radix sort of one-byte keys needs only one pass.
    kind = torch.uint8 if num_experts <= 256 else torch.int32
    in_order, order = expert.to(kind).sort(stable=True)
    place = torch.empty_like(order).scatter(0, order, numbers[:num_rows])
    start = torch.searchsorted(token.contiguous(), numbers[: num_tokens + 1])
    end = torch.searchsorted(in_order, numbers[:num_experts].to(kind), right=True).int()
    return [token[order], place, start, end]
