"""Components that only experiments use; pass this file to --plugin of train.py.

rounded_adamw   AdamW on weights in bf16, with fp32 moments
nucleus         expert choice as in Nucleus-Image
frozen          token choice by a gate that stops learning
table           token choice from a table by position, or by position and class
warm            the choice of a table for some steps, then `topk`
embedded        `topk`, and an embedding by class and position in each block
biased          `topk` with logits by class and position

Shape legend:
    N batch, T tokens per image, S = N*T tokens, E experts, K experts per token, C classes
"""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models import DiTBlock, DiTConfig
from options.parts import option
from routers import (
    ROUTERS,
    Context,
    ExpertChoiceRouter,
    Router,
    Routing,
    TopKRouter,
    expert_load,
    token_choice,
)
from training.optimizers import OPTIMIZERS, AdamW


class RoundedAdamW(AdamW):
    """AdamW whose weights are rounded to bf16 before and after each step, as bf16 master weights.

    An update below half the distance to the next number in bf16, 0.2% to 0.4% of the weight, is
    lost. Gradients and moments stay in fp32.
    """

    def make(self, named, lr, matrices) -> torch.optim.Optimizer:
        optimizer = super().make(named, lr, matrices)
        optimizer.register_step_pre_hook(round_weights)
        optimizer.register_step_post_hook(round_weights)
        return optimizer


@torch.no_grad()
def round_weights(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.copy_(weight.bfloat16())


class NucleusRouter(ExpertChoiceRouter):
    """Expert choice whose weights of a token sum to `scale` (Nucleus-Image, arXiv 2604.12163).

    With --router nucleus:input=normalised_time, the router of Nucleus-Image.
    """

    scale: float = option(2.5, help="sum of the weights of a token that has an expert", gt=0)

    def forward(self, x: Tensor, context: Context) -> Routing:
        routing = super().forward(x, context)
        total = routing.weight.new_zeros(x.shape[0] * x.shape[1])  # (S,)
        total = total.index_add(0, routing.token, routing.weight)
        weight = self.scale * routing.weight / total[routing.token]
        return routing._replace(weight=weight)


def routed_to(expert: Tensor, logits: Tensor) -> Routing:
    """Routes each token to the experts (S, K), weighted by the softmax of the logits (S, E).

    The choice has no balance loss: it would change the weights only.
    """
    weight = logits.softmax(dim=-1).gather(1, expert)  # (S, K)
    load = expert_load(expert.flatten(), logits.shape[1])
    return Routing(*token_choice(expert, weight), logits.new_zeros(()), load)


class FrozenRouter(Router):
    """`topk` whose choice stops learning: from then on, the K experts of a token are those with the
    largest scores under the W of that step. The weights of the experts still follow the learned W.

    The balance loss ends with the learning of the choice.
    """

    after: int = option(0, ge=0, help="number of steps in which the choice learns")

    def __post_init__(self):
        super().__post_init__()
        self.register_buffer("frozen", self.weight.detach().clone())
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.frozen.copy_(self.weight)
        self.steps.zero_()

    def forward(self, x: Tensor, context: Context) -> Routing:
        x = x.flatten(0, 1)
        logits, learns = self.score(x), self.steps < self.after  # (S, E), (1,)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            gate = torch.where(learns, self.weight, self.frozen)
            scores = F.linear(x.float(), gate.float()).softmax(dim=-1)  # (S, E)
            expert = scores.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices
        routing = routed_to(expert, logits)
        loss = (routing.load * logits.softmax(dim=-1).mean(dim=0)).sum()
        loss = torch.where(learns, loss, 0.0).sum()
        return routing._replace(loss=loss, observed=routing.load)

    @torch.no_grad()
    def update(self, observed: Tensor, skipped: Tensor | bool) -> None:
        self.steps += ~torch.as_tensor(skipped, device=self.steps.device)
        self.frozen.copy_(torch.where(self.steps <= self.after, self.weight, self.frozen))


class TableRouter(Router):
    """The experts of a token are those of a table, the weights of the experts are learned.

    The table is random, with the same number of tokens of each image for every expert, or that of
    `source`. It is drawn from a copy of the random state, so that the gates are those of `topk`.
    """

    tokens: int = option(16, ge=1, help="tokens per image")
    classes: int = option(
        0, ge=0, help="number of classes; each has its own experts, as have images without a "
        "class; 0: the experts depend on the position only",
    )  # fmt: skip
    source: str = option("", help="a file of experiments/choice_tables.py; empty: a random table")

    layer = 0  # number of the block, which sets it

    def __post_init__(self):
        super().__post_init__()
        rows = self.classes + 1 if self.classes else 1
        shape = rows, self.tokens, self.num_experts_per_tok
        self.register_buffer("table", torch.zeros(shape, dtype=torch.int64))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.source:
            self.table.copy_(load_file(self.source)["experts"][self.layer])
            return
        with torch.random.fork_rng(devices=[]):
            for row in self.table:
                row.copy_(balanced_choice(self.tokens, self.num_experts, row.shape[1]))

    def forward(self, x: Tensor, context: Context) -> Routing:
        row = context["classes"] if self.classes else torch.zeros_like(context["classes"])  # (N,)
        return routed_to(self.table[row].flatten(0, 1), self.score(x.flatten(0, 1)))


def balanced_choice(tokens: int, experts: int, k: int) -> Tensor:
    """Draws k different experts for each token (tokens, k), each expert equally often."""
    every = torch.arange(tokens * k) % experts
    while True:
        drawn = every[torch.randperm(len(every))].view(tokens, k)
        if (drawn.sort(dim=1).values.diff(dim=1) > 0).all():
            return drawn


class WarmRouter(TableRouter):
    """The choice of a table in the first steps, without a balance loss, and then `topk`."""

    after: int = option(100, ge=0, help="number of steps in which the table chooses")

    def __post_init__(self):
        super().__post_init__()
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.steps.zero_()

    def forward(self, x: Tensor, context: Context) -> Routing:
        of_table = super().forward(x, context)
        scores = self.score(x.flatten(0, 1)).softmax(dim=-1)  # (S, E)
        chosen = scores.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices
        by_table = self.steps < self.after
        expert = torch.where(by_table, of_table.expert.view_as(chosen), chosen)
        load = expert_load(expert.flatten(), self.num_experts)
        loss = torch.where(by_table, 0.0, (load * scores.mean(dim=0)).sum()).sum()
        rows = token_choice(expert, scores.gather(1, expert))
        return Routing(*rows, loss, load, observed=load)

    @torch.no_grad()
    def update(self, observed: Tensor, skipped: Tensor | bool) -> None:
        self.steps += ~torch.as_tensor(skipped, device=self.steps.device)


class PlacesRouter(TopKRouter):
    """Base class of routers with learned numbers by class and position, zero at first."""

    tokens: int = option(16, ge=1, help="tokens per image")
    classes: int = option(10, ge=1, help="number of classes; images without a class are one more")

    def __post_init__(self):
        super().__post_init__()
        shape = self.classes + 1, self.tokens, self.width_of_places
        self.places = nn.Parameter(torch.empty(shape))
        nn.init.zeros_(self.places)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.places)


class EmbeddedRouter(PlacesRouter):
    """`topk` in blocks that add an embedding by class and position to their tokens."""

    @property
    def width_of_places(self) -> int:
        return self.hidden_size


def add_places(block: DiTBlock, inputs: tuple) -> tuple:
    """Adds the embedding to the tokens (N, T, D) of a block."""
    x, c, context, *others = inputs
    return x + block.moe.gate.places[context["classes"]], c, context, *others


make_block = getattr(DiTBlock.__init__, "of_core", DiTBlock.__init__)


def make_embedded_block(self, config: DiTConfig, layer: int = 0) -> None:
    """A router cannot change the tokens, so a hook of its block does."""
    make_block(self, config, layer)
    if self.moe is not None and config.router.name == "embedded":
        self.register_forward_pre_hook(add_places)


make_embedded_block.of_core = make_block  # a second import of this file replaces it
DiTBlock.__init__ = make_embedded_block


class BiasedRouter(PlacesRouter):
    """`topk` whose logits are W x + b, where b depends on class and position."""

    @property
    def width_of_places(self) -> int:
        return self.num_experts

    def forward(self, x: Tensor, context: Context) -> Routing:
        logits = self.score(x) + self.places[context["classes"]].float()  # (N, T, E)
        return self.choose(logits.flatten(0, 1))


OPTIMIZERS["rounded_adamw"] = RoundedAdamW
ROUTERS["nucleus"] = NucleusRouter
ROUTERS["frozen"] = FrozenRouter
ROUTERS["table"] = TableRouter
ROUTERS["warm"] = WarmRouter
ROUTERS["embedded"] = EmbeddedRouter
ROUTERS["biased"] = BiasedRouter
