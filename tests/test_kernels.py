"""Each Triton kernel against its PyTorch counterpart, at sizes that are no multiple of its tiles.

Interpreted on a CPU, on the GPU where there is one; and compiled for GPUs that are not here.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, needs_triton, relative_error

from moe_kernels import torch_kernels

pytest.importorskip("triton", reason="needs Triton")
from moe_kernels import triton_kernels  # noqa: E402

pytestmark = needs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16", "fp16"])
TOKENS, K, E, D, H = 210, 2, 5, 72, 136  # 420 rows: two programs of the sort


@pytest.fixture
def rows():
    """Experts (R,) of which number 3 has no row, and the place and end that follow from them."""
    torch.manual_seed(0)
    expert = torch.randint(0, E, (TOKENS * K,), device=DEVICE)
    expert[expert == 3] = 2
    return expert, *torch_kernels.sort_rows(expert, E)


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def assert_agree(name: str, *arguments, dtype, **options):
    """Calls both kernels of a name, each on its own copies, and compares all that they return."""
    got, want = (
        getattr(module, name)(
            *(x.clone() if torch.is_tensor(x) and x.is_contiguous() else x for x in arguments),
            **options,
        )
        for module in (triton_kernels, torch_kernels)
    )
    if torch.is_tensor(got):
        got, want = (got,), (want,)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert relative_error(a, b) < TOLERANCES[dtype]


def test_the_sort_is_stable_and_counts_every_expert(rows):
    expert, place, end = rows
    got_place, got_end = triton_kernels.sort_rows(expert, E)
    assert torch.equal(got_place, place)
    assert torch.equal(got_end, end)
    assert got_end.dtype == end.dtype == torch.int32


@dtypes
def test_gather_and_combine(rows, dtype):
    _, place, _ = rows
    x, weight = randn(TOKENS, 1100, dtype=dtype), torch.rand(TOKENS * K, device=DEVICE).to(dtype)
    assert torch.equal(triton_kernels.gather(x, place // K), x[place // K])
    many = randn(TOKENS * K, 1100, dtype=dtype)
    for each in (weight, None):
        assert_agree("combine", many, place.view(TOKENS, K), each, dtype=dtype)


@dtypes
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_activations_and_their_backward_pass(dtype, gated):
    hidden, width = randn(40, 2 * 1100, dtype=dtype), 1100
    gate, up = hidden[:, :width], hidden[:, width:] if gated else None
    grad, weight = randn(40, width, dtype=dtype), torch.rand(40, device=DEVICE).to(dtype)
    assert_agree("activate", gate, up, dtype=dtype)
    assert_agree("activate_backward", gate, up, grad, weight, dtype=dtype)


@dtypes
def test_grouped_products(rows, dtype):
    _, _, end = rows
    many, grad = randn(TOKENS * K, D, dtype=dtype), randn(TOKENS * K, H, dtype=dtype)
    weight = randn(E, H, D, dtype=dtype)
    assert_agree("grouped_linear", many, weight, end, dtype=dtype)
    assert_agree("grouped_linear", grad, weight.transpose(1, 2), end, dtype=dtype)
    for wanted in {dtype, torch.float32}:
        got = triton_kernels.grouped_outer(grad, many, end, wanted)
        want = torch_kernels.grouped_outer(grad, many, end, wanted)
        assert got.dtype == want.dtype == wanted
        assert relative_error(got, want) < TOLERANCES[dtype]


@pytest.mark.parametrize("name, value", [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_products_of_fp32_are_tf32_where_pytorchs_are(name, value):
    matmul, x = torch.backends.cuda.matmul, torch.empty(0)
    try:
        setattr(matmul, name, value)
        assert triton_kernels.precision() == triton_kernels.arithmetic(x) == "tf32"
        matmul.allow_tf32 = False
        assert triton_kernels.precision() == triton_kernels.arithmetic(x) == "ieee"
    finally:
        matmul.allow_tf32 = False


def test_a_grouped_product_of_several_groups_of_tiles(rows, monkeypatch):
    _, _, end = rows
    assert end.diff(prepend=end.new_zeros(1)).max() > 3 * 32  # the rows of one group
    monkeypatch.setattr(triton_kernels, "TILES", {"ieee": (32, 32, 32, 4)})
    monkeypatch.setattr(triton_kernels, "TILE_GROUP", 3)
    many, weight = randn(TOKENS * K, D, dtype=torch.float32), randn(E, H, D, dtype=torch.float32)
    assert_agree("grouped_linear", many, weight, end, dtype=torch.float32)


def test_every_kernel_compiles_for_gpus_of_capability_8_and_9(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_kernels.py")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 2 * (9 + 3 + 9)
    for kernel, arithmetic, _, *numbers in lines:
        shared_memory, registers, spilled, of_tensor_cores, asynchronous = map(int, numbers)
        assert shared_memory <= 99 * 1024  # bytes that every GPU from capability 8.0 on has
        assert registers <= 255
        assert spilled == 0
        assert (of_tensor_cores > 0) == (kernel.startswith("grouped") and arithmetic != "ieee")
        assert (asynchronous > 0) == kernel.startswith("grouped")
