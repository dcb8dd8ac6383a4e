"""What a process computes with: precisions, memory, determinism."""

import ctypes
import os
import platform
import resource

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision
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


def be_deterministic() -> None:
    """Makes PyTorch take deterministic algorithms; call it before the first product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and for finding bugs only
    torch.backends.cudnn.benchmark = False


def memory_in_use(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
