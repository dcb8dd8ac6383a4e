"""The sparse mixture of experts that replaces the feed-forward layer of a DiT block.

    moe = SparseMoEBlock(hidden_size=384, num_experts=8, num_experts_per_tok=2)
    y, routing = moe(x)

A row is a pair of a token and one of the token's experts. A layer has three steps:
    1. The router (routers.py) chooses the rows and their weights.
    2. The experts compute the output of each row (`Experts`).
    3. The weighted outputs of each token are summed.
`experts_loop` and `experts_grouped` implement steps 2 and 3 with the same output and gradients, up
to rounding.

Shape legend:
    N batch, T tokens per image, S = N*T tokens, D width, H expert width, E experts,
    R chosen rows, U output width of up_proj: 2H in SwiGLU experts (the gate first), H in GELU ones
"""

import math
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.experts import compute_experts
from moe_kernels.forward_mode import has_tangent
from moe_kernels.gated_linear import gated_linear
from moe_kernels.quantized import QuantizedWeight
from options.parts import Word
from routers import NOTHING, ROUTERS, Context, Routing


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D)."""
        return gated_linear(self.gate_proj(x), self.up_proj(x), self.down_proj)


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))) with bias and the tanh approximation: the feed-forward layer of DiT."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiluMLP(GeluMLP):
    """fc2(silu(fc1(x))) with bias: the feed-forward layer of DSMoE's dense blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


MLP_TYPES = {
    "swiglu": SwiGLU, "swiglu_bias": partial(SwiGLU, bias=True), "gelu": GeluMLP, "silu": SiluMLP,
}  # fmt: skip


def width_of(hidden_size: int, mlp_ratio: float) -> int:
    """Returns the width D * mlp_ratio, rounded down."""
    # In floating point, D * (5 / D) can be slightly below 5. With 1e-6 added, the result is 5.
    return int(hidden_size * mlp_ratio + 1e-6)


class ExpertWeights(NamedTuple):
    """Stacked weights of E experts, SwiGLU (U = 2H) or GELU (U = H)."""

    up_proj: Tensor | QuantizedWeight  # (E, U, D)
    down_proj: Tensor | QuantizedWeight  # (E, D, H)
    up_bias: Tensor | None = None  # (E, U)
    down_bias: Tensor | None = None  # (E, D)


class Experts(nn.Module):
    """E experts of a layer as stacked parameters, SwiGLU or GELU.

    swiglu       gate_up_proj (E, 2H, D), the H rows of the gate before the H rows of the up
                 projection; down_proj (E, D, H)
    swiglu_bias  also gate_up_bias (E, 2H) and down_bias (E, D)
    gelu         up_proj (E, H, D), up_bias (E, H), down_proj (E, D, H), down_bias (E, D): E layers
                 like `GeluMLP`, such as the copies of a dense layer that upcycling makes

    `per_expert` and `shared` declare all parameters, with the number of matrices of equal size in
    each, one below the other (0: a vector). Expert parallelism, counts, Muon, quantisation and the
    dropping of experts follow them. A subclass adds its own parameters and overrides `weights` or
    `forward`.
    """

    is_spread = False  # whether other processes hold other experts of the layer
    per_expert: ClassVar[dict[str, int]] = {  # (E, ...): one slice belongs to each expert
        "gate_up_proj": 2, "up_proj": 1, "down_proj": 1,
        "gate_up_bias": 0, "up_bias": 0, "down_bias": 0,
    }  # fmt: skip
    shared: ClassVar[dict[str, int]] = {}  # every expert uses the whole parameter

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        backend: str = "grouped",
        mlp_type: str = "swiglu",
    ):
        super().__init__()
        self.backend = backend
        d, h = hidden_size, expert_size
        up, width = ("up", h) if mlp_type == "gelu" else ("gate_up", 2 * h)
        shapes = {f"{up}_proj": (width, d), f"{up}_bias": (width,), "down_proj": (d, h),
                  "down_bias": (d,)}  # fmt: skip
        for name, shape in shapes.items():
            if name.endswith("bias") and mlp_type == "swiglu":
                continue
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the matrices D -> H (gate and up) and H -> D of each expert as DiT does.

        xavier_uniform_ on the 3-D parameter would count the expert dimension as part of the fan.
        """
        bound = math.sqrt(6 / (self.down_proj.shape[1] + self.down_proj.shape[2]))
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                nn.init.uniform_(weight, -bound, bound)

    def forward(
        self, x: Tensor, routing: Routing, weights: ExpertWeights | None = None
    ) -> Tensor:
        """Computes the experts' outputs for tokens x (S, D); returns weighted sums (S, D).

        weights: of other experts; None: its own
        """
        weights = weights or self.weights()
        return EXPERT_BACKENDS[self.backend](cast_as_autocast(x), routing, weights)

    def weights(self) -> ExpertWeights:
        up = "gate_up" if hasattr(self, "gate_up_proj") else "up"
        names = (f"{up}_proj", "down_proj", f"{up}_bias", "down_bias")
        return ExpertWeights(*(getattr(self, name, None) for name in names))


def check_declared(experts: nn.Module, num_experts: int) -> None:
    """Raises ValueError for a parameter of experts whose owners are unknown; see `Experts`."""
    per_expert, shared = (getattr(experts, name, {}) for name in ("per_expert", "shared"))
    kind = type(experts).__name__
    for name, weight in experts.named_parameters():
        if (name in per_expert) == (name in shared):
            raise ValueError(f"{kind}: got the parameter {name}, expected its name in per_expert, "
                             f"if each expert owns a slice (E, ...), or in shared")
        if name in per_expert and (not weight.dim() or len(weight) != num_experts):
            raise ValueError(f"{kind}.per_expert: got {name} {tuple(weight.shape)}, expected "
                             f"({num_experts}, ...), a slice for each expert")


def cast_as_autocast(x: Tensor) -> Tensor:
    """Casts x to the dtype that autocast, if enabled, would use for a matrix product."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def experts_loop(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Reference back end: computes one expert after another."""
    # Unbind each parameter once: indexing it for each expert would add up gradients of full size.
    no_bias = [None] * len(weights.up_proj)
    experts = zip(*(no_bias if p is None else p.to(x.dtype).unbind() for p in weights), strict=True)
    y = torch.zeros_like(x)                                                 # (S, D)
    for expert, (up, down, up_bias, down_bias) in enumerate(experts):
        chosen = (routing.expert == expert).nonzero().squeeze(1)            # (rows of this expert,)
        token = routing.token[chosen]
        hidden = F.linear(x.index_select(0, token), up, up_bias)            # (rows, U)
        if len(up) == 2 * down.shape[1]:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden                                  # (rows, H)
        else:
            hidden = F.gelu(hidden, approximate="tanh")                     # (rows, H)
        rows = F.linear(hidden, down, down_bias)                            # (rows, D)
        y = y.index_add(0, token, rows * routing.weight[chosen, None].to(rows.dtype))
    return y


def experts_grouped(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Fast back end: one grouped matrix product per projection, see `compute_experts`.

    On CUDA with Triton, the host does not wait for the GPU and does not loop over experts.

    Under torch.func.jvp with gradients, `experts_loop` takes over, so that the tangent is
    differentiable. Other transforms and second derivatives require the back end "loop".
    """
    if torch.is_grad_enabled() and has_tangent(x, routing.weight, *weights):
        return experts_loop(x, routing, weights)
    token, expert, weight = routing.token, routing.expert, routing.weight
    if not routing.per_token:  # `compute_experts` expects the rows sorted by token
        token, order = token.sort(stable=True)
        expert, weight = expert[order], weight.gather(0, order)
    # up_proj, down_proj and, if the experts have biases, up_bias; down_bias is added below.
    parameters = [parameter for parameter in weights[:3] if parameter is not None]
    y = compute_experts(x, token, expert, weight, parameters)               # (S, D)
    if weights.down_bias is not None:  # add weight * down_bias for each row
        combine = weight.new_zeros(x.shape[0], len(weights.down_bias))      # (S, E)
        combine = combine.index_put((token, expert), weight, accumulate=True)
        y = y + combine.to(x.dtype) @ weights.down_bias.to(x.dtype)
    return y


EXPERT_BACKENDS = {"loop": experts_loop, "grouped": experts_grouped}


class SparseMoEBlock(nn.Module):
    """Routed experts plus a shared expert that sees every token (arXiv 2407.11633, section 2.2).

    y = (sum of weight * expert(x) over the chosen experts) + shared_experts(x)

    mlp_ratio: width H of an expert, in units of D
    n_shared_experts: width of the shared expert, in units of D; 0 for none
    expert_backend: a key of `EXPERT_BACKENDS`
    mlp_type: type of all experts, swiglu, swiglu_bias or gelu
    router: a word such as "sigmoid:scale=2.5", see `options.parts.Word`
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        mlp_ratio: float = 4.0,
        n_shared_experts: float = 2,
        expert_backend: str = "grouped",
        mlp_type: str = "swiglu",
        router: str | Word = "topk",
    ):
        super().__init__()
        self.gate = Word.parse(router, ROUTERS).make(
            ROUTERS, hidden_size=hidden_size, num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
        )  # fmt: skip
        self.experts = Experts(
            hidden_size,
            width_of(hidden_size, mlp_ratio),
            num_experts + self.gate.extra_experts,
            expert_backend,
            mlp_type,
        )
        check_declared(self.experts, num_experts + self.gate.extra_experts)
        shared_size = width_of(hidden_size, n_shared_experts)
        self.shared_experts = MLP_TYPES[mlp_type](hidden_size, shared_size) if shared_size else None

    def forward(self, x: Tensor, context: Context = NOTHING) -> tuple[Tensor, Routing]:
        """Returns y (N, T, D) and the routing.

        x: tokens (N, T, D)
        context: what the router reads besides
        """
        routing = self.gate(x, context)
        x = cast_as_autocast(x)  # cast once for routed and shared experts
        y = self.experts(x.flatten(0, 1), routing).view_as(x)               # (N, T, D)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing
