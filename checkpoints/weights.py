"""Weight files, read without executing anything: safetensors, and torch.save's with weights_only.

A file that cannot be used raises UserError, one line with its name.
"""

import argparse
import hashlib
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.tensor_file import Box, TensorFile
from moe_kernels.quantized import KINDS
from runtime.errors import UserError, reported_as
from runtime.files import flush_to_disk, open_foreign, replacing

MALFORMED = (
    SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
    RuntimeError,
)  # fmt: skip


def as_user_error(path: Path, what: str) -> AbstractContextManager:
    """Turns what malformed content raises, while it is read, into a UserError of that file."""
    return reported_as(f"{path}: {what}", *MALFORMED)


def open_safetensors(path: Path):
    """safetensors' safe_open; a truncated file is noticed here."""
    with as_user_error(path, "damaged or not a safetensors file"):
        open_foreign(path).close()  # safetensors would wait for a pipe
        return safe_open(path, framework="pt")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file."""
    with open_safetensors(path) as file, as_user_error(path, "damaged"):
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_pickle(path: Path, device: torch.device | str = "cpu", mmap: bool = True) -> dict:
    """Reads a .pt file with weights_only; argparse.Namespace is all that is allowed besides.

    With mmap the tensors are pages of the file, which has to stay as it is.
    """
    try:
        open_foreign(path).close()
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            stored = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # on a malformed file it can be any; torch's own advises pickle
        raise UserError(
            f"{path}: cannot be loaded ({type(error).__name__}): the file is damaged or holds more "
            "than tensors and plain values; code in a file is never run"
        ) from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: got a {type(stored).__name__}, expected a dict of weights")
    return stored


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes safetensors whole or not at all, flushed; OSError if that fails."""
    boxes = {name: Box.of_all(value.detach().cpu()) for name, value in tensors.items()}
    kinds = {name: (box.values.dtype, box.whole) for name, box in boxes.items()}
    with replacing(path) as temporary:
        TensorFile(temporary, kinds, metadata).write(boxes, with_header=True)


def write_pickle(path: Path, stored: dict) -> None:
    """torch.save, flushed to disk; OSError when that fails, which torch hides in a RuntimeError."""
    with open(path, "wb") as file:
        try:
            torch.save(stored, file)
        except RuntimeError as error:
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path.name}: {cause}") from None
    flush_to_disk(path)


def check_weights(state_dict: dict) -> None:
    """Raises ValueError unless all values are dense floating-point tensors of finite numbers.

    A tensor NAME of bytes is allowed beside NAME_scale: a quantised weight.
    """
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError("got no weights, expected a state dict of tensors")
    for name, value in state_dict.items():
        is_dense = isinstance(value, Tensor) and value.layout == torch.strided
        is_quantized = is_dense and value.dtype in KINDS and f"{name}_scale" in state_dict
        if not is_dense or not (value.is_floating_point() or is_quantized):
            got = f"{value.dtype}" if is_dense else type(value).__name__
            raise ValueError(f"{name!s:.80}: got {got}, expected a dense floating-point tensor")
        if (held := value.untyped_storage().nbytes()) < value.numel() * value.element_size():
            raise ValueError(f"{name:.80}: got {held:,} bytes, expected those of {value.numel():,}")
        if value.numel() and not all(torch.isfinite(end) for end in torch.aminmax(value)):
            raise ValueError(f"{name:.80}: got weights that are not finite, expected numbers")


def shapes_of(values: dict[str, Any]) -> dict[str, torch.Size]:
    """The shapes of those of the values that are tensors."""
    return {name: value.shape for name, value in values.items() if torch.is_tensor(value)}


def check_shapes(got: dict[str, Sequence[int]], expected: dict[str, Sequence[int]]) -> None:
    """Raises ValueError unless there is a shape of each expected name, and no other."""
    for name in sorted(got.keys() | expected.keys()):
        mine, wanted = (tuple(side[name]) if name in side else "none" for side in (got, expected))
        if mine != wanted:
            raise ValueError(f"{name:.80}: got {mine}, expected {wanted}")


def sampled_digest(path: Path) -> str:
    """Tells the weights of a file or a folder from others by some of their bytes, even of 66 GB.

    A SHA-256 of each file's size and of 256 blocks of 4 KB that are spread over it.
    """
    sha = hashlib.sha256()
    in_folder = [*sorted(path.glob("*.safetensors")), *sorted(path.glob("*.bin"))]
    for file in [path] if path.is_file() else in_folder:
        size = file.stat().st_size
        sha.update(b"%d\n" % size)
        with file.open("rb") as content:
            for block in range(256):
                content.seek(block * max(0, size - 4096) // 255)
                sha.update(content.read(4096))
    return sha.hexdigest()
