"""The manifest of a checkpoint folder: its files, their sizes and CRC-32, to notice damage by."""

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.files import open_foreign, read_json, write_durably
from runtime.processes import Distributed

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the facts of a folder's files; OSError when that fails."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = facts_of(folder, [path.relative_to(folder).as_posix() for path in files])
    write_durably(folder / MANIFEST_FILE, json.dumps(facts, indent=1) + "\n")


def facts_of(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """The size and the CRC-32 of files, several read at a time; OSError if one cannot be."""

    def read(name: str) -> dict:
        checksum = 0
        with open_foreign(folder / name) as file:
            while block := file.read(2**20):
                checksum = zlib.crc32(block, checksum)
            return {"bytes": file.tell(), "crc32": f"{checksum:08x}"}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def find_fault(folder: Path, dist: Distributed) -> str | None:
    """Says which file of a checkpoint is missing or damaged, or None; all processes call it."""
    return dist.broadcast(fault_of(folder) if dist.is_main else None)


def fault_of(folder: Path) -> str | None:
    try:
        expected = read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} is missing or damaged ({error})"
    try:
        found = facts_of(folder, expected)
    except OSError as error:
        return f"a file is missing or cannot be read ({error})"
    for name, facts in expected.items():
        got = found[name] if isinstance(facts, dict) else found[name]["bytes"]  # of before: sizes
        if got != facts:
            return f"{name} is damaged: got {got}, expected {facts!s:.100}"
    return None
