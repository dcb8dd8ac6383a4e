"""Writes a safetensors file, from one process or, with checksums, from several.

    write_tensors(path, {"weight": weight}, {"format": "pt"})           # one process

    file = TensorFile(path, {"weight": (torch.float32, (8, 4))}, {"format": "pt"})
    pieces = file.write({"weight": Box.of_all(weight)}, with_header=True)
    checksum = joined(path.name, pieces)                 # {"bytes": ..., "crc32": ...}

Every process creates the same `TensorFile` and writes its boxes, which are rectangular parts of the
tensors. Each byte is written once, in ascending order, through a write-only descriptor, so that
clients of a network file system do not overwrite each other's bytes.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.files import atomic_file

CHUNK = 2**24  # bytes per write
TYPES = {  # their names in the header
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Box:
    """Rectangular part of a tensor: `values`, at `offset` in a tensor of shape `full_shape`."""

    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor

    @classmethod
    def of_all(cls, values: Tensor) -> "Box":
        return cls(tuple(values.shape), (0,) * values.dim(), values)

    def runs(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (start, values) of each run of elements that is contiguous in the full tensor."""
        size, values = tuple(self.values.shape), self.values.contiguous()
        if not values.numel():
            return
        cut = cut_dim(size, self.full_shape)
        strides = [math.prod(self.full_shape[d + 1 :]) for d in range(len(size))]
        first = sum(o * stride for o, stride in zip(self.offset, strides, strict=True))
        rows = values.reshape(math.prod(size[:cut]), -1)
        for index, row in zip(product(*map(range, size[:cut])), rows, strict=True):
            yield first + sum(i * stride for i, stride in zip(index, strides, strict=False)), row


def cut_dim(size: Sequence[int], full_shape: Sequence[int]) -> int:
    """Returns the last dimension in which a box is smaller than the tensor; 0 if there is none.

    The box has a run of contiguous elements for each index of the dimensions before it.
    """
    return max((d for d in range(len(size)) if size[d] < full_shape[d]), default=0)


class Piece(NamedTuple):
    """A written range of bytes of a file, with its CRC-32."""

    start: int
    length: int
    crc32: int


class TensorFile:
    """Layout of a safetensors file, determined by the names, types and shapes of the tensors."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str],
    ):
        self.path, self.starts = path, {}
        header: dict = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        # Store types with large elements first, so that every tensor is aligned.
        for name, (dtype, shape) in sorted(
            tensors.items(), key=lambda t: (-t[1][0].itemsize, t[0])
        ):
            self.starts[name], size = end, math.prod(shape) * dtype.itemsize
            offsets, end = [end, end + size], end + size
            header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": offsets}
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)
        self.header = len(content).to_bytes(8, "little") + content

    def write(self, boxes: Mapping[str, Box], *, with_header: bool) -> list[Piece]:
        """Writes boxes of CPU tensors, and flushes them to disk.

        with_header: also write the header; True on exactly one of the processes
        """
        pieces = []
        try:
            # Never follow a link. The first process creates the file.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(self.path, flags, 0o666)
            try:
                if with_header:
                    pieces.append(write_at(descriptor, memoryview(self.header), 0))
                for name in sorted(boxes, key=self.starts.__getitem__):
                    start = len(self.header) + self.starts[name]
                    for number, values in boxes[name].runs():
                        content = memoryview(values.view(torch.uint8).numpy())
                        first = start + number * values.element_size()
                        pieces.append(write_at(descriptor, content, first))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self.path)) from None
        return pieces


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically, flushed to disk."""
    boxes = {name: Box.of_all(value.detach().cpu()) for name, value in tensors.items()}
    kinds = {name: (box.values.dtype, box.full_shape) for name, box in boxes.items()}
    with atomic_file(path) as temporary:
        TensorFile(temporary, kinds, metadata).write(boxes, with_header=True)


def write_at(descriptor: int, content: memoryview, start: int) -> Piece:
    checksum, position = 0, start
    for first in range(0, len(content), CHUNK):
        chunk = content[first : first + CHUNK]
        checksum = zlib.crc32(chunk, checksum)
        while chunk:
            written = os.pwrite(descriptor, chunk, position)
            chunk, position = chunk[written:], position + written
    return Piece(start, len(content), checksum)


def joined(name: str, pieces: Sequence[Piece]) -> dict:
    """Returns the size and CRC-32 of a file, given its pieces from all processes."""
    total, checksum = 0, 0
    for piece in sorted(pieces):
        assert piece.start == total, f"{name}: a byte is written twice, or never"
        checksum = multiply(power_of_x(8 * piece.length), checksum) ^ piece.crc32
        total += piece.length
    return {"bytes": total, "crc32": f"{checksum:08x}"}


# CRC-32 is the remainder of a polynomial over GF(2). Bit 31 is the coefficient of x^0.
POLYNOMIAL, ONE, X = 0xEDB88320, 1 << 31, 1 << 30


def multiply(a: int, b: int) -> int:
    """Returns the product of two remainders."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return result


@cache
def power_of_x(exponent: int) -> int:
    """Returns x^exponent, the factor that appends `exponent` zero bits to a checksum."""
    if exponent < 2:
        return X if exponent else ONE
    half = power_of_x(exponent // 2)
    return multiply(multiply(half, half), X if exponent % 2 else ONE)
