"""The sparse mixture of experts that replaces the feed-forward layer of a DiT block.

    moe = SparseMoEBlock(hidden_size=384, num_experts=8, num_experts_per_tok=2)
    y, routing = moe(x)

A layer is three visible steps: a router chooses experts for the tokens (`routers`), the experts
compute the chosen rows (`Experts`, by one of the back ends, which agree in output and every
gradient), and the weighted rows are summed back onto their tokens. Choosing knows nothing of
computing: a `Routing` is a list of (token, expert, weight) with any number of rows per token.

Shape legend:
    N batch, T tokens per image, S = N*T tokens, D width, H expert width,
    E experts, K experts per token, R = S*K chosen rows
"""

import math
import os
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from moe_kernels.experts import HAS_TRITON, SortedRows, compute_experts, sort_rows
from routers import ROUTERS, Routing


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without bias (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D). Keeps for backward what its two first layers return, and makes
        the activation again."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.compiler.is_compiling() or get_interpreter_stack() or lacks_derivative_rules():
            return self.down_proj(F.silu(gate) * up)  # a compiler makes it again by itself
        a = GatedSilu.apply(gate, up)
        if a.grad_fn is None:
            return self.down_proj(a)
        with remade(a):
            return self.down_proj(a)


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up that keeps its two inputs and nothing else."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.unpacked = None
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.unpacked or ctx.saved_tensors
        ctx.unpacked = None
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def remade(a: Tensor) -> saved_tensors_hooks:
    """A context in which autograd keeps, instead of the output a of `GatedSilu`, how to make it.

    That is the function's node, whose tensors are unpacked once for both: gradient checkpointing,
    which keeps none of them, makes them a single time.
    """
    node, storage, size = a.grad_fn, a.untyped_storage()._cdata, a.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        is_a = saved.untyped_storage()._cdata == storage and saved.numel() == size
        return saved.shape if is_a else saved

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if not isinstance(kept, torch.Size):
            return kept
        gate, up = node.unpacked = node.saved_tensors
        return (F.silu(gate.detach()) * up.detach()).view(kept)

    return saved_tensors_hooks(pack, unpack)


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))) with bias and the tanh approximation: the feed-forward layer of DiT."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D)."""
        return self.fc2(gelu_tanh(self.fc1(x)))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of (..., 2H)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def width_of(hidden_size: int, mlp_ratio: float) -> int:
    """Hidden units of a feed-forward layer: W for a ratio W / D, whose product may fall just short
    of W."""
    return int(hidden_size * mlp_ratio + 1e-6)


ACTIVATIONS = {"swiglu": swiglu, "gelu": gelu_tanh}
MLP_TYPES = {"swiglu": SwiGLU, "gelu": GeluMLP}


class Experts(nn.Module):
    """E SwiGLU experts as two stacked parameters, computed for the rows that a `Routing` lists.

    gate_up_proj is (E, 2H, D), the H gate rows of each expert first; down_proj is (E, D, H).
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, backend: str = "grouped"
    ):
        super().__init__()
        self.backend = checked_backend(backend)
        shape = (num_experts, hidden_size, intermediate_size)  # (E, D, H)
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
        x = cast_as_autocast(x)
        compute = choose_backend(self.backend, x, self.down_proj)
        return compute(x, routing, self.gate_up_proj, self.down_proj)


class GeluExperts(nn.Module):
    """E `GeluMLP` experts, stacked: what a dense DiT's feed-forward layer is upcycled to.

    up_proj (E, H, D), up_bias (E, H), down_proj (E, D, H), down_bias (E, D).
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, backend: str = "grouped"
    ):
        super().__init__()
        self.backend = checked_backend(backend)
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(num_experts, intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = math.sqrt(6 / (self.down_proj.shape[1] + self.down_proj.shape[2]))
        nn.init.uniform_(self.up_proj, -bound, bound)
        nn.init.uniform_(self.down_proj, -bound, bound)
        nn.init.zeros_(self.up_bias)
        nn.init.zeros_(self.down_bias)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Computes the routed rows of x (S, D); returns their weighted sum per token (S, D)."""
        x = cast_as_autocast(x)
        compute = choose_backend(self.backend, x, self.down_proj)
        return compute(
            x,
            routing,
            self.up_proj,
            self.down_proj,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
            activation="gelu",
        )


EXPERT_TYPES = {"swiglu": Experts, "gelu": GeluExperts}


def cast_as_autocast(x: Tensor) -> Tensor:
    """What autocast would make of the input of a matrix product; without it, x itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def checked_backend(backend: str) -> str:
    if backend not in EXPERT_BACKENDS:
        raise ValueError(f"expert_backend: got {backend!r}, expected {sorted(EXPERT_BACKENDS)}")
    return backend


def choose_backend(backend: str, x: Tensor, down_proj: Tensor) -> Callable[..., Tensor]:
    """The function of a back end, or the loop where that cannot take the shapes or derivatives."""
    if lacks_derivative_rules():
        return experts_loop
    if backend == "grouped" and not takes_grouped_products(x, down_proj):
        warn_of_loop(tuple(down_proj.shape), x.dtype)
        return experts_loop
    if backend == "triton" and x.element_size() > 4:
        raise ValueError(
            f"expert_backend: got 'triton' with {x.dtype}, expected fp32, bf16 or fp16, or 'loop'"
        )
    if backend == "triton" and not can_use_triton(x.device):
        raise ValueError(
            f"expert_backend: got 'triton' with tensors on {x.device.type} and Triton "
            f"{'installed' if HAS_TRITON else 'missing'}, expected CUDA and Triton, or 'grouped'"
        )
    return EXPERT_BACKENDS[backend]


def lacks_derivative_rules() -> bool:
    """Whether torch.func or forward mode differentiates what runs now.

    The operators of our own have a backward pass alone; forward mode would silently take them for
    constants.
    """
    return forward_ad._current_level >= 0 or is_differentiated_by_func()


@torch.compiler.assume_constant_result  # a compiler cannot read it; what it traced does not change
def is_differentiated_by_func() -> bool:
    transforms = [transform.key() for transform in get_interpreter_stack() or ()]
    return TransformType.Grad in transforms or TransformType.Jvp in transforms


def can_use_triton(device: torch.device) -> bool:
    """Whether Triton is there for a device; for a CPU only its interpreter is."""
    return HAS_TRITON and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def experts_loop(
    x: Tensor,
    routing: Routing,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """The reference back end: one expert after another. Shapes as in `Experts`, `GeluExperts`."""
    parameters = (up_proj, down_proj, up_bias, down_bias)
    parameters = [p if p is None else p.to(x.dtype) for p in parameters]
    up_proj, down_proj, up_bias, down_bias = parameters
    y = torch.zeros_like(x)  # (S, D)
    for expert, (up, down) in enumerate(zip(up_proj, down_proj, strict=True)):
        chosen = (routing.expert == expert).nonzero().squeeze(1)  # (rows of this expert,)
        token = routing.token[chosen]
        bias = None if up_bias is None else up_bias[expert]
        hidden = F.linear(x.index_select(0, token), up, bias)  # (rows, 2H), gelu H
        bias = None if down_bias is None else down_bias[expert]
        rows = F.linear(ACTIVATIONS[activation](hidden), down, bias)  # (rows, D)
        y = y.index_add(0, token, rows * routing.weight[chosen, None].to(rows.dtype))
    return y


def experts_grouped(
    x: Tensor,
    routing: Routing,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    kernels: str | None = None,
) -> Tensor:
    """The fast back end: rows sorted by expert, then one grouped matrix product per projection.

    Shapes as in `Experts`, `GeluExperts`. No host sync and no loop over experts on CUDA, where the
    steps are Triton kernels (`kernels` None or "triton"); without Triton, or with "torch", they are
    PyTorch's, whose grouped product is fused for bf16 on compute capability 9 and 10 alone.
    """
    kernels = kernels or ("triton" if x.is_cuda and HAS_TRITON else "torch")
    token, expert, weight, per_token, *_ = routing
    # Dispatch: each expert's rows side by side. Experts and combine: one autograd function.
    place, end = sort_rows(expert, len(up_proj), kernels)
    token = torch.empty_like(token).scatter(0, place, token)  # (R,) in expert order
    return compute_experts(
        x, weight, up_proj, down_proj, SortedRows(token, place, end, per_token),
        up_bias=up_bias, down_bias=down_bias, activation=activation, kernels=kernels,
    )  # fmt: skip


def experts_triton(*args, **options) -> Tensor:
    """`experts_grouped` by Triton kernels or not at all."""
    return experts_grouped(*args, **options, kernels="triton")


EXPERT_BACKENDS = {"loop": experts_loop, "grouped": experts_grouped, "triton": experts_triton}


def takes_grouped_products(x: Tensor, down_proj: Tensor) -> bool:
    """Whether D and H are multiples of 16 bytes, as the grouped matrix product asks of strides, of
    numbers of at most 4 bytes."""
    _, d, h = down_proj.shape
    size = x.element_size()
    return size <= 4 and d * size % 16 == 0 and h * size % 16 == 0


def warn_of_loop(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Says (once a process: Python shows a repeated warning once) why the loop is taken."""
    _, d, h = shape
    warnings.warn(
        "grouped experts need rows of a multiple of 16 bytes, of fp32, bf16 or fp16; got width "
        f"{d}, expert width {h} in {dtype}: computing them in a loop",
        stacklevel=4,
    )


class SparseMoEBlock(nn.Module):
    """Routed experts plus shared ones that see every token (arXiv 2407.11633, section 2.2).

    y = sum over the chosen experts of weight * expert(x), + shared_experts(x).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        mlp_ratio: float = 4.0,
        n_shared_experts: int = 2,
        expert_backend: str = "grouped",
        mlp_type: str = "swiglu",
        router: str = "topk",
        renormalize_top_k: bool = False,
    ):
        super().__init__()
        self.gate = ROUTERS[router](
            hidden_size, num_experts, num_experts_per_tok, renormalize=renormalize_top_k
        )
        intermediate_size = width_of(hidden_size, mlp_ratio)
        self.experts = EXPERT_TYPES[mlp_type](
            hidden_size, intermediate_size, num_experts, expert_backend
        )
        shared_size = n_shared_experts * hidden_size
        self.shared_experts = MLP_TYPES[mlp_type](hidden_size, shared_size) if shared_size else None

    def forward(self, x: Tensor, unconditional: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Takes x (N, T, D), and which images have no class (N,) bool, for routers that ask.

        Returns y (N, T, D) and what the router decided.
        """
        routing = self.gate(x, unconditional)
        x = cast_as_autocast(x)  # once for all experts
        y = self.experts(x.flatten(0, 1), routing).view_as(x)  # (N, T, D)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing
