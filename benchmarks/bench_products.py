"""The grouped products of the experts by themselves: how near to the peak, with how many rows each.

    python benchmarks/bench_products.py
    python benchmarks/bench_products.py --width 1152 --rows 16384 --precisions bf16 fp16

The same rows go to few experts or to many, evenly. A row says, of the peak of a square matrix
product in this run,
    up, down                      the two products of the forward pass
    up_input, down_input          those of the backward pass for the gradient of their input
    up_weight, down_weight        and of their weight
    all                           all six: what would be left of the peak if nothing else took time
    ms                            all six together
Weights are in the type that is multiplied, so that no cast is counted.
"""

import argparse
from collections.abc import Callable

import torch
from report import print_table, write_json
from timing import best_times, matrix_product_peak
from torch import Tensor

from moe import HAS_TRITON
from moe_kernels.experts import kernels_named
from runtime import options
from runtime.devices import keep_freed_memory
from runtime.errors import UserError, exit_on_user_error

RATIO = 4  # expert width over width, as in every published model


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    count = options.positive_int
    parser.add_argument("--width", type=count, default=384, help="D")
    parser.add_argument("--rows", type=count, default=4096, help="of all experts: tokens times k")
    parser.add_argument("--experts", nargs="+", type=count, default=[2, 8, 16, 32, 64])
    parser.add_argument(
        "--precisions", nargs="+", choices=list(options.DTYPES), default=["fp32", "bf16"]
    )
    parser.add_argument(
        "--kernels", nargs="+", choices=["torch", "triton"], help="default: all that run here"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="measured for each product")
    parser.add_argument("--output", default="results/bench_products.json", help="where JSON goes")
    return parser.parse_args()


def products(
    kernels: str,
    width: int,
    num_rows: int,
    num_experts: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Callable[[], Tensor]]:
    """The six products of a forward and backward pass of SwiGLU experts."""
    k, hidden = kernels_named(kernels), RATIO * width
    end = (torch.arange(1, num_experts + 1, device=device) * num_rows // num_experts).int()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    x, gate_up, a = (randn(num_rows, columns) for columns in (width, 2 * hidden, hidden))
    up, down = randn(num_experts, 2 * hidden, width), randn(num_experts, width, hidden)
    return {
        "up": lambda: k.grouped_linear(x, up, end),
        "down": lambda: k.grouped_linear(a, down, end),
        "up_input": lambda: k.grouped_linear(gate_up, up.transpose(1, 2), end),
        "down_input": lambda: k.grouped_linear(x, down.transpose(1, 2), end),
        "up_weight": lambda: k.grouped_outer(gate_up, x, end, dtype),
        "down_weight": lambda: k.grouped_outer(x, a, end, dtype),
    }


def measure(
    args: argparse.Namespace,
    precision: str,
    kernels: str,
    experts: int,
    peak: float,
    device: torch.device,
) -> dict:
    dtype = options.DTYPES[precision]
    functions = products(kernels, args.width, args.rows, experts, dtype, device)
    times = {  # one after another, so that the weights of one are not what the next finds cached
        name: best_times({name: function}, seconds=args.seconds, device=device)[name]
        for name, function in functions.items()
    }
    flops = {
        name: 2 * args.rows * RATIO * args.width**2 * (2 if name.startswith("up") else 1)
        for name in times
    }
    total = sum(times.values())
    return {
        "precision": precision,
        "kernels": kernels,
        "experts": experts,
        "rows_each": args.rows / experts,
        **{name: flops[name] / times[name] / peak for name in times},
        "all": sum(flops.values()) / total / peak,
        "ms": total * 1e3,
    }


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    if args.width % 8:
        raise UserError(f"--width: got {args.width}, expected a multiple of 8")
    has_triton = device.type == "cuda" and HAS_TRITON
    kernels = args.kernels or ["torch", *(["triton"] if has_triton else [])]
    for name in kernels:
        options.check_expert_backend("--kernels", name, device)
    rows, peaks = [], {}
    for precision in args.precisions:
        peaks[precision] = matrix_product_peak(options.DTYPES[precision], device)
        print(f"matrix-product peak in {precision}: {peaks[precision] / 1e12:.3g} TFLOP/s")
        for name in kernels:
            for experts in args.experts:
                rows.append(measure(args, precision, name, experts, peaks[precision], device))
    print_table(rows)
    write_json(args.output, rows, settings={**vars(args), "peaks": peaks}, device=device)


if __name__ == "__main__":
    main(parse_args())
