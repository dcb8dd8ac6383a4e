"""Compiles every Triton kernel to machine code, for GPUs that need not be there.

    python tests/compile_kernels.py

A line says the kernel, the type of its numbers, the compute capability and its bytes of shared
memory.
"""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))

from moe_kernels import triton_kernels as kernels  # noqa: E402

ROW = {"BLOCK": kernels.ROW_BLOCK}
SORT = {"BLOCK": kernels.SORT_BLOCK, "COLUMNS": 16}
POINTERS = {
    "expert": "*i64", "counts": "*i32", "ends": "*i32", "place": "*i64", "index": "*i64",
    "end": "*i32", "tile_end": "*i32", "dot": "*fp32",
}  # fmt: skip
NUMBERS = {"x", "out", "rows", "weight", "gate", "up", "grad", "grad_input", "a"}


def constants(size: int) -> dict:
    """The constants that each kernel is launched with, for numbers of `size` bytes."""
    first, second, third, _ = kernels.TILES[size]
    precision = {"PRECISION": "ieee", "WIDEN": False}
    linear = {"ROWS": first, "OUTPUTS": second, "INPUTS": third, "EXPERTS": 16, **precision}
    outer = {"OUTPUTS": first, "INPUTS": second, "ROWS": third, **precision}
    return {
        kernels.count_kernel: SORT,
        kernels.place_kernel: SORT,
        kernels.gather_kernel: ROW,
        kernels.combine_kernel: {**ROW, "PER_TOKEN": 2, "WEIGHTED": True},
        kernels.activate_kernel: {**ROW, "GATED": True},
        kernels.activate_backward_kernel: {**ROW, "GATED": True},
        kernels.grouped_linear_kernel: linear,
        kernels.grouped_outer_kernel: outer,
    }


def compile_kernel(kernel, values: dict, number: str, size: int, capability: int):
    signature = {
        name: "constexpr" if name in values
        else POINTERS.get(name, f"*{number}" if name in NUMBERS else "i32")
        for name in kernel.arg_names
    }  # fmt: skip
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=values),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernels.TILES[size][3]},
    )


def main() -> None:
    for number, size in (("bf16", 2), ("fp32", 4)):
        for kernel, values in constants(size).items():
            for capability in (80, 90):
                compiled = compile_kernel(kernel, values, number, size, capability)
                assert compiled.asm["cubin"]
                print(kernel.__name__, number, capability, compiled.metadata.shared)


if __name__ == "__main__":
    main()
