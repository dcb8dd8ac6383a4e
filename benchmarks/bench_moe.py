r"""The MoE layer, forward and backward: its back ends against a dense SwiGLU of the active width.

    python benchmarks/bench_moe.py
    python benchmarks/bench_moe.py --width 1152 --tokens 8192 --precisions bf16 --sweep \
        --output results/bench_moe.json

The layer has a gate, routed experts and shared ones; the dense layer has as many hidden units as a
token's experts together. A row says
    experts, top_k, tokens, width, load   of the layer; load is the busiest expert's over the mean
    forward_ms, ms                        the shortest time of a forward pass, and with the backward
    tokens_per_sec, tflops, of_peak       from ms; the peak is a square matrix product's in this run
    of_dense                              ms over the dense layer's, measured in turns with it
    kept_mb                               kept for the backward pass, parameters not counted
--sweep also varies the experts, k, the tokens, the width and the balance, one at a time.
"""

import argparse
from collections.abc import Iterator

import torch
from report import print_table, write_json
from timing import best_times, matrix_product_peak
from torch import Tensor, nn

from moe import EXPERT_BACKENDS, HAS_TRITON, SparseMoEBlock, SwiGLU
from runtime import options
from runtime.devices import keep_freed_memory
from runtime.errors import UserError, exit_on_user_error

RATIO = 4  # expert width over width, as in every published model
SWEEP = {
    "experts": (16, 32, 64), "top_k": (1, 4), "tokens": (1 / 4, 4), "width": (2,), "skew": (3.0,)
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    count, dtypes = options.positive_int, list(options.DTYPES)
    parser.add_argument("--width", type=count, default=384, help="D")
    parser.add_argument("--tokens", type=count, default=2048, help="S, of a whole batch")
    parser.add_argument("--experts", type=count, default=8, help="E")
    parser.add_argument("--top-k", type=count, default=2, help="K")
    parser.add_argument(
        "--precisions", nargs="+", choices=dtypes, default=["fp32", "bf16"],
        help="of the layer; its parameters are fp32 and cast, as in training",
    )  # fmt: skip
    parser.add_argument(
        "--backends", nargs="+", choices=list(EXPERT_BACKENDS), help="default: all that run here"
    )
    options.add_bool(parser, "--sweep", help="vary experts, k, tokens, width and balance too")
    options.add_bool(
        parser, "--keep-freed-memory", default=True,
        help="as training does on a CPU; see runtime.processes.keep_freed_memory",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1.0, help="measured for each time")
    parser.add_argument("--output", default="results/bench_moe.json", help="where the JSON goes")
    return parser.parse_args()


def layers(args: argparse.Namespace) -> Iterator[dict]:
    """The layers to measure: the given one and, with --sweep, one change at a time."""
    given = {
        "experts": args.experts, "top_k": args.top_k, "tokens": args.tokens, "width": args.width,
        "skew": 0.0,
    }  # fmt: skip
    yield given
    for name, values in SWEEP.items() if args.sweep else ():
        for value in values:
            changed = int(given[name] * value) if name in ("tokens", "width") else value
            yield {**given, name: changed}


def make_layer(layer: dict, backend: str, device: torch.device) -> SparseMoEBlock:
    """A layer; with a skew s the router's logits of the E experts fall from s to 0."""
    torch.manual_seed(0)
    block = SparseMoEBlock(
        layer["width"], layer["experts"], layer["top_k"], RATIO, expert_backend=backend
    )
    block.gate.weight.data[:, 0] = layer["skew"] * torch.linspace(1, 0, layer["experts"])
    return block.to(device)


def make_input(layer: dict, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tokens (1, S, D), the first number of each being 1, so that the gate has a bias."""
    torch.manual_seed(1)
    x = torch.randn(1, layer["tokens"], layer["width"], device=device)
    x[..., 0] = 1
    return x.requires_grad_()


def forward(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = module(x)
    return y[0] if isinstance(y, tuple) else y


def forward_and_backward(module: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    y = forward(module, x, dtype)
    y.backward(torch.ones_like(y))
    module.zero_grad(set_to_none=True)
    x.grad = None


def kept_bytes(module: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    """What autograd keeps of a forward pass beside the parameters themselves."""
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(module, x, dtype)
    return sum(kept.values())


def flops(layer: dict) -> int:
    """Multiplications and additions of a forward pass, gate included."""
    d, k = layer["width"], layer["top_k"]
    return 2 * layer["tokens"] * (3 * d * d * (k * RATIO + 2) + d * layer["experts"])


def busiest(block: SparseMoEBlock, x: Tensor, layer: dict) -> float:
    with torch.no_grad():
        chosen = block.gate(x).expert
    return (chosen.bincount(minlength=layer["experts"]).max() * layer["experts"]).item() / len(
        chosen
    )


def measure(
    layer: dict, precision: str, backends: list[str], peak: float, args: argparse.Namespace
) -> Iterator[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, x = options.DTYPES[precision], make_input(layer, options.DTYPES[precision], device)
    width = layer["width"] * (layer["top_k"] * RATIO + 2)
    modules = {"dense": SwiGLU(layer["width"], width).to(device)}
    modules.update({backend: make_layer(layer, backend, device) for backend in backends})
    forwards = {name: lambda m=m: forward(m, x, dtype) for name, m in modules.items()}
    steps = {name: lambda m=m: forward_and_backward(m, x, dtype) for name, m in modules.items()}
    forward_times = best_times(forwards, seconds=args.seconds / 3, device=device)
    times = best_times(steps, seconds=args.seconds, device=device)
    load = busiest(modules[backends[0]], x, layer)
    for name, module in modules.items():
        rate = 3 * flops(layer) / times[name]
        yield {
            "precision": precision,
            "layer": name,
            **{key: layer[key] for key in ("experts", "top_k", "tokens", "width")},
            "load": None if name == "dense" else round(load, 2),
            "forward_ms": forward_times[name] * 1e3,
            "ms": times[name] * 1e3,
            "tokens_per_sec": layer["tokens"] / times[name],
            "tflops": rate / 1e12,
            "of_peak": rate / peak,
            "of_dense": times[name] / times["dense"],
            "kept_mb": kept_bytes(module, x, dtype) / 1e6,
        }


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    if wrong := [layer for layer in layers(args) if layer["top_k"] > layer["experts"]]:
        raise UserError(
            f"--top-k: got {wrong[0]['top_k']} of {wrong[0]['experts']} experts (--sweep "
            "takes up to 4), expected as many experts"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in args.backends or ():
        options.check_expert_backend("--backends", backend, device)
    if args.keep_freed_memory:
        keep_freed_memory(device)
    has_kernels = device.type == "cuda" and HAS_TRITON
    backends = args.backends or ["loop", "grouped", *(["triton"] if has_kernels else [])]
    peaks = {name: matrix_product_peak(options.DTYPES[name], device) for name in args.precisions}
    for name, peak in peaks.items():
        print(f"matrix-product peak in {name}: {peak / 1e12:.3g} TFLOP/s")
    rows = []
    for precision in args.precisions:
        for layer in layers(args):
            rows.extend(measure(layer, precision, backends, peaks[precision], args))
    print_table(rows)
    write_json(args.output, rows, settings={**vars(args), "peaks": peaks}, device=device)


if __name__ == "__main__":
    main(parse_args())
