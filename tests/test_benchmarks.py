"""The benchmarks run as their headings say, and write what they measured with its circumstances."""

import json
import sys

import pytest
import torch
from conftest import ROOT, call_main

from runtime.errors import UserError

sys.path.insert(0, str(ROOT / "benchmarks"))

TINY = ["--seconds=0.01", "--precisions", "fp32"]


@pytest.mark.parametrize(
    "script, flags, layers",
    [
        (
            "bench_moe.py",
            ["--width=32", "--tokens=64", "--experts=4"],
            ["dense", "loop", "grouped"],
        ),
        ("bench_train.py", ["--model=DiT-Ti/2", "--image-size=64", "--batch-size=2"], None),
        ("bench_sample.py", ["--model=DiT-Ti/2", "--image-size=64", "--batch-size=2"], None),
    ],
)
def test_benchmark_measures_and_tells_where(script, flags, layers, tmp_path, capsys):
    output = tmp_path / "rows.json"
    call_main(script, *TINY, *flags, f"--output={output}")
    content = json.loads(output.read_text())
    assert content["versions"]["torch"]
    assert content["machine"]["cores"] >= 1
    rows = content["rows"]
    assert [row["layer"] for row in rows] == layers if layers else len(rows) == 2
    for row in rows:
        assert all(value > 0 for name, value in row.items() if name.endswith(("ms", "per_sec")))
    assert "| fp32 " in capsys.readouterr().out


def test_products_reach_shares_of_the_peak(tmp_path):
    output, flags = tmp_path / "rows.json", ["--width=32", "--rows=64", "--experts", "1", "4"]
    call_main("bench_products.py", *TINY, *flags, f"--output={output}")
    rows = json.loads(output.read_text())["rows"]
    assert [(row["experts"], row["rows_each"]) for row in rows] == [(1, 64), (4, 16)]
    for row in rows:
        shares = [row[name] for name in ("up", "down", "up_input", "down_input", "up_weight")]
        shares.append(row["down_weight"])
        assert min(shares) <= row["all"] <= max(shares)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run here")
@pytest.mark.parametrize("name", ["products", "moe", "train", "sample"])
def test_kernels_that_do_not_run_here_are_refused(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flag = "--kernels" if name == "products" else "--backends"
    with pytest.raises(UserError, match=f"{flag}: got triton on cpu"):
        call_main(f"bench_{name}.py", *TINY, flag, "triton")


def test_the_lean_layer_keeps_less_than_the_loop(tmp_path):
    output = tmp_path / "rows.json"
    call_main("bench_moe.py", *TINY, "--width=64", "--tokens=128", f"--output={output}")
    kept = {row["layer"]: row["kept_mb"] for row in json.loads(output.read_text())["rows"]}
    assert kept["grouped"] < 0.5 * kept["loop"]
    assert kept["grouped"] < 1.1 * kept["dense"]
