"""Precisions, memory use and determinism of a process."""

import ctypes
import os
import platform
import re
import resource
import sys

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h

# Names of instructions for matrix products (x86 and ARM) in Linux's list, by dtype.
CPUINFO = "/proc/cpuinfo"
HALF_PRECISION = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}


# Peak TFLOP/s of dense bf16 and fp16 matrix products (vendors' data sheets, without sparsity), by a
# part of the device's name; the first match counts.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181,
    "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
    "MI250X": 191.5,  # of one of its two dies, each a device
}  # fmt: skip


def peak_tflops(device: torch.device) -> float | None:
    """Returns the peak TFLOP/s of a GPU's 16-bit matrix products; None if it is not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """Returns the peak TFLOP/s of a GPU, given the name that the driver reports."""
    found = (peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return next(found, None)


def pinned_bytes(size: int) -> int:
    """Returns the size that PyTorch allocates for a pinned tensor: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def be_deterministic() -> None:
    """Makes PyTorch use deterministic algorithms. Call this before the first GPU matrix product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and only finds bugs
    torch.backends.cudnn.benchmark = False


def memory_in_use(device: torch.device) -> float:
    """Returns the peak memory of this process in GB: allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_freed_memory(device: torch.device) -> None:
    """Makes glibc keep freed memory for the next tensor, if the device is a CPU.

    By default glibc returns large tensors to the system, and faulting in new pages takes longer
    than writing to them. Does nothing with another C library.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def lacks_instructions(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether a CPU has no instructions for half-precision products, so fp32 is faster.

    PyTorch's own check is also true for processors with AVX-512 that lack them. Returns False where
    the system does not list the instructions.
    """
    if device.type != "cpu" or dtype not in HALF_PRECISION or not os.path.exists(CPUINFO):
        return False
    with open(CPUINFO) as file:
        return not HALF_PRECISION[dtype] & set(file.read().split("\n\n")[0].split())
