"""DiT-MoE: the diffusion transformer of Peebles and Xie with sparse experts (arXiv 2407.11633).

    model = DiT_models["DiT-S/2"](input_size=32, num_experts=8, num_experts_per_tok=2)
    prediction, aux_loss = model(x, t, y)

What is done to a model stands elsewhere: its first weights (initialization.py), checkpointing and
torch.compile (wrappers.py), sizes by name (presets.py).

Shape legend:
    N batch, C latent channels, C' output channels (2C with learn_sigma, otherwise C),
    h x w latent size, p patch size, P = (h/p)*(w/p) patches per image, T tokens per image in a
    block, D width, d = D / heads, L sparse layers, E experts
The patches are the last tokens of a block; class tokens, if any, precede them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditions import (
    CONDITIONS,
    Condition,
    Conditions,
    EmbedderConfig,
    TimestepEmbedder,
    TokenSequence,
    ZeroLinear,
    split_condition,
)
from initialization import initialize
from moe import EXPERT_BACKENDS, MLP_TYPES, SparseMoEBlock, width_of
from moe_kernels.attention import attend
from moe_kernels.forward_mode import has_tangent
from options.parts import Config, Size, Word, option, sides
from options.settings import changed, check_names
from presets import PRESETS
from routers import NOTHING, ROUTERS, Context, Routing


class RMSNorm(nn.RMSNorm):
    """RMSNorm with weights, in fp32 under autocast, as autocast does for LayerNorm."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)  # --shard casts weights to bf16
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


NORMS = {  # in the blocks and before the output
    "layer": partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False), "rms": RMSNorm,
}  # fmt: skip
QK_NORMS = {"layer": nn.LayerNorm, "rms": RMSNorm}


@dataclass(frozen=True)
class DiTConfig(Config):
    """Hyperparameters that define a DiT, stored with its weights."""

    input_size: Size = option(32, help="latent height and width", ge=1, le=1024)
    in_channels: int = option(4, help="latent channels", ge=1)
    num_classes: int = option(
        1000, help="number of classes (default: as in the data; 1000 without data)",
        ge=1,
    )
    conditions: tuple[str, ...] = option(
        ("label",),
        help="inputs of the model other than the time: label, the class; size, of the original "
        "image and its crop; text, its caption; vector:WIDTH or tokens:LENGTHxWIDTH, cached "
        "features; span, the time span of mean_flow",
    )
    patch_size: int = option(
        2, help="side of a patch, in latent pixels (default: the preset's)", ge=1, group="model"
    )
    patch_bottleneck: int | None = option(
        None, ge=1,
        help="width between the two linear layers that embed a patch in JiT (default: one layer)",
    )
    hidden_size: int = option(1152, help="width of a token (default: the preset's)", ge=1)
    depth: int = option(28, help="number of blocks (default: the preset's)", ge=1, le=1000)
    num_heads: int = option(16, help="attention heads (default: the preset's)", ge=1)
    num_experts: int = option(
        8, help="routed experts per block; 0 for a dense model, as in DiT", ge=0
    )
    num_experts_per_tok: int = option(2, help="experts per token, on average", ge=1)
    n_shared_experts: float = option(
        2, help="width of the shared expert, in units of the model's width; 0 for none", ge=0
    )
    mlp_type: str | None = option(
        None, choices=("swiglu", "swiglu_bias", "gelu"),
        help="type of the experts, or of a dense model's feed-forward layers; gelu has a bias, as "
        "in DiT, and swiglu_bias, as in JiT (default: swiglu, or gelu for a dense model)",
    )
    mlp_ratio: float = option(
        4.0, help="width of an expert, in units of the model's width (default: the preset's "
        "value, or 4.0)", gt=0,
    )
    sparse_layers: str | tuple[int, ...] = option(
        "all",
        help="blocks with experts: all, every-second, shallow-half, deep-half or numbers from 0, "
        "such as 6,8,10; the other blocks are dense",
    )
    dense_mlp_ratio: float | None = option(
        None, help="width of the dense blocks' feed-forward layers, in units of the model's width "
        "(default: mlp_ratio; in a model that also has sparse blocks, the width of a token's "
        "experts, num_experts_per_tok x mlp_ratio + n_shared_experts)",
        gt=0,
    )
    dense_mlp_type: str | None = option(
        None, help="type of the dense blocks' feed-forward layers; all but swiglu have a bias "
        "(default: mlp_type)",
        choices=tuple(MLP_TYPES),
    )
    router: Word = option(
        "topk", table=ROUTERS,
        help="assignment of tokens to experts: topk of DiT-MoE, sigmoid of DeepSeek-V3 and DSMoE, "
        "expert_choice of EC-DiT, race of Expert Race, batch_pool of DiffMoE, prototype of ProMoE",
    )
    aux_loss_alpha: float | None = option(
        None, ge=0, help="weight of the router's loss (default: 0.01, or 1 for batch_pool and "
        "prototype)"
    )
    class_tokens: int = option(
        0, ge=0,
        help="number of class tokens beside the patches, each the embedding of the class plus a "
        "learned position, as in JiT",
    )
    class_tokens_start: int = option(0, ge=0, help="first block with class tokens")
    norm: str = option(
        "layer", choices=tuple(NORMS),
        help="norm in the blocks and before the output: layer, LayerNorm without weights; or rms, "
        "RMSNorm with weights, as in JiT",
    )
    rope: bool = option(
        False, help="add 2-D rotary positions to the attention (Heo et al. 2024, arXiv 2403.13298)"
    )
    absolute_positions: bool = option(True, help="add the sin-cos positions to the patches")
    qk_norm: bool = option(
        False, help="normalise queries and keys, as in the published DiT-MoE-XL and DiT-MoE-G"
    )
    qk_norm_eps: float = option(
        1e-6, help="epsilon of the query and key norms; ProMoE uses 1e-5", gt=0
    )
    class_dropout_prob: float | None = option(
        None, help="probability that the conditions of an image are dropped, for guidance "
        "(default: 0.1, or 0 without a condition that can be dropped)", ge=0, lt=1,
    )
    learn_sigma: bool = option(True, help="also predict the variance, which doubles the channels")
    mlp_norm_eps: float = option(
        1e-6, help="epsilon of the norm before the feed-forward layer; diffusers' DiT uses 1e-5",
        gt=0,
    )
    time_scale: float = option(
        1.0, help="factor applied to the time before it is embedded; ProMoE uses 1000", gt=0
    )
    timestep_frequency_shift: int = option(
        0, choices=(0, 1),
        help="shift s of the n frequencies 10000^(-i / (n - s)) of the time embedding, for i from "
        "0 to n - 1; DiT uses 0, and diffusers' DiT uses 1",
    )
    expert_backend: str = option(
        "grouped", choices=tuple(EXPERT_BACKENDS),
        help="computation of the experts: grouped is fast, loop is the reference",
    )

    def __post_init__(self):
        super().__post_init__()
        given = dict(map(split_condition, self.conditions))
        lacking = [name for name, shape in given.items() if CONDITIONS[name].axes and not shape]
        layers = self.sparse_blocks
        width, heads, patch = self.hidden_size, self.num_heads, self.patch_size
        experts, k = self.num_experts, self.num_experts_per_tok
        rules = (  # field, whether its value is valid, expected value
            ("num_experts_per_tok", k <= experts or not experts, f"at most num_experts, {experts}"),
            ("sparse_layers", {*layers} <= {*range(self.depth)} if layers else not experts,
             f"{', '.join(named_layers(1))} or numbers from 0 to {self.depth - 1}"),
            ("input_size", not any(side % patch for side in sides(self.input_size)),
             f"a multiple of {patch}"),
            ("hidden_size", width % heads == 0, f"a multiple of {heads}"),
            ("hidden_size", width % 4 == 0, "a multiple of 4"),
            ("conditions", len(given) == len(self.conditions), "each condition once"),
            ("conditions", not lacking, "the shape too, such as vector:768"),
            ("class_tokens", "label" in given or not self.class_tokens, "0 without the label"),
            ("class_tokens_start", self.class_tokens_start < self.depth, f"below {self.depth}"),
            ("hidden_size", width // heads % 4 == 0 or not self.rope,
             f"a multiple of {4 * heads}, because rope needs a head width divisible by 4"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def sparse_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with experts."""
        return select_layers(self.sparse_layers, self.depth) if self.num_experts else ()

    @property
    def expert_mlp(self) -> str:
        return self.mlp_type or ("swiglu" if self.num_experts else "gelu")

    @property
    def dense_mlp(self) -> str:
        return self.dense_mlp_type or self.expert_mlp

    @property
    def dense_ratio(self) -> float:
        """Width of the dense feed-forward layers, by default that of a token's experts, if any."""
        active = self.num_experts_per_tok * self.mlp_ratio + self.n_shared_experts
        return self.dense_mlp_ratio or (active if self.num_experts else self.mlp_ratio)

    @property
    def dropout(self) -> float:
        """Probability that the conditions of an image are dropped; by default 0 if guidance can
        drop no condition, neither the label of several classes nor one such as vector:768."""
        names = [split_condition(word)[0] for word in self.conditions]
        has_labels = "label" in names and self.num_classes > 1
        if self.class_dropout_prob is not None:
            return self.class_dropout_prob
        return 0.1 if has_labels or any(CONDITIONS[name].axes for name in names) else 0.0

    @property
    def has_sequence(self) -> bool:
        """Whether the blocks attend to the tokens of a condition."""
        return any(CONDITIONS[split_condition(word)[0]].is_sequence for word in self.conditions)

    @property
    def loss_weight(self) -> float:
        """Weight of the routers' losses, by default that of the router."""
        default = ROUTERS[self.router.name].loss_weight
        return default if self.aux_loss_alpha is None else self.aux_loss_alpha

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h, w."""
        return (self.in_channels, *sides(self.input_size))

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of rows and columns of patches, (h/p, w/p)."""
        height, width = sides(self.input_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """P."""
        return math.prod(self.grid)

    def tokens_of(self, layer: int) -> int:
        """Returns the number of tokens per image, T, in block `layer`.

        Tokens that are no patches may join before any block, in front of the patches.
        """
        return self.num_patches + (self.class_tokens if layer >= self.class_tokens_start else 0)

    @property
    def num_tokens(self) -> int:
        """Number of tokens per image in the first block."""
        return self.tokens_of(0)

    @property
    def experts_per_layer(self) -> int:
        """Number of experts per sparse layer: routed experts and the router's extra experts."""
        return self.num_experts + ROUTERS[self.router.name].extra_experts if self.num_experts else 0


# Fields that affect neither the weights nor a prediction.
WITHOUT_EFFECT = ("expert_backend", "aux_loss_alpha")
# Properties that say what a field means if its default follows from other fields.
MEANINGS = {
    "sparse_layers": "sparse_blocks", "mlp_type": "expert_mlp", "dense_mlp_type": "dense_mlp",
    "dense_mlp_ratio": "dense_ratio", "class_dropout_prob": "dropout",
    "aux_loss_alpha": "loss_weight",
}  # fmt: skip


def select_layers(chosen: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Returns the indices of the chosen blocks.

    chosen: "all", "every-second" (1, 3, ...), "shallow-half", "deep-half", or indices such as
        "6,8,10". The paper found that experts help most in the deep half (arXiv 2407.11633).
    """
    if isinstance(chosen, str):  # text that is not a number becomes `depth`, which is out of range
        numbers = [int(n) if n.isdecimal() else depth for n in chosen.split(",")]
        chosen = named_layers(depth).get(chosen, numbers)
    return tuple(sorted(set(chosen)))


def named_layers(depth: int) -> dict[str, range]:
    half = depth // 2
    return {"all": range(depth), "every-second": range(1, depth, 2),
            "shallow-half": range(half), "deep-half": range(half, depth)}  # fmt: skip


class PatchEmbed(nn.Module):
    """Linear layer on each p x p patch of an image, implemented as a convolution.

    bottleneck: width between two linear layers, of which the first has no bias; None: one layer
    """

    def __init__(
        self, patch_size: int, in_channels: int, hidden_size: int, bottleneck: int | None = None
    ):
        super().__init__()
        width, bias = bottleneck or hidden_size, bottleneck is None
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size, bias=bias)
        self.expand = nn.Linear(bottleneck, hidden_size) if bottleneck else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, h, w) to patches (N, P, D), in row-major order."""
        return self.expand(self.proj(x).flatten(2).transpose(1, 2))


class ClassTokens(nn.Module):
    """Tokens of the class that join in front of the patches, as in JiT (arXiv 2511.13720).

    A token is the embedding of the class plus a learned position. It is not rotated.
    """

    matrices = {"positions": 0}  # see `training.optimizers.hidden_matrices`

    def __init__(self, count: int, hidden_size: int):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, count, hidden_size))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Returns the tokens (N, T, D) of patches x (N, P, D) and the embedding (N, D) of a class.
        """
        return torch.cat([label.unsqueeze(1) + self.positions, x], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention, with timm's parameter names.

    qk_norm: makes the norm of the queries and keys of each head, from its width
    """

    matrices = {"qkv.weight": 3}  # one below the other

    def __init__(
        self, hidden_size: int, num_heads: int, qk_norm: Callable[[int], nn.Module] = nn.Identity
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = qk_norm(self.head_dim), qk_norm(self.head_dim)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Maps (N, T, D) to (N, T, D); the rotation (T, d) is that of queries and keys."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (N, T, 3, heads, d)
        q, k, v = qkv.unbind(2)                                              # each (N, T, heads, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        x = attend(q.to(v.dtype), k.to(v.dtype), v)                          # (N, T, heads, d)
        return self.proj(x.flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens of an image to the tokens of the conditions (PixArt-alpha,
    Chen et al. 2023, arXiv 2310.00426), whose output starts at zero."""

    drawn_last = True  # so that the same seed gives the same other weights
    matrices = {"kv.weight": 2}

    def __init__(
        self, hidden_size: int, num_heads: int, qk_norm: Callable[[int], nn.Module] = nn.Identity
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm, self.k_norm = qk_norm(self.head_dim), qk_norm(self.head_dim)
        self.proj = ZeroLinear(hidden_size, hidden_size)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Maps x (N, T, D) to (N, T, D), with tokens (N, L, D) and their mask (N, L)."""
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))         # (N, T, heads, d)
        kv = self.kv(tokens).unflatten(-1, (2, self.num_heads, self.head_dim))
        k, v = kv.unbind(2)                                                  # each (N, L, heads, d)
        q, k = self.q_norm(q), self.k_norm(k)
        x = attend(q.to(v.dtype), k.to(v.dtype), v, mask)                    # (N, T, heads, d)
        return self.proj(x.flatten(2))


def rotary_positions(
    head_dim: int, grid: tuple[int, int], device: torch.device, num_class_tokens: int = 0
) -> Tensor:
    """Returns the cosines, then the sines, of 2-D rotary positions (T, d).

    The first half of the angles (T, d/2) depends on the row of a patch and the second half on the
    column. Class tokens, in front of the patches, are not rotated.
    """
    quarter = head_dim // 4
    frequencies = 10000 ** -(torch.arange(quarter, device=device) / quarter)  # (d/4,)
    angles = torch.arange(max(grid), device=device)[:, None] * frequencies  # (largest side, d/4)
    rows = angles[: grid[0]].repeat_interleave(grid[1], 0)                  # (P, d/4)
    columns = angles[: grid[1]].repeat(grid[0], 1)                          # (P, d/4)
    angles = F.pad(torch.cat([rows, columns], dim=1), (0, 0, num_class_tokens, 0))  # (T, d/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_(i + d/2)) of queries or keys (N, T, heads, d).

    rotation: (T, d), see `rotary_positions`
    """
    cos, sin = rotation.unsqueeze(1).chunk(2, dim=-1)                       # (T, 1, d/2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scales and shifts the tokens (N, T, D); `shift` and `scale` (N, D) are vectors per image."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning, which is the identity at first.

    Its feed-forward layer is sparse (`moe`) or dense (`mlp`); the other attribute is None.
    """

    matrices = {"adaLN_modulation.1.weight": 6}

    def __init__(self, config: DiTConfig, layer: int = 0):
        super().__init__()
        self.norm1 = NORMS[config.norm](config.hidden_size)
        qk_norm = partial(QK_NORMS[config.norm], eps=config.qk_norm_eps)
        self.attn = Attention(
            config.hidden_size, config.num_heads, qk_norm if config.qk_norm else nn.Identity
        )
        self.cross_attn = None
        if config.has_sequence:
            self.norm_cross = NORMS[config.norm](config.hidden_size)
            self.cross_attn = CrossAttention(
                config.hidden_size, config.num_heads, qk_norm if config.qk_norm else nn.Identity
            )
        self.norm2 = NORMS[config.norm](config.hidden_size, eps=config.mlp_norm_eps)
        self.moe = self.mlp = None
        if layer in config.sparse_blocks:
            self.moe = SparseMoEBlock(
                config.hidden_size,
                num_experts=config.num_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                mlp_ratio=config.mlp_ratio,
                n_shared_experts=config.n_shared_experts,
                expert_backend=config.expert_backend,
                mlp_type=config.expert_mlp,
                router=config.router,
            )
            self.moe.gate.layer = layer
        else:
            self.mlp = MLP_TYPES[config.dense_mlp](
                config.hidden_size, width_of(config.hidden_size, config.dense_ratio)
            )
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), ZeroLinear(config.hidden_size, 6 * config.hidden_size)
        )

    def forward(
        self, x: Tensor, c: Tensor, context: Context = NOTHING, rotation: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Returns the tokens (N, T, D) and, if the block is sparse, the routing.

        x: tokens (N, T, D)
        c: conditioning vectors (N, D), the sum of the embeddings of the time and the conditions
        context: what the block and its router read besides
        rotation: (T, d), see `rotary_positions`, or None
        """
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)               # 6 x (N, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        h = modulate(self.norm1(x), shift_msa, scale_msa)                   # (N, T, D)
        x = x + gate_msa.unsqueeze(1) * self.attn(h, rotation)
        if self.cross_attn is not None:
            h = self.norm_cross(x)
            x = x + self.cross_attn(h, context["sequence"], context["sequence_mask"])
        normed = self.norm2(x)
        h = modulate(normed, shift_mlp, scale_mlp)                          # (N, T, D)
        if self.moe is None:
            return x + gate_mlp.unsqueeze(1) * self.mlp(h), None
        y, routing = self.moe(h, context | {"unmodulated": normed})
        return x + gate_mlp.unsqueeze(1) * y, routing


class FinalLayer(nn.Module):
    """Final layer: normalises, modulates and projects each token to the pixels of its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, norm: str = "layer"):
        super().__init__()
        self.norm_final = NORMS[norm](hidden_size)
        self.linear = ZeroLinear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ZeroLinear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Maps patches x (N, P, D) to (N, P, p*p*C'); c: conditioning vectors (N, D)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer with sparse experts.

    Takes a `DiTConfig`, or its fields as keywords.

    Each forward pass of a sparse model sets, except under torch.func.jvp:
        expert_load         (L, config.experts_per_layer), see `Routing.load`
        experts_per_token   mean number of experts per token, by layer
        router_metrics      numbers for the log, by name: scalars, or (L,), see `Routing.metrics`
        observed            (L, ...) statistics for `Router.update`, or None, see `Routing.observed`
    """

    def __init__(self, config: DiTConfig | None = None, **fields):
        super().__init__()
        if config is not None and fields:
            raise TypeError(f"got a config and {', '.join(fields)}, expected one or the other")
        check_names(fields, DiTConfig)
        self.config = config = config or DiTConfig(**fields)
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.front_tokens = config.class_tokens  # tokens that may stand in front of the patches
        self.expert_load: Tensor | None = None
        self.observed: Tensor | None = None
        self.router_metrics: dict[str, Tensor] = {}
        self.experts_per_token: list[float] = []

        self.x_embedder = PatchEmbed(
            config.patch_size, config.in_channels, config.hidden_size, config.patch_bottleneck
        )
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.timestep_frequency_shift)
        for spec in config.conditions:
            name, shape = split_condition(spec)
            of_embedder = EmbedderConfig(
                config.hidden_size, config.num_classes, config.dropout,
                config.time_scale, shape,
            )
            self.add_module(embedder_of(name), CONDITIONS[name](of_embedder))
        positions = config.num_patches if config.absolute_positions else 1
        self.register_buffer("pos_embed", torch.empty(1, positions, config.hidden_size))
        self.blocks = nn.ModuleList(DiTBlock(config, layer) for layer in range(config.depth))
        self.class_tokens = None
        if config.class_tokens:
            self.class_tokens = ClassTokens(config.class_tokens, config.hidden_size)
        self.final_layer = FinalLayer(
            config.hidden_size, config.patch_size, self.out_channels, config.norm
        )
        initialize(self)

    @property
    def conditions(self) -> dict[str, Condition]:
        """Conditions by name, in the order in which the model adds their vectors."""
        names = [split_condition(spec)[0] for spec in self.config.conditions]
        return {name: getattr(self, embedder_of(name)) for name in names}

    @property
    def depends_on_batch(self) -> bool:
        """Whether a prediction in eval mode depends on the other images of the batch."""
        gates = [block.moe.gate for block in self.blocks if block.moe is not None]
        return any(gate.depends_on_batch for gate in gates)

    def reset_parameters(self) -> None:
        self.pos_embed.copy_(position_embedding(self.config))

    def expert_parameters(self) -> list[str]:
        """Returns the names of the parameters (E, ...) that have a slice for each expert."""
        return [
            f"{prefix}.experts.{name}"
            for prefix, module in self.named_modules() if isinstance(module, SparseMoEBlock)
            for name, _ in module.experts.named_parameters() if name in module.experts.per_expert
        ]  # fmt: skip

    def unpatchify(self, x: Tensor) -> Tensor:
        """Rearranges patches (N, P, p*p*C') to an image (N, C', h, w)."""
        p = self.config.patch_size
        x = x.unflatten(1, self.config.grid).unflatten(3, (p, p, self.out_channels))
        x = x.permute(0, 5, 1, 3, 2, 4)                                   # (N, C', h/p, p, w/p, p)
        return x.flatten(4, 5).flatten(2, 3)

    def patches_of(self, x: Tensor) -> Tensor:
        """Returns the patches (N, P, ...) of tokens (N, T, ...): all, or those behind front_tokens.

        Raises ValueError for any other number of tokens, whose places are not known.
        """
        patches, front = self.config.num_patches, self.front_tokens
        if x.shape[1] not in (patches, patches + front):
            raise ValueError(f"got {x.shape[1]} tokens, expected {patches} patches, or {front} "
                             "front_tokens and the patches; set model.front_tokens for others")
        return x[:, x.shape[1] - patches :]

    def forward(self, x: Tensor, t: Tensor, y: Conditions) -> tuple[Tensor, Tensor]:
        """Predicts what the objective defines, such as the noise, and with learn_sigma the variance
        channels.

        x: latents (N, C, h, w)
        t: times (N,), as the objective defines them: 0 to 999 (Gaussian), or 0 to 1 (flows)
        y: labels (N,) in [0, num_classes]; or a mapping from the names of conditions to tensors
            (N, ...). The label num_classes means "no class" and requires class_dropout_prob > 0.
            Every condition except the label has a default. Other names are ignored, but the
            label always decides the routers' "no_class", except in a model of sequences without
            the label, where it is an image without any token.

        Returns the prediction (N, C', h, w) and the auxiliary loss, a scalar to add to the training
        loss: aux_loss_alpha times the sum of the router losses; 0 for a dense model.
        """
        if tuple(x.shape[1:]) != self.config.latent_shape:
            raise ValueError(f"x: got latents of shape {tuple(x.shape[1:])}, expected "
                             f"{self.config.latent_shape}, the model's shape")
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed  # (N, P, D)
        y = {"label": y} if isinstance(y, Tensor) else y
        c = time = self.t_embedder(t * self.config.time_scale)              # (N, D)
        embedded: dict[str, Tensor] = {}                                    # (N, D)
        sequences: list[TokenSequence] = []
        for name, condition in self.conditions.items():
            values = y[name] if name in y else condition.default(x.shape[0], x.device)
            found = condition(values)
            if condition.is_sequence:
                sequences.append(found)
            embedded[name] = found.vector if condition.is_sequence else found
            c = c + embedded[name]
        classes = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # (N,)
        if "label" in y:
            classes = y["label"]
        no_class = classes == self.config.num_classes                       # (N,)
        if sequences:
            tokens = torch.cat([one.tokens for one in sequences], dim=1)    # (N, L, D)
            mask = torch.cat([one.mask for one in sequences], dim=1)        # (N, L)
            embedded |= {"sequence": tokens, "sequence_mask": mask}
            if "label" not in self.conditions:  # only the null tokens
                no_class = mask.sum(dim=1) == len(sequences)
        context = {"time": time, "classes": classes, "no_class": no_class}
        context = Context(context | embedded)
        rotation = None
        if self.config.rope:
            width = self.config.hidden_size // self.config.num_heads
            count = self.config.class_tokens
            rotation = rotary_positions(width, self.config.grid, x.device, count)       # (T, d)
        routings, rates = [], []                                            # one per sparse layer
        for layer, block in enumerate(self.blocks):
            if self.class_tokens is not None and layer == self.config.class_tokens_start:
                x = self.class_tokens(x, embedded["label"])                  # (N, T, D)
            of_tokens = None if rotation is None else rotation[-x.shape[1] :]
            x, routing = self.call(block, x, c, context, of_tokens)
            if routing is not None:
                context = context | (routing.passed_on or {})
                routings.append(routing)
                rates.append(routing.token.shape[0] / torch.sym_max(1, x.shape[0] * x.shape[1]))
        prediction = self.unpatchify(self.final_layer(self.patches_of(x), c))  # (N, C', h, w)
        if not routings:
            return prediction, torch.zeros((), device=x.device)
        loss = self.config.loss_weight * torch.stack([r.loss for r in routings]).sum()
        if has_tangent(x):  # tensors of torch.func must not outlive the transform
            return prediction, loss
        self.expert_load = torch.stack([routing.load.detach() for routing in routings])
        self.experts_per_token = rates
        metrics = {
            name: torch.stack([r.metrics[name].detach() for r in routings])  # (L,) or (L, 1)
            for name in routings[0].metrics or ()
        }
        self.router_metrics = {
            f"router_{name}": values.mean() if values.dim() == 1 else values.flatten()
            for name, values in metrics.items()
        }
        observed = [routing.observed for routing in routings]
        self.observed = None if observed[0] is None else torch.stack(observed).detach()
        return prediction, loss

    def call(self, block: DiTBlock, *inputs: Any) -> tuple[Tensor, Routing | None]:
        """Calls a block; gradient checkpointing replaces this method (see wrappers.py)."""
        return block(*inputs)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = 3
    ) -> Tensor:
        """Predicts (2N, C', h, w) under classifier-free guidance, in one batched pass, as the
        published sampling script expects.

        The batch (2N, ...) is [conditional; unconditional]: t and y hold both halves, and the
        second half of x is ignored.

        guided_channels: number of leading channels that guidance acts on, 3 in the published
            sampler; None: all latent channels
        """
        half = x[: len(x) // 2]
        prediction, _ = self(torch.cat([half, half]), t, y)
        channels = self.config.in_channels if guided_channels is None else guided_channels
        conditional, unconditional = prediction[:, :channels].chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), prediction[:, channels:]], dim=1)

    def load_state_dict(
        self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False
    ):
        """Loads a state dict in our layout or a published one."""
        # Not at the top, because checkpoints/, apart from this file, imports the model.
        from checkpoints.layouts import to_stacked_layout

        return super().load_state_dict(to_stacked_layout(state_dict), strict=strict, assign=assign)


def embedder_of(condition: str) -> str:
    """Returns the name of the DiT attribute that stores the embedder of a condition."""
    return "y_embedder" if condition == "label" else f"{condition}_embedder"


def position_embedding(config: DiTConfig) -> Tensor:
    """Returns the fixed 2-D sin-cos position embedding (1, P, D), added to the patch embeddings.

    The first D/2 channels encode the column of a patch, the others the row. Without absolute
    positions: zeros (1, 1, D).
    """
    if not config.absolute_positions:
        return torch.zeros(1, 1, config.hidden_size)
    quarter, (height, width) = config.hidden_size / 4, config.grid
    positions = np.arange(max(height, width))[:, None]
    angles = positions * (1 / 10000 ** (np.arange(quarter) / quarter))      # (largest side, D/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)         # (largest side, D/2)
    x, y = np.tile(axis[:width], (height, 1)), axis[:height].repeat(width, axis=0)  # (P, D/2) each
    return torch.from_numpy(np.concatenate([x, y], axis=1)[None]).float()


def build_preset(preset: str, **overrides) -> DiT:
    """Builds a published model with other fields; its router keeps what a word does not say."""
    return DiT(changed(DiTConfig(**PRESETS[preset]), overrides))


DiT_models = {preset: partial(build_preset, preset) for preset in PRESETS}
