"""Checkpoints: weights with a record of what they are.

    model = load_model("results/RUN")                # newest EMA weights of a run
    model = load_model("results/RUN", ema="0.999")   # of several EMAs, that one
    model = load_model("published.pt", num_heads=6)  # published layouts, other codes' too
    checkpoint = read_checkpoint("OWNER/NAME")       # of the hub: .state_dict, .config, .record

A step folder of a run, `checkpoints/0050000/`, has EMA weights and record in model.safetensors, and
the engine's training state beside it. It is complete: it was renamed to that when it was filled.
"""

import argparse
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.from_diffusers import find_diffusers, read_diffusers
from checkpoints.moe_dits import from_moe_dit, is_moe_dit
from checkpoints.published import facts_of, infer_config
from checkpoints.quantized import quantization_of, quantize_state_dict
from checkpoints.record import METADATA_KEY, Record
from checkpoints.weights import (
    as_user_error,
    check_weights,
    open_safetensors,
    read_pickle,
    read_tensors,
    write_tensors,
)
from layouts import to_stacked_layout
from models import DiT, DiT_models, DiTConfig
from moe import quantize_experts
from runtime.errors import UserError, reported_as
from runtime.files import find_moved

MODEL_FILE = "model.safetensors"
WEIGHTS = ("ema", "ema_model_state_dict", "model", "model_state_dict")  # in a .pt, the best first
EMA_FILES = "model-ema-{}.safetensors"  # beside it, a run's further averages
PUBLISHED_FILE = "model.pt"  # in a folder that export.py wrote in the published layout
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?::([\w./-]+))?")
WHOLE_MODEL = (  # of a repository of the hub
    MODEL_FILE, PUBLISHED_FILE, "config.json", "diffusion_pytorch_model*", "transformer/*", "vae/*",
)  # fmt: skip


@dataclass
class Checkpoint:
    """Weights that were read, those of its config in our layout, and what their file says."""

    path: Path
    state_dict: dict[str, Tensor]
    record: Record
    source: dict | None = None  # of the hub: {"hub", "revision"}
    model: DiT | None = None  # made of these tensors, until `build_model` takes it

    @property
    def config(self) -> DiTConfig:
        return self.record.config

    @property
    def quantization(self) -> str | None:
        """int8 or int4 if the expert weights are quantised, else None."""
        return quantization_of(self.state_dict)

    def in_full_precision(self) -> "Checkpoint":
        """This checkpoint; UserError if its experts are quantised."""
        if kind := self.quantization:
            expected = "expected weights of 16 or 32 bits"
            raise UserError(f"{self.path}: got experts in {kind}, {expected}")
        return self

    @property
    def origin(self) -> dict:
        """What a model made of these weights says as its record's `initialized_from`."""
        facts = {"path": str(self.path), "step": self.record.step, "model": self.record.model}
        facts |= self.source or {}
        return {name: value for name, value in facts.items() if value is not None}


def load_model(
    path: str | Path, device: torch.device | str = "cpu", objective: str | None = None, **overrides
) -> DiT:
    """Loads a DiT in eval mode with EMA weights, see `read_checkpoint`.

    objective: what it was trained for, where a published file does not say
    overrides: also ema and quantize
    """
    hints = {"objective": objective} if objective else {}
    return build_model(read_checkpoint(path, hints, **overrides), device)


def build_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> DiT:
    """Makes the DiT of a checkpoint, in eval mode, with its weights in dtype, fp32 if none."""
    model, checkpoint.model = checkpoint.model, None
    if model is None:
        model = assemble(checkpoint.config, checkpoint.state_dict)
    model.to(device=device, dtype=dtype or torch.float32)
    for parameter in model.parameters():
        if parameter.data_ptr() % 16:  # pages of a file, which grouped products may refuse
            parameter.data = parameter.data.clone()
    return model.eval()


def read_checkpoint(
    path: str | Path, hints: dict | None = None, ema: str | None = None,
    quantize: str | None = None, **overrides,
) -> Checkpoint:  # fmt: skip
    """Reads the EMA weights and the record of a run folder, a step folder or a weight file.

    A weight file is ours (.safetensors) or a published one (.pt): a bare state dict, or {"ema",
    "args", ...}, of DiT-MoE, the official dense DiT or a code of `moe_dits`. A folder may also be a
    DiT in diffusers' format, or what export.py wrote. Else it is a hub id,
    OWNER/NAME[@REVISION][:FILE].

    Overrides are fields of DiTConfig, and options of its router as router_scale, that win over the
    file; hints are those that fill its gaps, and "objective".
    ema is which of a run's moving averages to take, see `average_file`; else it is the first.
    quantize, int8 or int4, quantises the expert weights; a file may store them quantised already.
    No pickled code runs. Raises UserError, one line, for a file that cannot be used.
    """
    path, source = fetch(path)
    path = find_weights(path) if ema is None else average_file(path, ema)
    if path.is_dir():
        state_dict, record = read_diffusers(path, overrides)
    else:
        state_dict, record = read_file(path, hints or {}, overrides)
    with as_user_error(path, "another model"):
        if quantize:
            quantize_state_dict(state_dict, quantize)
        model = assemble(record.config, state_dict)
    record = replace(record, vae_path=find_vae(record, path))
    return Checkpoint(path, state_dict, record, source, model)


def fetch(path: str | Path) -> tuple[Path, dict | None]:
    """Downloads what a hub id names, a file or a model, unless the hub's cache holds it.

    Returns its path and {"hub", "revision": the commit}; or the path given and None if it is there,
    or is no hub id. UserError when it cannot be had.
    """
    match = HUB_ID.fullmatch(str(path))
    if match is None or Path(path).exists():
        return Path(path), None
    from huggingface_hub import snapshot_download  # slow to import

    repo, revision, file = match.groups()
    expected = "expected a local copy or a hub id"
    message = f"{path}: got no such path and nothing from the hub, {expected}"
    with reported_as(message, Exception):  # huggingface_hub and its transport each raise their own
        patterns = [file] if file else list(WHOLE_MODEL)
        local = snapshot_download(repo, revision=revision, allow_patterns=patterns, etag_timeout=5)
    revision = Path(local).name  # the commit
    return Path(local, file or ""), {"hub": str(path), "revision": revision}


def find_weights(path: Path) -> Path:
    """Finds what a path stands for: a weight file, or the folder of a model in diffusers' format.

    Of a run it is the newest checkpoint that opens; standard error tells of those that do not.
    """
    for file in (path, path / MODEL_FILE, path / PUBLISHED_FILE):
        if file.is_file():
            return file
    if folder := find_diffusers(path):
        return folder
    faults = []
    for folder in step_folders(path):
        try:
            read_record(folder)
        except UserError as error:
            faults.append(str(error))
            continue
        if faults and os.environ.get("RANK", "0") == "0":
            print(f"took {folder}, since {'; '.join(faults)}", file=sys.stderr)
        return folder / MODEL_FILE
    got = "; ".join(faults) or ("got no weights" if path.exists() else "no such file or folder")
    raise UserError(f"{path}: {got}, expected weights, a run, a step folder or a hub id")


def ema_file(name: str, *, is_first: bool) -> str:
    """The file of a checkpoint that has an average: the first is the model as others load it."""
    return MODEL_FILE if is_first else EMA_FILES.format(name)


def averages_of(path: Path) -> dict[str, Path]:
    """The files of the moving averages of a run or a step folder by name, such as 0.999, its first
    one first; none of other weights."""
    file = find_weights(path)
    if path == file or file.name != MODEL_FILE:
        return {}
    first, others = read_record(file.parent).ema, sorted(file.parent.glob(EMA_FILES.format("*")))
    start, _ = EMA_FILES.split("{}")
    return ({first: file} if first else {}) | {o.stem.removeprefix(start): o for o in others}


def average_file(path: Path, name: str) -> Path:
    """The file of the moving average of that name; UserError if there is none."""
    found = averages_of(path)
    if name not in found:
        has = ", ".join(found) or "none with a name"
        raise UserError(f"--ema: got {name}, expected one of those in {path}: {has}")
    return found[name]


def read_file(path: Path, hints: dict, overrides: dict) -> tuple[dict[str, Tensor], Record]:
    """Reads a .safetensors, with our record or without, or a .pt, as published or bare weights."""
    if path.suffix == ".safetensors":
        state_dict, metadata = read_tensors(path)
        arguments = hints
    else:
        stored, metadata = read_pickle(path), {}
        args = stored.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        arguments = {**hints, **(args if isinstance(args, dict) else {})}
        state_dict = next((stored[name] for name in WEIGHTS if name in stored), stored)
        if "ema_model_state_dict" in stored:  # ProMoE's training, of its baselines too
            arguments["time_scale"] = 1000.0
    with as_user_error(path, "cannot be read as a DiT-MoE with these flags"):
        check_weights(state_dict)
        if METADATA_KEY in metadata:
            record = Record.from_metadata(metadata)
            config = DiTConfig.from_flat({**record.config.flat(), **overrides})
            return to_stacked_layout(state_dict), replace(record, config=config)
        fields, facts, known = {}, facts_of(arguments), {**arguments, **overrides}
        if is_moe_dit(state_dict, known):
            state_dict, fields, own = from_moe_dit(state_dict, known)
            facts |= own
        state_dict = to_stacked_layout(state_dict)
        config = infer_config(state_dict, arguments, overrides, fields)
        return state_dict, Record.from_dict({"config": config.flat(), **facts})


def assemble(config: DiTConfig, state_dict: dict[str, Tensor]) -> DiT:
    """Makes a DiT whose weights are these tensors themselves.

    Raises ValueError or RuntimeError unless they are those of the config. Its size and depth are
    looked for in them before the model is built, so that a config alone makes nothing large.
    """
    width, patches = config.hidden_size, math.prod(config.grid)
    wanted = (1, patches if config.absolute_positions else 1, width)
    if (got := tuple(state_dict["pos_embed"].shape)) != wanted:
        raise ValueError(f"pos_embed: got {got}, expected {wanted}")
    attention = [value for key, value in state_dict.items() if key.endswith(".attn.qkv.weight")]
    depth = sum(value.shape == (3 * width, width) for value in attention)
    if depth != config.depth:
        raise ValueError(f"got {depth} blocks of width {width}, expected {config.depth}")
    with torch.device("meta"):
        model = DiT(config)
        if kind := quantization_of(state_dict):
            quantize_experts(model, kind)
    model.load_state_dict(state_dict, assign=True)
    return model


def find_vae(record: Record, path: Path) -> str | None:
    """The autoencoder recorded, or where that is no folder here, `vae/` beside exported weights."""
    beside, recorded = path.parent / "vae", record.vae_path
    if (beside / "config.json").is_file() and not (recorded and os.path.isdir(recorded)):
        return str(beside)
    return recorded and find_moved(recorded, "config.json", path)


def read_record(path: Path) -> Record:
    """Reads the record of a step folder or of a file; UserError if it is damaged."""
    path = path / MODEL_FILE if path.is_dir() else path
    with open_safetensors(path) as file, as_user_error(path, "not a DiT-MoE checkpoint"):
        return Record.from_metadata(file.metadata())


def save_model(path: Path, state_dict: dict[str, Tensor], record: Record) -> None:
    """Writes weights and their record, flushed to disk; OSError when that fails."""
    write_tensors(path, state_dict, record.to_metadata())


def step_folders(run: Path) -> list[Path]:
    """Lists the complete step folders of a run, the newest first."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if os.path.isdir(folder) else []  # false for a name too long
    return [folder / n for n in sorted(filter(str.isdecimal, names), key=int, reverse=True)]


def config_of(model: str, **overrides) -> DiTConfig:
    """The DiTConfig of a preset with overrides, without its weights; UserError if wrong."""
    try:
        return DiTConfig.from_flat({**DiT_models[model].keywords, **overrides})
    except ValueError as error:
        raise UserError(str(error)) from None
