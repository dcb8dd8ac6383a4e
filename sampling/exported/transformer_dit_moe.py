"""The transformer of DiT-MoE as a model of diffusers (Fei et al. 2024, arXiv 2407.11633).

    transformer = AutoModel.from_pretrained(folder, subfolder="transformer", trust_remote_code=True)
    prediction = transformer(latents, timestep, class_labels).sample

This file requires only torch and diffusers. It routes as in evaluation, in training mode too, and
without an auxiliary loss: it is for sampling, and for fine-tuning with adapters.

Shape legend:
    N batch, C latent channels, C' output channels, h x w latent size, p patch size,
    P = (h/p)*(w/p) patches, T tokens per image in a block, D width, E experts, L length of a
    sequence, F width of a feature or of a router's input
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

WAVES = 256  # number of sinusoids that represent one scalar


def norm_of(kind: str, width: int, eps: float = 1e-6, affine: bool = True) -> nn.Module:
    """Returns a norm with weights or, if it is "layer" and not `affine`, without."""
    if kind == "rms":
        return nn.RMSNorm(width, eps)
    return nn.LayerNorm(width, eps, elementwise_affine=affine)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scales and shifts the tokens (N, T, D) by vectors (N, D) of the images."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTMoEFeedForward(nn.Module):
    """A feed-forward layer or one expert: down(act(up(x))), or down(silu(gate(x)) * up(x)).

    kind: swiglu, swiglu_bias, gelu (tanh approximation, with bias) or silu (with bias)
    """

    def __init__(self, dim: int, inner_dim: int, kind: str):
        super().__init__()
        bias = kind != "swiglu"
        self.kind = kind
        self.gate_proj = nn.Linear(dim, inner_dim, bias) if kind.startswith("swiglu") else None
        self.up_proj = nn.Linear(dim, inner_dim, bias)
        self.down_proj = nn.Linear(inner_dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(x)) * up)
        return self.down_proj(F.silu(up) if self.kind == "silu" else F.gelu(up, approximate="tanh"))


class DiTMoERouter(nn.Module):
    """Base class of routers: a linear gate, computed in fp32.

    `forward` takes the router's input (N, T, F) and `no_class` (N,), true for an image without a
    class. It returns which tokens each expert computes, (N, T, E) bool, and the weights of their
    outputs, (N, T, E) fp32.
    """

    extra_experts = 0  # beside the E routed ones

    def __init__(self, dim: int, num_experts: int, num_experts_per_tok: int, **options):
        super().__init__()
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.options = options
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def score(self, x: Tensor) -> Tensor:
        """Returns the logits (N, T, E), fp32."""
        return self.gate(x.to(self.gate.weight.dtype)).float()

    def gating(self, logits: Tensor) -> Tensor:
        kind = self.options.get("gating", "softmax")
        if kind == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if kind == "sigmoid" else logits

    def forward(self, x: Tensor, no_class: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def largest(scores: Tensor, count: int, dim: int) -> Tensor:
    """Returns a mask of the `count` largest scores along a dimension."""
    index = scores.topk(count, dim).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, index, True)


class TopKRouter(DiTMoERouter):
    """Token choice of DiT-MoE (arXiv 2407.11633, equations 3 to 5)."""

    def forward(self, x: Tensor, no_class: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gating(self.score(x))
        chosen = largest(scores, self.num_experts_per_tok, -1)
        if self.options.get("renormalize"):
            scores = scores / scores.where(chosen, 0).sum(-1, keepdim=True)
        return chosen, scores


class SigmoidRouter(DiTMoERouter):
    """Token choice by sigmoid with a bias (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16)."""

    def __init__(self, dim: int, num_experts: int, num_experts_per_tok: int, **options):
        super().__init__(dim, num_experts, num_experts_per_tok, **options)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, x: Tensor, no_class: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(x).sigmoid()
        chosen = largest(scores + self.e_score_correction_bias, self.num_experts_per_tok, -1)
        if self.num_experts_per_tok > 1:
            scores = scores / scores.where(chosen, 0).sum(-1, keepdim=True)
        return chosen, self.options.get("scale", 1.0) * scores


class ExpertChoiceRouter(DiTMoERouter):
    """Expert choice within each image (EC-DiT, arXiv 2410.02098)."""

    def forward(self, x: Tensor, no_class: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gating(self.score(x))
        is_up = self.options.get("capacity_rounding", "up") == "up"
        rounded = math.ceil if is_up else math.floor
        capacity = rounded(x.shape[1] * self.num_experts_per_tok / self.num_experts)
        return largest(scores, max(1, capacity), 1), scores


class RaceRouter(DiTMoERouter):
    """Expert Race with its threshold (arXiv 2503.16057)."""

    def __init__(self, dim: int, num_experts: int, num_experts_per_tok: int, **options):
        super().__init__(dim, num_experts, num_experts_per_tok, **options)
        self.hidden = nn.Linear(dim, dim, bias=False)
        self.register_buffer("threshold", torch.zeros(1))

    def forward(self, x: Tensor, no_class: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.score(F.gelu(self.hidden(x.to(self.hidden.weight.dtype)).float()))
        return logits >= self.threshold, logits


class BatchPoolRouter(DiTMoERouter):
    """DiffMoE with its capacity predictor and thresholds (arXiv 2503.14487)."""

    def __init__(self, dim: int, num_experts: int, num_experts_per_tok: int, **options):
        super().__init__(dim, num_experts, num_experts_per_tok, **options)
        self.predictor = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, num_experts))
        self.register_buffer("threshold", torch.zeros(num_experts))

    def forward(self, x: Tensor, no_class: Tensor) -> tuple[Tensor, Tensor]:
        predicted = self.predictor(x.to(self.predictor[0].weight.dtype)).float()
        return predicted.sigmoid() > self.threshold, self.score(x).softmax(-1)


class PrototypeRouter(DiTMoERouter):
    """ProMoE's prototypes: cosine similarity, and one more expert for images without a class."""

    extra_experts = 1

    def __init__(self, dim: int, num_experts: int, num_experts_per_tok: int, **options):
        super().__init__(dim, num_experts, num_experts_per_tok, **options)
        del self.gate
        self.prototypes = nn.Parameter(torch.randn(num_experts, dim) * 0.02)

    def forward(self, x: Tensor, no_class: Tensor) -> tuple[Tensor, Tensor]:
        z = F.normalize(x.float(), dim=-1) @ F.normalize(self.prototypes.float(), dim=-1).t()
        if self.options.get("choice", "token") == "token":
            chosen = largest(z, self.num_experts_per_tok, -1)
        else:
            capacity = max(1, x.shape[1] * self.num_experts_per_tok // self.num_experts)
            chosen = largest(z, capacity, 1)
        is_extra = no_class & self.options.get("unconditional_expert", True)  # (N,)
        is_extra = is_extra.view(-1, 1, 1).expand(-1, x.shape[1], 1)
        return torch.cat([chosen & ~is_extra, is_extra], -1), F.pad(z, (0, 1), value=1.0)


ROUTERS = {
    "topk": TopKRouter, "sigmoid": SigmoidRouter, "expert_choice": ExpertChoiceRouter,
    "race": RaceRouter, "batch_pool": BatchPoolRouter, "prototype": PrototypeRouter,
}  # fmt: skip


class DiTMoESparseFeedForward(nn.Module):
    """Routed experts, each a module of linear layers, and a shared expert for every token.

    y = (sum of weight * expert(x) over the chosen experts) + shared_expert(x)
    """

    def __init__(
        self, dim: int, inner_dim: int, shared_dim: int, kind: str,
        num_experts: int, num_experts_per_tok: int, router: str, options: dict[str, Any],
    ):  # fmt: skip
        super().__init__()
        self.router_input = options.get("input", "modulated")
        width = dim * (2 if self.router_input == "normalised_time" else 1)
        self.router = ROUTERS[router](width, num_experts, num_experts_per_tok, **options)
        count = num_experts + self.router.extra_experts
        self.experts = nn.ModuleList(DiTMoEFeedForward(dim, inner_dim, kind) for _ in range(count))
        self.shared_expert = DiTMoEFeedForward(dim, shared_dim, kind) if shared_dim else None

    def forward(self, x: Tensor, normed: Tensor, time: Tensor, no_class: Tensor) -> Tensor:
        """Maps modulated tokens x (N, T, D) to (N, T, D).

        normed: the tokens before modulation (N, T, D)
        time: embedding of the time (N, D)
        no_class: (N,) bool
        """
        read = x if self.router_input == "modulated" else normed
        if self.router_input == "normalised_time":
            time = time.unsqueeze(1).expand(-1, x.shape[1], -1).to(read.dtype)
            read = torch.cat([read, time], -1)                              # (N, T, 2D)
        with torch.autocast(x.device.type, enabled=False):
            chosen, weight = self.router(read, no_class)                    # (N, T, E) each
        tokens, chosen, weight = x.flatten(0, 1), chosen.flatten(0, 1), weight.flatten(0, 1)
        y = torch.zeros_like(tokens)                                        # (S, D)
        for index, expert in enumerate(self.experts):
            rows = chosen[:, index].nonzero().squeeze(1)                    # (rows of this expert,)
            output = expert(tokens[rows]) * weight[rows, index, None].to(x.dtype)
            y = y.index_add(0, rows, output.to(y.dtype))
        y = y.view_as(x)
        return y if self.shared_expert is None else y + self.shared_expert(x)


class DiTMoEAttnProcessor:
    """Attention of a layer with PyTorch, or another backend of diffusers."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "DiTMoEAttention", hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `DiTMoEAttention.forward`."""
        query, key, value = (
            part.unflatten(-1, (-1, attn.head_dim))
            for part in attn.project(hidden_states, encoder_hidden_states)
        )                                                                   # (N, T or L, heads, d)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]               # (N, 1, 1, L)
        output = dispatch_attention_fn(
            query.to(value.dtype), key.to(value.dtype), value, attn_mask=attention_mask,
            backend=self._attention_backend, parallel_config=self._parallel_config,
        )  # fmt: skip
        return attn.to_out[0](output.flatten(2, 3))


class DiTMoEAttention(nn.Module, AttentionModuleMixin):
    """Self-attention, or attention to the tokens of the conditions."""

    _default_processor_cls = DiTMoEAttnProcessor
    _available_processors = [DiTMoEAttnProcessor]

    def __init__(
        self, dim: int, heads: int, qk_norm: str | None, eps: float,
        is_cross_attention: bool = False,
    ):
        super().__init__()
        self.heads, self.head_dim, self.use_bias = heads, dim // heads, True
        self.is_cross_attention = is_cross_attention
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(dim, dim))
        for name in ("norm_q", "norm_k"):
            self.add_module(name, norm_of(qk_norm, dim // heads, eps) if qk_norm else nn.Identity())
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.set_processor(DiTMoEAttnProcessor())

    def project(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple:
        """Returns queries, keys and values, (N, T or L, D) each."""
        if not self.fused_projections:
            read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            return self.to_q(hidden_states), self.to_k(read), self.to_v(read)
        if encoder_hidden_states is None:
            return self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_q(hidden_states), *self.to_kv(encoder_hidden_states).chunk(2, dim=-1)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotation: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Maps tokens (N, T, D) to (N, T, D).

        encoder_hidden_states, attention_mask: tokens to attend to (N, L, D) and their mask (N, L)
        rotation: (T, d), see `rotary_positions`
        """
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, rotation)


def rotary_positions(width: int, grid: tuple[int, int], device: torch.device, front: int) -> Tensor:
    """Returns the cosines, then the sines, of 2-D rotary positions (T, d) (arXiv 2403.13298).

    The first half of the angles belongs to rows, the second to columns. The `front` tokens before
    the patches are not rotated.
    """
    frequencies = 10000 ** -(torch.arange(width // 4, device=device) / (width // 4))
    angles = torch.arange(max(grid), device=device)[:, None] * frequencies
    rows = angles[: grid[0]].repeat_interleave(grid[1], 0)                  # (P, d/4)
    columns = angles[: grid[1]].repeat(grid[0], 1)
    angles = F.pad(torch.cat([rows, columns], 1), (0, 0, front, 0))         # (T, d/2)
    return torch.cat([angles.cos(), angles.sin()], 1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_(i + d/2)) of queries or keys (N, T, heads, d)."""
    cos, sin = rotation.unsqueeze(1).chunk(2, dim=-1)                       # (T, 1, d/2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class DiTMoETokenEmbedding(nn.Module):
    """Embeds a sequence: words by number, 0 for none, or features of tokens, zeros for none.

    A learned null token precedes the sequence, and alone stands for "none".
    """

    def __init__(self, dim: int, length: int, num_words: int | None, features: int | None):
        super().__init__()
        self.null = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, length, dim) * 0.02)
        self.table = nn.Embedding(num_words + 1, dim) if num_words else None
        self.project = nn.Linear(features, dim) if features else None
        self.pool = TimestepEmbedding(dim, dim)

    def forward(self, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a vector (N, D), tokens (N, 1 + L, D) and their mask (N, 1 + L).

        values: (N, L) int64 or (N, L, F)
        """
        if self.table is not None:
            tokens, mask = self.table(values).to(dtype), values > 0
        else:
            tokens, mask = self.project(values.to(dtype)), values.ne(0).any(-1)
        null = self.null.to(dtype).expand(tokens.shape[0], -1, -1)          # (N, 1, D)
        tokens = torch.cat([null, tokens + self.positions.to(dtype)], dim=1)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        mask = F.pad(mask, (1, 0), value=True)
        weight = mask.unsqueeze(2).to(dtype)
        return self.pool((tokens * weight).sum(1) / weight.sum(1)), tokens, mask


class DiTMoETransformerBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning and a sparse or dense feed-forward layer."""

    def __init__(self, dim: int, attention: dict[str, Any], norm: str, ff_norm_eps: float,
                 ff: nn.Module, has_cross_attention: bool):  # fmt: skip
        super().__init__()
        self.norm1 = norm_of(norm, dim, affine=False)
        self.attn1 = DiTMoEAttention(dim, **attention)
        self.norm_cross = self.attn2 = None
        if has_cross_attention:
            self.norm_cross = norm_of(norm, dim, affine=False)
            self.attn2 = DiTMoEAttention(dim, **attention, is_cross_attention=True)
        self.norm2 = norm_of(norm, dim, ff_norm_eps, affine=False)
        self.ff = ff
        self.is_sparse = isinstance(ff, DiTMoESparseFeedForward)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, hidden_states: Tensor, temb: Tensor, time: Tensor, no_class: Tensor,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Maps tokens (N, T, D) to (N, T, D).

        temb: conditioning vectors (N, D), the sum of the embeddings of time and conditions
        time, no_class: for the router, see `DiTMoESparseFeedForward.forward`
        """
        x = hidden_states
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(temb)).chunk(6, dim=1)
        attended = self.attn1(modulate(self.norm1(x), shift1, scale1), rotation=rotation)
        x = x + gate1.unsqueeze(1) * attended
        if self.attn2 is not None:
            x = x + self.attn2(self.norm_cross(x), encoder_hidden_states, encoder_attention_mask)
        normed = self.norm2(x)
        h = modulate(normed, shift2, scale2)
        h = self.ff(h, normed, time, no_class) if self.is_sparse else self.ff(h)
        return x + gate2.unsqueeze(1) * h


class DiTMoEPatchEmbed(nn.Module):
    """A linear layer on each patch, or two with `bottleneck` values between them."""

    def __init__(self, patch_size: int, in_channels: int, dim: int, bottleneck: int | None):
        super().__init__()
        self.proj = nn.Conv2d(
            in_channels, bottleneck or dim, patch_size, stride=patch_size, bias=bottleneck is None
        )
        self.expand = nn.Linear(bottleneck, dim) if bottleneck else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, h, w) to patches (N, P, D)."""
        return self.expand(self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2))


class DiTMoETransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Diffusion transformer with sparse experts.

    sample_size: latent height and width
    out_channels: C', 2 * in_channels with a learned variance; None: in_channels
    num_classes: number of classes; the label num_classes means "no class" if `has_null_class`
    conditions: inputs besides the time: label, size, vector:F, text:LxWORDS, tokens:LxF or span;
        None: label
    mlp_ratio, n_shared_experts, dense_mlp_ratio: widths of an expert, of the shared expert and of
        the dense blocks' layers, in units of the model's width
    mlp_type, dense_mlp_type: types of the experts and of the dense layers, see `DiTMoEFeedForward`
    sparse_layers: blocks with experts; None: all if there are experts
    router, router_options: a key of `ROUTERS` and its options
    norm: "layer" or "rms", in the blocks and before the output
    time_scale: factor of the times before they are embedded
    class_tokens, class_tokens_start: number of tokens of the class that join the patches (JiT,
        arXiv 2511.13720), and the first block with them
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTMoETransformerBlock"]
    _repeated_blocks = ["DiTMoETransformerBlock"]
    _keep_in_fp32_modules = ["router", "pos_embed"]
    _skip_layerwise_casting_patterns = ["pos_embed", "patch_embed", "norm", "router"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_classes: int = 1000,
        has_null_class: bool = True,
        conditions: list[str] | None = None,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        n_shared_experts: float = 2.0,
        mlp_ratio: float = 4.0,
        mlp_type: str = "swiglu",
        sparse_layers: list[int] | None = None,
        dense_mlp_ratio: float = 4.0,
        dense_mlp_type: str = "gelu",
        router: str = "topk",
        router_options: dict[str, Any] | None = None,
        norm: str = "layer",
        mlp_norm_eps: float = 1e-6,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        rope: bool = False,
        absolute_positions: bool = True,
        patch_bottleneck: int | None = None,
        class_tokens: int = 0,
        class_tokens_start: int = 0,
        time_scale: float = 1.0,
        timestep_frequency_shift: int = 0,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        height, width = (sample_size,) * 2 if isinstance(sample_size, int) else sample_size
        self.grid = height // patch_size, width // patch_size
        self.out_channels = out_channels or in_channels
        self.conditions = {}  # sizes by name: {"label": (), "text": (L, WORDS)}
        for word in ["label"] if conditions is None else conditions:
            name, _, sizes = word.partition(":")
            self.conditions[name] = tuple(map(int, sizes.split("x"))) if sizes else ()
        self.patch_embed = DiTMoEPatchEmbed(patch_size, in_channels, dim, patch_bottleneck)
        positions = sincos_positions(dim, self.grid)                        # (1, P, D)
        positions = positions if absolute_positions else torch.zeros(1, 1, dim)
        self.register_buffer("pos_embed", positions)
        self.time_proj = Timesteps(WAVES, True, timestep_frequency_shift)
        self.waves = Timesteps(WAVES, True, 0)
        self.time_embed = TimestepEmbedding(WAVES, dim)
        for name, sizes in self.conditions.items():
            self.add_module(f"{name}_embed", self.embedder(name, sizes, dim))
        self.class_positions = None
        if class_tokens:
            self.class_positions = nn.Parameter(torch.randn(1, class_tokens, dim) * 0.02)
        layers = range(num_layers) if sparse_layers is None else sparse_layers
        attention = {
            "heads": num_attention_heads, "qk_norm": norm if qk_norm else None, "eps": qk_norm_eps,
        }  # fmt: skip

        def feed_forward(layer: int) -> nn.Module:
            def inner(ratio: float) -> int:  # 1e-6, because D * (5 / D) can be slightly below 5
                return int(dim * ratio + 1e-6)

            if not num_experts or layer not in layers:
                return DiTMoEFeedForward(dim, inner(dense_mlp_ratio), dense_mlp_type)
            return DiTMoESparseFeedForward(
                dim, inner(mlp_ratio), inner(n_shared_experts), mlp_type,
                num_experts, num_experts_per_tok, router, router_options or {},
            )  # fmt: skip

        has_sequence = not {"text", "tokens"}.isdisjoint(self.conditions)
        self.transformer_blocks = nn.ModuleList(
            DiTMoETransformerBlock(
                dim, attention, norm, mlp_norm_eps, feed_forward(layer), has_sequence
            )
            for layer in range(num_layers)
        )
        self.norm_out = norm_of(norm, dim, affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False

    def embedder(self, name: str, sizes: tuple[int, ...], dim: int) -> nn.Module:
        """Returns the embedder of a condition."""
        if name == "label":
            return nn.Embedding(self.config.num_classes + self.config.has_null_class, dim)
        if name in ("text", "tokens"):
            length, count = sizes
            words, features = (count, None) if name == "text" else (None, count)
            return DiTMoETokenEmbedding(dim, length, words, features)
        widths = {"span": WAVES, "size": 4 * WAVES, "vector": sum(sizes)}
        return TimestepEmbedding(widths[name], dim)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        added_sizes: Tensor | None = None,
        r_timestep: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts (N, C', h, w) from latents (N, C, h, w).

        timestep: times (N,) as in training: 0 to 999 (Gaussian diffusion), or 0 to 1 (flows)
        class_labels: (N,) in [0, num_classes]; num_classes means "no class". The model's other
            conditions have a default:
        input_ids: numbers (N, L) of words, 0 for none (text; default: no text)
        encoder_hidden_states: features (N, L, F) of tokens, zeros for none (tokens)
        pooled_projections: a feature (N, F) (vector; default: zeros)
        added_sizes: height and width of the original image, and top and left edge of the crop,
            relative to the image, (N, 4) (size; default: 1, 1, 0, 0)
        r_timestep: end (N,) of the time step (span; default: timestep)

        Raises ValueError if the model has the condition label and `class_labels` is None.
        """
        device, count = hidden_states.device, hidden_states.shape[0]
        grid, patch = self.grid, self.config.patch_size
        x = self.patch_embed(hidden_states)                                 # (N, P, D)
        dtype = x.dtype
        x = x + self.pos_embed.to(dtype)
        timestep = timestep.expand(count) * self.config.time_scale
        time = temb = self.time_embed(self.time_proj(timestep).to(dtype))   # (N, D)
        no_class = torch.zeros(count, dtype=torch.bool, device=device)
        tokens, masks = [], []
        for name, sizes in self.conditions.items():
            embed = getattr(self, f"{name}_embed")
            if name == "label":
                if class_labels is None:
                    raise ValueError("class_labels: got None, expected the class of each image")
                no_class = class_labels == self.config.num_classes
                label = vector = embed(class_labels).to(dtype)
            elif name == "text":
                if input_ids is None:
                    input_ids = torch.zeros(count, sizes[0], dtype=torch.int64, device=device)
                vector, *sequence = embed(input_ids, dtype)
            elif name == "tokens":
                if encoder_hidden_states is None:
                    encoder_hidden_states = torch.zeros(count, *sizes, device=device)
                vector, *sequence = embed(encoder_hidden_states, dtype)
            elif name == "vector":
                if pooled_projections is None:
                    pooled_projections = torch.zeros(count, *sizes, device=device)
                vector = embed(pooled_projections.to(dtype))
            elif name == "size":
                if added_sizes is None:
                    added_sizes = torch.tensor([[1.0, 1.0, 0.0, 0.0]], device=device)
                waves = self.waves(1000 * added_sizes.expand(count, 4).flatten())
                vector = embed(waves.view(count, -1).to(dtype))
            else:  # span
                span = torch.zeros_like(timestep, dtype=torch.float32)
                if r_timestep is not None:
                    span = timestep - r_timestep.expand(count) * self.config.time_scale
                vector = embed(self.waves(span).to(dtype))
            if name in ("text", "tokens"):
                tokens.append(sequence[0])
                masks.append(sequence[1])
            temb = temb + vector
        encoded = mask = None
        if tokens:
            encoded, mask = torch.cat(tokens, dim=1), torch.cat(masks, dim=1)
            if "label" not in self.conditions:  # only the null tokens
                no_class = mask.sum(dim=1) == len(tokens)
        rotation, front = None, self.config.class_tokens
        if self.config.rope:
            rotation = rotary_positions(self.config.attention_head_dim, grid, device, front)
        for layer, block in enumerate(self.transformer_blocks):
            if self.class_positions is not None and layer == self.config.class_tokens_start:
                joined = label.unsqueeze(1) + self.class_positions.to(dtype)
                x = torch.cat([joined, x], dim=1)                           # (N, T, D)
            of_tokens = None if rotation is None else rotation[-x.shape[1] :]
            inputs = (x, temb, time, no_class, encoded, mask, of_tokens)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *inputs)
            else:
                x = block(*inputs)
        shift, scale = self.modulation_out(F.silu(temb)).chunk(2, dim=1)
        x = self.proj_out(modulate(self.norm_out(x[:, -grid[0] * grid[1] :]), shift, scale))
        x = x.unflatten(1, grid).unflatten(3, (patch, patch, self.out_channels))
        output = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)    # (N, C', h, w)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **options):
        known = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(known, **options)

    def save_config(self, save_directory: str | Path, *args, **options) -> None:
        """Saves the config as diffusers does, and this file, for AutoModel."""
        super().save_config(save_directory, *args, **options)
        target = Path(save_directory) / "transformer_dit_moe.py"
        if Path(__file__).resolve() != target.resolve():
            shutil.copyfile(__file__, target)


DiTMoETransformer2DModel.register_for_auto_class("AutoModel")


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Returns DiT's fixed position embedding (1, P, D): the column, then the row of each patch."""
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(max(grid), dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                   # (longest side, D/2)
    columns = axis[: grid[1]].repeat(grid[0], 1)                            # (P, D/2)
    rows = axis[: grid[0]].repeat_interleave(grid[1], 0)
    return torch.cat([columns, rows], dim=1)[None].float()
