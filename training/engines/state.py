"""The training state in a step folder; each process writes one file of boxes.

A box is a rectangular part of a tensor (`runtime.tensor_file.Box`).

    tensors, metadata = stored_boxes({"model/pos_embed": Box.of_all(weight)}, {})
    state, stored = read_state(folder, shapes, places, device)  # boxes of any position, all files

A state has the tensors "model/NAME" and "optimizer/NAME/KEY". Its metadata, in JSON, are the offset
of each box, scalars of the optimizer, and the loss scaler. Any number of processes reads a state.
`DDPEngine` and `FSDPEngine` read each other's; the boxes of `DeepSpeedEngine` are ranges of
flattened parameters. Processes with the same parameters share the writing, and each byte is written
once.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoints.weights import as_user_error, open_safetensors
from runtime.errors import UserError
from runtime.files import parse_json
from runtime.tensor_file import Box
from training.engines.layout import Place

STATE_FILES = "state/rank_{:05d}.safetensors"
STATE_KEY = "state"  # key in the metadata of a file


def stored_boxes(
    boxes: Mapping[str, Box], metadata: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a process's file."""
    boxes = {title: box for title, box in boxes.items() if box.values.numel()}
    metadata = {**metadata, "offsets": {title: box.offset for title, box in boxes.items()}}
    return {title: box.values for title, box in boxes.items()}, {STATE_KEY: json.dumps(metadata)}


class StoredShard(NamedTuple):
    """A stored shard of a tensor, which is read on demand."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[Place], Tensor]

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.offset, self.shape, strict=True)))


def read_state(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    places: Mapping[str, Place],
    device: torch.device,
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, ...]]]:
    """Reads a box of each parameter, and the optimizer's state of that box.

    Tensors that do not have the shape of their parameter in `shapes`, such as AdamW's step, and
    buffers are read completely. Returns {"model": {NAME: Tensor}, "optimizer": {NAME: {KEY:
    value}}, "scaler": dict, "spikes": dict}, and the stored shape of each parameter and buffer.
    """
    shards, numbers, metadata = stored_shards(folder)
    model: dict[str, Tensor] = {}
    stored_shapes: dict[str, tuple[int, ...]] = {}
    with as_user_error(folder, "damaged, or of a different model"):
        optimizer: dict[str, dict] = {name: dict(kept) for name, kept in numbers.items()}
        for title, stored in shards.items():
            kind, name, *key = title.split("/")
            whole = whole_shape(stored)
            place = places[name] if whole == shapes.get(name) else None
            tensor = read_box(title, stored, place).to(device, copy=True)
            if kind == "model":
                model[name], stored_shapes[name] = tensor, whole
            else:
                optimizer.setdefault(name, {})[key[0]] = tensor
    own = {name: metadata.get(name, {}) for name in ("scaler", "spikes")}
    return {"model": model, "optimizer": optimizer, **own}, stored_shapes


def whole_shape(shards: Sequence[StoredShard]) -> tuple[int, ...]:
    return tuple(map(max, zip(*(shard.end for shard in shards), strict=True)))


def read_box(title: str, shards: Sequence[StoredShard], place: Place | None) -> Tensor:
    """Assembles a box from the shards of a tensor; None: the complete tensor."""
    place = place or tuple(slice(0, size) for size in whole_shape(shards))
    size = tuple(cut.stop - cut.start for cut in place)
    result, count = shards[0].read((slice(0, 1),) * len(place)).new_empty(size), 0
    for shard in shards:
        spans = [
            (max(cut.start, first), min(cut.stop, last))
            for cut, first, last in zip(place, shard.offset, shard.end, strict=True)
        ]
        if any(first >= last for first, last in spans):
            continue
        inner = zip(spans, shard.offset, strict=True)
        values = shard.read(tuple(slice(a - o, b - o) for (a, b), o in inner))
        if values.shape == size:
            return values
        outer = zip(spans, place, strict=True)
        result[tuple(slice(a - c.start, b - c.start) for (a, b), c in outer)] = values
        count += values.numel()
    if count != result.numel():
        raise ValueError(f"{title}: got {count} numbers, expected {result.numel()}")
    return result


def stored_shards(
    folder: Path,
) -> tuple[dict[str, list[StoredShard]], dict[str, dict], dict]:
    """Opens the files of a state; returns tensors' shards, optimizer scalars, metadata."""
    shards: dict[str, list[StoredShard]] = {}
    paths = sorted(folder.glob(STATE_FILES.replace("{:05d}", "*")))
    if not paths:
        expected = STATE_FILES.format(0)
        hint = "--finetune reads only the weights"
        raise UserError(f"{folder}: got no training state, expected {expected}; {hint}")
    metadata: list[dict] = []
    for path in paths:
        file = open_safetensors(path)
        with as_user_error(path, "damaged"):
            metadata.append(parse_json(file.metadata()[STATE_KEY]))
            for title, offset in metadata[-1]["offsets"].items():
                content = file.get_slice(title)
                read = content.__getitem__ if offset else lambda _, f=file, t=title: f.get_tensor(t)
                shards.setdefault(title, []).append(
                    StoredShard(tuple(offset), tuple(content.get_shape()), read)
                )
    with as_user_error(folder, "damaged"):
        if len(paths) != (expected := metadata[0]["processes"]):
            raise ValueError(f"got {len(paths)} files of its state, expected {expected!s:.80}")
        numbers = {name: kept for one in metadata for name, kept in one["numbers"].items()}
    return shards, numbers, metadata[0]


def rows_of(tensor: Tensor) -> Tensor:
    """Returns the local shard of a DTensor, or a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
