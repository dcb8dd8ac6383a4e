"""The sparse mixture of experts that replaces the feed-forward layer of a DiT block.

    moe = SparseMoEBlock(hidden_size=384, num_experts=8, num_experts_per_tok=2)
    y, router_logits = moe(x)

A layer is four visible steps: the gate scores (`MoEGate`), a router chooses (`route_top_k`), the
experts compute the chosen rows (`Experts`, by one of two back ends that agree in output and every
gradient), and the weighted rows are summed back onto their tokens. Choosing knows nothing of
computing: a `Routing` is a list of (token, expert, weight) with any number of rows per token.

Shape legend:
    N batch, T tokens per image, S = N*T tokens, D width, H expert width,
    E experts, K experts per token, R = S*K chosen rows
"""

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """Which rows the experts compute: row r is token[r] seen by expert[r], scaled by weight[r]."""

    token: Tensor  # (R,) int64, in [0, S)
    expert: Tensor  # (R,) int64, in [0, E)
    weight: Tensor  # (R,) fp32


class MoEGate(nn.Module):
    """Linear gate that scores every expert for every token, in fp32 whatever the autocast."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Scores x (S, D); returns router logits (S, E), fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def top_k_scores(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, then the k best, without renormalising (arXiv 2407.11633, eq. 3).

    Takes router logits (..., E); returns scores (..., E) fp32, weight (..., k), index (..., k).
    """
    scores = router_logits.float().softmax(dim=-1)
    weight, index = scores.topk(k, dim=-1, sorted=False)
    return scores, weight, index


def route_top_k(router_logits: Tensor, k: int) -> Routing:
    """Token choice: each token goes to its k best experts; none is dropped. Logits are (S, E)."""
    _, weight, index = top_k_scores(router_logits, k)
    token = torch.arange(len(index), device=index.device).unsqueeze(1).expand_as(index)
    return Routing(token.flatten(), index.flatten(), weight.flatten())


def load_balancing_loss(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Balance loss sum_i f_i P_i of each layer (arXiv 2407.11633, eq. 5), before alpha.

    Takes router logits (L, S, E) of L layers. Returns the loss (L,), 1 when perfectly balanced,
    and the load f (L, E): E times each expert's share of the S*K assignments, mean 1, detached.
    """
    scores, _, index = top_k_scores(router_logits, k)
    num_experts = router_logits.shape[-1]
    index = index.flatten(1)                                                # (L, S*K)
    ones = torch.ones(1, device=index.device).expand_as(index)
    load = torch.zeros_like(scores[:, 0]).scatter_add(1, index, ones)       # (L, E) counts
    load = load * (num_experts / index.shape[1])
    return (load * scores.mean(dim=1)).sum(dim=1), load.detach()


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without bias (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """E SwiGLU experts as two stacked parameters, computed for the rows that a `Routing` lists.

    gate_up_proj is (E, 2H, D), the H gate rows of each expert first; down_proj is (E, D, H).
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, backend: str = "grouped"
    ):
        super().__init__()
        if backend not in EXPERT_BACKENDS:
            raise ValueError(f"expert_backend: got {backend!r}, expected {sorted(EXPERT_BACKENDS)}")
        self.backend = backend
        shape = (num_experts, hidden_size, intermediate_size)               # (E, D, H)
        self.down_proj = nn.Parameter(torch.empty(shape))
        self.gate_up_proj = nn.Parameter(torch.empty(shape[0], 2 * shape[2], shape[1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Each slice is the linear layer D -> H or H -> D that it stands for. xavier_uniform_ on the
        # 3-D parameter would take the expert axis for part of the fan.
        bound = math.sqrt(6 / (self.down_proj.shape[1] + self.down_proj.shape[2]))
        nn.init.uniform_(self.gate_up_proj, -bound, bound)
        nn.init.uniform_(self.down_proj, -bound, bound)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Computes the routed rows of x (S, D); returns their weighted sum per token (S, D)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        compute = EXPERT_BACKENDS[self.backend]
        if self.backend == "grouped" and not rows_are_aligned(x, self.gate_up_proj):
            warn_unaligned(tuple(self.gate_up_proj.shape), x.dtype)
            compute = experts_loop
        return compute(x, routing, self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype))


def experts_loop(x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The reference back end: one expert after another. Shapes as in `Experts`."""
    y = torch.zeros_like(x)                                                 # (S, D)
    for expert, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        chosen = (routing.expert == expert).nonzero().squeeze(1)            # (rows of this expert,)
        token = routing.token[chosen]
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)             # each (rows, H)
        rows = F.linear(F.silu(gate) * up, down)                            # (rows, D)
        y = y.index_add(0, token, rows * routing.weight[chosen, None].to(rows.dtype))
    return y


def experts_grouped(x: Tensor, routing: Routing, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The fast back end: rows sorted by expert, then one grouped matrix product per projection.

    Shapes as in `Experts`. No host sync and no loop over experts on the way.
    """
    # Dispatch: `end[e]` is where the rows of expert e end.
    expert, order = routing.expert.sort(stable=True)                        # (R,)
    experts = torch.arange(len(gate_up_proj), device=x.device)
    end = torch.searchsorted(expert, experts, right=True).int()             # (E,)
    token = routing.token[order]
    # Experts.
    gate, up = grouped_linear(x[token], gate_up_proj, end).chunk(2, dim=-1)  # each (R, H)
    rows = grouped_linear(F.silu(gate) * up, down_proj, end)                # (R, D)
    # Combine.
    rows = rows * routing.weight[order, None].to(rows.dtype)
    return torch.zeros_like(x).index_add(0, token, rows)                    # (S, D)


# F.grouped_mm as operators of our own: torch.compile and tensors without data (--dry-run) accept
# the built-in one in bf16 alone, though eager mode computes every floating type.
@torch.library.custom_op("dit_moe::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, end: Tensor) -> Tensor:
    """Linear layer e on rows end[e-1]:end[e]; rows (R, I), weight (E, O, I), end (E,) int32."""
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=end)             # (R, O)


@torch.library.custom_op("dit_moe::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, rows: Tensor, end: Tensor) -> Tensor:
    """The weight gradient of `grouped_linear`: grad (R, O)^T rows (R, I), expert by expert."""
    return F.grouped_mm(grad.t(), rows, offs=end)                           # (E, O, I)


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, end: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(grad: Tensor, rows: Tensor, end: Tensor) -> Tensor:
    return rows.new_empty(end.shape[0], grad.shape[1], rows.shape[1])


def save_for_grouped_linear(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def grouped_linear_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, end = ctx.saved_tensors
    grad = grad.contiguous()  # the grouped product refuses an expanded gradient
    return grouped_linear(grad, weight.transpose(1, 2), end), grouped_outer(grad, rows, end), None


grouped_linear.register_autograd(grouped_linear_backward, setup_context=save_for_grouped_linear)

EXPERT_BACKENDS = {"loop": experts_loop, "grouped": experts_grouped}


def rows_are_aligned(x: Tensor, gate_up_proj: Tensor) -> bool:
    """Whether D and H are multiples of 16 bytes, as the grouped matrix product asks of strides."""
    _, twice_h, d = gate_up_proj.shape
    unit = 16 // x.element_size()
    return d % unit == 0 and (twice_h // 2) % unit == 0


def warn_unaligned(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Says (once a process: Python shows a repeated warning once) why the loop is taken."""
    _, twice_h, d = shape
    warnings.warn(
        f"grouped experts need rows of a multiple of 16 bytes; got width {d}, expert width "
        f"{twice_h // 2} in {dtype}: computing them in a loop",
        stacklevel=3,
    )


class SparseMoEBlock(nn.Module):
    """Routed SwiGLU experts plus shared ones that see every token (arXiv 2407.11633, section 2.2).

    y = sum over the chosen experts of score * expert(x), + shared_experts(x).
    """

    # DeepSpeed's AutoEP reads this Hugging Face convention: forward returns (y, router_logits), and
    # so does the expert-parallel layer that takes this block's place.
    _can_record_outputs = {"router_logits": MoEGate}

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        mlp_ratio: float = 4.0,
        n_shared_experts: int = 2,
        expert_backend: str = "grouped",
    ):
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.gate = MoEGate(hidden_size, num_experts)
        intermediate_size = int(hidden_size * mlp_ratio)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, expert_backend)
        self.shared_experts = (
            SwiGLU(hidden_size, n_shared_experts * hidden_size) if n_shared_experts else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes x (N, T, D); returns y (N, T, D) and the router logits (S, E), fp32."""
        tokens = x.flatten(0, 1)                                            # (S, D)
        router_logits = self.gate(tokens)                                   # (S, E)
        routing = route_top_k(router_logits, self.num_experts_per_tok)
        y = self.experts(tokens, routing).view_as(x)                        # (N, T, D)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, router_logits
