"""Layouts of published files: DiT-MoE releases and the official dense DiT.

`checkpoints.layouts.to_stacked_layout` converts weights to our layout, and `to_published` converts
them back. `infer_config` infers the config from the shapes of the weights. `READERS` read the files
of other projects.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from checkpoints.layouts import FLASH_ATTENTION_NAMES
from checkpoints.record import with_overrides
from models import MEANINGS, WITHOUT_EFFECT, DiTConfig
from options.parts import Registry, options_of
from presets import JIT_SIZES, PRESETS, SIZES

HEADS = {size["hidden_size"]: size["num_heads"] for size in (*SIZES.values(), *JIT_SIZES.values())}
NEEDED = (
    "x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight", "final_layer.linear.bias",
)  # fmt: skip

# Fields that a published file, its arguments or the presets say, or that a prediction does not
# depend on. In any other field, only the default can be published.
SAID = (
    "input_size", "in_channels", "num_classes", "patch_size", "hidden_size", "depth", "num_heads",
    "num_experts", "num_experts_per_tok", "n_shared_experts", "mlp_ratio", "dense_mlp_ratio",
    "qk_norm", "class_dropout_prob", "learn_sigma", *WITHOUT_EFFECT,
)  # fmt: skip


class Reader(NamedTuple):
    """Reads the weight files of another project.

    is_for(state_dict, known): whether the file is of this project; ValueError: a variant that is
        not supported
    read(state_dict, known): returns the weights in our layout (experts may be unstacked), fields of
        DiTConfig, and fields of Record

    known: what the file, flags or hints say, by name, such as num_heads or objective
    """

    is_for: Callable[[dict[str, Tensor], dict], bool]
    read: Callable[[dict[str, Tensor], dict], tuple[dict[str, Tensor], dict, dict]]


# Of other projects; the first one whose `is_for` holds reads a file.
READERS = Registry(elsewhere={"moe_dits": "extras.moe_dits"})


def recorded_in(arguments: dict) -> dict:
    """Translates the arguments of a published file to fields of a Record."""
    names = ("image_size", "vae_path", "latents_norm", "class_names")
    recorded = {name: arguments[name] for name in names if arguments.get(name) is not None}
    if arguments.get("model") in list(PRESETS):
        recorded["model"] = arguments["model"]
    if "rf" in arguments:
        recorded["objective"] = "rectified_flow" if arguments["rf"] else "gaussian"
    return recorded


def infer_config(
    state_dict: dict[str, Tensor], arguments: dict, overrides: dict, fields: dict
) -> DiTConfig:
    """Infers a DiTConfig from the shapes of a state dict in our layout.

    What shapes do not determine comes from the overrides, the arguments, or the preset of that
    width: num_heads, num_experts_per_tok, some options of the router, and whether a row of the
    label table means "no class".

    fields: other known fields of the config
    """
    if missing := [name for name in NEEDED if name not in state_dict]:
        raise ValueError(
            f"unknown layout: got {len(state_dict)} tensors such as "
            f"{', '.join(list(state_dict)[:3])}, expected {', '.join(missing)}"
        )
    patches = state_dict["x_embedder.proj.weight"]  # (D, C, p, p), or (bottleneck, C, p, p)
    width, in_channels, patch_size, _ = patches.shape
    hidden_size = state_dict["pos_embed"].shape[2]
    rows = len(state_dict["y_embedder.embedding_table.weight"])
    has_null_class = rows != overrides.get("num_classes", arguments.get("num_classes"))
    known = {
        "input_size": math.isqrt(state_dict["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "patch_bottleneck": width if "x_embedder.expand.weight" in state_dict else None,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
        "num_classes": rows - has_null_class,
        "class_dropout_prob": 0.1 if has_null_class else 0.0,
        **infer_feed_forward(state_dict, hidden_size),
        "learn_sigma": len(state_dict["final_layer.linear.bias"]) == 2 * patches[0].numel(),
        "norm": "rms" if "blocks.0.norm1.weight" in state_dict else "layer",
        "qk_norm": "blocks.0.attn.q_norm.weight" in state_dict,
    }
    if hidden_size in HEADS:
        known["num_heads"] = HEADS[hidden_size]
    if (positions := state_dict.get("class_tokens.positions")) is not None:  # (1, tokens, D)
        known["class_tokens"] = positions.shape[1]
    known |= fields
    undetermined = ("num_heads", "num_experts_per_tok")
    known |= {name: arguments[name] for name in undetermined if name in arguments}
    if "num_heads" not in known | overrides:
        raise ValueError(f"num_heads: is required, because no preset has width {hidden_size}")
    return with_overrides({"router": "topk", **known}, overrides)


def infer_feed_forward(state_dict: dict[str, Tensor], hidden_size: int) -> dict:
    """Infers fields of DiTConfig from the shapes of the feed-forward layers."""

    def first(name: str) -> Tensor | None:
        found = (v for k, v in state_dict.items() if k.startswith("blocks.") and k.endswith(name))
        return next(found, None)

    def type_of(gate: Tensor | None, bias: Tensor | None) -> str:
        return "gelu" if gate is None else "swiglu" if bias is None else "swiglu_bias"

    known: dict = {}
    gate, bias = first(".mlp.gate_proj.weight"), first(".mlp.gate_proj.bias")
    if (dense := first(".mlp.fc1.weight") if gate is None else gate) is not None:  # (H, D)
        known = {"dense_mlp_type": type_of(gate, bias), "dense_mlp_ratio": len(dense) / hidden_size}
    experts = first(".moe.experts.down_proj")  # (E, D, H)
    if experts is None:
        if not known:
            raise ValueError("got no feed-forward layers, expected dense or sparse layers")
        return {"num_experts": 0, **{k.removeprefix("dense_"): v for k, v in known.items()}}
    mlp_type = type_of(first(".moe.experts.gate_up_proj"), first(".moe.experts.down_bias"))
    shared = first(f".moe.shared_experts.{'fc2' if mlp_type == 'gelu' else 'down_proj'}.weight")
    ratio = 0 if shared is None else shared.shape[1] / hidden_size  # of (D, shared width)
    return {
        **known,
        "mlp_ratio": experts.shape[2] / hidden_size,
        "mlp_type": mlp_type,
        "num_experts": len(first(".moe.gate.weight")),
        "n_shared_experts": ratio,
        "sparse_layers": sorted({int(k.split(".")[1]) for k in state_dict if ".moe." in k}),
    }


def to_published(state_dict: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Converts weights to the layout that the published code loads.

    This layout has one linear layer per expert and projection. The attention has timm's names or,
    with QK-norm, flash-attn's names, as in the published scripts. A dense tanh-GELU model gets the
    layout of the official DiT. Refuses a model that no published code can compute.
    """
    plain = DiTConfig(**{name: getattr(config, name) for name in SAID})
    names = [name for name in options_of(DiTConfig) if name not in SAID]
    if not config.num_experts:  # all blocks are of `dense_mlp_type`
        of_experts = ("router", "sparse_layers", "mlp_type")
        names = [name for name in names if name not in of_experts]
    pairs = {n: [getattr(c, MEANINGS.get(n, n)) for c in (config, plain)] for n in names}
    if differing := [
        f"{name}: got {got}, expected {expected}"
        for name, (got, expected) in pairs.items() if got != expected
    ]:  # fmt: skip
        raise ValueError(f"{'; '.join(differing)}, as in the published code")
    if not isinstance(config.input_size, int):
        raise ValueError(f"input_size: got {config.input_size}, expected a square")
    if (width := config.n_shared_experts) % 1:
        raise ValueError(f"n_shared_experts: got {width}, expected a whole number")
    published = {}
    for key, value in state_dict.items():
        if config.qk_norm:
            for theirs, ours in FLASH_ATTENTION_NAMES.items():
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
