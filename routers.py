"""Routers: the assignment of tokens to experts, one class per method.

    router = ROUTERS["topk"](hidden_size=384, num_experts=8, num_experts_per_tok=2)
    routing = router(x, context)

A router reads the tokens and the `Context` of its block. It returns a `Routing`: the rows that the
experts compute and the recorder (analysis/recorder.py) counts, a loss for training, and the load.
After each optimizer step, `Router.update` updates the state of the router from the observed
statistics.

To add a router, write a subclass of `Router` with `forward` or `choose`, and add it to `ROUTERS`. A
field made by `option` can be set: --router sigmoid:scale=2.5.

Shape legend:
    N batch, T tokens per image, S = N*T tokens, D width of a token, F width of the router's input
    (D, or 2D with the time), E experts, K experts per token on average, R chosen rows, C rows per
    expert and image; x router input, z logits, W gate weight (E, F)
"""

import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options.parts import Component, option

GATINGS = ("softmax", "sigmoid", "identity")


# FSDP2 finds tensors in a dataclass, and before torch 2.13 in a node of pytree. All methods of
# MutableMapping that write raise the error of `__setitem__`.
@dataclass(frozen=True, eq=False)
class Context(MutableMapping[str, Tensor]):
    """Tensors by name that a block and its router read besides the tokens.

        time           (N, D), the embedded time
        classes        (N,) labels in [0, num_classes], or 0 without labels
        no_class       (N,) true for an image without a class, or, without labels, without a token
        label, size, and each other condition of the model: (N, D), embedded
        sequence       (N, L, D) tokens of all conditions that are sequences, such as a text
        sequence_mask  (N, L)
        unmodulated    (N, T, D), for routers: the normalised tokens without shift and scale

    and what routers before have passed on (`Routing.passed_on`).

    It is read-only: the backward pass may compute blocks again, the last one first, and would find
    what another block has written. `context | {name: tensor}` is a new context.
    """

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise KeyError(f"context: got {name}, expected one of {', '.join(self.tensors)}")
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __or__(self, more: Mapping[str, Tensor]) -> "Context":
        return Context({**self.tensors, **more})

    def __setitem__(self, name: str, value: Tensor | None = None) -> None:
        raise TypeError(
            f"context: got a change of {name!r}, but a block and its router only read the context, "
            "because the backward pass may compute them again; what later blocks shall read, a "
            "router returns as Routing.passed_on, and a block returns to DiT.forward"
        )

    __delitem__ = __setitem__


torch.export.register_dataclass(Context)
NOTHING = Context({})


class Routing(NamedTuple):
    """A router's decision. Row r sends token[r] to expert[r] and scales the output by weight[r]."""

    token: Tensor  # (R,) int64, in [0, S)
    expert: Tensor  # (R,) int64, in [0, E), or E for the expert of images without a class
    weight: Tensor  # (R,) fp32
    per_token: int  # K if every token s has the K rows K*s to K*s + K - 1, otherwise 0
    loss: Tensor  # scalar, added to the training loss with the weight aux_loss_alpha
    # (E + extra_experts,) rows of each expert, relative to the mean: all 1 with perfect balance
    load: Tensor
    # Statistics of a router with state. `Router.update` receives their mean over micro-batches and
    # processes. None for a router without state. In eval mode, only `SigmoidRouter` returns them.
    observed: Tensor | None = None
    # Numbers to log, by name: scalars, which are averaged over the layers, or (1,), of which each
    # layer's is logged. The block may add its own.
    metrics: Mapping[str, Tensor] | None = None
    is_even: bool = False  # whether every expert has exactly R / E rows
    # Tensors by name that the blocks after this one, and their routers, find in `context`.
    passed_on: Mapping[str, Tensor] | None = None


class Router(Component, nn.Module):
    """Base class of routers: a linear gate W (E, F), computed in fp32 even under autocast."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    input: str = option(
        "modulated", choices=("modulated", "normalised", "normalised_time"),
        help="input of the router: modulated, the tokens that are also the experts' input; "
        "normalised, the tokens before modulation; normalised_time, the normalised tokens with the "
        "embedding of the time, as in arXiv 2604.12163",
    )

    loss_weight: ClassVar = 0.01  # of `Routing.loss`, unless `DiTConfig.aux_loss_alpha` is set
    extra_experts = 0  # number of experts in addition to the E routed experts
    weight_std = None  # standard deviation of the initial W; None: uniform, as in nn.Linear
    varies_in = ()  # modes in which the number of rows varies: "training", "evaluation"
    matrices = {"weight": 0}  # see `training.optimizers.hidden_matrices`
    depends_on_batch = False  # whether an image's rows in eval mode depend on the other images

    def __post_init__(self):
        super().__post_init__()
        self.width = self.hidden_size * (2 if self.input == "normalised_time" else 1)  # F
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.width))
        Router.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Sets the gate's weights. A subclass with more parameters or buffers sets them, too."""
        if self.weight_std is None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.normal_(self.weight, std=self.weight_std)

    def __call__(self, x: Tensor, context: Context) -> Routing:
        """Calls `forward`, and the hooks, with the input that the option `input` selects.

        x: modulated tokens (N, T, D)
        """
        return super().__call__(self.select_input(x, context), context)

    def select_input(self, x: Tensor, context: Context) -> Tensor:
        """Returns the router's input (N, T, F), as the option `input` says.

        x: modulated tokens (N, T, D)
        """
        if self.input == "modulated":
            return x
        x = context["unmodulated"]                                          # (N, T, D)
        if self.input == "normalised":
            return x
        time = context["time"].unsqueeze(1).expand(-1, x.shape[1], -1).to(x.dtype)
        return torch.cat([x, time], dim=-1)                                 # (N, T, 2D)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Routes the tokens.

        x: the router's input (N, T, F), see `select_input`
        context: what the block knows besides

        What a later layer shall read is returned as `Routing.passed_on`, not kept in an attribute:
        checkpointing computes a block again after the later ones.
        """
        return self.choose(self.score(x.flatten(0, 1)))

    def choose(self, logits: Tensor) -> Routing:
        """Routes tokens by logits (S, E), fp32. To read more than logits, override `forward`."""
        raise NotImplementedError

    def score(self, x: Tensor) -> Tensor:
        """Computes the logits (..., E) of x (..., F) in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())

    @torch.no_grad()
    def update(self, observed: Tensor, skipped: Tensor | bool) -> None:
        """Updates the state after an optimizer step.

        observed: mean of `Routing.observed` over the micro-batches and processes of the step
        skipped: whether the optimizer step was skipped; the state then stays unchanged
        """


def expert_load(expert: Tensor, num_experts: int) -> Tensor:
    """Returns the load (num_experts,), fp32: the rows of each expert, relative to the mean.

    expert: (R,) expert of each row
    """
    counts = torch.zeros(num_experts, device=expert.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert, dtype=counts.dtype))
    return counts * (num_experts / torch.sym_max(1, expert.shape[0]))


def gate_scores(logits: Tensor, gating: str) -> Tensor:
    """Applies softmax over the experts, sigmoid or the identity to logits (..., E)."""
    if gating == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if gating == "sigmoid" else logits


class TopKRouter(Router):
    """Token choice, DiT-MoE's router (arXiv 2407.11633, equations 3 to 5).

    p = softmax(W x) over all experts. Each token goes to the K experts with the largest p, and the
    output of an expert is weighted by its p. No token is dropped.

    The loss is sum_i f_i P_i, where f_i is the load and P_i the mean p of expert i. The loss is 1
    under perfect balance. A different gating replaces p by sigmoid(W x) or W x (Yuan et al. 2025,
    arXiv 2503.16057, table 1); P_i remains the mean of the softmax.
    """

    gating: str = option(
        "softmax", choices=GATINGS, help="function that maps the router's logits to expert scores"
    )
    renormalize: bool = option(
        False, help="normalise the weights of each token to sum to 1, as upcycling requires"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.renormalize and self.gating == "identity":
            expected = "softmax or sigmoid, whose scores are positive"
            raise ValueError(f"gating: got identity with renormalize=True, expected {expected}")

    def choose(self, logits: Tensor) -> Routing:
        k = self.num_experts_per_tok
        probabilities = logits.softmax(dim=-1)                              # (S, E)
        scores = gate_scores(logits, self.gating)                           # (S, E)
        weight, expert = scores.topk(k, dim=-1, sorted=False)               # (S, K)
        if self.renormalize:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        load = expert_load(expert.flatten(), self.num_experts)              # (E,)
        loss = (load * probabilities.mean(dim=0)).sum()
        return Routing(*token_choice(expert, weight), loss, load)


def token_choice(expert: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Returns the rows of tokens with K experts each, given expert and weight (S, K)."""
    token = torch.arange(expert.shape[0], device=expert.device).unsqueeze(1).expand_as(expert)
    return token.flatten(), expert.flatten(), weight.flatten(), expert.shape[1]


class SigmoidRouter(Router):
    """Token choice by sigmoid, balanced by a bias instead of a loss (DeepSeek-V3, arXiv 2412.19437,
    equations 12 to 16). DSMoE uses this router for diffusion; DSMoE's code never updates the bias.

    s = sigmoid(W x). Each token goes to the K experts with the largest s + b, and the output of an
    expert is weighted by lambda s / (sum of the chosen s of the token). With K = 1 the weight is
    lambda s, because the gate would otherwise receive no gradient.

    Once per optimizer step the bias is updated. Let n_i be the number of tokens of the step, on all
    processes, that went to expert i. Then d = gamma sign(mean(n) - n), b += d - mean(d).
    """

    scale: float = option(1.0, help="lambda, a factor of the outputs of the routed experts", gt=0)
    bias_step: float = option(
        1e-3, help="gamma, the size of a bias update before the mean of the updates is subtracted",
        ge=0,
    )

    def __post_init__(self):
        super().__post_init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.e_score_correction_bias)

    def choose(self, logits: Tensor) -> Routing:
        scores = logits.sigmoid()
        biased = scores.detach() + self.e_score_correction_bias
        expert = biased.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices  # (S, K)
        weight = scores.gather(1, expert)
        if self.num_experts_per_tok > 1:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        load = expert_load(expert.flatten(), self.num_experts)
        rows = token_choice(expert, self.scale * weight)
        return Routing(*rows, logits.new_zeros(()), load, observed=load)

    @torch.no_grad()
    def update(self, observed: Tensor, skipped: Tensor | bool) -> None:
        # The deficit is rounded. An expert whose load differs from the mean only by rounding errors
        # then has the sign 0.
        deficit = (observed.mean() - observed).round(decimals=6)            # (E,)
        step = self.bias_step * deficit.sign()
        step = step - step.mean()
        skipped = torch.as_tensor(skipped, device=step.device)
        self.e_score_correction_bias += torch.where(skipped, 0.0, step)


class ExpertChoiceRouter(Router):
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368) within each image, as in EC-DiT (arXiv
    2410.02098).

    p = softmax(W x) over the experts. In each image every expert takes the C = ceil(T K / E) tokens
    with the largest p, weighted by p. A token may get no expert. W ~ N(0, 0.006^2), as in DiffMoE's
    baseline, which rounds C down.
    """

    gating: str = option(
        "softmax", choices=GATINGS, help="function that maps the router's logits to expert scores"
    )
    capacity_rounding: str = option(
        "up", choices=("up", "down"),
        help="rounding of the number of tokens that an expert takes from each image, (tokens) x "
        "(experts per token) / (experts); DiffMoE's EC-DiT baseline rounds down",
    )

    weight_std = 0.006

    def forward(self, x: Tensor, context: Context) -> Routing:
        scores = gate_scores(self.score(x), self.gating)                    # (N, T, E)
        _, tokens, experts = scores.shape
        rounded = math.ceil if self.capacity_rounding == "up" else math.floor
        capacity = max(1, rounded(tokens * self.num_experts_per_tok / experts))
        weight, index = scores.transpose(1, 2).topk(capacity, dim=2)        # (N, E, C)
        token, expert = expert_choice(index, tokens)
        load = expert_load(expert, experts)
        loss = scores.new_zeros(())
        return Routing(token, expert, weight.flatten(), 0, loss, load, is_even=True)


def expert_choice(index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and experts (N*E*C,) of the chosen rows.

    index: indices (N, E, C) of the chosen tokens within their image, in [0, T)
    """
    images, experts, _ = index.shape
    first = torch.arange(images, device=index.device)[:, None, None] * tokens
    expert = torch.arange(experts, device=index.device)[None, :, None].expand_as(index)
    return (first + index).flatten(), expert.flatten()


class ThresholdRouter(Router):
    """Base class of routers that compare scores within the micro-batch in training, and with a
    threshold, a moving average, in eval mode.

    In training, the routing of an image therefore changes if the batch is split over another number
    of processes or micro-batches. In eval mode it does not depend on the batch, unless
    `depends_on_batch`. Subclasses define `threshold` and `momentum`.
    """

    varies_in = ("evaluation",)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.threshold)

    @torch.no_grad()
    def update(self, observed: Tensor, skipped: Tensor | bool) -> None:
        """threshold <- momentum * threshold + (1 - momentum) * observed."""
        # A skipped step may have observed nan; multiplying nan by 0 would not remove it.
        skipped = torch.as_tensor(skipped, device=observed.device)
        observed = torch.where(skipped, self.threshold, observed)
        self.threshold.lerp_(observed, 1 - self.momentum)


class RaceRouter(ThresholdRouter):
    """Expert Race (Yuan et al. 2025, arXiv 2503.16057).

    z = W gelu(W1 x). Of the S E pairs (token, expert) of a process's micro-batch, those with the
    S K largest z win; each is a row, weighted by z. The threshold is a moving average of the
    smallest winning z. In eval mode the pairs with z >= threshold win.

    The auxiliary loss, weighted by aux_loss_alpha, is the router similarity loss. With
    P = softmax(z) and M the mask (S, E) of the winning pairs, L = 1/S sum_ij w_ij (P^T P)_ij, where
    w_ii = E (M^T M)_ii / trace(M^T M) and, for i != j,
    w_ij = (E^2 - E) (M^T M)_ij / (sum of the off-diagonal entries of M^T M).

    The paper's second loss, of an output of each layer that predicts the diffusion target, is
    omitted, because a router does not receive the target.
    """

    matrices = {"weight": 0, "hidden": 1}

    momentum: float = option(
        0.99, help="momentum of the threshold's moving average", ge=0, le=1
    )

    def __post_init__(self):
        super().__post_init__()
        self.hidden = nn.Parameter(torch.empty(self.width, self.width))
        self.register_buffer("threshold", torch.zeros(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.hidden)

    def forward(self, x: Tensor, context: Context) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.gelu(F.linear(x.flatten(0, 1).float(), self.hidden.float()))
        logits = self.score(hidden)                                         # (S, E)
        tokens, experts = logits.shape
        if self.training:
            winners = logits.flatten().topk(tokens * self.num_experts_per_tok, sorted=False)
            pair, observed = winners.indices, winners.values.detach().min().view(1)
        else:
            pair, observed = (logits.flatten() >= self.threshold).nonzero().squeeze(1), None
        token, expert = pair // experts, pair % experts
        weight = logits.flatten()[pair]
        loss = logits.new_zeros(())
        if self.training:
            with torch.autocast(x.device.type, enabled=False):
                loss = self.similarity_loss(logits, pair)
        return Routing(token, expert, weight, 0, loss, expert_load(expert, experts), observed)

    def similarity_loss(self, logits: Tensor, pair: Tensor) -> Tensor:
        tokens, experts = logits.shape
        mask = torch.zeros_like(logits).flatten().scatter(0, pair, 1.0).view_as(logits)
        cooccurrence = mask.t() @ mask                                      # (E, E)
        scores = logits.softmax(dim=-1)
        similarity = scores.t() @ scores                                    # (E, E)
        is_diagonal = torch.eye(experts, device=logits.device, dtype=torch.bool)
        diagonal, rest = cooccurrence.where(is_diagonal, 0), cooccurrence.where(~is_diagonal, 0)
        weight = diagonal * (experts / diagonal.sum().clamp_min(1))
        weight = weight + rest * ((experts**2 - experts) / rest.sum().clamp_min(1))
        return (weight * similarity).sum() / tokens


class BatchPoolRouter(ThresholdRouter):
    """DiffMoE's batch-level pool (Shi et al. 2025, arXiv 2503.14487).

    p = softmax(W x). Among the S tokens of a process's micro-batch, every expert takes the
    k = max(1, floor(S K / E)) tokens with the largest p, weighted by p.

    A capacity predictor predicts from detached x which pairs (token, expert) are chosen. The
    auxiliary loss, weighted by aux_loss_alpha, is the binary cross-entropy of these predictions,
    averaged over all S E pairs. The threshold of each expert is a moving average of the k-th
    largest of the expert's predictions. In eval mode an expert takes the tokens whose prediction is
    above the threshold; for `inference` "count" see its help.
    """

    momentum: float = option(
        0.95, help="momentum of the thresholds' moving averages", ge=0, le=1
    )
    inference: str = option(
        "threshold", choices=("threshold", "count"),
        help="tokens that an expert takes in eval mode: threshold, those predicted above the "
        "threshold; count, as many with the largest scores in the batch, as in DiffMoE's released "
        "code, so that an image depends on the rest of the batch",
    )
    loss_weight = 1.0

    weight_std = 0.006

    def __post_init__(self):
        super().__post_init__()
        self.predictor = nn.Sequential(
            nn.Linear(self.width, self.width), nn.SiLU(), nn.Linear(self.width, self.num_experts)
        )
        self.register_buffer("threshold", torch.zeros(self.num_experts))

    @property
    def depends_on_batch(self) -> bool:
        return self.inference == "count"

    def forward(self, x: Tensor, context: Context) -> Routing:
        x = x.flatten(0, 1)                                                 # (S, F)
        scores = self.score(x).softmax(dim=-1)                              # (S, E)
        with torch.autocast(x.device.type, enabled=False):
            predicted = self.predictor(x.detach().to(self.predictor[0].weight.dtype)).float()
        tokens, experts = scores.shape
        if not self.training:
            chosen = predicted.sigmoid() > self.threshold                   # (S, E)
            if self.depends_on_batch:
                rank = scores.argsort(dim=0, descending=True).argsort(dim=0)
                chosen = rank < chosen.sum(dim=0)
            token, expert = chosen.nonzero().unbind(1)
            load = expert_load(expert, experts)
            return Routing(token, expert, scores[token, expert], 0, scores.new_zeros(()), load)
        capacity = max(1, tokens * self.num_experts_per_tok // experts)
        weight, token = scores.t().topk(capacity, dim=1)                    # (E, k)
        expert = torch.arange(experts, device=x.device)[:, None].expand_as(token)
        chosen = torch.zeros_like(predicted).scatter(0, token.t(), 1.0)     # (S, E)
        loss = F.binary_cross_entropy_with_logits(predicted, chosen)
        observed = predicted.detach().sigmoid().topk(capacity, dim=0).values[-1]  # (E,)
        rows = (token.flatten(), expert.flatten(), weight.flatten(), 0)
        load = expert_load(rows[1], experts)
        return Routing(*rows, loss, load, observed, is_even=True)


class PrototypeRouter(Router):
    """ProMoE's prototype routing (ICLR 2026), by token choice (ProMoE-TC) or expert choice
    (ProMoE-EC).

    The score of token x for expert i is z_i = cos(x, p_i). The prototypes p are the rows of
    W ~ N(0, 0.02^2). A chosen expert's output is weighted by z.
        token choice    each token goes to the K experts with the largest z
        expert choice   in each image, every expert takes the C = max(1, floor(T K / E)) tokens with
                        the largest z
    With `unconditional_expert`, each token of an image without a class goes to one extra expert,
    number E: as one row of weight 1 under expert choice, as K rows of weight 1 / K under token
    choice.

    The auxiliary loss, weighted by aux_loss_alpha, is the routing contrastive loss. Let m_i be the
    mean of the tokens assigned to expert i. An expert i that received tokens has the loss
    -log softmax_j(cos(p_i, m_j) / 0.07) at j = i, where j runs over the experts that received
    tokens. The auxiliary loss is the mean of these losses, and 0 if fewer than two experts received
    tokens. Under expert choice it is computed for each image and averaged over the images that have
    a class (all images without `unconditional_expert`).

    Under expert choice, the host waits for the number of images without a class.

    Differs from the published script, where "no class" is label 1000, so that the extra expert is
    never used with fewer classes: `unconditional_expert=False` reproduces that.
    """

    choice: str = option(
        "token", choices=("token", "expert"),
        help="who chooses: token, tokens their experts, as in ProMoE-TC; or expert, experts tokens "
        "of each image, as in ProMoE-EC",
    )
    unconditional_expert: bool = option(
        True, help="route the tokens of images without a class to one extra expert"
    )
    loss_weight = 1.0

    extra_experts = 1
    weight_std = 0.02
    temperature = 0.07

    @property
    def varies_in(self) -> tuple[str, ...]:
        return ("training", "evaluation") if self.choice == "expert" else ()

    def forward(self, x: Tensor, context: Context) -> Routing:
        unconditional = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)  # (N,)
        if self.unconditional_expert:
            unconditional = context.get("no_class", unconditional)
        with torch.autocast(x.device.type, enabled=False):
            shape, x = x.shape[:2], x.flatten(0, 1).float().contiguous()    # (S, F)
            prototypes = self.weight.float()  # cast once: gradients of both uses add up in fp32
            z = F.normalize(x, dim=-1) @ F.normalize(prototypes, dim=-1).t()  # (S, E)
            z = z.unflatten(0, shape)                                       # (N, T, E)
            choose = self.choose_experts if self.choice == "token" else self.choose_tokens
            *rows, loss = choose(x, z, unconditional, prototypes)
        return Routing(*rows, loss, expert_load(rows[1], self.num_experts + 1))

    def choose_experts(
        self, x: Tensor, z: Tensor, unconditional: Tensor, prototypes: Tensor
    ) -> tuple:
        """Token choice: returns token, expert and weight of the rows, rows per token, and loss."""
        is_unconditional = unconditional.repeat_interleave(z.shape[1])[:, None]  # (S, 1)
        weight, expert = z.flatten(0, 1).topk(self.num_experts_per_tok, dim=-1, sorted=False)
        loss = z.new_zeros(())
        if self.training:
            chosen = torch.zeros(expert.shape[0], self.num_experts, device=x.device)
            chosen = chosen.scatter(1, expert, 1.0).where(~is_unconditional, 0.0)  # (S, E)
            loss = self.contrastive_loss(prototypes, x, chosen)
        weight = weight.where(~is_unconditional, 1 / self.num_experts_per_tok)
        return *token_choice(expert.where(~is_unconditional, self.num_experts), weight), loss

    def choose_tokens(
        self, x: Tensor, z: Tensor, unconditional: Tensor, prototypes: Tensor
    ) -> tuple:
        """Expert choice: returns the same values as `choose_experts`."""
        images, tokens, experts = z.shape
        has_class = ~unconditional
        capacity = max(1, tokens * self.num_experts_per_tok // experts)
        weight, index = z.transpose(1, 2).topk(capacity, dim=2)             # (N, E, C)
        loss = z.new_zeros(())
        if self.training:
            chosen = torch.zeros_like(z).scatter(1, index.transpose(1, 2), 1.0)
            each = torch.vmap(self.contrastive_loss, (None, 0, 0))
            losses = each(prototypes, x.unflatten(0, z.shape[:2]), chosen)  # (N,)
            loss = losses.where(has_class, 0.0).sum() / has_class.sum().clamp_min(1)
        token, expert = expert_choice(index, tokens)
        kept = has_class[token // tokens]
        rows = (token[kept], expert[kept], weight.flatten()[kept])
        # The tokens of images without a class follow, as rows of the extra expert, number E.
        token = unconditional.repeat_interleave(tokens).nonzero().squeeze(1)
        extra_rows = (token, torch.full_like(token, experts), weight.new_ones(token.shape[0]))
        return *(torch.cat(pair) for pair in zip(rows, extra_rows, strict=True)), 0, loss

    def contrastive_loss(self, prototypes: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
        """Returns the loss of tokens x (S, F); chosen (S, E) is 1 for chosen experts, else 0."""
        count = chosen.sum(dim=0)                                           # (E,)
        means = (chosen.t() @ x) / count.clamp_min(1)[:, None]              # (E, F)
        similarity = F.normalize(prototypes, dim=-1) @ F.normalize(means, dim=-1).t()
        is_active = count > 0
        similarity = (similarity / self.temperature).masked_fill(~is_active, -1e4)  # (E, E)
        losses = -similarity.log_softmax(dim=-1).diagonal()                 # (E,)
        active = is_active.sum()
        loss = losses.where(is_active, 0.0).sum() / active.clamp_min(1)
        return loss.where(active >= 2, 0.0)


ROUTERS = {
    "topk": TopKRouter,
    "sigmoid": SigmoidRouter,
    "expert_choice": ExpertChoiceRouter,
    "race": RaceRouter,
    "batch_pool": BatchPoolRouter,
    "prototype": PrototypeRouter,
}
