"""Checkpoints: written whole or not at all, read without executing anything.

    model = load_model("results/RUN")                # newest EMA weights of a run
    model = load_model("published.pt", num_heads=6)  # published layouts

A run keeps `checkpoints/0050000/` with two parts: model.safetensors (EMA weights; config, step and
training facts as JSON in its metadata) and the engine's training state beside it. The folder is
filled under a temporary name and then renamed, so one that has its final name is complete, and its
manifest tells whether it still is as it was written. training/saving.py writes them.
"""

import argparse
import math
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import hub
from checkpoints.layouts import DIFFUSERS_CLASSES, from_diffusers
from checkpoints.manifest import find_fault_of_file
from checkpoints.record import METADATA_KEY, Record, parse_config
from checkpoints.stored_config import check_fit, check_weights
from models import (
    SIZES,
    DiT,
    DiT_models,
    DiTConfig,
    sincos_position_embedding,
    to_stacked_layout,
)
from runtime.errors import UserError
from runtime.files import flush_to_disk
from runtime.untrusted import check_safetensors, check_torch_zip, read_json

MODEL_FILE = "model.safetensors"
MAX_POSITIONS = 2**26  # numbers of a position embedding that is computed; XL at 4096 px: 2**26
PLAIN_TYPES = (bool, int, float, str)


@dataclass
class Checkpoint:
    """A weight file that was read: its weights, and what it says of them."""

    path: Path
    state_dict: dict[str, Tensor]
    record: Record
    source: dict | None = None  # of the hub: {"hub", "revision", "sha256"}

    @property
    def config(self) -> DiTConfig:
        return self.record.config


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
    """Makes the DiT of a checkpoint, in eval mode, with its weights in dtype, fp32 if none."""
    with blame(checkpoint.path, "cannot be built"), torch.device("meta"):
        model = DiT(**asdict(checkpoint.config))
    try:
        model.load_state_dict(checkpoint.state_dict, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(f"{checkpoint.path}: another model: {lines[0]}{more}") from None
    model.to(device=device, dtype=dtype or torch.float32)
    for parameter in model.parameters():
        if parameter.data_ptr() % 16:  # pages of a file, which grouped products may refuse
            parameter.data = parameter.data.clone()
    return model.eval()


def read_checkpoint(path: str | Path, hints: dict | None = None, **overrides) -> Checkpoint:
    """Reads the EMA weights and config of a run folder, a step folder or a weight file.

    Weight files are ours (.safetensors) or published ones (.pt): a bare state dict, or {"ema",
    "args", ...}, in any layout that `DiT.load_state_dict` knows, the official dense DiT's among
    them. A folder may be a DiT in diffusers' format, or a pipeline with one. A path that is nothing
    here is looked up as a hub id, OWNER/NAME[@REVISION][:FILE], and `source` then says what came.
    Safetensors or weights_only: no pickled code runs. UserError says in one line what is wrong with
    a file that cannot be used. Overrides are fields of DiTConfig that win over the file; hints
    those that fill its gaps.
    """
    if hub.is_hub_id(path):
        path, source = hub.fetch(str(path))
        stored = read_checkpoint(path, hints, **overrides)
        return replace(stored, source=source)
    if folder := diffusers_folder(Path(path)):
        return read_diffusers(folder, overrides)
    path = resolve_weights(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path, hints or {}, overrides)
    stored = read_pickle(path)
    arguments = {**(hints or {}), **plain_values(stored.get("args"))}
    state_dict = stored.get("ema", stored.get("model", stored))
    if not isinstance(state_dict, dict) or not state_dict:
        raise UserError(f"{path}: got no weights, expected a state dict of tensors")
    with blame(path, "not a DiT-MoE state dict"):
        check_weights(state_dict, path.stat().st_size)
        state_dict = to_stacked_layout(state_dict)
        config = infer_config(state_dict, arguments, overrides)
        check_fit(config, state_dict)
        record = Record.from_dict({"config": config, **facts_of_arguments(arguments)})
    return Checkpoint(path, state_dict, record)


@contextmanager
def blame(path: Path, what: str) -> Iterator[None]:
    """Makes what a stranger's weights and words can raise, while they are read, a UserError."""
    try:
        yield
    except (
        LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError,
    ) as error:  # fmt: skip
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: {what}: {lines[0][:500]}") from None


def plain_values(arguments: object) -> dict:
    """The arguments of a published file, an argparse.Namespace or a dict, without nested ones."""
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if not isinstance(arguments, dict):
        return {}
    values = {name: value for name, value in arguments.items() if type(value) in PLAIN_TYPES}
    names = arguments.get("class_names")
    if isinstance(names, list) and all(type(name) is str for name in names):
        values["class_names"] = names
    return values


def diffusers_folder(path: Path) -> Path | None:
    """Finds the folder of the DiT in a folder of diffusers', or None if it is not one."""
    for folder in (path / "transformer", path):
        try:
            config = read_json(folder / "config.json")
        except OSError:
            continue
        except ValueError as error:
            if (folder / MODEL_FILE).is_file():  # which says all that config.json would
                continue
            raise UserError(f"{folder / 'config.json'}: not JSON: {error}") from None
        if isinstance(config, dict) and "_class_name" in config:
            return folder
    return None


def read_diffusers(folder: Path, overrides: dict) -> Checkpoint:
    """Reads a DiTTransformer2DModel, or the transformer of a pipeline that export.py wrote."""
    config = read_json(folder / "config.json")
    weights, size = {}, 0
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        weights.update(read_tensors(path)[0])
        size += path.stat().st_size
    binary = folder / "diffusion_pytorch_model.bin"
    if not weights and binary.is_file():
        weights, size = read_pickle(binary), binary.stat().st_size
    if not weights:
        raise UserError(
            f"{folder}: got no weights, expected diffusion_pytorch_model.safetensors or .bin"
        )
    with blame(folder, "not a DiT in diffusers' format"):
        check_weights(weights, size)
        if config["_class_name"] == "DiTMoETransformer":
            weights = {key.removeprefix("model."): value for key, value in weights.items()}
            known, facts = config["dit"], config.get("info") or {}
        elif config["_class_name"] in DIFFUSERS_CLASSES:
            (weights, known), facts = from_diffusers(weights, config), {"objective": "gaussian"}
            parse_config(known)
            side = known["input_size"] // known["patch_size"]
            if side**2 * known["hidden_size"] > MAX_POSITIONS:
                raise ValueError(
                    f"sample_size: got {known['input_size']}, expected at most {MAX_POSITIONS} "
                    "numbers of position embedding"
                )
            weights["pos_embed"] = sincos_position_embedding(known["hidden_size"], side)
        else:
            raise ValueError(
                f"got a {config['_class_name']!s:.80}, expected {' or '.join(DIFFUSERS_CLASSES)}"
            )
        parsed = parse_config({**known, **overrides})
        check_fit(parsed, weights)
        record = Record.from_dict({**facts, "config": parsed})
    vae = folder.parent / "vae"
    if folder.name == "transformer" and (vae / "config.json").is_file():
        record = replace(record, vae_path=str(vae))  # the pipeline's own
    return Checkpoint(folder, weights, record)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file; UserError when it is damaged."""
    with open_safetensors(path) as file:
        try:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except Exception as error:  # a dtype that torch does not have raises its own
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{path}: damaged or not a safetensors file ({reason})") from None


def open_safetensors(path: Path):
    """safetensors' safe_open; UserError when the file is damaged."""
    try:
        check_safetensors(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path}: damaged or not a safetensors file ({reason})") from None


def resolve_weights(path: str | Path) -> Path:
    """Finds the weight file that a run folder, a step folder or a file stands for.

    One that is not what its manifest says is refused; of a run's checkpoints it is passed over,
    with a line on standard error.
    """
    path = Path(path)
    if path.is_dir() and (path / MODEL_FILE).is_file():
        path = path / MODEL_FILE
    if path.is_file():
        if path.name == MODEL_FILE and (fault := find_fault_of_file(path)):
            raise UserError(f"{path.parent}: {fault}")
        return path
    faults = []
    for folder in step_folders(path):
        fault = find_fault_of_file(folder / MODEL_FILE)
        if fault is None:
            if faults and os.environ.get("RANK", "0") == "0":
                print(f"took {folder}, since {'; '.join(faults)}", file=sys.stderr)
            return folder / MODEL_FILE
        faults.append(f"{folder}: {fault}")
    if faults:
        raise UserError("no checkpoint is whole: " + "; ".join(faults))
    if path.is_dir():
        raise UserError(f"{path}: got a folder without a checkpoint, expected a run or step folder")
    raise UserError(f"{path}: no such file or folder")


def read_safetensors(path: Path, hints: dict, overrides: dict) -> Checkpoint:
    state_dict, metadata = read_tensors(path)
    with blame(path, "not a DiT-MoE checkpoint"):
        check_weights(state_dict, path.stat().st_size)
        state_dict = to_stacked_layout(state_dict)
        if METADATA_KEY in metadata:
            record = Record.from_metadata(metadata)
            record = replace(record, config=replace(record.config, **overrides))
        else:
            record = Record(config=infer_config(state_dict, hints, overrides))
        check_fit(record.config, state_dict)
    return Checkpoint(path, state_dict, record)


def read_record(folder: Path) -> Record:
    """Reads what a step folder says of itself, and none of its weights."""
    path = folder / MODEL_FILE
    with open_safetensors(path) as file, blame(path, "damaged or not a DiT-MoE checkpoint"):
        return Record.from_metadata(file.metadata())


def read_pickle(path: Path, device: torch.device | str = "cpu", mmap: bool = True) -> dict:
    """Reads a .pt file with weights_only, argparse.Namespace being all that is allowed besides.

    Files of torch before 1.6 are refused: they are bare pickles. With mmap the tensors are pages of
    the file, which has to stay as it is.
    """
    try:
        check_torch_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol: the error says enough
            stored = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused: got pickled code or objects, or a damaged pickle, expected tensors "
            "and plain values"
        ) from None
    except Exception as error:  # a malformed file can raise anything in the unpickler
        reason = (str(error).strip().splitlines() or [""])[0][:300]
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
    return parse_config(known)


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


def facts_of_arguments(arguments: dict) -> dict:
    """Translates the arguments stored in a published checkpoint into fields of a Record."""
    names = ("image_size", "vae_path", "class_names")
    facts = {name: arguments[name] for name in names if name in arguments}
    if arguments.get("model") in DiT_models:
        facts["model"] = arguments["model"]
    if "rf" in arguments:
        facts["objective"] = "rectified_flow" if arguments["rf"] else "gaussian"
    return facts


def save_model(path: Path, state_dict: dict[str, Tensor], record: Record) -> None:
    """Writes weights, with the record in the safetensors metadata, and flushes them to disk.

    Raises OSError when that fails.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    try:
        save_file(tensors, path, metadata=record.to_metadata())
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    flush_to_disk(path)


def step_folders(run: Path) -> list[Path]:
    """Lists the complete step folders of a run, the newest first."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted((name for name in names if name.isdecimal()), key=int, reverse=True)
    return [folder / name for name in steps]


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
