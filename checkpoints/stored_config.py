"""Whether what a weight file says can be true, checked before a model of that size is built.

    check_weights(state_dict, num_bytes)
    config = parse_config(values)
    check_fit(config, state_dict)
    check_info(info, config)

All raise ValueError with one line of what was got and expected.
"""

import re
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from models import DiTConfig
from moe import EXPERT_BACKENDS

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_SIZE = 2**20  # of any whole number in a config
MAX_NUMBER = 1024.0  # of any other
OBJECTIVES = ("gaussian", "rectified_flow")
MODEL_NAME = re.compile(r"\w[\w.+-]{0,99}(/\d{1,3})?", re.ASCII)
INFO_TYPES = {
    "step": int, "model": str, "objective": str, "image_size": int, "vae_path": str,
    "class_names": list, "settings": dict, "initialized_from": dict,
}  # fmt: skip


def check_weights(state_dict: dict, num_bytes: int) -> None:
    """Checks that weights are finite numbers of floating point, together no more than `num_bytes`.

    num_bytes: of the files that they come from; more would mean that they overlap or repeat
    """
    total = 0
    for key, value in state_dict.items():
        if type(key) is not str or type(value) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"got a {type(value).__name__} named {key!s:.80}, expected a state dict of tensors"
            )
        dense = value.layout == torch.strided and value.device.type == "cpu"
        if value.dtype not in WEIGHT_DTYPES or not dense:
            kind = str(value.dtype if dense else value.layout).removeprefix("torch.")
            raise ValueError(f"{key:.80}: got {kind} weights, expected floating-point ones")
        total += value.numel() * value.element_size()
        if total > num_bytes:
            raise ValueError(
                f"{key:.80}: got tensors of {total} bytes, expected no more than the file's "
                f"{num_bytes}"
            )
        if value.numel() and not all(torch.isfinite(end) for end in torch.aminmax(value)):
            raise ValueError(f"{key:.80}: got weights that are not finite, expected numbers")


def parse_config(values: dict) -> DiTConfig:
    """Makes the DiTConfig of stored fields, each of its type and of a size that can be."""
    if not isinstance(values, dict):
        raise ValueError(f"config: got a {type(values).__name__}, expected the fields of a model")
    kinds = {field.name: field.type for field in fields(DiTConfig)}
    if unknown := sorted(str(name)[:80] for name in values.keys() - kinds.keys()):
        raise ValueError(f"config: got {unknown[0]!r}, expected fields of DiTConfig")
    for name, value in values.items():
        check_field(name, value, kinds[name])
    if (backend := values.get("expert_backend", "grouped")) not in EXPERT_BACKENDS:
        raise ValueError(f"expert_backend: got {backend!r:.80}, expected {sorted(EXPERT_BACKENDS)}")
    if backend == "triton":  # asked for where it was trained; grouped takes it where it can
        values = {**values, "expert_backend": "grouped"}
    return DiTConfig(**values)


def check_field(name: str, value: object, kind: object) -> None:
    """Checks a field of DiTConfig against its annotation."""
    if value is None and isinstance(None, kind):
        return
    if name == "sparse_layers":
        if not isinstance(value, list | tuple) or not all(is_size(layer) for layer in value):
            raise ValueError(f"{name}: got {value!r:.80}, expected a list of layers")
    elif kind is int and not is_size(value):
        raise ValueError(f"{name}: got {value!r:.80}, expected a whole number up to {MAX_SIZE}")
    elif kind in (float, float | None) and not is_number(value):
        raise ValueError(f"{name}: got {value!r:.80}, expected a number up to {MAX_NUMBER:g}")
    elif kind in (bool, str, str | None):
        wanted = bool if kind is bool else str
        if type(value) is not wanted:
            raise ValueError(f"{name}: got {value!r:.80}, expected a {wanted.__name__}")


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_NUMBER  # so not nan


def check_fit(config: DiTConfig, state_dict: dict[str, Tensor]) -> None:
    """Checks that weights have the depth, the width and the tables that a config asks for.

    All that makes a model large follows from these or is a parameter's own shape, which loading
    compares.
    """
    d, patch = config.hidden_size, config.patch_size
    rows = config.num_classes + (config.class_dropout_prob > 0)
    for name, shape in {
        "pos_embed": (1, (config.input_size // patch) ** 2, d),
        "x_embedder.proj.weight": (d, config.in_channels, patch, patch),
        "y_embedder.embedding_table.weight": (rows, d),
    }.items():
        got = tuple(state_dict[name].shape) if name in state_dict else "none"
        if got != shape:
            raise ValueError(f"another model: {name}: got {got}, expected {shape}")
    blocks = {key.split(".")[1] for key in state_dict if key.startswith("blocks.")}
    if blocks != set(map(str, range(config.depth))):
        raise ValueError(
            f"another model: got {len(blocks)} blocks, expected {config.depth}, numbered from 0"
        )


def check_shapes(got: dict[str, Sequence[int]], expected: dict[str, Sequence[int]]) -> None:
    """Checks that there is a tensor of each of the expected names, of its shape, and no other."""
    for name in sorted(got.keys() | expected.keys()):
        mine, wanted = (tuple(side[name]) if name in side else "none" for side in (got, expected))
        if mine != wanted:
            raise ValueError(f"{name:.80}: got {mine}, expected {wanted}")


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    for name, value in tensors.items():
        if type(name) is not str or not isinstance(value, Tensor):
            raise ValueError(f"{name!s:.80}: got a {type(value).__name__}, expected a tensor")
    return {name: value.shape for name, value in tensors.items()}


def check_info(info: dict, config: DiTConfig) -> None:
    """Checks the facts that a file tells of its training, as far as they are used."""
    if not isinstance(info, dict):
        raise ValueError(f"info: got a {type(info).__name__}, expected an object")
    for name, kind in INFO_TYPES.items():
        if name in info and type(info[name]) is not kind:
            got = type(info[name]).__name__
            raise ValueError(f"{name}: got a {got}, expected a {kind.__name__}")
    if not 0 <= info.get("step", 0) < 2**53:
        raise ValueError(f"step: got {info['step']!s:.80}, expected a number of steps")
    if not 0 < info.get("image_size", 1) <= 2**16:
        raise ValueError(f"image_size: got {info['image_size']!s:.80}, expected pixels")
    if info.get("objective", "gaussian") not in OBJECTIVES:
        raise ValueError(
            f"objective: got {info['objective']!r:.80}, expected {' or '.join(OBJECTIVES)}"
        )
    if MODEL_NAME.fullmatch(info.get("model", "DiT")) is None:
        raise ValueError(f"model: got {info['model']!r:.80}, expected a name such as DiT-S/2")
    names = info.get("class_names", [])
    if not all(isinstance(name, str) for name in names):
        raise ValueError("class_names: got something else than text, expected names")
    if names and len(names) != config.num_classes:
        raise ValueError(f"class_names: got {len(names)}, expected {config.num_classes}")
    origin = info.get("initialized_from", {"path": ""})
    if not isinstance(origin.get("path"), str):
        raise ValueError("initialized_from: got no path, expected one")
    for name in ("vae_path", "path"):
        if "\0" in {**origin, **info}.get(name, ""):
            raise ValueError(f"{name}: got a zero byte in it, expected a path")
