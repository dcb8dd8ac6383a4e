"""Reads models in diffusers format: a dense DiTTransformer2DModel, or a pipeline that export.py
wrote."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.diffusers_layout import config_from_exported, from_exported
from checkpoints.record import Record, with_overrides
from checkpoints.weights import as_user_error, check_weights, read_pickle, read_tensors
from models import DiTConfig, position_embedding
from runtime.errors import reported_as
from runtime.files import read_json

EXPORTED_CLASS = "DiTMoETransformer2DModel"  # see sampling/exported/
OLD_CLASS = "DiTMoETransformer"  # of export.py until version 0.3
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
# Config values of a DiTTransformer2DModel that our DiT can reproduce.
REQUIRED = {
    "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True,
    "norm_elementwise_affine": False,
}  # fmt: skip


def find_diffusers(path: Path) -> Path | None:
    """Returns the transformer's folder within a diffusers folder, or None for another folder."""
    for folder in (path / "transformer", path):
        file = folder / "config.json"
        with reported_as(f"{file}: damaged", OSError, ValueError):
            if file.is_file() and "_class_name" in read_json(file):
                return folder
    return None


def read_diffusers(folder: Path, overrides: dict) -> tuple[dict[str, Tensor], Record]:
    """Reads the transformer in a folder. Overrides are DiTConfig fields that replace the file's."""
    config, weights = read_json(folder / "config.json"), {}
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        weights.update(read_tensors(path)[0])
    if not weights:
        weights = read_pickle(folder / "diffusion_pytorch_model.bin")
    with as_user_error(folder, "not a DiT in diffusers' format"):
        check_weights(weights)
        if config["_class_name"] == EXPORTED_CLASS:
            record = exported_record(folder, config)
            weights = from_exported(weights, record.config)
            return weights, replace(record, config=with_overrides(record.config, overrides))
        if config["_class_name"] == OLD_CLASS:
            weights = {key.removeprefix("model."): value for key, value in weights.items()}
            values = {"config": config["dit"], **(config.get("info") or {})}
            record = Record.from_dict(values)
            return weights, replace(record, config=with_overrides(record.config, overrides))
        if config["_class_name"] in DIFFUSERS_CLASSES:
            weights, fields = from_diffusers(weights, config)
            return weights, Record(config=with_overrides(fields, overrides), objective="gaussian")
        kinds = " or ".join(DIFFUSERS_CLASSES)
        raise ValueError(f"its class is {config['_class_name']!s:.80}, expected {kinds}")


def exported_record(folder: Path, config: dict) -> Record:
    """Returns the record of an exported transformer, with facts of its pipeline, if any."""
    index = folder.parent / "model_index.json"
    pipeline = read_json(index) if index.is_file() else {}
    facts = pipeline.get("record") or {}
    fields = config_from_exported(config) | facts.get("config", {})
    names = pipeline.get("id2label") or {}
    names = tuple(names[str(number)] for number in range(len(names)))
    words = tuple(pipeline.get("words") or ())
    facts = {**facts, "config": fields, "class_names": names, "words": words}
    return Record.from_dict(facts)


def from_diffusers(weights: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict]:
    """Converts a DiTTransformer2DModel to a dense DiT. Returns (state dict, DiTConfig fields).

    The diffusers DiT differs from the official one in its time frequencies
    (`timestep_frequency_shift` 1) and in the epsilon of the norm before the feed-forward layer;
    both become config fields. Refuses what our DiT cannot reproduce, such as different time or
    class embedders in the blocks.
    """
    for name, expected in REQUIRED.items():
        if (got := config.get(name, expected)) != expected:
            raise ValueError(f"{name}: got {got!r:.80}, expected {expected!r}")
    depth = config.get("num_layers", 28)
    state_dict = rename_weights(weights, depth)
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
    state_dict["pos_embed"] = position_embedding(DiTConfig(**fields))
    return state_dict, fields


def rename_weights(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Renames the weights of a DiTTransformer2DModel to ours; KeyError or ValueError for others."""
    state_dict, left = {}, dict(weights)
    for kind in ("weight", "bias"):
        for layer in range(depth):
            ours, theirs = f"blocks.{layer}", f"transformer_blocks.{layer}"
            qkv = [left.pop(f"{theirs}.attn1.to_{part}.{kind}") for part in "qkv"]
            state_dict[f"{ours}.attn.qkv.{kind}"] = torch.cat(qkv)  # (3D, D) or (3D,)
            for name, our_name in BLOCK_NAMES.items():
                state_dict[f"{ours}.{our_name}.{kind}"] = left.pop(f"{theirs}.{name}.{kind}")
        for theirs, ours in OUTER_NAMES.items():
            if f"{theirs}.{kind}" in left:  # the label table has no bias
                state_dict[f"{ours}.{kind}"] = left.pop(f"{theirs}.{kind}")
    for name, value in left.items():
        _, _, inner = name.removeprefix("transformer_blocks.").partition(".")
        first = weights.get(f"transformer_blocks.0.{inner}")
        if not inner.startswith("norm1.emb.") or first is None or not torch.equal(value, first):
            raise ValueError(
                f"got {name:.80}, expected the same embedder in all blocks and no other weights"
            )
    return state_dict
