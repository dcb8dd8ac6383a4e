"""Writes a safetensors file, from one process or from several.

    write_tensors(path, {"weight": weight}, {"format": "pt"})           # one process

    file = TensorFile(path, {"weight": (torch.float32, (8, 4))}, {"format": "pt"})
    file.write({"weight": Box.of_all(weight)}, with_header=True)

Every process creates the same `TensorFile` and writes its boxes, which are rectangular parts of the
tensors. Each byte is written once, in ascending order, through a write-only descriptor, so that
clients of a network file system do not overwrite each other's bytes.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

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

    def write(self, boxes: Mapping[str, Box], *, with_header: bool) -> int:
        """Writes boxes of CPU tensors, and flushes them to disk; returns the number of bytes.

        with_header: also write the header; True on exactly one of the processes
        """
        written = 0
        try:
            # Never follow a link. The first process creates the file.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(self.path, flags, 0o666)
            try:
                if with_header:
                    written += write_at(descriptor, memoryview(self.header), 0)
                for name in sorted(boxes, key=self.starts.__getitem__):
                    start = len(self.header) + self.starts[name]
                    for number, values in boxes[name].runs():
                        content = memoryview(values.view(torch.uint8).numpy())
                        first = start + number * values.element_size()
                        written += write_at(descriptor, content, first)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self.path)) from None
        return written


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically, flushed to disk."""
    boxes = {name: Box.of_all(value.detach().cpu()) for name, value in tensors.items()}
    kinds = {name: (box.values.dtype, box.full_shape) for name, box in boxes.items()}
    with atomic_file(path) as temporary:
        TensorFile(temporary, kinds, metadata).write(boxes, with_header=True)


def write_at(descriptor: int, content: memoryview, start: int) -> int:
    """Writes bytes at a place of a file; returns their number."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done : done + CHUNK], start + done)
    return done
