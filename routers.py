"""Routers: how tokens get experts, one class a method.

    router = ROUTERS["topk"](hidden_size=384, num_experts=8, num_experts_per_tok=2)
    routing = router(x)

A router chooses and nothing else. What it decides, a `Routing`, is computed once and travels:
the experts compute its rows, the training loss adds its loss, `DiT.expert_load`, the recorder and
the heat maps count it.

Shape legend:
    N batch, T tokens per image, S = N*T tokens, D width, E experts, K experts per token,
    R chosen rows
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """A router's decision: row r is token[r] seen by expert[r], scaled by weight[r]."""

    token: Tensor  # (R,) int64, in [0, S)
    expert: Tensor  # (R,) int64, in [0, E)
    weight: Tensor  # (R,) fp32
    per_token: int  # K if rows K*s to K*s + K - 1 are those of token s; 0: in any order and number
    loss: Tensor  # scalar: what the router adds to the training loss, before aux_loss_alpha
    load: Tensor  # (E,) each expert's share of the rows, times E: 1 everywhere is perfect balance


class TopKRouter(nn.Module):
    """Token choice, DiT-MoE's router (arXiv 2407.11633, equations 3 to 5).

    p = softmax(W x) over all experts; a token goes to the K experts of largest p, each weighted by
    its p. No token is dropped. The loss is sum_i f_i P_i with f_i the load and P_i the mean p of
    expert i: 1 when perfectly balanced.

    renormalize: a token's K weights sum to 1, so that K equal experts make one (upcycled models)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        renormalize: bool = False,
    ):
        super().__init__()
        self.num_experts_per_tok, self.renormalize = num_experts_per_tok, renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, unconditional: Tensor | None = None) -> Routing:
        """Takes x (N, T, D), and which images have no class (N,) bool, which changes nothing."""
        return self.choose(self.score(x.flatten(0, 1)))

    def score(self, x: Tensor) -> Tensor:
        """Scores x (S, D) in fp32 whatever the autocast; returns logits (S, E)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())

    def choose(self, logits: Tensor) -> Routing:
        """Routes the tokens that have these logits (S, E), fp32."""
        num_experts, k = logits.shape[1], self.num_experts_per_tok
        scores = logits.softmax(dim=-1)  # (S, E)
        weight, expert = scores.topk(k, dim=-1, sorted=False)  # (S, K)
        if self.renormalize:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        token = torch.arange(len(expert), device=expert.device).unsqueeze(1).expand_as(expert)
        load = share_of_rows(expert.flatten(), num_experts)  # (E,)
        loss = (load * scores.mean(dim=0)).sum()
        return Routing(token.flatten(), expert.flatten(), weight.flatten(), k, loss, load)


def share_of_rows(expert: Tensor, num_experts: int) -> Tensor:
    """Each expert's share of the rows expert (R,), times E; returns (E,) fp32, of mean 1."""
    counts = torch.zeros(num_experts, device=expert.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert, dtype=counts.dtype))
    return counts * (num_experts / max(1, len(expert)))


ROUTERS = {"topk": TopKRouter}
