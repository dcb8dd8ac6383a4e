"""The stages of check_gpu.py: each adds its rows to the report."""

import math
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import bench_moe, bench_sample, bench_train
from benchmarks.common import matrix_peaks, open_device
from checks.report import Rows
from moe_kernels.experts import triton_runs

NO_GPU = "needs a GPU"
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
HEAD_DIMS = (64, 72, 88)  # of S, B and L; XL; G
WIDTHS = {"S": 384, "XL": 1152, "G": 1408}
TOKENS = 8192  # of 32 images
MODELS = (("DiT-S/2", 32), ("DiT-B/2", 64))  # whose memory is measured, and images
LEAST_SHARE = 0.4  # of the matrix peak that the layer of XL has to reach
PLAN_TOLERANCE = 0.1


def check_environment(rows: Rows, device: torch.device, quick: bool) -> None:
    """Versions as in requirements.txt, the GPUs, Triton, and attention without T x T weights."""
    with rows.guard(name := "versions of requirements.txt"):
        wanted = map(Requirement, Path("requirements.txt").read_text().splitlines())
        found = [(package, metadata.version(package.name)) for package in wanted]
        others = [f"{p}: got {v}" for p, v in found if not p.specifier.contains(v, True)]
        rows.holds(name, not others, "; ".join(others) or len(found), "no others")
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(number)
            rows.at_least(f"compute capability of GPU {number}", major + minor / 10, 8.0)
        rows.holds("Triton runs", triton_runs(device), None, "without a warning in the log")
    else:
        rows.add("GPUs and Triton", "skipped", reason=NO_GPU)
    for head_dim in HEAD_DIMS:
        shape = 3, 2, 4, 256, head_dim  # q k and v, images, heads, tokens
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        with rows.guard(name := f"fused attention, head dim {head_dim}"), sdpa_kernel(FUSED):
            F.scaled_dot_product_attention(q, k, v).sum().backward()
            rows.add(name, "pass")


class Reporter:
    """A plugin of pytest that makes a row of each test, with the numbers of its `at_most`."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        name = report.nodeid.removeprefix("tests/test_").replace(".py::test_", ": ")
        result = {"passed": "pass", "failed": "fail"}.get(report.outcome, report.outcome)
        values = {k: v if math.isfinite(v) else str(v) for k, (v, _) in report.user_properties}
        limits = [f"{key} <= {limit:g}" for key, (_, limit) in report.user_properties]
        reason = report.longrepr[2] if report.skipped else report.longreprtext[-300:]
        self.rows.add(name.replace("_", " "), result, values or None, ", ".join(limits), reason)


def check_tests(rows: Rows, device: torch.device, quick: bool) -> None:
    """The tests of the GPU: kernels, steps, runs, parallel runs."""
    arguments = ["tests", "-v", "-p", "no:cacheprovider"]
    arguments += ["--gpu"] if device.type == "cuda" else ["-m", "gpu or needs_gpu"]
    if quick:
        arguments += ["--ignore", "tests/test_deepspeed.py"]
        rows.add("deepspeed", "skipped", reason="--quick")
    code = pytest.main(arguments, [Reporter(rows)])
    rows.holds("pytest comes to its end", code < 2, int(code), "exit code 0 or 1")


def check_speed(rows: Rows, device: torch.device, quick: bool) -> None:
    """The layer against the loop and the peak of a matrix product; a step; sampling."""
    on_gpu = open_device().type == "cuda"
    seconds = 0.1 if not on_gpu else 0.5 if quick else 2.0
    peak = matrix_peaks(device, ("bf16",))["bf16"]
    rows.add("peak of a matrix product, bf16, TFLOP/s", "info", peak / 1e12)
    for name, width in (WIDTHS if on_gpu else {"a tiny model": 64}).items():
        with rows.guard(f"layer of {name}"):
            config = bench_moe.MoEConfig(width=width, seconds=seconds)
            sizes = TOKENS if on_gpu else 256, 8, 2  # experts, experts a token
            found = bench_moe.measure(config, sizes, "bf16", peak, device)
            layers = {row["layer"]: row for row in found}
            for layer, row in layers.items():
                rows.inform(f"layer of {name}, {layer}", row, "forward_ms ms of_peak of_dense")
            if name == "XL":
                ratio = layers["grouped"]["ms"] / layers["loop"]["ms"]
                rows.at_most("layer of XL, time over the loop's", ratio, 1.0)
                share = layers["grouped"]["of_peak"]
                rows.at_least("layer of XL, of the matrix peak", share, LEAST_SHARE)
    model = "DiT-Ti/2" if not on_gpu else "DiT-S/2" if quick else "DiT-B/2"
    size = dict(batch_size=32) if on_gpu else dict(batch_size=2, image_size=64)
    settings = dict(model=model, seconds=seconds, backends=("grouped",), **size)
    for experts, backend in ((8, "grouped"), (8, "loop"), (0, "grouped")):
        with rows.guard(name := f"step of {model}, {experts} experts, {backend}"):
            config = bench_train.TrainBenchmarkConfig(num_experts=experts, **settings)
            row = bench_train.measure(config, "bf16", backend, "adamw", peak=peak, device=device)
            rows.inform(name, row, "step_ms images_per_sec of_peak")
    config = bench_sample.SampleBenchmarkConfig(num_sampling_steps=2, **settings)
    for precision in ("bf16", "fp16") if on_gpu else ("bf16",):
        with rows.guard(name := f"sampling {model}, {precision}"):
            rows.inform(name, bench_sample.measure(config, precision, device)[0], "ms_per_step")


def check_memory(rows: Rows, device: torch.device, quick: bool) -> None:
    """The peak of steps of two micro-batches, where gradients and activations meet."""
    if device.type == "cpu":
        rows.add("peak over the plan", "skipped", reason=f"{NO_GPU}: a CPU counts other memory too")
        return
    for (model, images), precision in product(MODELS[: 1 if quick else 2], ("bf16", "fp32")):
        with rows.guard(name := f"peak over the plan, {model}, {images} images, {precision}"):
            settings = dict(model=model, batch_size=images, micro_batches=2, seconds=0.1)
            config = bench_train.TrainBenchmarkConfig(**settings)
            row = bench_train.measure(
                config, precision, "grouped", "adamw", peak=1.0, device=device
            )
            rows.at_most(name, row["peak_gb"] / row["planned_gb"], 1 + PLAN_TOLERANCE)
            rows.at_least(name, row["peak_gb"] / row["planned_gb"], 1 - PLAN_TOLERANCE)
        torch.cuda.empty_cache()
