"""experiments/: arms of equal size, paired runs that go on, and what the tables say of rows."""

import math
from dataclasses import replace
from statistics import stdev

import pytest
from conftest import call_main

from experiments import routers
from experiments.arms import QUESTIONS
from experiments.report import at_equal_time, differences, smallest_visible, table
from models import count_macs, count_parameters
from runtime.errors import UserError


@pytest.fixture(scope="module")
def config(image_tree, tiny_vae, tmp_path_factory) -> routers.ExperimentConfig:
    root = tmp_path_factory.mktemp("experiments")
    data = ("--data-path", image_tree, "--vae-path", tiny_vae, "--image-size", 16)
    call_main("cache_latents.py", *data, "--output", root / "latents")
    return routers.ExperimentConfig(
        latents_path=str(root / "latents"), val_path=str(root / "latents"), val_images=20, steps=2,
        batch_size=2, seeds=1, output=root / "out",
    )  # fmt: skip


def test_arms_of_a_question_have_one_active_size(config):
    macs = {}
    for number, question in QUESTIONS.items():
        assert question.reference in question.arms
        for arm in question.arms:
            model = routers.train_config(config, arm).model
            macs[arm] = count_macs(model)
            if number == 2:
                assert model.router == arm
    assert macs["topk"] == pytest.approx(macs["dense"], rel=0.01)
    assert {arm: n for arm, n in macs.items() if abs(n / macs["topk"] - 1) > 0.05} == {}
    active = [count_parameters(routers.train_config(config, a).model)[1] for a in ("dense", "topk")]
    assert active[1] == pytest.approx(active[0], rel=0.01)


def test_runs_leave_rows_and_are_not_done_again(config, capsys, monkeypatch):
    routers.check_protocol(config)
    routers.run_missing(config, ["topk", "race"])
    rows = routers.read_rows(config.output)
    assert sorted((row["arm"], row["seed"]) for row in rows) == [("race", 0), ("topk", 0)]
    assert all(math.isfinite(row["val_loss"]) and row["curve"][-1][0] == 2 for row in rows)
    assert (config.output / "question-2.png").stat().st_size > 1000
    assert "| race |" in (config.output / "tables.md").read_text()
    monkeypatch.setattr(routers, "run_arm", None)  # would fail if it were called
    routers.run_missing(config, ["topk", "race"])
    monkeypatch.undo()
    (config.output / "rows.jsonl").unlink()  # as if stopped before the rows were written
    monkeypatch.setattr(routers.subprocess, "run", None)
    routers.run_missing(config, ["topk", "race"])
    assert sorted(row["arm"] for row in routers.read_rows(config.output)) == ["race", "topk"]
    with pytest.raises(UserError, match="steps: got 3, expected 2"):
        routers.check_protocol(replace(config, steps=3))


def test_tables_pair_seeds_and_compare_at_equal_time():
    losses = {"dense": (0.64, 0.66, 0.65), "topk": (0.63, 0.64, 0.65)}
    rows = [
        {"arm": arm, "seed": seed, "val_loss": loss, "curve": [[10, 1.0], [20, loss]],
         "total_parameters": 1, "active_parameters": 1, "macs": 1}
        for arm, values in losses.items() for seed, loss in enumerate(values)
    ]  # fmt: skip
    question, found = QUESTIONS[1], [-0.01, -0.02, 0.0]
    assert differences(rows, "topk", "dense") == pytest.approx(found)
    assert smallest_visible(rows, question) == pytest.approx(
        (4.3027 + 1.0607) * stdev(found) / math.sqrt(3), rel=1e-4
    )  # of Student's t at two degrees of freedom
    equal = at_equal_time(rows, {"dense": 1.1, "topk": 2.2}, question)
    assert equal["topk"] == pytest.approx(1.0) and equal["dense"] == pytest.approx(0.65)
    line = table(rows, question, {})[1]
    assert line["difference"] == "-0.0100 ± 0.0058" and line["arm"] == "topk"
