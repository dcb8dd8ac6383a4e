"""The manifest of a checkpoint folder: size and SHA-256 of every file, so that damage is noticed.

It is written last. The processes share the hashing, file by file.
"""

import json
from pathlib import Path

from runtime.files import file_digest, read_json, write_durably
from runtime.processes import Distributed

MANIFEST_FILE = "checksums.json"


def write_manifest(folder: Path, dist: Distributed) -> None:
    """Hashes the files of a folder and writes their manifest; all processes call it together.

    Raises OSError on all of them if one fails.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = sorted(dist.broadcast(names))[dist.rank :: dist.world_size]
    mine = dist.together(lambda: {name: describe(folder / name) for name in names})
    entries = {name: entry for part in dist.gather(mine) for name, entry in part.items()}
    text = json.dumps(entries, indent=1, sort_keys=True)
    dist.together(lambda: write_durably(folder / MANIFEST_FILE, text) if dist.is_main else None)


def find_fault(folder: Path, dist: Distributed) -> str | None:
    """Says which file of a checkpoint is missing or damaged, or None; all processes call it."""
    try:
        entries = read_json(folder / MANIFEST_FILE) if dist.is_main else None
    except (OSError, ValueError) as error:
        entries = f"{MANIFEST_FILE} is missing or damaged ({error})"
    entries = dist.broadcast(entries)
    if isinstance(entries, str):
        return entries
    mine = list(entries.items())[dist.rank :: dist.world_size]
    faults = (fault_of(folder, name, entry) for name, entry in mine)
    return next(filter(None, dist.gather(next(filter(None, faults), None))), None)


def describe(path: Path) -> list:
    return [path.stat().st_size, file_digest(path)]


def fault_of(folder: Path, name: str, expected: object) -> str | None:
    if not (folder / name).is_file():
        return f"{name} is missing"
    try:
        got = describe(folder / name)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if got == expected else f"{name} is damaged: got {got}, expected {expected!s:.100}"
