"""Memory of a CPU: freed pages are taken again, and rows stay in the cache."""

import ctypes
import platform
from collections.abc import Iterator

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory(device: torch.device) -> None:
    """Makes glibc keep freed memory for the next tensor, where a CPU computes.

    Otherwise each step gets every large activation as fresh pages from the system, and filling
    those takes longer than filling the same memory again. Other C libraries are left alone.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cached_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows (R, H): a few rows at a time on a CPU, else all of them at once.

    A few rows stay in the CPU's cache from one operation on them to the next.
    """
    num_rows, width = rows.shape
    block = max(128, 2**18 // width) if rows.device.type == "cpu" else max(1, num_rows)
    for first in range(0, num_rows, block):
        yield slice(first, first + block)
