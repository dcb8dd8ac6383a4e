"""Checkpoints: weights with a record of their metadata.

    model = load_model("results/RUN")                # newest EMA weights of a run
    model = load_model("results/RUN", ema="0.999")   # one of several EMAs
    model = load_model("published.pt", num_heads=6)  # a published layout
    checkpoint = read_checkpoint("OWNER/NAME")       # from the hub: .state_dict, .config, .record

A step folder of a run, `checkpoints/0050000/`, holds EMA weights and record in model.safetensors,
and the training state of the engine. A step folder gets this name when it is complete.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from checkpoints.from_diffusers import find_diffusers, read_diffusers
from checkpoints.layouts import to_stacked_layout
from checkpoints.published import READERS, infer_config, recorded_in
from checkpoints.quantizers import quantizer, quantizer_of
from checkpoints.record import METADATA_KEY, Record, with_overrides
from checkpoints.weights import (
    MissingPlugin,
    as_user_error,
    check_weights,
    open_safetensors,
    read_pickle,
    read_tensors,
)
from latents.autoencoder import PIXELS
from models import DiT, DiTConfig
from options.settings import changed
from presets import PRESETS
from runtime.errors import UserError, print_safely, reported_as
from runtime.files import find_moved, hub_folder, parse_json
from runtime.tensor_file import write_tensors

T = TypeVar("T")
MODEL_FILE = "model.safetensors"
WEIGHTS = (  # keys of a .pt, best first
    "ema", "ema_model_state_dict", "model_ema1", "model", "model_state_dict"
)  # fmt: skip
EMA_FILES = "model-ema-{}.safetensors"  # further EMAs of a run, next to MODEL_FILE
PUBLISHED_FILE = "model.pt"  # written by export.py in the published layout
MAX_HEADER = 100_000_000  # bytes; safetensors allows no longer header
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?::([\w./-]+))?")
WHOLE_MODEL = (  # files to download from a repository of the hub
    MODEL_FILE, PUBLISHED_FILE, "config.json", "diffusion_pytorch_model*", "transformer/*", "vae/*",
)  # fmt: skip


@dataclass
class Checkpoint:
    """Weights in our layout, with their record."""

    path: Path
    state_dict: dict[str, Tensor]
    record: Record
    source: dict | None = None  # {"hub", "revision"} for weights from the hub

    @property
    def config(self) -> DiTConfig:
        return self.record.config

    @property
    def quantization(self) -> str | None:
        """int8 or int4 if the expert weights are quantised, else None."""
        found = quantizer_of(self.state_dict)
        return found and found.name

    def in_full_precision(self) -> "Checkpoint":
        """Returns this checkpoint, or refuses quantised experts."""
        if kind := self.quantization:
            expected = "expected weights of 16 or 32 bits"
            raise UserError(f"{self.path}: got experts in {kind}, {expected}")
        return self

    @property
    def origin(self) -> dict:
        """Provenance of these weights, for `initialized_from` in the record of a derived model."""
        known = {"path": str(self.path), "step": self.record.step, "model": self.record.model}
        known |= self.source or {}
        return {name: value for name, value in known.items() if value is not None}


def load_model(
    path: str | Path, device: torch.device | str = "cpu", objective: str | None = None, **overrides
) -> DiT:
    """Loads a DiT in eval mode with EMA weights, see `read_checkpoint`.

    objective: objective of the training, if a published file does not record it
    overrides: fields of DiTConfig, ema and quantize
    """
    hints = {"objective": objective} if objective else {}
    return build_model(read_checkpoint(path, hints, **overrides), device)


def build_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> DiT:
    """Builds the DiT of a checkpoint, in eval mode, with weights in dtype (default: fp32)."""
    model = assemble(checkpoint.config, checkpoint.state_dict)
    model.to(device=device, dtype=dtype or torch.float32)
    for parameter in model.parameters():
        if parameter.data_ptr() % 16:  # grouped products need an alignment of 16 bytes
            parameter.data = parameter.data.clone()
    return model.eval()


def read_checkpoint(
    path: str | Path, hints: dict | None = None, ema: str | None = None,
    quantize: str | None = None, **overrides,
) -> Checkpoint:  # fmt: skip
    """Reads the EMA weights and the record of a run folder, a step folder or a weight file.

    A weight file is ours (.safetensors) or a published file (.pt) of DiT-MoE, the official dense
    DiT or a project in `READERS`: a bare state dict, or {"ema", "args", ...}. A folder may also
    hold a DiT in diffusers' format, or the files that export.py writes. Any other path is a hub id,
    OWNER/NAME[@REVISION][:FILE]. Code in a file is never run.

    hints: fields of DiTConfig and "objective", which fill gaps of the file
    ema: name of an EMA of a run (see `average_file`) or of a .pt file; None: the first EMA
    quantize: int8 or int4 quantises the expert weights; a file may store quantised weights, too
    overrides: fields of DiTConfig that replace the values of the file; a router such as
        "batch_pool:inference=count" replaces the options that it says
    """
    named, source = fetch(path)
    is_pickled = os.path.isfile(named) and named.suffix != ".safetensors"

    def read() -> tuple[Path, dict[str, Tensor], Record]:
        path = find_weights(named) if ema is None or is_pickled else average_file(named, ema)
        if path.is_dir():
            return path, *read_diffusers(path, overrides)
        return path, *read_file(path, hints or {}, overrides, ema)

    path, state_dict, record = while_replaced(named, read)
    with as_user_error(path, "a different model"):
        if quantize:
            quantizer(quantize).convert(state_dict, record.config)
        assemble(record.config, state_dict)  # raises if they do not fit
    record = replace(record, vae_path=find_vae(record, path))
    return Checkpoint(path, state_dict, record, source)


def fetch(path: str | Path) -> tuple[Path, dict | None]:
    """Downloads the file or model that a hub id names, unless the hub's cache holds it.

    Returns the local path and {"hub", "revision": the commit}; for a local path, itself and None.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"got {path!r:.80}, expected a path or a hub id")
    match = HUB_ID.fullmatch(str(path))
    if match is None or os.path.exists(path):
        return Path(path), None
    repo, revision, file = match.groups()
    message = f"{path}: the path does not exist, and the hub does not provide it"
    with reported_as(message, Exception):  # huggingface_hub and its client raise many kinds
        patterns = [file, str(Path(file).parent / "vae" / "*")] if file else list(WHOLE_MODEL)
        local = hub_folder(repo, patterns, revision=revision)
    return local / (file or ""), {"hub": str(path), "revision": local.name}  # named by the commit


def while_replaced(run: Path, read: Callable[[], T]) -> T:
    """Calls read(), again if it failed while a checkpoint disappeared: a run that trains replaces
    its older ones."""
    while True:
        before = step_folders(run)
        try:
            return read()
        except UserError:
            if set(before) <= set(step_folders(run)):
                raise


def find_weights(path: Path) -> Path:
    """Finds the weights of a path: a weight file, or a folder of a model in diffusers' format.

    Of a run folder, the newest readable checkpoint; the unreadable ones are listed on stderr.
    """
    with reported_as(f"{path}: cannot be read", OSError):  # such as a lack of permission
        for file in (path, path / MODEL_FILE, path / PUBLISHED_FILE):
            if file.is_file():
                return file
    if folder := find_diffusers(path):
        return folder
    faults = []
    for folder in step_folders(path):
        try:
            open_safetensors(folder / MODEL_FILE)  # refuses truncated tensors
            read_record(folder)
        except MissingPlugin:
            raise
        except UserError as error:
            if not folder.exists():  # a run that trains has replaced it
                return find_weights(path)
            faults.append(str(error))
            continue
        if faults and os.environ.get("RANK", "0") == "0":
            print_safely(f"using {folder}, because {'; '.join(faults)}", file=sys.stderr)
        return folder / MODEL_FILE
    got = "; ".join(faults) or ("got no weights" if path.exists() else "no such file or folder")
    raise UserError(f"{path}: {got}, expected weights, a run, a step folder or a hub id")


def ema_file(name: str, *, is_first: bool) -> str:
    """Returns the file name of an EMA in a checkpoint; the first EMA is in MODEL_FILE."""
    return MODEL_FILE if is_first else EMA_FILES.format(name)


def averages_of(path: Path) -> dict[str, Path]:
    """Returns the EMA files of a run or step folder, by name such as 0.999, the first EMA first; {}
    for other weights."""
    file = find_weights(path)
    if path == file or file.name != MODEL_FILE:
        return {}
    try:
        first = read_record(file.parent).ema
    except MissingPlugin:
        raise
    except UserError:  # a file without a record, or a checkpoint that a run has replaced
        return {} if file.exists() else averages_of(path)
    others = sorted(file.parent.glob(EMA_FILES.format("*")))
    start, _ = EMA_FILES.split("{}")
    return ({first: file} if first else {}) | {o.stem.removeprefix(start): o for o in others}


def average_file(path: Path, name: str) -> Path:
    found = averages_of(path)
    if name not in found:
        has = ", ".join(found) or "no named EMA"
        raise UserError(f"--ema: got {name}, but {path} has {has}")
    return found[name]


def read_file(
    path: Path, hints: dict, overrides: dict, ema: str | None = None
) -> tuple[dict[str, Tensor], Record]:
    """Reads a .safetensors file, with or without our record, or a published .pt file.

    ema: key of the weights in a .pt file, such as "model_ema2"; None: the best of `WEIGHTS`
    """
    if path.suffix == ".safetensors":
        state_dict, metadata = read_tensors(path)
        arguments = hints
    else:
        stored, metadata = read_pickle(path), {}
        args = stored.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        arguments = {**hints, **(args if isinstance(args, dict) else {})}
        if ema is not None and ema not in stored:
            raise UserError(f"--ema: got {ema}, but {path} has {', '.join(map(str, stored))}"[:300])
        names = WEIGHTS if ema is None else (ema,)
        state_dict = next((stored[name] for name in names if name in stored), stored)
        if "ema_model_state_dict" in stored:  # ProMoE's code trained this model or baseline
            arguments["time_scale"] = 1000.0
    with as_user_error(path, "cannot be read as a DiT-MoE with these flags"):
        check_weights(state_dict)
        if METADATA_KEY in metadata:
            record = Record.from_metadata(metadata)
            config = with_overrides(record.config, overrides)
            return to_stacked_layout(state_dict), replace(record, config=config)
        fields, recorded, known = {}, recorded_in(arguments), {**arguments, **overrides}
        if reader := next((one for one in READERS.values() if one.is_for(state_dict, known)), None):
            state_dict, fields, more = reader.read(state_dict, known)
            recorded |= more
        state_dict = to_stacked_layout(state_dict)
        config = infer_config(state_dict, arguments, overrides, fields)
        return state_dict, Record(config=config, **recorded)


def assemble(config: DiTConfig, state_dict: dict[str, Tensor]) -> DiT:
    """Builds a DiT that uses these tensors as its weights, without copying.

    Raises ValueError or RuntimeError if they do not fit the config. Width and depth are compared
    before the model is built, so that a hostile config causes no large allocation.
    """
    width, patches = config.hidden_size, config.num_patches
    expected = (1, patches if config.absolute_positions else 1, width)
    if (got := tuple(state_dict["pos_embed"].shape)) != expected:
        raise ValueError(f"pos_embed: got {got}, expected {expected}")
    of_blocks = (item for item in state_dict.items() if item[0].startswith("blocks."))
    depth = len({key.split(".")[1] for key, value in of_blocks if width in value.shape})
    if depth != config.depth:
        raise ValueError(f"got {depth} blocks of width {width}, expected {config.depth}")
    with torch.device("meta"):
        model = DiT(config)
        if found := quantizer_of(state_dict):
            found.replace_experts(model)
    for name, tensor in model.state_dict().items():
        got, expected = state_dict.get(name, tensor).dtype, tensor.dtype
        if got.is_floating_point != expected.is_floating_point:
            raise ValueError(f"{name}: got {got}, expected {expected}")
    model.load_state_dict(state_dict, assign=True)
    return model


def find_vae(record: Record, path: Path) -> str | None:
    """Returns the folder of the autoencoder: as recorded, else `vae/` next to the weights, else the
    recorded one where it moved with the weights; or a hub id.
    """
    local, recorded = path.parent / "vae", record.vae_path
    if recorded == PIXELS:
        return recorded
    if (local / "config.json").is_file() and not (recorded and os.path.isdir(recorded)):
        return str(local.resolve())
    return recorded and find_moved(recorded, "config.json", path)


def read_record(path: Path) -> Record:
    """Reads the record of a step folder or file, even if the tensors behind it are truncated."""
    path = path / MODEL_FILE if path.is_dir() else path
    with as_user_error(path, "damaged or not a safetensors file"), open(path, "rb") as file:
        header = parse_json(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER)))
    with as_user_error(path, "not a DiT-MoE checkpoint"):
        return Record.from_metadata(header.get("__metadata__"))


def save_model(path: Path, state_dict: dict[str, Tensor], record: Record) -> None:
    """Writes weights and record, flushed to disk."""
    write_tensors(path, state_dict, record.to_metadata())


def step_folders(run: Path) -> list[Path]:
    """Lists the complete step folders of a run, the newest first."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if os.path.isdir(folder) else []  # False if the name is too long
    return [folder / n for n in sorted(filter(str.isdecimal, names), key=int, reverse=True)]


def config_of(model: str, **overrides) -> DiTConfig:
    """Returns the DiTConfig of a preset with overrides."""
    try:
        return changed(DiTConfig(**PRESETS[model]), overrides)
    except ValueError as error:
        raise UserError(str(error)) from None
