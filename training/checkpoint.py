"""Checkpoints: written whole or not at all, read without executing anything.

    model = load_model("results/RUN")                # newest EMA weights of a run
    model = load_model("published.pt", num_heads=6)  # published layouts

A run keeps `checkpoints/0050000/` with two parts: model.safetensors (EMA weights; config, step and
training facts as JSON in its metadata) and the engine's training state beside it. The folder is
filled under a temporary name and then renamed, so one that has its final name is complete.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models import (
    SIZES,
    DiT,
    DiT_models,
    DiTConfig,
    sincos_position_embedding,
    to_stacked_layout,
)
from training import hub
from training.errors import UserError
from training.layouts import DIFFUSERS_CLASSES, from_diffusers

MODEL_FILE = "model.safetensors"


@dataclass
class Checkpoint:
    """What a weight file says: weights, the config they need, and how they were trained.

    `info` of our own files has step, model, objective ("gaussian" or "rectified_flow"), vae_path,
    image_size, class_names; published files say less, and what they do not say is absent.
    """

    path: Path
    state_dict: dict[str, Tensor]
    config: DiTConfig
    info: dict = field(default_factory=dict)


def load_model(path: str | Path, device: torch.device | str = "cpu", **overrides) -> DiT:
    """Loads a DiT in eval mode with EMA weights; see `read_checkpoint` for path and errors.

    Overrides are fields of DiTConfig, needed where a published file does not tell.
    """
    return build_model(read_checkpoint(path, **overrides), device)


def build_model(
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> DiT:
    """Makes the DiT of a checkpoint, in eval mode, with its weights, cast to dtype if given."""
    with torch.device("meta"):
        model = DiT(**asdict(checkpoint.config))
    try:
        model.load_state_dict(checkpoint.state_dict, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(f"{checkpoint.path}: another model: {lines[0]}{more}") from None
    return model.to(device=device, dtype=dtype).eval()


def read_checkpoint(path: str | Path, hints: dict | None = None, **overrides) -> Checkpoint:
    """Reads the EMA weights and config of a run folder, a step folder or a weight file.

    Weight files are ours (.safetensors) or published ones (.pt): a bare state dict, or {"ema",
    "args", ...}, in any layout that `DiT.load_state_dict` knows, the official dense DiT's among
    them. A folder may be a DiT in diffusers' format, or a pipeline with one. A path that is nothing
    here is looked up as a hub id, OWNER/NAME[@REVISION][:FILE], and info["source"] then says what
    came. Safetensors or weights_only: no pickled code runs. UserError says in one line what is
    wrong with a file that cannot be used. Overrides are fields of DiTConfig that win over the file;
    hints those that fill its gaps.
    """
    if hub.is_hub_id(path):
        path, source = hub.fetch(str(path))
        stored = read_checkpoint(path, hints, **overrides)
        return replace(stored, info={**stored.info, "source": source})
    if folder := diffusers_folder(Path(path)):
        return read_diffusers(folder, overrides)
    path = resolve_weights(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path, hints or {}, overrides)
    stored = read_pickle(path)
    arguments = stored.get("args", {})
    arguments = arguments if isinstance(arguments, dict) else vars(arguments)
    arguments = {**(hints or {}), **arguments}
    state_dict = stored.get("ema", stored.get("model", stored))
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UserError(f"{path}: got no weights, expected a state dict of tensors")
    try:
        state_dict = to_stacked_layout(state_dict)
        config = infer_config(state_dict, arguments, overrides)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a DiT-MoE state dict: {error}") from None
    return Checkpoint(path, state_dict, config, info_of_arguments(arguments))


def diffusers_folder(path: Path) -> Path | None:
    """Finds the folder of the DiT in a folder of diffusers', or None if it is not one."""
    for folder in (path / "transformer", path):
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and "_class_name" in config:
            return folder
    return None


def read_diffusers(folder: Path, overrides: dict) -> Checkpoint:
    """Reads a DiTTransformer2DModel, or the transformer of a pipeline that export.py wrote."""
    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        with open_safetensors(path) as file:
            weights.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    binary = folder / "diffusion_pytorch_model.bin"
    if not weights and binary.is_file():
        weights = read_pickle(binary)
    if not weights:
        raise UserError(
            f"{folder}: got no weights, expected diffusion_pytorch_model.safetensors or .bin"
        )
    try:
        if config["_class_name"] == "DiTMoETransformer":
            weights = {key.removeprefix("model."): value for key, value in weights.items()}
            known, info = config["dit"], config.get("info") or {}
        elif config["_class_name"] in DIFFUSERS_CLASSES:
            (weights, known), info = from_diffusers(weights, config), {"objective": "gaussian"}
            side = known["input_size"] // known["patch_size"]
            weights["pos_embed"] = sincos_position_embedding(known["hidden_size"], side)
        else:
            raise ValueError(
                f"got a {config['_class_name']}, expected {' or '.join(DIFFUSERS_CLASSES)}"
            )
        return Checkpoint(folder, weights, DiTConfig(**{**known, **overrides}), dict(info))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: not a DiT in diffusers' format: {error}") from None


def open_safetensors(path: Path):
    """safetensors' safe_open; UserError when the file is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from None


def resolve_weights(path: str | Path) -> Path:
    """Finds the weight file that a run folder, a step folder or a file stands for."""
    path = Path(path)
    if path.is_file():
        return path
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    if newest := latest_checkpoint(path):
        return newest / MODEL_FILE
    if path.is_dir():
        raise UserError(f"{path}: got a folder without a checkpoint, expected a run or step folder")
    raise UserError(f"{path}: no such file or folder")


def read_safetensors(path: Path, hints: dict, overrides: dict) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from None
    try:
        info = json.loads(metadata.get("info", "{}"))
        state_dict = to_stacked_layout(state_dict)
        if "config" in info:
            config = DiTConfig(**{**info.pop("config"), **overrides})
        else:
            config = infer_config(state_dict, hints, overrides)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a DiT-MoE checkpoint: {error}") from None
    return Checkpoint(path, state_dict, config, info)


def read_config(folder: Path) -> tuple[DiTConfig, dict]:
    """Reads the config and the training facts of a step folder, and none of its weights."""
    try:
        info = read_info(folder)
        return DiTConfig(**info["config"]), info
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: damaged or not a DiT-MoE checkpoint ({error})") from None


def read_info(folder: Path) -> dict:
    """Reads what a step folder says of itself, "config" included, and none of its weights."""
    path = folder / MODEL_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["info"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged or not a DiT-MoE checkpoint ({error})") from None


def read_pickle(path: Path) -> dict:
    """Reads a .pt file with weights_only, argparse.Namespace being all that is allowed besides."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol: the error says enough
            mmap = zipfile.is_zipfile(path)
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused: got pickled code or objects, or a damaged pickle, expected tensors "
            "and plain values"
        ) from None
    except Exception as error:  # a malformed file can raise anything in the unpickler
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{path}: damaged or not a checkpoint ({type(error).__name__}: {reason})"
        ) from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: got a {type(stored).__name__}, expected a dict of weights")
    return stored


def infer_config(state_dict: dict[str, Tensor], arguments: dict, overrides: dict) -> DiTConfig:
    """Reads a DiTConfig off the shapes of a published state dict in the stacked layout.

    Shapes do not tell num_heads, num_experts_per_tok or whether a row of the label table means "no
    class": those come from overrides, the file, hints, or the preset of that width.
    """
    check_layout(state_dict)
    patches = state_dict["x_embedder.proj.weight"]  # (D, C, p, p)
    hidden_size, in_channels, patch_size, _ = patches.shape
    rows = len(state_dict["y_embedder.embedding_table.weight"])
    out = len(state_dict["final_layer.linear.bias"]) // patch_size**2
    has_null_class = rows != overrides.get("num_classes", arguments.get("num_classes"))
    known = {
        "input_size": math.isqrt(state_dict["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
        "num_classes": rows - has_null_class,
        "class_dropout_prob": 0.1 if has_null_class else 0.0,
        **infer_feed_forward(state_dict, hidden_size),
        "learn_sigma": out == 2 * in_channels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state_dict,
    }
    heads = [size["num_heads"] for size in SIZES.values() if size["hidden_size"] == hidden_size]
    if heads:
        known["num_heads"] = heads[0]
    for name in ("num_heads", "num_experts_per_tok"):
        if name in arguments:
            known[name] = arguments[name]
    known.update(overrides)
    if "num_heads" not in known:
        raise ValueError(f"no preset has width {hidden_size}: num_heads has to be given")
    return DiTConfig(**known)


EXPECTED_KEYS = {
    "x_embedder.proj.weight": r"x_embedder\.proj\.weight",
    "pos_embed": "pos_embed",
    "blocks.N.attn.qkv.weight (or Wqkv)": r"blocks\.0\.attn\.qkv\.weight",
    "blocks.N.moe.experts... or blocks.N.mlp...": r"blocks\.0\.(moe\.experts|mlp)\..+",
    "final_layer.linear.bias": r"final_layer\.linear\.bias",
}


def check_layout(state_dict: dict[str, Tensor]) -> None:
    """Raises ValueError that lists what was expected and found, for weights of something else."""
    missing = [
        name
        for name, pattern in EXPECTED_KEYS.items()
        if not any(re.fullmatch(pattern, key) for key in state_dict)
    ]
    if missing:
        found = ", ".join(list(state_dict)[:5])
        raise ValueError(
            f"unknown layout: expected {', '.join(missing)}; found {len(state_dict)} others: "
            f"{found}{', ...' if len(state_dict) > 5 else ''}"
        )


def infer_feed_forward(state_dict: dict[str, Tensor], hidden_size: int) -> dict:
    """The fields of DiTConfig that the shapes of the feed-forward layers tell."""
    gelu_dense = state_dict.get("blocks.0.mlp.fc1.weight")  # (H, D)
    if gelu_dense is not None:
        return {"num_experts": 0, "mlp_ratio": len(gelu_dense) / hidden_size}
    swiglu_dense = state_dict.get("blocks.0.mlp.gate_proj.weight")
    if swiglu_dense is not None:
        ratio = len(swiglu_dense) / hidden_size
        return {"num_experts": 0, "mlp_ratio": ratio, "mlp_type": "swiglu"}
    down_proj = state_dict["blocks.0.moe.experts.down_proj"]  # (E, D, H)
    shared = state_dict.get("blocks.0.moe.shared_experts.down_proj.weight")  # (D, n * D)
    return {
        "mlp_ratio": down_proj.shape[2] / hidden_size,
        "num_experts": len(down_proj),
        "n_shared_experts": shared.shape[1] // hidden_size if shared is not None else 0,
    }


def info_of_arguments(arguments: dict) -> dict:
    """Translates the arguments stored in a published checkpoint into our `info`."""
    names = ("image_size", "vae_path", "class_names")
    info = {name: arguments[name] for name in names if name in arguments}
    if arguments.get("model") in DiT_models:
        info["model"] = arguments["model"]
    if "rf" in arguments:
        info["objective"] = "rectified_flow" if arguments["rf"] else "gaussian"
    return info


def save_model(path: Path, state_dict: dict[str, Tensor], config: DiTConfig, info: dict) -> None:
    """Writes weights with config and info as JSON in the safetensors metadata, flushed to disk."""
    info = {"config": asdict(config), **info}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    save_file(tensors, path, metadata={"info": json.dumps(info), "format": "pt"})
    flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_folder(run: Path, step: int, temporary: bool = False) -> Path:
    """Names a step's folder, or the one that it is written to before it is complete."""
    name = f"{step:07d}"
    return run / "checkpoints" / (f"writing-{name}.tmp" if temporary else name)


def begin_checkpoint(temporary: Path) -> None:
    """Makes the empty folder that a checkpoint is written to; call on one process."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def finish_checkpoint(temporary: Path, run: Path, step: int) -> Path:
    """Gives a filled folder its final name: from here on it is the newest checkpoint."""
    folder = checkpoint_folder(run, step)
    shutil.rmtree(folder, ignore_errors=True)
    flush_to_disk(temporary)
    temporary.rename(folder)
    flush_to_disk(folder.parent)
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """Returns the newest complete step folder of a run, or None."""
    steps = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name), default=None)


def config_of(model: str, **overrides) -> DiTConfig:
    """The DiTConfig of a preset with overrides, without its weights; UserError if wrong."""
    try:
        with torch.device("meta"):
            return DiT_models[model](**overrides).config
    except ValueError as error:
        raise UserError(str(error)) from None


def config_difference(stored: DiTConfig, wanted: DiTConfig) -> str:
    """Names the fields in which two configs differ, as "field: got A, expected B"."""
    differing = [
        f"{f.name}: got {getattr(wanted, f.name)}, expected {getattr(stored, f.name)}"
        for f in fields(DiTConfig)
        if getattr(stored, f.name) != getattr(wanted, f.name) and f.name != "expert_backend"
    ]
    return "; ".join(differing)
