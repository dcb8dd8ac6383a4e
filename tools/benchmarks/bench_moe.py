r"""Measures the MoE layer, forward and backward, against a dense SwiGLU of equal active width.

    python -m tools.benchmarks.bench_moe
    python -m tools.benchmarks.bench_moe --experts 8 64 --tokens 2048 8192
    python -m tools.benchmarks.bench_moe --width 1152 --tokens 8192 --precisions bf16

The layer has a gate, routed experts and a shared expert. *dense* has as many hidden units as all
experts of a token together. *products* are only the six matrix products of the routed experts, with
equal numbers of rows and without casts: a lower bound of the time. Each product also has a row: for
gate and up together (up) and for down, the product itself and the products for the gradients of the
rows (dx) and weights (dw). The columns of a row:
    forward_ms, ms             shortest time of a forward pass, and of forward plus backward
    tflops, of_peak            computed from ms; the peak is the speed of square matrix products
    of_dense                   ms divided by the ms of the dense layer, measured in turns
    kept_mb                    memory saved for the backward pass, without parameters
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from checkpoints.costs import saved_tensors
from moe import SparseMoEBlock, SwiGLU
from moe_kernels.operators import kernels_for
from options.parts import option
from runtime.devices import DTYPES
from runtime.errors import run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from tools.benchmarks.common import (
    BenchmarkConfig,
    best_times,
    matrix_peaks,
    open_processes,
    report,
)


@dataclass(frozen=True, kw_only=True)
class MoEConfig(BenchmarkConfig):
    width: int = option(384, group="layer", ge=1, help="D, width of a token")
    tokens: tuple[int, ...] = option((2048,), ge=1, help="S, tokens per batch")
    experts: tuple[int, ...] = option((8,), ge=1, help="E, number of experts")
    top_k: tuple[int, ...] = option((2,), ge=1, help="K, experts per token")
    mlp_ratio: int = option(4, ge=1, help="hidden units of an expert, relative to the width")


def make_products(
    rows: int, experts: int, d: int, h: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Returns the six matrix products of the experts as functions, the forward pass first."""
    k = kernels_for(torch.empty(0, dtype=dtype, device=device))
    end = (torch.arange(1, experts + 1, device=device) * rows // experts).int()  # (E,)
    randn = partial(torch.randn, dtype=dtype, device=device)
    x, gate_up, a = randn(rows, d), randn(rows, 2 * h), randn(rows, h)
    up, down = randn(experts, 2 * h, d), randn(experts, d, h)
    return {
        "up": lambda: k.grouped_linear(x, up, end),
        "down": lambda: k.grouped_linear(a, down, end),
        "up dx": lambda: k.grouped_linear(gate_up, up.transpose(1, 2), end),
        "down dx": lambda: k.grouped_linear(x, down.transpose(1, 2), end),
        "up dw": lambda: k.grouped_outer(gate_up, x, end, dtype),
        "down dw": lambda: k.grouped_outer(x, a, end, dtype),
    }


def call_all(functions: Iterable[Callable[[], object]]) -> None:
    for function in functions:
        function()


def forward(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def forward_and_backward(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    y = forward(layer, x, dtype)
    y.backward(torch.ones_like(y))
    layer.zero_grad(set_to_none=True)
    x.grad = None


def kept_bytes(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    """Returns the bytes that autograd saves in a forward pass, without the parameters."""
    with saved_tensors() as kept:
        forward(layer, x, dtype)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
    for parameter in layer.parameters():
        sizes.pop(parameter.data_ptr(), None)
    return sum(sizes.values())


def measure(
    config: MoEConfig, sizes: tuple[int, int, int], precision: str, peak: float,
    device: torch.device,
) -> Iterator[dict]:  # fmt: skip
    (tokens, experts, top_k), dtype = sizes, DTYPES[precision]
    d, ratio = config.width, config.mlp_ratio
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"dense": SwiGLU(d, d * (top_k * ratio + 2)).to(device)}
    for backend in config.backends:
        layer = SparseMoEBlock(d, experts, top_k, mlp_ratio=ratio, expert_backend=backend)
        layers[backend] = layer.to(device)
    x = torch.randn(1, tokens, d, device=device, requires_grad=True)  # (1, S, D)
    passes = {name: partial(forward, m, x, dtype) for name, m in layers.items()}
    steps = {name: partial(forward_and_backward, m, x, dtype) for name, m in layers.items()}
    products = make_products(tokens * top_k, experts, d, ratio * d, dtype, device)
    passes["products"] = partial(call_all, [products["up"], products["down"]])
    steps["products"] = partial(call_all, products.values())
    forward_times = best_times(passes, seconds=config.seconds, device=device)
    times = best_times(steps, seconds=config.seconds, device=device)
    for name, time in times.items():
        units = top_k * ratio + (0 if name == "products" else 2)  # hidden units / width
        flops = 3 * 2 * tokens * 3 * units * d**2  # backward needs twice the FLOPs of forward
        yield {
            "precision": precision, "layer": name, "experts": experts, "top_k": top_k,
            "tokens": tokens, "forward_ms": forward_times[name] * 1e3, "ms": time * 1e3,
            "tflops": flops / time / 1e12, "of_peak": flops / time / peak,
            "of_dense": time / times["dense"],
            "kept_mb": kept_bytes(layers[name], x, dtype) / 1e6 if name in layers else None,
        }  # fmt: skip
    times = best_times(products, seconds=config.seconds / 4, device=device)
    for name, time in times.items():
        flops = 2 * tokens * top_k * ratio * d**2 * (2 if name.startswith("up") else 1)
        yield {
            "precision": precision, "layer": name, "experts": experts, "top_k": top_k,
            "tokens": tokens, "ms": time * 1e3, "tflops": flops / time / 1e12,
            "of_peak": flops / time / peak,
        }  # fmt: skip


def parse_args() -> MoEConfig:
    return parse_config(MoEConfig, __doc__)


def main(config: MoEConfig) -> None:
    prepare_output("--output", config.output)
    device = open_processes().device
    peaks, rows = matrix_peaks(device, config.precisions), []
    for precision in config.precisions:
        for sizes in product(config.tokens, config.experts, config.top_k):
            rows.extend(measure(config, sizes, precision, peaks[precision], device))
    report(config, rows, device, peaks)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
