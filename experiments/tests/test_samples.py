"""Samples of experiments: the KID of evaluate.py, measured once."""

import json

import pytest
import test_sampled_images
from helpers import (
    call_main,
    expect_error,
)
from test_sampled_images import COMMON, command

from experiments.samples import seeds_of_groups

checkpoint, single = test_sampled_images.checkpoint, test_sampled_images.single


def test_samples_of_an_experiment_have_the_kid_of_evaluate_and_are_measured_once(
    checkpoint, single, tmp_path, capsys
):
    real, rows = tmp_path / "real.npz", tmp_path / "rows.jsonl"
    call_main("evaluate.py", "--images", single / "images", "--precompute-reference", real,
              *COMMON[:2])  # fmt: skip
    flags = [
        "--runs", checkpoint, "--choosing", real, "--reporting", real, "--output", rows,
        "--sampler", "euler", "--batch-size", 6, "--num-images", 24, "--kid-subset-size", 24,
        "--groups", 1,
    ]  # fmt: skip
    call_main("experiments.samples", *flags, "--steps", 2, "--scales", 1, 2)
    call_main("experiments.samples", *flags, "--steps", 2, "--scales", 2,
              "--quantize", "none", "int4")  # fmt: skip
    call_main("experiments.samples", *flags, "--steps", 2, "--scales", 2,
              "--experts-per-token", 1, "--min-weights", 0, 0.9)  # fmt: skip
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    names = ("scale", "quantize", "experts_per_token", "min_weight")
    assert [tuple(row[name] for name in names) for row in found] == [
        (1, "none", 2, 0), (2, "none", 2, 0), (2, "int4", 2, 0), (2, "none", 1, 0),
        (2, "none", 1, 0.9),
    ]  # fmt: skip
    assert len({row["reporting"][0] for row in found}) == 5
    assert found[-1]["mean_experts_per_token"] < 1
    assert [row["passes"] for row in found] == [2, 4, 4, 4, 4]  # guidance counts twice
    pictures = sorted(path.name.split("-euler-")[1] for path in tmp_path.glob("*.png"))
    assert pictures == ["int4-2.png", "none-1-0.9.png", "none-1.png", "none-2.png"]
    call_main(*command(checkpoint, tmp_path / "kid", "--batch-size", 6, "--num-sampling-steps", 2,
                       "--reference", real, "--kid-subset-size", 24, "--seed", 24))  # fmt: skip
    metrics = json.loads((tmp_path / "kid" / "results.json").read_text())["metrics"]
    kids = [value for name, value in metrics.items() if name.startswith("kid_e")]
    assert found[1]["groups"] == pytest.approx(kids, abs=1e-5)  # images of seed 24 on
    assert seeds_of_groups("flow-1", 2, 24) == [range(48, 72), range(72, 96)]
    line = expect_error(capsys, "experiments.samples", *flags, "--num-images", 23)
    assert "--num-images: got 23" in line
