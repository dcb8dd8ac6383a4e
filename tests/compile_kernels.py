"""Compiles every Triton kernel to machine code, for GPUs that need not be there.

    python tests/compile_kernels.py

The kernels are specialised as a launch does it: pointers, widths and strides are multiples of 16
but for the stride that is 1. A line says the kernel, how numbers are multiplied, the compute
capability, the bytes of shared memory, the registers of a thread, the bytes of them that spill to
memory, the instructions of tensor cores and the asynchronous copies.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

sys.path.insert(0, str(Path(__file__).parent.parent))

from moe_kernels import triton_kernels as kernels  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NUMBERS = {"half": "bf16", "tf32": "fp32", "ieee": "fp32"}
ROW = {"BLOCK": kernels.ROW_BLOCK}
SORT = {"BLOCK": kernels.SORT_BLOCK, "COLUMNS": 16}
POINTERS = {
    "expert": "*i64", "counts": "*i32", "ends": "*i32", "place": "*i64", "index": "*i64",
    "end": "*i32", "tile_end": "*i32", "dot": "*fp32",
}  # fmt: skip
OF_NUMBERS = {"x", "out", "rows", "weight", "gate", "up", "grad", "grad_input", "a"}
ANY_INTEGER = {"num_experts", "num_rows", "num_blocks", "size"}


def launches(arithmetic: str) -> list[tuple]:
    """Each kernel with the constants and the warps that it is launched with."""
    first, second, third, warps = kernels.TILES[arithmetic]
    product = {"PRECISION": "ieee" if arithmetic == "half" else arithmetic, "WIDEN": False}
    linear = {"ROWS": first, "OUTPUTS": second, "INPUTS": third, "EXPERTS": 16, **product}
    linear["GROUP"] = kernels.TILE_GROUP
    outer = {"OUTPUTS": first, "INPUTS": second, "ROWS": third, **product}
    products = [
        (kernels.grouped_linear_kernel, {**linear, "stride_input": 1}, warps),
        (kernels.grouped_linear_kernel, {**linear, "stride_output": 1}, warps),  # transposed
        (kernels.grouped_outer_kernel, outer, warps),
    ]
    if arithmetic == "tf32":
        return products
    return [
        (kernels.count_kernel, SORT, 4),
        (kernels.place_kernel, SORT, 4),
        (kernels.gather_kernel, ROW, 4),
        (kernels.combine_kernel, {**ROW, "PER_TOKEN": 2, "WEIGHTED": True}, 4),
        (kernels.activate_kernel, {**ROW, "GATED": True}, 4),
        (kernels.activate_backward_kernel, {**ROW, "GATED": True}, 4),
        *products,
    ]


def compile_kernel(kernel, values: dict, number: str, warps: int, capability: int):
    signature = {
        name: "constexpr" if name in values
        else POINTERS.get(name, f"*{number}" if name in OF_NUMBERS else "i32")
        for name in kernel.arg_names
    }  # fmt: skip
    multiples = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in values and name not in ANY_INTEGER
    }
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=multiples),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )


def registers(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers of a thread, and the bytes of them that lie in memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def main() -> None:
    for arithmetic, number in NUMBERS.items():
        for kernel, values, warps in launches(arithmetic):
            for capability in (80, 90):
                compiled = compile_kernel(kernel, values, number, warps, capability)
                code = compiled.asm["ptx"]
                print(
                    kernel.__name__, arithmetic, capability, compiled.metadata.shared,
                    *registers(compiled), len(re.findall(r"wgmma\.mma|mma\.sync", code)),
                    len(re.findall(r"cp\.async\.c[ag]", code)),
                )  # fmt: skip


if __name__ == "__main__":
    main()
