"""The manifest of a checkpoint folder: its files, their sizes and checksums, to notice damage by.

The checksum is CRC-32: a core takes less than half a second for a gigabyte.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.files import open_foreign, read_json, write_durably
from runtime.processes import Distributed

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the sizes and checksums of a folder's files; OSError when that fails."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum}
        for path, checksum in zip(paths, checksums(paths), strict=True)
    }
    write_durably(folder / MANIFEST_FILE, json.dumps(files, indent=1) + "\n")


def find_fault(folder: Path, dist: Distributed) -> str | None:
    """Says which file of a checkpoint is missing or damaged, or None; all processes call it."""
    return dist.broadcast(fault_of(folder) if dist.is_main else None)


def fault_of(folder: Path) -> str | None:
    try:
        files = read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} is missing or damaged ({error})"
    # Manifests of before have sizes alone.
    files = {
        name: facts if isinstance(facts, dict) else {"bytes": facts}
        for name, facts in files.items()
    }
    for name, facts in files.items():
        path, size = folder / name, facts.get("bytes")
        if not path.is_file():
            return f"{name} is missing"
        if (got := path.stat().st_size) != size:
            return f"{name} is damaged: got {got} bytes, expected {size!s:.100}"
    summed = {name: facts["crc32"] for name, facts in files.items() if "crc32" in facts}
    try:
        found = checksums([folder / name for name in summed])
    except OSError as error:
        return f"a file cannot be read: {error}"
    for (name, expected), got in zip(summed.items(), found, strict=True):
        if got != expected:
            return f"{name} is damaged: got checksum {got}, expected {expected!s:.100}"
    return None


def checksums(paths: list[Path]) -> list[str]:
    """The CRC-32 of each file in hexadecimal, several files at a time; OSError if one fails."""

    def checksum(path: Path) -> str:
        value = 0
        with open_foreign(path) as file:
            while block := file.read(2**20):
                value = zlib.crc32(block, value)
        return f"{value:08x}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(checksum, paths))
