"""The manifest of a checkpoint: the size of each file, which reveals a missing or truncated one.

write_manifest(folder, sizes)
fault = fault_of(folder)                             # None: the files are complete

A checkpoint gets its final name once its files are on the disk.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import UserError
from runtime.files import read_json, write_durably

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path, sizes: Mapping[str, int]) -> None:
    """Writes the number of bytes of each file in a folder."""
    write_durably(folder / MANIFEST_FILE, json.dumps(sizes, indent=1) + "\n")


def fault_of(folder: Path) -> str | None:
    """Describes the first missing or truncated file of a checkpoint, None if there is none."""
    try:
        expected = {**read_json(folder / MANIFEST_FILE)}
    except (OSError, ValueError, TypeError) as error:
        return f"{MANIFEST_FILE} is missing or damaged ({error})"
    if any(isinstance(size, dict) for size in expected.values()):  # with CRC-32s, before 0.3
        raise UserError(
            f"{folder} was saved by an earlier version, whose runs do not go on; its weights can "
            "still be used, by sample.py --ckpt and by train.py --finetune"
        )
    try:
        for name, size in expected.items():
            if (got := os.stat(folder / name).st_size) != size:
                return f"{name} is damaged: got {got} bytes, expected {size!s:.20}"
    except (OSError, ValueError) as error:  # ValueError for a name with \0
        return f"a file is missing or cannot be read ({error})"
    return None
