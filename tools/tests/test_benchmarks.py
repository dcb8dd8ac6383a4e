"""The benchmarks run, and write their measurements with the machine and the settings."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call_main, expect_error, in_processes

from runtime.processes import Distributed
from tools.benchmarks import bench_cluster, bench_moe, bench_save, bench_train, common
from tools.benchmarks.common import matrix_peaks, time_by_kind

TINY = ["--seconds=0.01", "--precisions", "fp32"]
TINY_MODEL = ["--model=DiT-Ti/2", "--depth=1", "--image-size=64", "--batch-size=2"]
TINY_LAYER = ["--width=64", "--tokens=128", "--mlp-ratio=3", "--experts", "4", "16"]


def rows_of(script: str, folder, *flags) -> list[dict]:
    call_main(script, *TINY, *flags, f"--output={folder / 'rows.json'}")
    content = json.loads((folder / "rows.json").read_text())
    assert content["machine"]["versions"]["torch"] and content["settings"]["seconds"] == 0.01
    for row in content["rows"]:
        assert all(value > 0 for name, value in row.items() if name.endswith(("ms", "per_sec")))
    return content["rows"]


def test_bench_sample_measures_each_expert_back_end(tmp_path, capsys):
    kinds = ("--quantize", "none", "int8")
    rows = rows_of("tools.benchmarks.bench_sample", tmp_path, *TINY_MODEL, *kinds)
    measured = [(row["experts"], row["quantize"]) for row in rows]
    assert measured == [(name, kind) for name in ("loop", "grouped") for kind in kinds[1:]]
    assert "fp32" in capsys.readouterr().out


def test_the_seconds_of_sampling_are_measured_with_and_without_reuse(tmp_path, capsys):
    output = tmp_path / "rows.json"
    words = ["--run", ROOT / "assets" / "demo", "--batch-size", 2, "--seconds", 0.01]
    words += ["--rounds", 2, "--precisions", "fp32", "--output", output, "--settings"]
    call_main("tools.benchmarks.bench_sample", *words, "euler:2", "heun:2:2")
    first, second = json.loads(output.read_text())["rows"]
    assert (first["sampler"], first["steps"], first["reuse"]) == ("euler", 2, 0)
    assert (second["sampler"], second["steps"], second["reuse"]) == ("heun", 2, 2)
    both = zip(second["ms_per_image"], first["ms_per_image"], strict=True)
    assert first["ratios"] == [1, 1] and second["ratios"] == [mine / ref for mine, ref in both]
    error = expect_error(capsys, "tools.benchmarks.bench_sample", *words, "euler")
    assert "--settings: got euler" in error


def test_bench_moe_measures_the_layer_next_to_a_dense_layer_and_its_products(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_moe, "matrix_peaks", lambda *_: {"fp32": 2e11})  # takes seconds
    rows = rows_of("tools.benchmarks.bench_moe", tmp_path, *TINY_LAYER)
    few, many = ({row["layer"]: row for row in half} for half in (rows[:10], rows[10:]))
    assert list(few)[:5] == ["dense", "loop", "grouped", "products", "up"]
    work = [row["ms"] * row["tflops"] for row in rows[3:10]]  # all six products, and each of them
    assert sum(work[1:]) == pytest.approx(work[0])
    assert few["dense"]["of_dense"] == 1
    # The grouped back end recomputes the tensors that the loop keeps, for any number of experts.
    assert few["grouped"]["kept_mb"] < 0.5 * few["loop"]["kept_mb"]
    assert few["grouped"]["kept_mb"] < 1.1 * few["dense"]["kept_mb"]
    assert many["grouped"]["kept_mb"] < 1.05 * few["grouped"]["kept_mb"]


def test_bench_train_measures_each_back_end_with_new_inputs_at_every_step(tmp_path, monkeypatch):
    from models import DiT

    seen, forward = [], DiT.forward

    def watched(model: DiT, x, t, y):
        if type(x) is torch.Tensor:  # not a tensor without data, which the memory plan uses
            seen.append(x.sum().item())
        return forward(model, x, t, y)

    monkeypatch.setattr(DiT, "forward", watched)
    monkeypatch.setattr(bench_train, "matrix_peaks", lambda *_: {"fp32": 2e11})  # takes seconds
    rows = rows_of("tools.benchmarks.bench_train", tmp_path, *TINY_MODEL)
    assert [row["experts"] for row in rows] == ["loop", "grouped"]
    assert len(seen) >= 20 and max(Counter(seen).values()) == 2  # once by each back end


def test_benchmarks_measure_saves_and_the_steps_of_a_cluster_of_two_processes(tmp_path):
    for saves, cluster in in_processes(measure_together, tmp_path / "saves"):
        assert [row["processes"] for row in saves] == [2, 2]
        assert all(row["gb"] > 0 and row["read_s"] > 0 for row in saves)
        checks = {row["check"]: row for row in cluster}
        assert checks["ulimit -n"]["result"] == "pass" and checks["save, gb"]["value"] > 0
        for how in ("--shard", "--expert-parallel 2"):
            assert checks[f"{how}, step_ms"]["value"] > 0
        assert any(name.startswith("all_to_all of 1 MB, experts") for name in checks)
    assert not (tmp_path / "saves" / "checkpoints" / "0000001").exists()  # the second replaced it


def measure_together(dist: Distributed, folder: Path) -> tuple[list[dict], ...]:
    tiny = dict(model="DiT-Ti/2", depth=1, image_size=64, batch_size=2, seconds=0.01)
    config = bench_save.SaveConfig(
        **tiny, precisions=("fp32",), shard=True, saves=2, wait_ms=5, folder=folder
    )
    saves = list(bench_save.measure(config, dist))
    cluster = bench_cluster.ClusterConfig(
        model="DiT-Ti/2", num_experts=4, depth=1, image_size=64, batch_size=2, precision="fp32",
        compile=False, seconds=0.01, megabytes=1, folder=folder,
    )  # fmt: skip
    return saves, list(bench_cluster.measure(cluster, dist))


def test_the_peak_is_of_the_fastest_product_and_sides_grow_until_one_is_slow(monkeypatch):
    seconds, sides = {256: 0.001, 1024: 0.2}, []

    def timed(products: dict, **_) -> dict[str, float]:
        sides.append(len(products["mm"]()))
        return {"mm": seconds[sides[-1]]}

    monkeypatch.setattr(common, "best_times", timed)
    assert matrix_peaks(torch.device("cpu"), ("fp32",)) == {"fp32": 2 * 256**3 / 0.001}
    assert sides == [256, 1024]


def test_kernel_times_are_grouped_by_the_names_of_kernels():
    times = {
        "void cutlass::device_kernel<GroupProblemShape<...>>": 0.5, "nvjet_tst_128x256": 0.2,
        "triton_poi_fused_mul_0": 0.1, "ncclDevKernel_AllGather_RING_LL": 0.1,
        "void pytorch_flash::flash_fwd_kernel": 0.05, "something_else": 0.05,
    }  # fmt: skip
    shares = time_by_kind(times)
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert list(shares) == [
        "grouped products", "dense products", "compiled elementwise", "communication", "attention",
        "others",
    ]  # fmt: skip
