"""The manifest of a checkpoint: the size and CRC-32 of each file, which reveal damage.

write_manifest(folder, checksums)
fault = find_fault(folder, dist)                     # None: the files are undamaged
"""

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.files import open_regular, read_json, write_durably
from runtime.processes import Distributed

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path, checksums: dict[str, dict]) -> None:
    """Writes the sizes and checksums of a folder's files."""
    write_durably(folder / MANIFEST_FILE, json.dumps(checksums, indent=1) + "\n")


def checksums_of(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Reads files in parallel and returns their sizes and CRC-32s."""

    def read(name: str) -> dict:
        checksum = 0
        with open_regular(folder / name) as file:
            while block := file.read(2**20):
                checksum = zlib.crc32(block, checksum)
            return {"bytes": file.tell(), "crc32": f"{checksum:08x}"}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def find_fault(folder: Path, dist: Distributed) -> str | None:
    """Describes the first missing or damaged file of a checkpoint, None if there is none.

    All processes call this function.
    """
    return dist.broadcast(fault_of(folder) if dist.is_main else None)


def fault_of(folder: Path) -> str | None:
    try:
        expected = read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} is missing or damaged ({error})"
    try:
        found = checksums_of(folder, expected)
    except (OSError, ValueError) as error:  # ValueError for a name with \0
        return f"a file is missing or cannot be read ({error})"
    for name, checksum in expected.items():
        if found[name] != checksum:
            return f"{name} is damaged: got {found[name]}, expected {checksum!s:.100}"
    return None
