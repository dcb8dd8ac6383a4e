"""Files: written durably, read without waiting or believing, and looked at before work begins."""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from runtime.errors import UserError, reported_as


def read_json(path: Path | str) -> dict:
    """Reads a JSON object; OSError if it cannot be read, ValueError if it is something else."""
    with open_foreign(path) as file:
        values = json.load(file)
    if not isinstance(values, dict):
        raise ValueError(f"got a {type(values).__name__}, expected a JSON object")
    return values


@contextmanager
def open_npz(path: Path | str, what: str) -> Iterator[np.lib.npyio.NpzFile]:
    """Opens an .npz, nothing pickled; UserError for a damaged one, or one of something else."""
    # zipfile, zlib and NumPy each raise their own.
    with reported_as(f"{path}: not {what}", Exception), open_foreign(path) as file:
        yield np.load(file, allow_pickle=False)


def find_moved(folder: str, file: str, near: Path) -> str:
    """Finds a folder that moved along with `near`; its old path if it is there, or is not found.

    For each parent of `near`, from the nearest up, it tries the ends of the old path, the longest
    first, and returns the first that holds `file`. A path that is not absolute, such as a hub id,
    is returned as it is.
    """
    if Path(folder).is_absolute() and not os.path.isdir(folder):  # nor one that cannot be seen
        _, *names = Path(folder).parts
        for parent in near.absolute().parents:
            for start in range(len(names)):
                place = parent.joinpath(*names[start:])
                if os.path.isfile(place / file):
                    return str(place)
    return folder


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_own(path: Path) -> BinaryIO:
    """Opens a file of a run's own to append to, unbuffered.

    A link or a pipe in its place is an OSError: what it leads to is somebody else's.
    """
    return open_regular(path, "a+b", os.O_NOFOLLOW, buffering=0)


def open_foreign(path: Path | str) -> BinaryIO:
    """Opens somebody's file to read; a pipe or device in its place is an OSError, at once."""
    return open_regular(path, "rb")


def open_regular(path: Path | str, mode: str, more_flags: int = 0, buffering: int = -1) -> BinaryIO:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | more_flags | os.O_NONBLOCK, 0o666)

    file = open(path, mode, buffering=buffering, opener=opener)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def write_durably(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; an OSError, as of a full disk, names it."""
    with replacing(path) as temporary, open(temporary, "xb") as file:  # never through a link
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name under which a file is written that is flushed and takes `path` when whole.

    If anything is raised meanwhile, nothing is left; an OSError names the file.
    """
    temporary = path.with_name(path.name + ".tmp")
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
def filling(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; at the end it is renamed to `folder`, new or empty.

    If anything is raised meanwhile, it is removed; a kill leaves it, as .NAME.writing.
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
    """Makes the folder of an output file and checks that it can be written; UserError if not."""
    if path.is_dir():
        raise UserError(f"{flag}: got the folder {path}, expected a file name")
    with reported_as(f"{flag}: cannot write {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def check_new_folder(flag: str, path: Path) -> None:
    """Raises UserError unless a path is a folder that is empty or not there yet."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag}: got {path}, expected a new or empty folder")
