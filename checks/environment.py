"""The software: versions as in requirements.txt, Triton, NCCL, compiler, attention."""

import re
import shutil
from importlib import metadata

import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch.profiler import profile

from checks.common import NO_GPU, ROOT, CheckConfig, Checks
from moe_kernels.experts import triton_runs

HEAD_DIMS = (64, 72, 88)  # of S, B and L; XL; G
SDPA = re.compile(r"aten::_scaled_dot_product_(?:(attention_math)|(\w+)_attention(?:_for_cpu)?)$")


def check(checks: Checks, config: CheckConfig) -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        package = Requirement(line)
        with checks.guard(f"{package.name} {package.specifier}"):
            version = metadata.version(package.name)
            fits = package.specifier.contains(version, prereleases=True)
            checks.holds(package.name, fits, version, str(package.specifier))
    if config.is_small:
        checks.skip("GPUs, NCCL, Triton and its C compiler", NO_GPU)
    else:
        check_cuda(checks)
    dtype = torch.float32 if config.is_small else torch.bfloat16
    for head_dim in HEAD_DIMS:
        name = f"attention back end, head dim {head_dim}, {dtype}".replace("torch.", "")
        with checks.guard(name):
            backend = attention_backend(head_dim, config.device, dtype)
            checks.holds(name, backend not in ("attention_math", "none"), backend, "a fused one")


def check_cuda(checks: Checks) -> None:
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = properties.major + properties.minor / 10
        checks.at_least(f"capability of GPU {number}, {properties.name}", capability, 8.0)
    with checks.guard("NCCL"):
        checks.inform("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    checks.holds("C compiler, for Triton", bool(compiler), compiler, "one")
    with checks.guard("Triton runs"):
        runs = triton_runs(torch.device("cuda"))
        checks.holds("Triton runs", runs, runs, "True")
    has_bf16 = torch.cuda.is_bf16_supported()
    checks.holds("bf16 on the GPU", has_bf16, has_bf16, "True")


def attention_backend(head_dim: int, device: str, dtype: torch.dtype) -> str:
    """Which of its back ends scaled_dot_product_attention takes, forward and backward."""
    shape = (2, 4, 256, head_dim)  # images, heads, tokens
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in "qkv")
    with profile() as seen:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    found = filter(None, (SDPA.fullmatch(event.name) for event in seen.events()))
    return " and ".join(sorted({next(filter(None, match.groups())) for match in found})) or "none"
