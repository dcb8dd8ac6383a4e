"""The training state in a step folder of train.py: one file, or one a process with some rows of
every weight. Each engine reads what the other wrote, for any number of processes.

    write_pickle(folder / STATE_FILE, state)             # all rows
    write_pickle(folder / PART_FILES.format(3), state)   # those that come fourth of state["parts"]
    state = read_state(folder, rows, device)             # those rows, whoever wrote them

A state is {"model": {name: Tensor}, "optimizer": {name: {key: value}}, "scaler": dict}.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.weights import as_user_error, read_pickle
from runtime.errors import UserError

STATE_FILE = "training_state.pt"
PART_FILES = "fsdp/rank_{:05d}.pt"


def read_state(folder: Path, rows: Mapping[str, slice], device: torch.device) -> dict[str, Any]:
    """Reads the rows of each parameter, and what the optimizer keeps of them.

    What has no rows here is whole in every part: buffers, and numbers such as AdamW's step. Raises
    UserError for a folder without a state, and for a damaged one.
    """
    paths = sorted(folder.glob(PART_FILES.replace("{:05d}", "*"))) or [folder / STATE_FILE]
    if not paths[0].is_file():
        raise UserError(f"{folder}: no {STATE_FILE} in it, expected a checkpoint of train.py")
    stored = [read_pickle(path) for path in paths]
    with as_user_error(paths[0], "damaged, or of another model"):
        if len(stored) != (expected := stored[0].get("parts", 1)):
            raise ValueError(f"got {len(stored)} files, expected {expected}")

        def read(name: str, values: Sequence[Any]) -> Any:
            first = values[0]
            if name in rows and torch.is_tensor(first) and first.dim():
                return take_rows(values, rows[name]).to(device)
            return first.to(device, copy=True) if torch.is_tensor(first) else first

        model, *_ = models = [part["model"] for part in stored]
        optimizer, *_ = optimizers = [part["optimizer"] for part in stored]
        return {
            "model": {name: read(name, [part[name] for part in models]) for name in model},
            "optimizer": {
                name: {key: read(name, [part[name][key] for part in optimizers]) for key in kept}
                for name, kept in optimizer.items()
            },
            "scaler": stored[0].get("scaler", {}),
        }


def take_rows(tensors: Sequence[Tensor], rows: slice) -> Tensor:
    """Copies some rows of tensors that follow each other."""
    found, first = [], 0
    for tensor in tensors:
        found.append(tensor[max(0, rows.start - first) : max(0, rows.stop - first)])
        first += len(tensor)
    return torch.cat(found)


def own_rows(count: int, part: int, parts: int) -> slice:
    """The rows of part number `part`, as FSDP cuts: equal parts but for the last ones."""
    size = -(-count // parts)
    return slice(min(count, part * size), min(count, part * size + size))
