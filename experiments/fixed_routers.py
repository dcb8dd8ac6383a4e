"""Routers that class and position, or the time, decide; pass this file to --plugin of train.py.

replaced      a trained `topk` with tables by class and position in place of its gate
at_times      `topk` at some times, and the same experts for all tokens at the others
two_by_time   one choice of experts above a time, and another one below

Shape legend:
    N batch, T tokens per image, S = N*T tokens, E experts, K experts per token
"""

import torch
from torch import Tensor, nn

from conditions import TimestepEmbedder
from options.parts import option
from routers import ROUTERS, Context, Router, Routing, expert_load, token_choice


class ReplacedRouter(Router):
    """Tables by class and position in place of a gate's choice, of its weights, or of both.

    `replaced_gates.py` sets the tables from a trained `topk`. A tabled weight is a parameter. A
    gate whose weights are tabled keeps its choice, because no gradient reaches it.
    """

    choice: str = option("table", choices=("gate", "table"), help="what chooses the experts")
    weights: str = option("gate", choices=("gate", "table"), help="what weights the experts")
    tokens: int = option(16, ge=1, help="tokens per image")
    classes: int = option(10, ge=1, help="number of classes; images without a class are one more")

    def __post_init__(self):
        super().__post_init__()
        places = self.classes + 1, self.tokens
        if self.choice == "table":
            table = torch.zeros(*places, self.num_experts_per_tok, dtype=torch.int64)
            self.register_buffer("table", table)
        if self.weights == "table":
            self.places = nn.Parameter(torch.empty(*places, self.num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weights == "table":
            nn.init.constant_(self.places, 1 / self.num_experts)
        if self.choice == "table":
            self.table.copy_(torch.arange(self.num_experts_per_tok).expand_as(self.table))

    def forward(self, x: Tensor, context: Context) -> Routing:
        row = context["classes"]  # (N,)
        scores = self.score(x.flatten(0, 1)).softmax(dim=-1)  # (S, E)
        if self.choice == "table":
            expert = self.table[row].flatten(0, 1)  # (S, K)
        else:
            expert = scores.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices
        if self.weights == "table":
            scores = self.places[row].flatten(0, 1)
        load = expert_load(expert.flatten(), self.num_experts)
        rows = token_choice(expert, scores.gather(1, expert))
        return Routing(*rows, scores.new_zeros(()), load)


make_embedding = getattr(TimestepEmbedder.forward, "of_core", TimestepEmbedder.forward)


def embed_and_keep_time(self, t: Tensor) -> Tensor:
    """Embeds times (N,); the embedding has them as its attribute `times`, for routers."""
    embedded = make_embedding(self, t)
    embedded.times = t
    return embedded


embed_and_keep_time.of_core = make_embedding  # a second import of this file replaces it
TimestepEmbedder.forward = embed_and_keep_time


class AtTimesRouter(Router):
    """`topk` at the times low <= t < high of a flow (t = 1 is noise).

    At the other times every token has the same two extra experts with weight 1: together, a dense
    layer of as many multiply-adds. The balance loss is that of the tokens at the times of `topk`.
    """

    low: float = option(0.0, help="first time at which the gate chooses")
    high: float = option(1.0, help="time from which it does not choose any more")

    extra_experts = 2

    def forward(self, x: Tensor, context: Context) -> Routing:
        times, tokens = context["time"].times, x.shape[1]  # (N,)
        chooses = ((self.low <= times) & (times < self.high)).repeat_interleave(tokens)[:, None]
        scores = self.score(x.flatten(0, 1)).softmax(dim=-1)  # (S, E)
        weight, expert = scores.topk(self.num_experts_per_tok, dim=-1, sorted=False)
        dense = self.num_experts + torch.arange(self.extra_experts, device=x.device)
        share = chooses / chooses.sum().clamp_min(1)  # (S, 1), of each token
        mask = torch.zeros_like(scores).scatter(1, expert, 1.0)  # (S, E)
        load = (mask * share).sum(dim=0) * self.num_experts / self.num_experts_per_tok
        loss = (load * (scores * share).sum(dim=0)).sum()
        expert = torch.where(chooses, expert, dense)
        rows = token_choice(expert, torch.where(chooses, weight, 1.0))
        every = self.num_experts + self.extra_experts
        return Routing(*rows, loss, expert_load(rows[1], every))


class TwoByTimeRouter(Router):
    """Two fixed choices of experts with weight 1, one from the time `boundary` on and one below.

    With K of 2 K experts of any width, this is one dense layer for high noise and one for low
    noise, as the two transformers of Wan2.2; attention and all other layers are shared here.
    """

    boundary: float = option(0.5, help="time from which the first K experts compute")

    def forward(self, x: Tensor, context: Context) -> Routing:
        is_low = (context["time"].times < self.boundary).repeat_interleave(x.shape[1])  # (S,)
        k = self.num_experts_per_tok
        expert = is_low[:, None] * k + torch.arange(k, device=x.device)  # (S, K)
        load = expert_load(expert.flatten(), self.num_experts)
        weight = torch.ones(expert.shape, device=x.device)
        # Without a gate; its gradient is zero.
        return Routing(*token_choice(expert, weight), 0 * self.weight.sum(), load)


ROUTERS["replaced"] = ReplacedRouter
ROUTERS["at_times"] = AtTimesRouter
ROUTERS["two_by_time"] = TwoByTimeRouter
