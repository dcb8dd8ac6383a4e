"""The layout of an exported model: weights and config of DiTMoETransformer2DModel
(sampling/exported/transformer_dit_moe.py), which has one module per expert.

    weights, config = to_exported(checkpoint.state_dict, checkpoint.config)
    state_dict = from_exported(weights, config_from_exported(config))

Both directions keep all bits.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from checkpoints.meta import meta_model
from conditions import split_condition
from models import DiTConfig
from options.parts import Word

SUPPORTED = {  # what the exported model can say, by field
    "router": ("topk", "sigmoid", "expert_choice", "race", "batch_pool", "prototype"),
    "conditions": ("label", "size", "vector", "text", "tokens", "span"),
}
# Fields with a value of their own name; input_size, depth and num_heads have another.
SAME = (
    "patch_size", "in_channels", "num_classes", "num_experts", "num_experts_per_tok",
    "n_shared_experts", "mlp_ratio", "norm", "mlp_norm_eps", "qk_norm", "qk_norm_eps", "rope",
    "absolute_positions", "patch_bottleneck", "class_tokens", "class_tokens_start", "time_scale",
    "timestep_frequency_shift",
)  # fmt: skip
# Beginnings of our names, or of those in a block, and theirs. The first that fits counts.
OUTER_NAMES = {
    "x_embedder.": "patch_embed.", "t_embedder.mlp.0.": "time_embed.linear_1.",
    "t_embedder.mlp.2.": "time_embed.linear_2.", "y_embedder.embedding_table.": "label_embed.",
    "class_tokens.positions": "class_positions", "final_layer.norm_final.": "norm_out.",
    "final_layer.linear.": "proj_out.", "final_layer.adaLN_modulation.1.": "modulation_out.",
}  # fmt: skip
BLOCK_NAMES = {
    "adaLN_modulation.1.": "modulation.", "attn.proj.": "attn1.to_out.0.",
    "attn.q_norm.": "attn1.norm_q.", "attn.k_norm.": "attn1.norm_k.",
    "cross_attn.q.": "attn2.to_q.", "cross_attn.proj.": "attn2.to_out.0.",
    "cross_attn.q_norm.": "attn2.norm_q.", "cross_attn.k_norm.": "attn2.norm_k.",
    "mlp.fc1.": "ff.up_proj.", "mlp.fc2.": "ff.down_proj.", "mlp.": "ff.",
    "moe.shared_experts.fc1.": "ff.shared_expert.up_proj.",
    "moe.shared_experts.fc2.": "ff.shared_expert.down_proj.",
    "moe.shared_experts.": "ff.shared_expert.", "moe.gate.hidden": "ff.router.hidden.weight",
    "moe.gate.weight": "ff.router.gate.weight", "moe.gate.": "ff.router.",
}  # fmt: skip
JOINED = {  # our weights that are several of theirs, one below the other
    "attn.qkv.": ("attn1.to_q.", "attn1.to_k.", "attn1.to_v."),
    "cross_attn.kv.": ("attn2.to_k.", "attn2.to_v."),
}
EXPERT_NAMES = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "up_proj": ("up_proj.weight",),
    "gate_up_bias": ("gate_proj.bias", "up_proj.bias"), "up_bias": ("up_proj.bias",),
    "down_proj": ("down_proj.weight",), "down_bias": ("down_proj.bias",),
}  # fmt: skip


def to_exported(
    state_dict: Mapping[str, Tensor], config: DiTConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Converts a DiT to weights and config of an exported model.

    Raises ValueError for a router or condition that the exported model cannot say, such as that of
    a plugin, or a router whose result for an image depends on the others.
    """
    names = [name for name, _ in map(split_condition, config.conditions)]
    for field, got in (("router", [config.router.name]), ("conditions", names)):
        if unknown := [name for name in got if name not in SUPPORTED[field]]:
            known = ", ".join(SUPPORTED[field])
            raise ValueError(f"{field}: got {unknown[0]}, expected one of {known}")
    if config.num_experts and meta_model(config).depends_on_batch:
        raise ValueError(f"router: got {config.router}, which routes an image by the others")
    weights = {}
    for name, value in state_dict.items():
        parts = names_of(name, config)
        slices = value if isinstance(parts[0], tuple) else [value]
        groups = parts if isinstance(parts[0], tuple) else [tuple(parts)]
        for group, one in zip(groups, slices, strict=True):
            for theirs, part in zip(group, one.chunk(len(group)), strict=True):
                weights[theirs] = part.contiguous()
    return weights, config_of_exported(config)


def from_exported(weights: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Converts the weights of an exported model to the state dict of a DiT.

    Raises KeyError for a weight that is missing, and ValueError for one that is unknown.
    """
    left, state_dict = dict(weights), {}
    for name in meta_model(config).state_dict():
        parts = names_of(name, config)
        if isinstance(parts[0], tuple):
            experts = [torch.cat([left.pop(theirs) for theirs in group]) for group in parts]
            state_dict[name] = torch.stack(experts)
        else:
            found = [left.pop(theirs) for theirs in parts]
            state_dict[name] = torch.cat(found) if len(found) > 1 else found[0]
    if left:
        raise ValueError(f"{min(left):.80}: unknown, expected the weights of the config")
    return state_dict


def names_of(name: str, config: DiTConfig) -> list[str] | list[tuple[str, ...]]:
    """Returns their names of our weight: the parts of dimension 0, or such parts per expert."""
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        return of_block(f"transformer_blocks.{found[1]}.", found[2], config)
    name = re.sub(r"^(size|vector|span)_embedder\.mlp\.", r"\1_embed.", name)
    name = re.sub(r"^(text|tokens)_embedder\.", r"\1_embed.", name)
    if found := re.fullmatch(r"(\w+_embed\.(?:pool\.)?)([02])(\..+)", name):
        return [f"{found[1]}linear_{1 + int(found[2]) // 2}{found[3]}"]
    return [renamed(name, OUTER_NAMES)]


def of_block(prefix: str, name: str, config: DiTConfig) -> list[str] | list[tuple[str, ...]]:
    for ours, theirs in JOINED.items():
        if name.startswith(ours):
            return [prefix + part + name.removeprefix(ours) for part in theirs]
    if name.startswith("moe.experts."):
        parts = EXPERT_NAMES[name.removeprefix("moe.experts.")]
        count = range(config.experts_per_layer)
        return [tuple(f"{prefix}ff.experts.{i}.{part}" for part in parts) for i in count]
    if name == "moe.gate.weight" and config.router.name == "prototype":
        return [f"{prefix}ff.router.prototypes"]
    return [prefix + renamed(name, BLOCK_NAMES)]


def renamed(name: str, names: Mapping[str, str]) -> str:
    """Replaces the beginning of a name by the first entry that fits."""
    for ours, theirs in names.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def config_of_exported(config: DiTConfig) -> dict[str, Any]:
    """Returns the arguments of DiTMoETransformer2DModel."""
    size = config.input_size
    return {
        **{name: getattr(config, name) for name in SAME},
        "sample_size": size if isinstance(size, int) else list(size),
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "has_null_class": config.dropout > 0,
        "conditions": list(config.conditions),
        "mlp_type": config.expert_mlp,
        "sparse_layers": list(config.sparse_blocks),
        "dense_mlp_ratio": config.dense_ratio,
        "dense_mlp_type": config.dense_mlp,
        "router": config.router.name,
        "router_options": config.router.options,
    }


def config_from_exported(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the DiTConfig for the config.json of an exported model."""
    size, num_experts = config["sample_size"], config["num_experts"]
    return {
        **{name: config[name] for name in SAME},
        "input_size": size if isinstance(size, int) else tuple(size),
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
        "class_dropout_prob": 0.1 if config["has_null_class"] else 0.0,
        "conditions": tuple(config["conditions"]),
        "mlp_type": config["mlp_type"],
        "sparse_layers": tuple(config["sparse_layers"]) if num_experts else "all",
        "dense_mlp_ratio": config["dense_mlp_ratio"],
        "dense_mlp_type": config["dense_mlp_type"],
        "router": Word(config["router"], dict(config["router_options"] or {})),
    }
