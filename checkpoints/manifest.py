"""The manifest of a checkpoint folder: the size and SHA-256 of every file, so damage is noticed.

It is the last file to be written. Files are hashed in pieces, which are dealt out to the processes,
so that all of them share the work whatever the sizes of the files are.
"""

import hashlib
import json
from pathlib import Path

from runtime.files import write_durably
from runtime.processes import Distributed
from runtime.untrusted import read_json

MANIFEST_FILE = "checksums.json"
PIECE = 2**28  # bytes

Files = dict[str, tuple[int, list[str]]]  # name: (bytes, SHA-256 of each piece)
Piece = tuple[str, int]  # file name, number of the piece in it


def write_manifest(folder: Path, dist: Distributed) -> None:
    """Hashes all files of a folder and writes the manifest; all processes call it together.

    Raises OSError, on all of them, when a file cannot be read or the manifest not be written.
    """
    sizes = dist.broadcast(dist.together(lambda: file_sizes(folder) if dist.is_main else None))
    mine = pieces_of(sizes, PIECE)[dist.rank :: dist.world_size]
    hashes = dist.together(lambda: {piece: hash_piece(folder, piece, PIECE) for piece in mine})
    hashes = {piece: text for part in dist.gather(hashes) for piece, text in part.items()}
    files = {
        name: {"bytes": size, "sha256": [hashes[piece] for piece in pieces_of({name: size}, PIECE)]}
        for name, size in sizes.items()
    }
    content = json.dumps({"piece_bytes": PIECE, "files": files}, indent=1)
    dist.together(lambda: write_durably(folder / MANIFEST_FILE, content) if dist.is_main else None)


def file_sizes(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def pieces_of(sizes: dict[str, int], piece_bytes: int) -> list[Piece]:
    """Cuts files up; an empty one is one piece."""
    return [
        (name, number)
        for name, size in sizes.items()
        for number in range(count_pieces(size, piece_bytes))
    ]


def count_pieces(size: int, piece_bytes: int) -> int:
    return max(1, -(-size // piece_bytes))


def hash_piece(folder: Path, piece: Piece, piece_bytes: int) -> str:
    name, number = piece
    digest, left = hashlib.sha256(), piece_bytes
    with open(folder / name, "rb") as file:
        file.seek(number * piece_bytes)
        while left and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def find_fault(folder: Path, dist: Distributed) -> str | None:
    """Says which file of a folder is bad and why, or None; all processes call it together.

    None too of a folder without a manifest, an old one, of which nothing is known.
    """
    manifest = dist.broadcast(try_reading(folder) if dist.is_main else None)
    if manifest is None or isinstance(manifest, str):
        return manifest
    piece_bytes, files = manifest
    pieces = pieces_of({name: size for name, (size, _) in files.items()}, piece_bytes)
    fault = first_fault(folder, pieces[dist.rank :: dist.world_size], files, piece_bytes)
    return next(filter(None, dist.gather(fault)), None)


def find_fault_of_file(path: Path) -> str | None:
    """Says what is wrong with one file, by the manifest beside it, or None."""
    manifest = try_reading(path.parent)
    if manifest is None or isinstance(manifest, str):
        return manifest
    piece_bytes, files = manifest
    if path.name not in files:
        return None
    pieces = pieces_of({path.name: files[path.name][0]}, piece_bytes)
    return first_fault(path.parent, pieces, files, piece_bytes)


def first_fault(folder: Path, pieces: list[Piece], files: Files, piece_bytes: int) -> str | None:
    for name, number in pieces:
        (size, hashes), path = files[name], folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if (got := path.stat().st_size) != size:
                return f"{name} is damaged: got {got} bytes, expected {size}"
            if hash_piece(folder, (name, number), piece_bytes) != hashes[number]:
                return f"{name} is damaged: it has not the SHA-256 that it was written with"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def try_reading(folder: Path) -> tuple[int, Files] | str | None:
    """Reads a manifest: (bytes of a piece, files), or a line if it is damaged, or None if none."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        piece_bytes, files = content["piece_bytes"], {}
        if type(piece_bytes) is not int or piece_bytes < 2**16:
            raise ValueError(f"pieces of {piece_bytes!r} bytes")
        for name, entry in content["files"].items():
            size, hashes = entry["bytes"], entry["sha256"]
            outside = name.startswith("/") or ".." in name.split("/")
            if outside or type(size) is not int or len(hashes) != count_pieces(size, piece_bytes):
                raise ValueError(f"its entry {name[:100]!r}")
            files[name] = size, hashes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} is damaged ({type(error).__name__}: {error})"
    return piece_bytes, files
