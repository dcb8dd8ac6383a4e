"""Reads the weight files of other published sparse DiTs: ProMoE, DiffMoE, its baselines, DSMoE and
JiTMoE.

A file is recognised by the names and shapes of its weights. Architectural differences become
DiTConfig fields. A reversed time axis, a target of opposite sign and other pairs of rotary
positions are absorbed into the weights. docs/models.md lists what users have to pass.

Shape legend: E experts, D width, d width of a head, C latent channels, p patch size
"""

import math
import re

import torch
from torch import Tensor

from checkpoints.published import HEADS, READERS, Reader
from conditions import sinusoids
from latents.autoencoder import PIXELS
from options.parts import Word
from presets import JIT_SIZES

SPARSE_KEY = re.compile(r"(blocks\.\d+\.)mlp\.(?!fc\d|gate_proj|up_proj|down_proj)(.*)")
NAMES = {  # name in a published sparse layer -> our name
    "cluster_centers": "gate.weight", "gate_weight": "gate.weight",
    "expert_threshold": "gate.threshold", "capacity_predictor": "gate.predictor",
    "shared_expert.up_proj": "shared_experts.fc1", "shared_expert.down_proj": "shared_experts.fc2",
    "experts.blocks": "experts",
}  # fmt: skip
UNSUPPORTED = {  # pattern in a weight's name -> the unsupported variant that has such weights
    r"^blocks\..*sink": "DSMoE's attention sinks",
    r"^blocks\..*(kda|attn\.q_proj)": "DSMoE's KDA, a linear attention",
    r"^blocks\.\d+\.norm1\.weight": "DSMoE's RMSNorm, used in its variants with expert groups",
}


def is_moe_dit(state_dict: dict[str, Tensor], known: dict) -> bool:
    """Returns whether weights come from one of these projects; ValueError: unsupported variant.

    A dense model with the names of the official DiT counts as DiffMoE's if the file mentions a YAML
    config of that project, or if it is a rectified flow.
    """
    if is_jit(state_dict):
        return True
    for pattern, what in UNSUPPORTED.items():
        if any(re.search(pattern, key) for key in state_dict):
            raise ValueError(f"got {what}, which is not supported")
    is_dense = "blocks.0.mlp.fc1.weight" in state_dict
    is_flow = known.get("objective") == "rectified_flow" or known.get("time_scale", 1) != 1
    names_yaml = str(known.get("config", "")).endswith((".yaml", ".yml"))
    is_dense &= "rf" not in known and (is_flow or names_yaml)
    return is_dense or any(SPARSE_KEY.fullmatch(key) for key in state_dict)


def from_moe_dit(
    state_dict: dict[str, Tensor], known: dict
) -> tuple[dict[str, Tensor], dict, dict]:
    """Converts weights to our layout. Returns the weights, and fields of DiTConfig and Record.

    known: other known values by name, such as num_heads or objective; time_scale 1000 marks a
        baseline that was trained with ProMoE's code, whose time axis equals ours
    """
    if is_jit(state_dict):
        return from_jit(state_dict, known)
    patches = state_dict["x_embedder.proj.weight"]  # (D, C, p, p)
    width, tokens = len(patches), state_dict.get("pos_embed", patches).shape[1]
    fields = router_of(state_dict, known)
    if fields.get("router", "").startswith("batch_pool") and (width, tokens) == (384, 64):
        fields["num_heads"] = 16  # the published DiffMoE-S for 128 x 128 pixels
    heads = known.get("num_heads", fields.get("num_heads", HEADS.get(width)))
    if fields.get("router", "").startswith("sigmoid") and "pos_embed" not in state_dict:
        if not heads:
            raise ValueError(f"num_heads: is required, because no preset has width {width}")
        fields |= {"rope": True, "absolute_positions": False}
        fields["input_size"] = known.get("input_size", 32)  # the size of all published models
        state_dict = reorder_heads(state_dict, heads, DSMOE_PAIRS)
        state_dict["pos_embed"] = torch.zeros(1, 1, width)
    if fields.get("router", "").startswith("prototype") or known.get("time_scale", 1) != 1:
        fields |= {"time_scale": 1000.0, "qk_norm_eps": 1e-5}
        recorded = {"objective": "rectified_flow:times=logit-normal"}
    elif known.get("objective") == "gaussian" or "DDPM" in str(known.get("config")):
        recorded = {"objective": "gaussian"}
    else:
        recorded = {"objective": "rectified_flow:times=uniform"}
        state_dict = negate_output(reverse_time(state_dict))
    return renamed(state_dict), fields, recorded


def router_of(state_dict: dict[str, Tensor], known: dict) -> dict:
    """Returns DiTConfig fields that the weight names imply, with published values for the rest."""
    inner = {match[2]: key for key in state_dict if (match := SPARSE_KEY.fullmatch(key))}
    if not inner:
        return {}
    if "cluster_centers" in inner:
        rows = len(state_dict["y_embedder.embedding_table.weight"])
        return {
            # The published code treats label 1000 as "no class" for any number of classes.
            "router": f"prototype:unconditional_expert={rows == 1001}", "num_experts_per_tok": 1,
        }  # fmt: skip
    if "capacity_predictor.0.weight" in inner:
        return {
            "router": f"batch_pool:momentum={round(state_dict[inner['ema_decay']].item(), 6)}",
            "num_experts_per_tok": 1,
            # ProMoE's code trains DiffMoE, as a baseline, with 0.01.
            "aux_loss_alpha": 0.01 if known.get("time_scale", 1) != 1 else 1.0,
        }  # fmt: skip
    if "gate_weight" in inner:
        return {"router": "expert_choice:capacity_rounding=down", "num_experts_per_tok": 1}
    if "gate.e_score_correction_bias" not in inner:
        return {"router": "topk", "num_experts_per_tok": 1}
    if not any(name.startswith("shared_experts.") for name in inner):
        raise ValueError(
            "got DSMoE without shared experts, whose layers add their input to their output; this "
            "is not supported"
        )
    is_e48 = len(state_dict[inner["gate.weight"]]) == 48
    chosen = known.get("num_experts_per_tok", 5 if is_e48 else 2)
    return {
        "router": f"sigmoid:scale={2.5 if chosen == 5 else 2.0},bias_step=0",
        "num_experts_per_tok": chosen, "dense_mlp_type": "silu",
    }  # fmt: skip


def renamed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames weights to our names, except experts, which `to_stacked_layout` renames later."""
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if match := SPARSE_KEY.fullmatch(key):
            block, name = match.groups()
            theirs = next(filter(name.startswith, NAMES), "")
            key = f"{block}moe.{NAMES.get(theirs, '')}{name.removeprefix(theirs)}"
        if not key.endswith(".moe.ema_decay"):  # already read as an option of the router
            result[key] = value
    return result


def reverse_time(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns, for the weights of a model f, the weights of (x, t, y) -> f(x, 1 - t, y).

    The weights absorb the reversal: cos and sin of w (1 - t) are linear in cos and sin of w t.
    """
    cos, sin = sinusoids(torch.ones(1), 256)[0].chunk(2)
    a, b = state_dict["t_embedder.mlp.0.weight"].float().chunk(2, dim=1)  # (D, 128) each
    weight = torch.cat([a * cos + b * sin, a * sin - b * cos], dim=1)
    return {**state_dict, "t_embedder.mlp.0.weight": weight}


def negate_output(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Changes the sign of the first C output channels."""
    result = dict(state_dict)
    _, channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state_dict[name].unflatten(0, (patch * patch, -1)).clone()  # (p*p, C or 2C, ...)
        rows[:, :channels] *= -1
        result[name] = rows.flatten(0, 1)
    return result


# Rotary pairs of a head of width d, as shapes: the halves of the last axis but one of a view of
# range(d) are pairs. We pair (i, i + d/2): the first d/4 pairs rotate with the row of the patch,
# the others with the column.
DSMOE_PAIRS = (2, 2, -1)  # (i, i + d/4) within each half of a head
JIT_PAIRS = (-1, 2, 1)  # (2i, 2i + 1)


def reorder_heads(
    state_dict: dict[str, Tensor], heads: int, pairs: tuple[int, ...]
) -> dict[str, Tensor]:
    """Reorders queries and keys from another code's rotary pairs to ours."""
    result = dict(state_dict)
    for key, value in state_dict.items():
        is_qkv = ".attn.qkv." in key
        if is_qkv or ".attn.q_norm." in key or ".attn.k_norm." in key:
            rows = value.unflatten(0, (3, heads, -1) if is_qkv else (1, 1, -1)).clone()
            order = torch.arange(rows.shape[2]).view(pairs).transpose(0, 1).flatten()
            rows[:2] = rows[:2, :, order]  # (3 or 1, heads or 1, d, ...)
            result[key] = rows.flatten(0, 2)
    return result


def is_jit(state_dict: dict[str, Tensor]) -> bool:
    return "net.x_embedder.proj1.weight" in state_dict


JIT_NAMES = {  # in a published name -> in our name
    "x_embedder.proj1.": "x_embedder.proj.", "x_embedder.proj2.": "x_embedder.expand.",
    "in_context_posemb": "class_tokens.positions", ".experts.blocks.": ".experts.",
    ".w3.": ".down_proj.",
}  # fmt: skip


def from_jit(state_dict: dict[str, Tensor], known: dict) -> tuple[dict[str, Tensor], dict, dict]:
    """Converts weights of JiT or JiTMoE; see `from_moe_dit`."""
    layers: dict[str, Tensor] = {}
    sparse = {m[0] for key in state_dict if (m := re.match(r"net\.blocks\.\d+\.mlp\.experts", key))}
    for key, value in state_dict.items():
        layer = re.sub(r"\.mlp\..*", ".mlp.experts", key)
        key = key.removeprefix("net.").replace(".mlp.", ".moe." if layer in sparse else ".mlp.")
        for theirs, ours in JIT_NAMES.items():
            key = key.replace(theirs, ours)
        if ".w12." in key:
            halves = zip(("gate_proj", "up_proj"), value.chunk(2), strict=True)
            layers |= {key.replace("w12", name): half.clone() for name, half in halves}
        else:
            layers[key] = value.flatten(1) if key == "x_embedder.expand.weight" else value
    width, side = layers["pos_embed"].shape[2], math.isqrt(layers["pos_embed"].shape[1])
    size = next((size for size in JIT_SIZES.values() if size["hidden_size"] == width), {})
    settings = size | known
    for name in ("num_heads", "class_tokens_start"):
        if name not in settings:
            raise ValueError(f"{name}: is required, because no preset of JiT has width {width}")
    fields = {name: settings[name] for name in ("num_heads", "class_tokens_start")}
    fields["rope"] = True
    if sparse:
        fields |= {
            "router": "sigmoid:scale=2.5,bias_step=0", "num_experts_per_tok": 2,
        }  # fmt: skip
    options = {
        "mean": -known.get("P_mean", -0.8), "std": known.get("P_std", 0.8),
        "clamp": known.get("t_eps", 0.05), "noise_scale": known.get("noise_scale", 1.0),
    }  # fmt: skip
    recorded = {
        "objective": Word("flow_x", options), "vae_path": PIXELS,
        "image_size": side * layers["x_embedder.proj.weight"].shape[2],
    }  # fmt: skip
    layers = reorder_heads(layers, settings["num_heads"], JIT_PAIRS)
    return reverse_time(layers), fields, recorded


READERS["moe_dits"] = Reader(is_moe_dit, from_moe_dit)
