"""The benchmarks run, and write their measurements with the machine and the settings."""

import json
from collections import Counter

import torch
from conftest import call_main

TINY = ["--seconds=0.01", "--precisions", "fp32"]
TINY_MODEL = ["--model=DiT-Ti/2", "--image-size=64", "--batch-size=2"]
TINY_LAYER = ["--width=64", "--tokens=128", "--experts", "4", "16"]


def rows_of(script: str, folder, *flags) -> list[dict]:
    call_main(script, *TINY, *flags, f"--output={folder / 'rows.json'}")
    content = json.loads((folder / "rows.json").read_text())
    assert content["machine"]["versions"]["torch"] and content["settings"]["seconds"] == 0.01
    for row in content["rows"]:
        assert all(value > 0 for name, value in row.items() if name.endswith(("ms", "per_sec")))
    return content["rows"]


def test_bench_sample_measures_each_expert_back_end(tmp_path, capsys):
    kinds = ("--quantize", "none", "int8")
    rows = rows_of("benchmarks.bench_sample", tmp_path, *TINY_MODEL, *kinds)
    measured = [(row["experts"], row["quantize"]) for row in rows]
    assert measured == [(name, kind) for name in ("loop", "grouped") for kind in kinds[1:]]
    assert "fp32" in capsys.readouterr().out


def test_bench_moe_measures_the_layer_next_to_a_dense_layer_and_its_products(tmp_path):
    rows = rows_of("benchmarks.bench_moe", tmp_path, *TINY_LAYER)
    few, many = ({row["layer"]: row for row in half} for half in (rows[:4], rows[4:]))
    assert list(few) == ["dense", "loop", "grouped", "products"]
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
    rows = rows_of("benchmarks.bench_train", tmp_path, *TINY_MODEL)
    assert [row["experts"] for row in rows] == ["loop", "grouped"]
    assert len(seen) >= 20 and max(Counter(seen).values()) == 2  # once by each back end
