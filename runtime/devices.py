"""Precisions, memory use and determinism of a process."""

import os
import resource
import sys

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --precision


def be_deterministic() -> None:
    """Makes PyTorch use deterministic algorithms. Call this before the first GPU matrix product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and only finds bugs
    torch.backends.cudnn.benchmark = False


def memory_in_use(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on a GPU, or resident for a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
