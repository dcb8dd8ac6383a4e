"""Weight files: safetensors, and torch.save's files with weights_only, so that no code is run.

A file that cannot be used raises UserError, one line with the file's name.
"""

import argparse
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from options.parts import UnknownComponent, UnknownOption
from runtime.errors import UserError, reported_as
from runtime.files import flush_to_disk

MALFORMED = (
    SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
    RuntimeError,
)  # fmt: skip


class MissingPlugin(UserError):
    """A file needs a component, or an option of it, that no imported file defines."""


@contextmanager
def as_user_error(path: Path, what: str) -> Iterator[None]:
    """Converts exceptions due to malformed content into a UserError."""
    with reported_as(f"{path}: {what}", *MALFORMED):
        try:
            yield
        except UnknownComponent as error:
            raise MissingPlugin(f"{path}: {error}") from None
        except UnknownOption as error:
            advice = "which was saved with this option; declare it again, even if nothing reads it"
            raise MissingPlugin(f"{path}, {advice}: {error}") from None


def open_safetensors(path: Path):
    """Opens a safetensors file by safe_open, which also detects a truncated file."""
    with as_user_error(path, "damaged or not a safetensors file"):
        return safe_open(path, framework="pt")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file."""
    with open_safetensors(path) as file, as_user_error(path, "damaged"):
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_pickle(path: Path, mmap: bool = True) -> dict:
    """Reads a .pt file with weights_only, which allows tensors, plain values and Namespaces.

    With mmap the tensors are pages of the file, which must not change while they are used.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol
            mmap = mmap and zipfile.is_zipfile(path)  # False in torch's format before 1.6
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of any kind; torch's message recommends weights_only=False
        if not isinstance(error, OSError):
            with open(path, "rb") as file:
                start = file.read(2)
            if start and start[:1] != b"\x80" and start != b"PK":  # no pickle, no zip file
                expected = "a .safetensors file, a .pt file, a run or a hub id"
                raise UserError(f"{path}: not a file of weights, expected {expected}") from None
        raise UserError(
            f"{path}: cannot be loaded ({type(error).__name__}): the file is damaged or holds more "
            "than tensors and plain values; code in a file is never run"
        ) from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: got {type(stored).__name__}, expected a dict of weights")
    return stored


def write_pickle(path: Path, stored: dict) -> None:
    """Writes a file by torch.save, flushed to disk; raises the OSError that torch hides."""
    with open(path, "wb") as file:
        try:
            torch.save(stored, file)
        except RuntimeError as error:
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path.name}: {cause}") from None
    flush_to_disk(path)


def check_weights(state_dict: dict) -> None:
    """Checks that all values are dense tensors of a usable type, without reading them."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError("got no weights, expected a state dict of tensors")
    for name, value in state_dict.items():
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.layout != torch.strided:
            got = value.layout if is_tensor else type(value).__name__
            raise ValueError(f"{name!s:.80}: got {got}, expected a dense tensor")
        if value.is_floating_point() and value.itemsize < 2:
            raise ValueError(f"{name:.80}: got {value.dtype}, expected at least 16 bits")


def shapes_of(values: dict[str, Any]) -> dict[str, torch.Size]:
    """Returns the shapes of the values that are tensors."""
    return {name: value.shape for name, value in values.items() if torch.is_tensor(value)}


def check_shapes(got: dict[str, Sequence[int]], expected: dict[str, Sequence[int]]) -> None:
    """Requires equal names and shapes."""
    for name in sorted(got.keys() | expected.keys()):
        found, right = (tuple(side[name]) if name in side else "none" for side in (got, expected))
        if found != right:
            raise ValueError(f"{name:.80}: got {found}, expected {right}")
