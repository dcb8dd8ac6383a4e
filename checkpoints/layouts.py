"""Other people's names for the same weights: diffusers' DiT, and the published DiT-MoE files.

    state_dict, fields = from_diffusers(weights, config)     # DiTTransformer2DModel -> ours
    weights, config = to_diffusers(model.state_dict(), model.config)
    published = to_published(model.state_dict(), model.config)

The official dense DiT names its weights as a dense DiT of ours does. What brings the published
DiT-MoE files to our layout is `models.to_stacked_layout`.
"""

import re

import torch
from torch import Tensor

from models import DiTConfig

DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")

# Diffusers' name -> ours, outside the blocks and (after "transformer_blocks.N.") inside them.
OUTER_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
BLOCK_NAMES = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
BLOCK_KEY = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

# What the config of a DiTTransformer2DModel has to say for a DiT to be the same function.
REQUIRED = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
}


def from_diffusers(weights: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict]:
    """Turns a DiTTransformer2DModel into a dense DiT: (state dict, fields of DiTConfig).

    The function is that of diffusers, whose DiT has other time frequencies than the official one
    (`timestep_frequency_shift` 1) and its own epsilon in the norm before the feed-forward layer;
    both go into the config. Raises ValueError for what a DiT cannot be, such as blocks whose
    embedders of time and class differ: a DiT has one for all.
    """
    for name, allowed in REQUIRED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name}: got {config[name]!r}, expected {allowed[0]!r}")
    state_dict, qkv = {}, {}
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        if module in OUTER_NAMES:
            state_dict[f"{OUTER_NAMES[module]}.{kind}"] = value
            continue
        match = BLOCK_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"unknown layout: found {key}, expected DiTTransformer2DModel's names")
        layer, module, kind = match.groups()
        if module.startswith("norm1.emb."):
            first = weights[f"transformer_blocks.0.{module}.{kind}"]
            if not torch.equal(value, first):
                raise ValueError(f"{key} differs from block 0's, expected one embedder for all")
        elif module in QKV:
            qkv[layer, QKV.index(module), kind] = value
        elif module in BLOCK_NAMES:
            state_dict[f"blocks.{layer}.{BLOCK_NAMES[module]}.{kind}"] = value
        else:
            raise ValueError(f"unknown layout: found {key}, expected DiTTransformer2DModel's names")
    depth = config.get("num_layers", 28)
    for layer in map(str, range(depth)):
        for kind in ("weight", "bias"):
            parts = [qkv[layer, part, kind] for part in range(3)]
            state_dict[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)  # (3D, D) or (3D,)
    channels = config.get("in_channels", 4)
    fields = {
        "input_size": config.get("sample_size", 32),
        "patch_size": config.get("patch_size", 2),
        "in_channels": channels,
        "hidden_size": len(state_dict["x_embedder.proj.weight"]),
        "depth": depth,
        "num_heads": config.get("num_attention_heads", 16),
        "class_dropout_prob": 0.1,
        "num_classes": len(state_dict["y_embedder.embedding_table.weight"]) - 1,
        "num_experts": 0,
        "learn_sigma": (config.get("out_channels") or channels) == 2 * channels,
        "mlp_norm_eps": config.get("norm_eps", 1e-5),
        "timestep_frequency_shift": 1,
    }
    return state_dict, fields


def to_diffusers(
    state_dict: dict[str, Tensor], config: DiTConfig
) -> tuple[dict[str, Tensor], dict]:
    """Turns a dense DiT into (weights, config) of a DiTTransformer2DModel.

    Raises ValueError for what that class cannot be: it has dense tanh-GELU layers of four times the
    width, no QK-norm, and its own time frequencies (`timestep_frequency_shift` 1), so a model
    trained with the official ones would be another function there.
    """
    wanted = {
        "num_experts": 0, "mlp_type": "gelu", "dense_mlp_ratio": 4, "qk_norm": False,
        "timestep_frequency_shift": 1,
    }  # fmt: skip
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}: got {getattr(config, name)}, expected {value}, all that diffusers' "
                "DiTTransformer2DModel computes"
            )
    ours_to_outer = {ours: theirs for theirs, ours in OUTER_NAMES.items()}
    ours_to_block = {ours: theirs for theirs, ours in BLOCK_NAMES.items()}
    weights = {}
    for key, value in state_dict.items():
        module, _, kind = key.rpartition(".")
        if module == "y_embedder.embedding_table" and not config.class_dropout_prob:
            value = torch.cat([value, torch.zeros_like(value[:1])])  # never looked up
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
            prefix = f"transformer_blocks.{layer}"
            if module == "attn.qkv":
                for name, part in zip(QKV, value.chunk(3), strict=True):
                    weights[f"{prefix}.{name}.{kind}"] = part
            else:
                weights[f"{prefix}.{ours_to_block[module]}.{kind}"] = value
        elif module in ours_to_outer:
            theirs = ours_to_outer[module]
            layers = range(config.depth) if theirs.startswith("transformer_blocks.0.") else (0,)
            for layer in layers:
                name = theirs.replace("transformer_blocks.0.", f"transformer_blocks.{layer}.")
                weights[f"{name}.{kind}"] = value.clone()
    return weights, {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
    }


FLASH_NAMES = {".attn.qkv.": ".attn.Wqkv.", ".attn.proj.": ".attn.out_proj."}


def to_published(state_dict: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Brings weights to the layout that the published code loads: the inverse of
    `models.to_stacked_layout`.

    One linear layer for each expert and projection; timm's attention names, or with QK-norm those
    of flash-attn, as each of the published scripts has them. A dense tanh-GELU model comes out in
    the layout of the official DiT. Raises ValueError for what no published code computes.
    """
    wanted = {
        "mlp_norm_eps": 1e-6, "timestep_frequency_shift": 0, "renormalize_top_k": False,
        "mlp_type": "swiglu" if config.num_experts else "gelu",
        "sparse_layers": tuple(range(config.depth)) if config.num_experts else (),
    }  # fmt: skip
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}: got {getattr(config, name)}, expected {value}, all that the published "
                "code computes"
            )
    published = {}
    for key, value in state_dict.items():
        if config.qk_norm:
            for ours, theirs in FLASH_NAMES.items():
                key = key.replace(ours, theirs)
        prefix, _, name = key.rpartition(".")
        if not prefix.endswith(".experts"):
            published[key] = value
            continue
        for expert, weight in enumerate(value):
            names = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
            for part, rows in zip(names, weight.chunk(len(names)), strict=True):
                published[f"{prefix}.{expert}.{part}.weight"] = rows.clone()
    return published
