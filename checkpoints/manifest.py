"""The manifest of a checkpoint folder: its files and their sizes, so that a cut one is noticed."""

import json
from pathlib import Path

from runtime.files import read_json, write_durably
from runtime.processes import Distributed

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the sizes of a folder's files; OSError when that fails."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_durably(folder / MANIFEST_FILE, json.dumps(sizes, indent=1) + "\n")


def find_fault(folder: Path, dist: Distributed) -> str | None:
    """Says which file of a checkpoint is missing or cut, or None; all processes call it."""
    return dist.broadcast(fault_of(folder) if dist.is_main else None)


def fault_of(folder: Path) -> str | None:
    try:
        sizes = read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} is missing or damaged ({error})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (got := path.stat().st_size) != size:
            return f"{name} is damaged: got {got} bytes, expected {size!s:.100}"
    return None
