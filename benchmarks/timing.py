"""Times functions against each other, and the matrix-product peak that they are measured by."""

import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_times(
    functions: dict[str, Callable[[], object]], *, seconds: float, device: torch.device
) -> dict[str, float]:
    """The shortest time of each function in seconds.

    They take turns, so that what else the machine does meets all alike, until each has run for
    `seconds` and at least three times; before that each runs twice unmeasured.
    """
    for function in functions.values():
        function()
        function()
    best, spent, rounds = dict.fromkeys(functions, float("inf")), 0.0, 0
    while rounds < 3 or spent < seconds * len(functions):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            elapsed = time.perf_counter() - start
            best[name] = min(best[name], elapsed)
            spent += elapsed
        rounds += 1
    return best


def matrix_product_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best square matrix product: what share of it others reach is comparable."""
    peak = 0.0
    for side in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a = torch.randn(side, side, dtype=dtype, device=device)
        b = torch.randn(side, side, dtype=dtype, device=device)
        times = best_times({"mm": lambda a=a, b=b: a @ b}, seconds=0.5, device=device)
        peak = max(peak, 2 * side**3 / times["mm"])
    return peak
