"""Safe file access: durable writes, bounded reads that do not trust the file, and output paths
checked before work starts."""

import atexit
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from runtime.errors import UserError, reported_as

HUB_SECONDS = 5  # time limit for the first answer of the hub
MAX_JSON_BYTES, MAX_YAML_BYTES = 50_000_000, 100_000


def hub_folder(
    repo: str, names: Sequence[str], revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Downloads files of a hub repository into the hub's cache and returns their folder.

    If the hub does not answer, uses the files in the cache; raises OSError if there are none.
    """
    from huggingface_hub import HfApi, snapshot_download  # imported here: slow

    files = dict(revision=revision, allow_patterns=list(names))
    if not local_files_only:
        try:  # snapshot_download waits without a limit for a network that drops packets
            HfApi().repo_info(repo, revision=revision, timeout=HUB_SECONDS)
        except Exception as error:
            try:
                return Path(snapshot_download(repo, local_files_only=True, **files))
            except Exception:  # report the first error, which is more informative
                raise OSError(f"{type(error).__name__}: {error}") from None
    return Path(snapshot_download(repo, local_files_only=local_files_only, **files))


def read_json(path: Path | str) -> dict:
    """Reads a JSON object of up to MAX_JSON_BYTES; OSError, or ValueError for other content."""
    return parse_json(read_bounded(path, MAX_JSON_BYTES))


def parse_json(text: str | bytes) -> dict:
    """Parses a JSON object; ValueError for other content."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"got a {type(values).__name__}, expected a JSON object")
    return values


def read_yaml(path: Path | str) -> list[Any]:
    """Reads the documents of a YAML file of up to MAX_YAML_BYTES as text, lists and dicts."""
    return [*yaml.load_all(read_bounded(path, MAX_YAML_BYTES), PlainLoader)]


class PlainLoader(yaml.BaseLoader):
    """Reads text, null, lists and dicts; ValueError for a key that a mapping has twice."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str | None:
        is_null = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
        return None if is_null else super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, times in Counter(str(key.value) for key, _ in node.value).items():
            if times > 1:
                raise ValueError(f"{key:.80}: is given twice")
        return super().construct_mapping(node, deep)


def read_bounded(path: Path | str, most: int) -> bytes:
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"got more than {most:,} bytes")
    return content


@contextmanager
def open_npz(path: Path | str, what: str) -> Iterator[np.lib.npyio.NpzFile]:
    """Opens an .npz file without unpickling anything."""
    # zipfile, zlib and NumPy each raise exceptions of their own.
    with reported_as(f"{path}: not {what}", Exception), open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not an .npz file, or it is incomplete")
        file.seek(0)
        yield np.load(file, allow_pickle=False)


def find_moved(folder: str, file: str, near: Path) -> str:
    """Finds a folder that was moved together with `near`. Returns `folder` itself if it exists or
    nothing is found, and for a relative path or a hub id.

    Under each parent of `near`, the nearest first, it tries the trailing parts of the old path,
    longest first, and returns the first folder that contains `file`.
    """
    if Path(folder).is_absolute() and not os.path.isdir(folder):  # False also without permission
        _, *names = Path(folder).parts
        for parent in near.absolute().parents:
            for start in range(len(names)):
                place = parent.joinpath(*names[start:])
                if os.path.isfile(place / file):
                    return str(place)
    return folder


def wait_for_file(path: Path, seconds: float = 60) -> bool:
    """Waits for a file that another node has created; returns whether it appeared.

    An NFS client remembers for about 30 seconds that a path did not exist. It asks the server again
    after it has listed the folder in which the path was missing.
    """
    deadline = time.monotonic() + seconds
    while not os.path.isfile(path):
        if time.monotonic() > deadline:
            return False
        for parent in path.absolute().parents:
            with suppress(OSError):  # this folder was missing as well
                os.listdir(parent)
                break
        time.sleep(0.2)
    return True


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_unbuffered(path: Path) -> BinaryIO:
    """Opens a file for reading and appending; what is written goes to the system at once."""
    return open(path, "a+b", buffering=0)


def write_durably(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all. An OSError, such as a full disk, names the file."""
    suffix = f".{os.getpid()}.tmp"  # two processes may write the same file
    with atomic_file(path, suffix) as part, open(part, "xb") as file:  # "x" never follows a link
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yields a temporary path to write to, which is flushed and renamed to `path` at the end of the
    block, or removed if the block raises. An OSError names `path`.
    """
    temporary = path.with_name(path.name + suffix)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which is renamed to `folder`, a new or empty one, at the
    end of the block, or removed if the block raises. A killed process leaves .NAME.writing.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.is_mount():
            shutil.copytree(temporary, folder, dirs_exist_ok=True)
        else:
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare_output(flag: str, path: Path) -> None:
    """Creates the folder of an output file. A new folder that stays empty, because the script fails
    before it writes the file, is removed at exit."""
    if os.path.isdir(path):  # False without permission
        raise UserError(f"{flag}: got the folder {path}, expected a file name")
    new = [folder for folder in path.absolute().parents if not os.path.exists(folder)]
    atexit.register(remove_empty, new)
    with reported_as(f"{flag}: cannot write {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, the innermost first, as long as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_new_folder(flag: str, path: Path, ignored: str = "") -> None:
    """Requires a path without a file or folder, or an empty folder, except for a file `ignored`."""
    if os.path.exists(path) and (not path.is_dir() or {p.name for p in path.iterdir()} - {ignored}):
        raise UserError(f"{flag}: got {path}, expected a new or empty folder")
