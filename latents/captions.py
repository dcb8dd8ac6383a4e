"""Captions of images, as people store them, and the words of them that a model knows.

    captions = Captions.of(["a red circle", None, ["a cat", "a black cat"]])
    captions[2]                                                # ["a cat", "a black cat"]

The captions of FILE.png are in FILE.txt beside it, one a line; or in a column `text`, `caption` or
`prompt` of metadata.jsonl or metadata.parquet in its folder or above, with `file_name`, as in the
image folders of Hugging Face.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

COLUMNS = ("text", "caption", "prompt")
METADATA = ("metadata.jsonl", "metadata.parquet")
MAX_CAPTION = 20_000  # bytes of a file of captions
SIDES = re.compile(r"\b(left|right|clockwise|counterclockwise|anticlockwise)\b", re.IGNORECASE)


class Captions(Sequence):
    """The captions of each image, from none to several.

    They are bytes in one array, because reference counting in workers would copy the memory of
    lists.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends  # (bytes,) uint8; (images,) int64

    @classmethod
    def of(cls, written: Iterable[str | Sequence[str] | None]) -> "Captions":
        """Each image has a text with one caption a line, a list of captions, or None."""
        encoded = []
        for one in written:
            lines = one.splitlines() if isinstance(one, str) else one or []
            if not all(isinstance(line, str) for line in lines):
                raise ValueError(f"got the caption {one!r:.80}, expected text")
            lines = [" ".join(line.split()) for line in lines]
            encoded.append("\n".join(filter(None, lines)).encode())
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[str]:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode().splitlines()

    def __bool__(self) -> bool:
        return len(self.text) > 0

    @property
    def missing(self) -> np.ndarray:
        """Indices of the images without a caption."""
        return np.flatnonzero(np.diff(self.ends, prepend=0) == 0)

    @property
    def sha256(self) -> str | None:
        """Digest of all captions; None without any."""
        sha = hashlib.sha256(self.ends.tobytes())
        sha.update(self.text.tobytes())
        return sha.hexdigest() if self else None


def captions_of_files(paths: Sequence[str], root: str) -> Iterator[str | Sequence[str] | None]:
    """Yields the captions of image files below a folder."""
    names: dict[str, set[str]] = {}  # by folder
    listed: dict[str, str | Sequence[str]] = {}  # by path
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in names:
            for one in above(folder, os.path.normpath(root)):
                if one not in names:
                    names[one] = set(os.listdir(one))
                    for metadata in sorted(names[one].intersection(METADATA)):
                        listed |= read_metadata(Path(one, metadata))
        text = os.path.splitext(name)[0] + ".txt"
        if text in names[folder]:
            with open(os.path.join(folder, text), "rb") as file:
                yield file.read(MAX_CAPTION).decode(errors="replace")
        else:
            yield listed.get(os.path.normpath(path))


def above(folder: str, root: str) -> Iterator[str]:
    """Yields a folder and those above it, up to the root."""
    yield folder
    while len(os.path.normpath(folder)) > len(root):
        folder = os.path.dirname(folder)
        yield folder


def read_metadata(path: Path) -> dict[str, str | Sequence[str]]:
    """Reads captions by path from a metadata file of Hugging Face's image folders."""
    if path.suffix == ".parquet":
        from pyarrow import parquet  # of the package datasets

        rows = parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not rows or not isinstance(rows[0], dict) or "file_name" not in rows[0]:
        return {}  # it describes something else
    column = caption_column(rows[0])
    if column is None:
        return {}
    found = {row.get("file_name"): row.get(column) for row in rows}
    return {os.path.normpath(path.parent / name): text for name, text in found.items() if name}


def caption_column(names: Iterable[str]) -> str | None:
    """Returns the name of the column with captions, if there is one."""
    return next((name for name in COLUMNS if name in {*names}), None)
