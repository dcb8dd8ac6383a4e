"""Each Triton kernel compared with its PyTorch counterpart, at sizes that tiles do not divide.

Kernels run on the GPU, or interpreted on a CPU. They are also compiled for other GPUs.
"""

import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from helpers import needs_gpu, needs_triton, relative_error

from moe_kernels import torch_kernels
from moe_kernels.experts import sort_rows
from moe_kernels.operators import kernels_for, triton_runs
from moe_kernels.quantized import GROUP, quantize

triton = pytest.importorskip("triton", reason="needs Triton")
from moe_kernels import triton_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
dtypes = pytest.mark.parametrize(  # the interpreter treats fp16 like bf16
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=needs_gpu)],
    ids=["fp32", "bf16", "fp16"],
)
K, E, D, H = 2, 5, 72, 136
CAPABILITIES = (80, 90)  # compute capabilities with different instruction sets


def rows_of(tokens: int) -> tuple[torch.Tensor, ...]:
    """Rows as returned by `sort_rows`. Expert 3 has no rows."""
    torch.manual_seed(0)
    expert = torch.randint(0, E, (tokens * K,), device=DEVICE)
    expert[expert == 3] = 2
    return sort_rows(torch.arange(tokens * K, device=DEVICE) // K, expert, tokens, E)


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


@pytest.fixture
def assert_agree(at_most):
    """Function that calls both kernels of a given name and compares their results."""

    def check(name: str, *arguments, dtype):
        got, want = (getattr(k, name)(*arguments) for k in (triton_kernels, torch_kernels))
        if torch.is_tensor(got):
            got, want = (got,), (want,)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            at_most(f"error of {name}", relative_error(a, b), TOLERANCES[dtype])

    return check


@pytest.mark.gpu
@needs_triton
@dtypes
def test_triton_gather_and_combine_agree_with_pytorch(dtype, assert_agree):
    tokens = 42  # no multiple of the rows of a block, which are 8
    _, place, start, _ = rows_of(tokens)
    x, weight = randn(tokens, 300, dtype=dtype), torch.rand(tokens * K, device=DEVICE).to(dtype)
    assert torch.equal(triton_kernels.gather(x, place // K), x[place // K])
    many = randn(tokens * K, 300, dtype=dtype)
    some = torch.randint(tokens * K, (tokens - 1,), device=DEVICE).sort().values
    any_number = torch.tensor([0, *some.tolist(), tokens * K], device=DEVICE)
    for first, each in ((start, weight), (any_number, None)):
        assert_agree("combine", many, place, first, each, dtype=dtype)


@pytest.mark.gpu
@needs_triton
@dtypes
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_triton_activations_and_their_backward_pass_agree_with_pytorch(dtype, gated, assert_agree):
    rows, width = 9, 300  # one row more than a block has
    hidden = randn(rows, 2 * width, dtype=dtype)
    gate, up = hidden[:, :width], hidden[:, width:] if gated else None
    grad, weight = randn(rows, width, dtype=dtype), torch.rand(rows, device=DEVICE).to(dtype)
    assert_agree("activate", gate, up, dtype=dtype)
    assert_agree("activate_backward", gate, up, grad, weight, dtype=dtype)


@pytest.mark.gpu
@needs_triton
@dtypes
def test_triton_grouped_products_agree_with_pytorch(dtype, assert_agree):
    *_, end = rows_of(110)  # expert 2 has more rows than one tile in fp32
    assert end.diff(prepend=end.new_zeros(1)).max() > triton_kernels.TILES["ieee"][0]
    rows = int(end[-1])
    many, grad = randn(rows, D, dtype=dtype), randn(rows, H, dtype=dtype)
    weight = randn(E, H, D, dtype=dtype)
    assert_agree("grouped_linear", many, weight, end, dtype=dtype)
    assert_agree("grouped_linear", grad, weight.transpose(1, 2), end, dtype=dtype)
    for kind in ("int8", "int4"):
        x = randn(rows, 96, dtype=dtype)
        quantized = quantize(randn(E, H, 96, dtype=dtype), kind)
        assert_agree("grouped_linear", x, quantized, end, dtype=dtype)
    for out_dtype in {dtype, torch.float32}:
        assert_agree("grouped_outer", grad, many, end, out_dtype, dtype=dtype)


@pytest.mark.gpu
@needs_triton
def test_triton_grouped_product_of_several_tile_groups(monkeypatch, assert_agree):
    *_, end = rows_of(210)
    assert end.diff(prepend=end.new_zeros(1)).max() > 3 * 32  # the rows of one group
    monkeypatch.setattr(triton_kernels, "TILES", {"ieee": (32, 32, 32, 4)})
    monkeypatch.setattr(triton_kernels, "TILE_GROUP", 3)
    rows = int(end[-1])
    many, weight = randn(rows, 40, dtype=torch.float32), randn(E, 40, 40, dtype=torch.float32)
    assert_agree("grouped_linear", many, weight, end, dtype=torch.float32)


@pytest.mark.parametrize("name, value", [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_triton_fp32_products_use_tf32_when_pytorch_does(name, value):
    matmul, x = torch.backends.cuda.matmul, torch.empty(0)
    try:
        setattr(matmul, name, value)
        assert triton_kernels.precision() == triton_kernels.arithmetic(x) == "tf32"
        matmul.allow_tf32 = False
        assert triton_kernels.precision() == triton_kernels.arithmetic(x) == "ieee"
    finally:
        matmul.allow_tf32 = False


class OnGPU:
    """CPU tensor that reports a CUDA device."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.is_cuda, self.device = tensor, True, torch.device("cuda")

    def __getattr__(self, name: str):
        return getattr(self.tensor, name)


@pytest.mark.parametrize("kind", [RuntimeError, triton.TritonError])  # without gcc, by an old ptxas
def test_a_triton_that_cannot_compile_gives_one_warning_and_pytorch_kernels(monkeypatch, kind):
    def fail(*arguments):
        raise kind("Failed to find C compiler.\nPlease specify one")

    triton_runs.cache_clear()
    monkeypatch.setattr(triton_kernels, "gather", fail)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: torch.empty(size))
    x = OnGPU(torch.empty(1))
    with pytest.warns(UserWarning, match="slower kernels: Failed to find C compiler.$") as warned:
        assert kernels_for(x) is kernels_for(x) is torch_kernels
    assert len(warned) == 1
    triton_runs.cache_clear()


OF_VALUES = {8: "*i8", 4: "*u8"}  # quantised weights, by number of bits
POINTERS = {
    "place": "*i64", "index": "*i64", "start": "*i64", "end": "*i32", "dot": "*fp32",
    "scale": "*bf16",
}  # fmt: skip
OF_NUMBERS = {"x", "out", "rows", "weight", "gate", "up", "grad", "grad_input", "a"}
ANY_INTEGER = {"num_experts", "num_rows", "num_tokens"}


def launches(capability: int) -> list[tuple]:
    """Launches of every kernel: arithmetic, kernel, constants and number of warps.

    To save time, fp32 products are compiled only for the first capability, of an untransposed
    weight, and quantised to 4 bits.
    """
    block = dict(zip(("ROWS", "COLUMNS"), triton_kernels.block_of(1152), strict=True))
    tokens = {"TOKENS": block["ROWS"], "COLUMNS": block["COLUMNS"], "WEIGHTED": True}
    backward = {"GATED": True, "COLUMNS": block["COLUMNS"]}
    found = [
        ("half", triton_kernels.gather_kernel, block, 4),
        ("half", triton_kernels.combine_kernel, tokens, 4),
        ("half", triton_kernels.activate_kernel, {**block, "GATED": True}, 4),
        ("half", triton_kernels.activate_backward_kernel, backward, 4),
    ]
    linear, outer = triton_kernels.grouped_linear_kernel, triton_kernels.grouped_outer_kernel
    for arithmetic, (first, second, third, warps) in triton_kernels.TILES.items():
        if arithmetic != "half" and capability != CAPABILITIES[0]:
            continue
        product = {"PRECISION": "ieee" if arithmetic == "half" else arithmetic, "WIDEN": False}
        tile = {"ROWS": first, "OUTPUTS": second, "INPUTS": third, "EXPERTS": 16}
        tile["GROUP"] = triton_kernels.TILE_GROUP
        is_half = arithmetic == "half"
        found += [
            (arithmetic, linear, {**tile, **product, "BITS": 16, stride: 1}, warps)
            for stride in ("stride_input", *["stride_output"] * is_half)  # also of its transpose
        ]
        for bits, inputs in ((4, GROUP), *[(8, third)] * is_half):
            stored = {"INPUTS": inputs, "BITS": bits, "stride_input": 1}
            values = {**tile, **product, **stored}
            found.append((arithmetic, linear, values, triton_kernels.QUANTIZED_WARPS))
        tile = {"OUTPUTS": first, "INPUTS": second, "ROWS": third}
        found.append((arithmetic, outer, {**tile, **product}, warps))
    return found


def compile_kernels(folder: Path, capability: int) -> list[dict] | str:
    """Compiles every kernel; returns their resource usage, or why this Triton cannot compile."""
    compiled = []
    for arithmetic, kernel, values, warps in launches(capability):
        number = "bf16" if arithmetic == "half" else "fp32"
        signature = {
            name: "constexpr" if name in values
            else POINTERS.get(name, f"*{number}" if name in OF_NUMBERS else "i32")
            for name in kernel.arg_names
        }  # fmt: skip
        if values.get("BITS", 16) < 16:
            signature["weight"] = OF_VALUES[values["BITS"]]
        multiples = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name not in values and name not in ANY_INTEGER
        }
        source = triton.compiler.ASTSource(kernel, signature, values, multiples)
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        try:
            code = triton.compile(source, target=target, options={"num_warps": warps})
        except (RuntimeError, ValueError) as error:
            if compiled:  # this Triton compiles for this GPU
                raise
            return f"Triton {triton.__version__} cannot compile for {capability}: {error}"
        (folder / "cubin").write_bytes(code.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "-res-usage", folder / "cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        compiled.append({
            "kernel": kernel.__name__, "arithmetic": arithmetic, "shared": code.metadata.shared,
            "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
            "tensor cores": len(re.findall(r"wgmma\.mma|mma\.sync|tcgen05\.mma", code.asm["ptx"])),
        })  # fmt: skip
    return compiled


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """New process that compiles kernels, because Triton decides at import whether to interpret."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "0")
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_triton_kernels_compile_without_spills_for_tensor_cores(compiler, capability, tmp_path):
    kernels = compiler.submit(compile_kernels, tmp_path, capability).result()
    if isinstance(kernels, str):
        pytest.skip(kernels)
    for kernel in kernels:
        is_product = kernel["kernel"].startswith("grouped")
        assert kernel["shared"] <= 99 * 1024, kernel  # bytes available from capability 8.0 on
        assert kernel["spilled"] == 0, kernel
        uses_tensor_cores = is_product and kernel["arithmetic"] != "ieee"
        assert (kernel["tensor cores"] > 0) == uses_tensor_cores, kernel


@pytest.mark.parametrize("capability, fused", [((8, 0), False), ((9, 0), True), ((10, 0), True)])
def test_pytorchs_fused_product_is_used_only_where_it_is_correct(monkeypatch, capability, fused):
    """On capability 10, PyTorch's product returns a wrong weight gradient for experts without
    rows."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows, weight = OnGPU(torch.zeros(4, 16).bfloat16()), torch.zeros(2 * 16 * 16 + 1)
    end, has_product = torch.tensor([4, 4]), torch_kernels.has_fused_product
    assert has_product(rows, weight[:-1].view(2, 16, 16), end) == fused
    outer = has_product(rows, rows, end, torch_kernels.OUTER_ON)
    assert outer == (fused and capability < (10, 0))
    assert not has_product(rows, weight[1:].view(2, 16, 16), end)  # odd address
    assert not has_product(rows, torch.zeros(2, 12, 12).transpose(1, 2), end)
    assert not has_product(OnGPU(torch.zeros(4, 16)), weight[:-1], end)
    assert not has_product(rows, weight[:-1].view(2, 16, 16), torch.full((1024,), 4))
