"""Checks of the machine by check_gpu.py: package versions, speed, and memory as planned."""

import json
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, needs_gpu, run_script
from packaging.requirements import Requirement
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import bench_moe, bench_sample, bench_train
from benchmarks.common import matrix_peaks, open_device
from moe_kernels.experts import triton_runs

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
MODELS = ("DiT-S/2", "DiT-B/2")


@pytest.fixture(scope="module")
def peak() -> float:
    """Peak FLOP/s of matrix products in bf16."""
    return matrix_peaks(torch.device("cuda"), ("bf16",))["bf16"]


@pytest.mark.gpu
def test_environment_package_versions_satisfy_the_requirements():
    wanted = map(Requirement, (ROOT / "requirements.txt").read_text().splitlines())
    found = [(package, metadata.version(package.name)) for package in wanted]
    assert not [f"{p}: got {v}" for p, v in found if not p.specifier.contains(v, True)]


@needs_gpu
def test_environment_gpus_are_new_enough(at_least):
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        at_least(f"compute capability of GPU {number}", major + minor / 10, 8.0)


@needs_gpu
def test_environment_triton_runs():
    assert triton_runs(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 88])  # head sizes of S, B and L; of XL; of G
def test_environment_attention_is_fused(head_dim):
    """No T x T attention weights are stored, forward or backward."""
    device = open_device()
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
        for name in ("forward_ms", "ms", "of_peak", "of_dense"):
            record_property(f"{layer} {name}", (row[name], ""))
    if width == 1152:
        ratio = layers["grouped"]["ms"] / layers["loop"]["ms"]
        at_most("time over the loop's", ratio, 1.0)
        at_least("share of the matrix peak", layers["grouped"]["of_peak"], 0.4)


@needs_gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("experts, backend", [(8, "grouped"), (8, "loop"), (0, "grouped")])
def test_speed_of_a_step(model, experts, backend, peak, record_property):
    config = bench_train.TrainBenchmarkConfig(
        model=model, num_experts=experts, batch_size=32, seconds=0.5
    )
    given = dict(peak=peak, device=torch.device("cuda"))
    row = bench_train.measure(config, "bf16", backend, "adamw", **given)
    for name in ("step_ms", "images_per_sec", "of_peak"):
        record_property(name, (row[name], ""))


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
    config = bench_train.TrainBenchmarkConfig(
        model=model, batch_size=images, micro_batches=2, seconds=0.1
    )
    given = dict(peak=1.0, device=torch.device("cuda"))
    row = bench_train.measure(config, precision, "grouped", "adamw", **given)
    torch.cuda.empty_cache()
    at_most("peak over the plan", row["peak_gb"] / row["planned_gb"], 1.1)
    at_least("peak over the plan", row["peak_gb"] / row["planned_gb"], 0.9)


@needs_gpu
def test_speed_of_collectives(record_property, tmp_path):
    """Measures the collectives of --shard and --expert-parallel over all GPUs of this machine."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    path = tmp_path / "rows.json"
    script, environment = "benchmarks/bench_collectives.py", {"PYTHONPATH": str(ROOT)}
    run_script(script, f"--output={path}", processes=count, **environment)
    for row in json.loads(path.read_text())["rows"]:
        name = f"{row['collective']} of {row['megabytes']} MB"
        record_property(f"{name}, GB/s", (row["gb_per_sec"], ""))
