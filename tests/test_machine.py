"""Checks of the machine by check_gpu.py: package versions, speed, and memory as planned."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, free_port, needs_gpu, run_script
from packaging.requirements import Requirement
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from latents.loading import BatchStream, loader_workers, read_batches
from latents.sources import open_images
from moe_kernels.operators import kernels_for, triton_runs
from tools.benchmarks import bench_moe, bench_sample, bench_train
from tools.benchmarks.bench_train import TrainBenchmarkConfig, build_engine
from tools.benchmarks.common import (
    kernel_times,
    matrix_peaks,
    open_processes,
    time_by_kind,
    train_step,
)

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
MODELS = ("DiT-S/2", "DiT-B/2")


@pytest.fixture(scope="module")
def peak() -> float:
    """Peak FLOP/s of matrix products in bf16."""
    return matrix_peaks(torch.device("cuda"), ("bf16",))["bf16"]


@pytest.mark.gpu
def test_environment_package_versions_satisfy_the_requirements():
    expected = map(Requirement, (ROOT / "requirements.txt").read_text().splitlines())
    found = [(package, metadata.version(package.name)) for package in expected]
    assert not [f"{p}: got {v}" for p, v in found if not p.specifier.contains(v, True)]


@needs_gpu
def test_environment_gpus_are_new_enough(at_least):
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        at_least(f"compute capability of GPU {number}", major + minor / 10, 8.0)


@needs_gpu
def test_environment_triton_runs(record_property):
    assert triton_runs(torch.device("cuda"))
    rows = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    record_property("experts computed by", (kernels_for(rows).__name__, ""))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 88])  # head sizes of S, B and L; of XL; of G
def test_environment_attention_is_fused(head_dim):
    """No T x T attention weights are stored, forward or backward."""
    device = open_processes().device
    shape = 3, 2, 4, 256, head_dim  # q k and v, images, heads, tokens
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    with sdpa_kernel(FUSED):
        F.scaled_dot_product_attention(q, k, v).sum().backward()


@needs_gpu
@pytest.mark.parametrize("width", [384, 1152, 1408])  # widths of S, XL and G
def test_speed_of_the_layer(width, peak, at_most, at_least, record_property):
    """Compared with the loop over experts and with the matrix peak, at 8192 tokens."""
    config = bench_moe.MoEConfig(width=width, seconds=0.5)
    rows = bench_moe.measure(config, (8192, 8, 2), "bf16", peak, torch.device("cuda"))
    layers = {row["layer"]: row for row in rows}
    for layer, row in layers.items():
        for name in ("forward_ms", "ms", "tflops", "of_peak", "of_dense"):
            if name in row:
                record_property(f"{layer} {name}", (row[name], ""))
    if width == 1152:
        ratio = layers["grouped"]["ms"] / layers["loop"]["ms"]
        at_most("time over the loop's", ratio, 1.0)
        at_least("share of the matrix peak", layers["grouped"]["of_peak"], 0.4)


@needs_gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("experts, backend", [(8, "grouped"), (8, "loop"), (0, "grouped")])
def test_speed_of_a_step(model, experts, backend, peak, record_property):
    config = TrainBenchmarkConfig(model=model, num_experts=experts, batch_size=32, seconds=0.5)
    engine = build_engine(config, "bf16", backend, "adamw", open_processes())
    record_step(bench_train.measure(config, engine, peak), record_property)


@needs_gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_speed_of_sampling(model, precision, record_property):
    config = bench_sample.SampleBenchmarkConfig(
        model=model, num_sampling_steps=2, batch_size=32, backends=("grouped",), seconds=0.5
    )
    (row,) = bench_sample.measure(config, precision, torch.device("cuda"))
    record_property("ms_per_step", (row["ms_per_step"], ""))


@needs_gpu
@pytest.mark.parametrize("model, images", [("DiT-S/2", 32), ("DiT-B/2", 64)])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_peak_of_a_step_matches_the_plan(model, images, precision, at_most, at_least):
    """Uses steps of two micro-batches, whose peak includes gradients and activations."""
    config = TrainBenchmarkConfig(model=model, batch_size=images, micro_batches=2, seconds=0.1)
    engine = build_engine(config, precision, "grouped", "adamw", open_processes())
    row = bench_train.measure(config, engine, peak=1.0)
    del engine
    torch.cuda.empty_cache()
    at_most("peak over the plan", row["peak_gb"] / row["planned_gb"], 1.1)
    at_least("peak over the plan", row["peak_gb"] / row["planned_gb"], 0.9)


def record_step(row: dict, record_property) -> None:
    for name in ("step_ms", "images_per_sec", "tflops", "of_peak", "peak_gb"):
        record_property(name, (row[name], ""))


def run_benchmark(name: str, folder: Path, *flags: str) -> list[dict]:
    """Runs a benchmark on all GPUs of this machine and returns its rows."""
    path, count = folder / "rows.json", torch.cuda.device_count()
    given = [*flags, f"--output={path}"]
    run_script(f"tools/benchmarks/{name}.py", *given, processes=count, PYTHONPATH=str(ROOT))
    return json.loads(path.read_text())["rows"]


needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_gpu
@pytest.mark.parametrize(
    "model, experts, depth, images", [("DiT-XL/2", 8, 4, 64), ("DiT-G/2", 16, 2, 16)]
)
def test_cluster_compiled_blocks(model, experts, depth, images, peak, record_property):
    """Measures blocks of models too large for one GPU, and the share of each kind of kernel."""
    config = TrainBenchmarkConfig(
        model=model, num_experts=experts, depth=depth, batch_size=images, compile=True, seconds=0.5
    )
    engine = build_engine(config, "bf16", "grouped", "adamw", open_processes())
    record_step(bench_train.measure(config, engine, peak), record_property)
    times = kernel_times(partial(train_step, engine, engine.config.objective, images))
    for kind, share in time_by_kind(times).items():
        record_property(f"share of {kind}", (share, ""))
    for name, seconds in list(times.items())[:15]:
        record_property(f"ms of {name:.100}", (1000 * seconds, ""))


@needs_gpu
@needs_gpus
def test_cluster_steps_of_ddp_on_all_gpus(record_property, tmp_path):
    flags = ["--model=DiT-B/2", "--batch-size=64", "--precisions=bf16", "--backends=grouped"]
    (row,) = run_benchmark("bench_train", tmp_path, "--seconds=1", *flags)
    record_step(row, record_property)


@pytest.mark.gpu
def test_cluster_limits_collectives_sharded_steps_and_a_save(request, record_property, tmp_path):
    """Runs scripts/check_cluster.sh on this node; on a CPU with two processes of a tiny model."""
    flags = [f"--folder={tmp_path / 'folder'}", f"--output={tmp_path / 'rows.json'}"]
    if not torch.cuda.is_available():
        if not request.config.getoption("--report"):
            pytest.skip("needs a GPU, or check_gpu.py")
        flags += ["--model=DiT-Ti/2", "--depth=1", "--num-experts=4", "--image-size=64",
                  "--batch-size=2", "--precision=fp32", "--compile=False", "--seconds=0.05",
                  "--megabytes=1"]  # fmt: skip
    count = torch.cuda.device_count() or 2
    environment = {**os.environ, "GPUS": str(count), "PORT": str(free_port())}
    environment["PYTHON"] = sys.executable
    subprocess.run(["bash", "scripts/check_cluster.sh", *flags], cwd=ROOT, env=environment)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    for row in rows:
        record_property(row["check"], (row["value"], row["expected"]))
    assert not [row["check"] for row in rows if row["result"] == "FAIL"]


@pytest.mark.gpu
def test_cluster_images_are_read(record_property, tmp_path):
    """Measures reading photos of 500 x 375 pixels and scaling them to 256, with default workers."""
    is_gpu = torch.cuda.is_available()
    number, micro_batch = (4096, 64) if is_gpu else (16, 8)
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(tmp_path / "0000.jpg", quality=90)
    for name in range(1, number):
        (tmp_path / f"{name:04d}.jpg").hardlink_to(tmp_path / "0000.jpg")
    stream = BatchStream(range(number), micro_batch, end_step=number // micro_batch)
    images = open_images(str(tmp_path), 256)
    start, count = time.perf_counter(), 0
    for batch, _ in read_batches(images, stream, None, pin=is_gpu):
        count += len(batch["label"])
    assert count == number
    if is_gpu:
        record_property("images_per_sec", (count / (time.perf_counter() - start), ""))
        record_property("workers", (loader_workers(None), ""))
