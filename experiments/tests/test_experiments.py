"""Arms of equal size, paired runs that resume, and tables made from their rows."""

import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, TINY_MODEL, call_main, expect_error
from matplotlib.figure import Figure
from pandas import DataFrame, Series
from scipy import stats

from checkpoints import build_model, load_model, read_checkpoint, step_folders
from checkpoints.costs import count_macs, count_parameters
from evaluation.heldout import latent_batches
from experiments import routers, specialisation
from experiments.arms import QUESTIONS
from experiments.choice_tables import count_by_class_and_position
from experiments.comparisons import (
    equivalence_interval,
    errors_for_power,
    fieller_interval,
    holm,
    paired_tests,
    pairs_table,
    with_error,
)
from experiments.copies import compare, mean_cosine
from experiments.dropping import losses_without, scores_of
from experiments.every_table import multiplicity_table
from experiments.expert_tables import dropping_tables, persistence_tables
from experiments.noisy_copies import with_noise
from experiments.persistence import shares
from experiments.replaced_gates import Tables, replaced
from experiments.rows import measure_missing
from experiments.sample_tables import (
    comparisons_table,
    guidance_table,
    kid_table,
    read_samples,
)
from experiments.samples import border_contrast
from experiments.shifted_images import shifted
from experiments.specialisation import bits, call, count_choices
from experiments.training_tables import (
    at_equal_time,
    differences,
    steps_to_quality,
    table,
)
from latents.cache import CachedLatents
from latents.loading import evenly_spaced
from models import DiT
from routers import NOTHING, ROUTERS, Context, Routing, TopKRouter
from runtime.errors import UserError
from runtime.plugins import import_plugins
from tools.interventions import DropSmall, Reuse
from training.config import TrainConfig, parse_training
from training.optimizers import OPTIMIZERS


@pytest.fixture(scope="module", autouse=True)
def plugins():
    """The components of arms, which are registered for these tests only. Models have two blocks."""
    path = os.path.realpath(ROOT / "experiments" / "plugins.py")
    command = routers.command_of
    shallow = patch.object(
        routers, "command_of", lambda *arm, **seed: [*command(*arm, **seed), "--depth=2"]
    )
    with patch.dict(ROUTERS), patch.dict(OPTIMIZERS), shallow:
        import_plugins([path])
        yield sys.modules[f"plugin:{path}"]
        del sys.modules[f"plugin:{path}"]


@pytest.fixture(scope="module")
def config(latent_cache, tmp_path_factory) -> routers.ExperimentConfig:
    paths = {f"{name}_path": str(latent_cache) for name in ("latents", "val", "report")}
    sizes = dict(val_images=20, steps=2, batch_size=2, seeds=1, precision="fp32")
    output = tmp_path_factory.mktemp("experiments")
    return routers.ExperimentConfig(**paths, **sizes, output=output)


def test_all_arms_of_a_question_have_equal_compute(config):
    """Compares models of two blocks. The rest of a model is less than 2% of its compute."""
    models, same = {}, {}  # arms that differ only in learning rate and steps have the same model
    for question in QUESTIONS.values():
        assert question.reference in question.arms
        for arm, flags in question.arms.items():
            others = " ".join(re.sub(r"--(lr|max-steps) \S+", "", flags).split())
            if others not in same:
                same[others] = routers.train_config(config, arm).model
            models[arm] = same[others]
    assert all(models[arm].router.name == arm for arm in QUESTIONS[2].arms)
    macs_of = functools.cache(count_macs)  # many arms train the same model
    macs = {arm: macs_of(model) for arm, model in models.items()}
    assert macs["topk"] == pytest.approx(macs["dense"], rel=0.01)
    of_width = {
        models[arm].hidden_size: macs[arm]
        for arm in ("topk", "topk-256-4e-3-203", "topk-8e-3-1600")
    }
    shares = {arm: n / of_width[models[arm].hidden_size] for arm, n in macs.items()}
    assert {arm: share for arm, share in shares.items() if abs(share - 1) > 0.05} == {}
    dense, sparse = (count_parameters(models[arm])[1] for arm in ("dense", "topk"))
    assert sparse == pytest.approx(dense, rel=0.01)


def test_a_row_is_measured_once_and_not_mixed_with_rows_of_other_facts(tmp_path):
    """The first row is of a version without --silence, whose rows name no such setting."""
    output, measured = tmp_path / "rows.jsonl", []
    output.write_text('{"run": "a", "loss": 0, "images": 10}\n')

    def rows_of(images: int) -> list[dict]:
        settings = [{"run": run, "silenced": on} for run in ("a", "b") for on in (False, True)]
        measure = lambda row: measured.append(row) or {"loss": 1}  # noqa: E731
        return measure_missing(output, settings, measure, {"images": images})

    first, again = rows_of(10), rows_of(10)
    assert [(row["run"], row["silenced"], row["loss"]) for row in first] == [
        ("a", False, 0), ("a", True, 1), ("b", False, 1), ("b", True, 1),
    ]  # fmt: skip
    assert first == again and len(measured) == 3
    with pytest.raises(UserError, match="images: got 20, expected 10"):
        rows_of(20)
    assert len(measured) == 3


@pytest.fixture(scope="module")
def trained(config) -> routers.ExperimentConfig:
    """The config, whose folder has runs of topk and race, as after a kill before their rows."""
    with patch.object(routers.subprocess, "run", train_here):
        for arm in ("topk", "race"):
            routers.run_arm(config, arm, 0)
    return config


def test_experiment_runs_write_rows_and_are_not_repeated(trained, monkeypatch):
    config = trained
    routers.check_protocol(config)
    monkeypatch.setattr(routers.subprocess, "run", None)  # a call would fail
    routers.run_missing(config, ["topk", "race"])
    rows = routers.finished_rows(config.output)
    assert sorted((row["arm"], row["seed"]) for row in rows) == [("race", 0), ("topk", 0)]
    assert all(row["curve"][-1] == [2, row["val_loss"]] for row in rows)
    for row in rows:  # both losses use the same images, in different batches
        assert row["report_loss"] == pytest.approx(row["val_loss"], rel=0.2)
    with pytest.raises(UserError, match="--arms: got rase, expected some of dense, topk"):
        routers.arms_of(replace(config, arms=("topk", "rase")), (1, 2))
    assert routers.arms_of(replace(config, arms=("race", "topk")), (1, 2)) == ["topk", "race"]
    assert (config.output / "question-2.png").stat().st_size > 1000
    assert "| race |" in (config.output / "tables.md").read_text()
    monkeypatch.setattr(routers, "run_arm", None)
    routers.run_missing(config, ["topk", "race"])
    monkeypatch.undo()
    run = config.output / "runs" / "topk-0"
    shutil.rmtree(run / "checkpoints")  # as after a failed save
    monkeypatch.setattr(routers.subprocess, "run", train_here)
    row = routers.row_of(config, "topk", 0, routers.run_arm(config, "topk", 0))
    monkeypatch.undo()
    assert step_folders(run) and row in routers.finished_rows(config.output)
    with pytest.raises(UserError, match="steps: got 3, expected 2"):
        routers.check_protocol(replace(config, steps=3))

    runs = tuple(str(config.output / "runs" / f"{arm}-0") for arm in ("topk", "race"))
    output = config.output / "specialisation.csv"
    settings = dict(runs=runs, val_path=config.val_path, val_images=20, output=output)
    specialisation.main(specialisation.SpecialisationConfig(**settings))
    assert output.read_text().count("\n") == 7 and "nan" not in output.read_text()
    assert output.with_name("specialisation_spending.png").is_file()
    assert (config.output / "question-2.csv").read_text().startswith("arm,seeds")


def test_a_run_that_went_on_with_other_settings_gets_no_row(config, tmp_path, monkeypatch):
    config, command = replace(config, output=tmp_path), routers.command_of(config, "topk", 0)
    command[command.index("--results-dir") + 1] = tmp_path / "runs"
    call_main("train.py", *command, "--max-steps", 1)
    call_main("train.py", *command, "--lr", 0.5)
    monkeypatch.setattr(routers.subprocess, "run", None)  # it is not trained again
    with pytest.raises(UserError, match=r"topk-0: .*--lr: was 0.002, is 0.5"):
        routers.run_missing(config, ["topk"])
    assert routers.finished_rows(tmp_path) == []


def test_runs_that_finish_at_the_same_time_have_rows(trained, monkeypatch, tmp_path):
    """Their multiply-adds are counted, which two threads cannot do at once."""
    config = replace(trained, output=tmp_path, jobs=2)
    shutil.copytree(trained.output / "runs", tmp_path / "runs")
    monkeypatch.setattr(routers.subprocess, "run", None)  # a call would fail
    together, listed = threading.Barrier(2, timeout=60), routers.step_folders
    counted, threads = routers.count_macs, []

    def step_folders(run: Path) -> list[Path]:
        together.wait()
        return listed(run)

    def count_in_thread(*arguments) -> int:
        threads.append(threading.get_ident())
        return counted(*arguments)

    monkeypatch.setattr(routers, "step_folders", step_folders)
    monkeypatch.setattr(routers, "count_macs", count_in_thread)
    routers.run_missing(config, ["topk", "race"])
    assert len(threads) == 2 and len(set(threads)) == 1
    assert sorted(row["arm"] for row in routers.finished_rows(tmp_path)) == ["race", "topk"]


def train_here(command: list, **_) -> SimpleNamespace:
    """Trains in this process, because another process starts slowly."""
    assert command[:2] == [sys.executable, ROOT / "train.py"]
    call_main("train.py", *command[2:])
    return SimpleNamespace(returncode=0)


class PositionRouter(TopKRouter):
    """Sends the patch at position p to the experts p and p + 1, modulo the number of experts."""

    def forward(self, x: torch.Tensor, context: Context) -> Routing:
        eye = torch.eye(self.num_experts).repeat(x.shape[0] * x.shape[1] // self.num_experts, 1)
        return self.choose(eye + eye.roll(1, dims=1))


def test_routing_bits_of_a_router_by_position_are_the_exact_information(config):
    fields = routers.train_config(config, "topk").model
    model = DiT(**vars(fields)).eval()
    for block in model.blocks:
        block.moe.gate.__class__ = PositionRouter
    latents = torch.randn(40, fields.in_channels, fields.input_size, fields.input_size)
    labels, found = torch.arange(40) % fields.num_classes, {}
    with torch.no_grad():
        for shuffled in (False, True):
            found[shuffled] = bits(count_choices(model, latents, labels, shuffled=shuffled))
    # An expert has log2(8) = 3 bits. The position determines 2 of them.
    others = dict.fromkeys(("class", "time", "class given position", "time given position"), 0)
    assert found[False] == pytest.approx({"position": 2, **others}, abs=1e-6)
    assert found[True]["position"] < 0.1
    assert found[True]["time"] == pytest.approx(0, abs=1e-6)  # the router ignores the time


def test_the_class_can_determine_the_expert_only_together_with_the_position():
    """With the expert (class + position) modulo 4, neither has information by itself."""
    joint = torch.stack([torch.eye(4, dtype=torch.int64).roll(c, 1) for c in range(4)])[:, :, None]
    by_class, by_position = joint.sum(1), joint.sum(0)
    tables = dict(by_class=by_class, by_position=by_position, by_step=by_class)
    found = bits(SimpleNamespace(tables=tables, joint=[joint, joint.sum(0, keepdim=True)]))
    assert found["class"] == found["position"] == pytest.approx(0)
    assert found["class given position"] == pytest.approx(2)
    assert found["time given position"] == pytest.approx(0)


def test_the_spans_of_specialisation_start_at_pure_noise():
    calls, latents, labels = [], torch.ones(10, 4, 2, 2), torch.arange(10)
    t = call(lambda *inputs: calls.append(inputs), latents, labels, torch.arange(10), spans=True)
    noised, time, y = calls[0]
    assert time is t and torch.equal(t, torch.ones(10))
    torch.testing.assert_close(y["span"], torch.arange(0.05, 1, 0.1))
    call(lambda *inputs: calls.append(inputs), 0 * latents, labels, torch.arange(10), spans=True)
    assert torch.equal(noised, calls[1][0]), "the input of a step from time 1 contains the image"


def test_experiment_tables_pair_seeds_and_compare_at_equal_time():
    losses = {"dense": (0.64, 0.66, 0.65), "topk": (0.63, 0.64, 0.65)}
    rows = [
        {"arm": arm, "seed": seed, "val_loss": loss, "curve": [[10, 1.0], [20, loss]],
         "total_parameters": 1, "active_parameters": 1, "macs": 1}
        for arm, values in losses.items() for seed, loss in enumerate(values)
    ]  # fmt: skip
    question, found = QUESTIONS[1], [-0.01, -0.02, 0.0]
    assert differences(rows, question)["topk"].tolist() == pytest.approx(found)
    equal = at_equal_time(rows, {"dense": 1.1, "topk": 2.2}, question)
    assert equal["topk"].tolist() == pytest.approx([1.0] * 3)
    assert equal["dense"].tolist() == pytest.approx(losses["dense"])
    line = table(rows, question, {"dense": 1.1, "topk": 2.2})[1]
    assert line["at equal time"] == "+0.3500 ± 0.0058"
    assert line["difference"] == "-0.0100 ± 0.0058" and line["arm"] == "topk"
    assert line["p (Holm)"] == "0.23 (0.23)"  # for t = -1.732 at 2 degrees of freedom
    detectable = errors_for_power(2, 0.05) * stdev(found) / math.sqrt(3)
    assert line["detectable"] == f"{detectable:.4f}"


def test_holms_correction_and_the_power_of_the_corrected_test():
    """Holm 1979, with p of 0.01, 0.02, 0.03 and 0.2; the power is counted in simulated runs."""
    normal = np.random.default_rng(0).normal(size=(20_000, 4))
    error = normal.std(axis=1, ddof=1) / 2
    shift = errors_for_power(3, 0.05 / 2)
    # The detectable difference uses the true standard error, 1/2.
    p = stats.ttest_1samp(normal + shift / 2, 0, axis=1).pvalue
    assert (p < 0.05 / 2).mean() == pytest.approx(0.8, abs=0.01) and error.mean() < 0.5
    pairs = {name: make_pairs(p) for name, p in zip("abcd", (0.02, 0.2, 0.01, 0.03), strict=True)}
    found = paired_tests(DataFrame(pairs))
    assert found["p"].tolist() == pytest.approx([0.02, 0.2, 0.01, 0.03])
    assert found["holm"].tolist() == pytest.approx([0.06, 0.2, 0.04, 0.06])
    spread = DataFrame(pairs).sem() * errors_for_power(2, 0.05 / 4)
    assert found["detectable"].tolist() == pytest.approx(spread.tolist())


def test_detected_differences_of_all_tables_together():
    """0.039 * 5 / 4 is below 5%, and 0.01 * 5 is not."""
    tables = [Series(values) for values in ([0.01, 0.039, 0.9], [0.02, 0.03])]
    tests = [DataFrame({"p": p, "holm": holm(p)}) for p in tables]
    lines = multiplicity_table(tests).splitlines()[2:]
    assert [line.rpartition(" | ")[2] for line in lines] == ["3 |", "0 |", "4 |"]


def test_named_pairs_have_one_correction():
    """An arm with one seed has no test, and does not count."""
    a, b = make_pairs(0.02), make_pairs(0.03)
    losses = DataFrame({"zero": [0.0] * 3, "a": a, "b": b, "one": [1.5, math.nan, math.nan]})
    lines = pairs_table(losses, ("a:zero", "zero:b", "one:zero")).splitlines()[3:]
    assert lines[0].startswith(f"| a | zero | 3 | +{mean(a):.4f} ± ")
    assert lines[1].startswith(f"| zero | b | 3 | -{mean(b):.4f} ± ")
    assert "| 0.02 (0.04) |" in lines[0] and "| 0.03 (0.04) |" in lines[1]
    assert lines[2] == "| one | zero | 1 | +1.5000 |  |  |"


def make_pairs(p: float) -> list[float]:
    """Returns three differences with this two-sided p."""
    t = stats.t.isf(p / 2, 2)
    return [t / math.sqrt(3) + shift for shift in (-1, 0, 1)]


def test_an_interval_within_the_margin_is_two_one_sided_tests():
    pairs = Series(np.random.default_rng(0).normal(0.0003, 0.001, 16))
    low, high = equivalence_interval(pairs)
    for bound, side in ((low, "greater"), (high, "less")):
        assert stats.ttest_1samp(pairs, bound, alternative=side).pvalue == pytest.approx(0.05)


def test_fiellers_interval_ends_where_a_test_of_the_ratio_has_a_p_of_5_percent():
    draw = np.random.default_rng(0).normal(size=(3, 16))
    denominator = Series(0.0036 + 0.0015 * draw[0])
    numerator = 0.5 * denominator + 0.001 * draw[1]
    low, high = fieller_interval(numerator, denominator)
    assert low < 0.5 < high
    for ratio in (low, high):
        p = stats.ttest_1samp(numerator - ratio * denominator, 0).pvalue
        assert p == pytest.approx(0.05)
    assert fieller_interval(numerator, Series(draw[2] - draw[2].mean())) is None


def test_arms_are_equivalent_different_or_undecided_at_the_rate_that_other_seeds_chose(
    tmp_path, capsys
):
    """Planted: `same` equals topk, `bad` has no advantage, `wide` deviates too much."""
    noise = np.random.default_rng(0).normal(0, 0.0004, (5, 16))
    noise -= noise.mean(axis=1, keepdims=True)
    shifts = {"topk": 0, "dense": 0.004, "same": 0.0001, "bad": 0.004, "wide": 0.0008}
    rows = []
    for (name, shift), of_arm in zip(shifts.items(), noise, strict=True):
        of_arm = of_arm * (8 if name == "wide" else 1)
        best = "4e-3" if name == "bad" else "8e-3"
        run = {"max_violation": math.nan if name == "dense" else 0.5}
        # The lead of every arm is halved from one step of the curve to the next.
        run["curve"] = [[step, 2 + shift * 2 ** (1 - step)] for step in range(10)]
        run["val_bins"] = [1.0, 1 + shift]
        for rate in ("4e-3", "8e-3"):
            arm, worse = f"{name}-{rate}-400", 0.01 * (rate != best)
            for seed in (16, 17):  # their reporting losses count for nothing
                loss = 0.73 + worse + shift
                rows.append(run | {"arm": arm, "seed": seed, "val_loss": loss, "report_loss": 9})
        for seed, error in enumerate(of_arm):
            loss = 0.73 + shift + error
            arm = f"{name}-{best}-400"
            rows.append(run | {"arm": arm, "seed": seed, "val_loss": 9, "report_loss": loss})
    rows.append(rows[0] | {"arm": "same-4e-3-400", "seed": 0, "report_loss": 9})  # not chosen
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "experiments.equivalence", "--rows", path, "--output", tmp_path
    call_main(*words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| arm | seeds | 4e-3 | 8e-3 | chosen |"
    assert "| topk | 2, 2 | 0.7400 | 0.7300 | 8e-3 |" in lines
    assert "| bad | 2, 2 | 0.7340 | 0.7440 | 4e-3 |" in lines
    tested, steps, bins = "\n".join(lines).split("\n\n")[1:]
    cells = {line.split(" | ")[0][2:]: line.split(" | ") for line in tested.splitlines()}
    shift = shifts["bad"]
    halved = " | ".join(f"{shift * 2 ** (1 - step):+.4f} ± 0.0000" for step in (2, 4, 6, 8))
    assert f"| bad | {halved} |" in steps
    assert f"| bad | +0.0000 ± 0.0000 | {shift:+.4f} ± 0.0000 |" in bins
    assert [cells[name][8] for name in ("same", "bad", "wide")] == [
        "equivalent", "worse", "not decided",
    ]  # fmt: skip
    assert cells["topk"][3:10] == [""] * 7
    assert cells["bad"][1] == "16" and cells["bad"][10] == "0.50 ± 0.00 |"
    pairs = Series(0.0039 + noise[3] - noise[0] + 0.0001)
    p = stats.ttest_1samp(pairs, 0).pvalue
    assert cells["bad"][3] == with_error(pairs, "+") and cells["bad"][6] == f"{p:.2g} ({3 * p:.2g})"
    gains = (DataFrame(noise).T[1] + 0.004 - noise[0], DataFrame(noise).T[1] + 0.0039 - noise[2])
    share = gains[1].mean() / gains[0].mean()
    low, high = fieller_interval(gains[1], gains[0])
    assert cells["same"][9] == f"{share:.0%} ({low:.0%} to {high:.0%})"
    assert "--reference: got race" in expect_error(capsys, *words, "--reference", "race")
    path.write_text("{}\n")
    assert "NAME-RATE-STEPS" in expect_error(capsys, *words)


def test_a_head_start_is_tested_with_all_seeds_and_a_third_of_the_advantage(tmp_path, capsys):
    """Planted: `class` saves 40 steps at first and 20 later, and ends within the margin."""
    noise = np.random.default_rng(0).normal(0, 0.0002, (4, 8))
    shifts = {"topk": 0, "dense": 0.006, "class": 0.0012, "embedded": -0.004}
    path = tmp_path / "rows.jsonl"
    words = "experiments.head_start", "--rows", path, "--output", tmp_path
    words = *words, "--steps", 160, 400, "--goals", 160, 400
    saved = {"topk": (0, 0), "dense": (0, 0), "class": (40, 20), "embedded": (0, 0)}
    for seeds in (7, 8):
        rows = []
        for (name, shift), of_arm in zip(shifts.items(), noise, strict=True):
            early, late = saved[name]
            for seed, error in enumerate(of_arm[:seeds]):
                loss = 0.7 + shift + error
                # One straight line from step to step: topk has 1 - step / 1000.
                start = 1 + error / 100
                curve = [[step, start - (step + early) / 1000] for step in (80, 160, 240)]
                curve += [[step, start - (step + late) / 1000] for step in (320, 400, 480)]
                rows.append({
                    "arm": f"{name}-8e-3-1600", "seed": seed, "val_loss": loss, "curve": curve,
                    "val_bins": [1 + shift * (k < 3) for k in range(10)], "max_violation": 0.5,
                })  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        call_main(*words)
        tested, _, _, found, early, *decay = capsys.readouterr().out.split("\n\n")
        lines = {line.split(" | ")[0][2:]: line.split(" | ") for line in tested.splitlines()}
        assert lines["class"][8] == ("equivalent" if seeds == 8 else "")
        assert lines["embedded"][8] == ("better" if seeds == 8 else "")
        zeros = "+0.0000 ± 0.0000 | +0.0000 ± 0.0000"
        assert f"| class | +40 ± 0 | +20 ± 0 | +0.0012 ± 0.0000 | {zeros} |" in found
        assert ("p (Holm)" in early) == (seeds == 8) == bool(decay)
        assert f"| class | embedded | {seeds} | -0.0400" in early
    margin = float(lines["class"][5])
    assert margin == pytest.approx(np.mean(0.006 + noise[1] - noise[0]) / 3, abs=1e-4)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if "topk" not in r["arm"]))
    assert "expected question 21" in expect_error(capsys, *words)


def planted_runs(shifts: dict[str, list[float]], seeds: int) -> list[dict]:
    """Rows of arms whose losses in three ranges of ten times are 0.7 plus these shifts."""
    generator, rows = np.random.default_rng(0), []
    for name, (low, middle, high) in shifts.items():
        for seed, error in enumerate(generator.normal(0, 0.0002, seeds)):
            bins = [0.7 + error + s for s in [low] * 3 + [middle] * 5 + [high] * 2]
            rows.append({
                "arm": f"{name}-8e-3-1600", "seed": seed, "val_bins": bins, "max_violation": 0.5,
                "val_loss": mean(bins), "report_loss": mean(bins), "curve": [[80, 1.0]],
            })  # fmt: skip
    return rows


def test_experts_at_some_times_are_tested_at_these_times(tmp_path, capsys):
    """Planted: experts help at low and middle noise. `two` is as good as `topk`."""
    shifts = {
        "dense": [0.006, 0.006, 0.0], "topk": [0.0, 0.0, 0.0], "low": [0.0, 0.006, 0.0],
        "middle": [0.006, 0.0, 0.0], "high": [0.006, 0.006, 0.0], "two": [0.0, 0.0, 0.001],
    }  # fmt: skip
    path = tmp_path / "rows.jsonl"
    words = "experiments.noise_tables", "--rows", path, "--output", tmp_path
    for seeds in (7, 8):
        rows = planted_runs(shifts, seeds)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        call_main(*words)
        every, *own, ranges = capsys.readouterr().out.split("\n\n")
        assert "| topk | -0.006" in ranges and bool(own) == (seeds == 8)
    results = {line.split(" | ")[0][2:]: line.split(" | ")[8] for line in every.splitlines()}
    found = [results[name] for name in ("low", "middle", "high", "two")]
    assert found == ["worse", "worse", "worse", "equivalent"]
    cells = [line.split(" | ") for line in own[0].splitlines()[2:]]
    found = [(one[0][2:], one[1], float(one[4].split("(")[1][:-1]) < 0.05) for one in cells]
    assert found == [
        ("low", "t < 0.3", True), ("middle", "t 0.3 to 0.8", True), ("high", "t > 0.8", False),
    ]  # fmt: skip
    path.write_text(json.dumps(rows[0]) + "\n")
    assert "expected question 21" in expect_error(capsys, *words)


def test_a_replaced_gate_is_compared_with_the_gate_that_was_tuned_as_long(tmp_path, capsys):
    """Planted: the weights are worth more than the choice."""
    trained = tmp_path / "trained.jsonl"
    rows = planted_runs({"dense": [0.006] * 3, "topk": [0.0] * 3}, 8)
    trained.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shifts = {("gate", "gate"): 0, ("table", "gate"): 0.0003, ("gate", "table"): 0.008,
              ("table", "table"): 0.008, ("random", "gate"): 0.05}  # fmt: skip
    path, generator = tmp_path / "rows.jsonl", np.random.default_rng(0)
    words = "experiments.replaced_tables", "--rows", path, "--trained", trained
    for seeds in (7, 8):
        rows = [
            {"seed": seed, "choice": choice, "weights": weights, "steps": steps,
             "replaced_loss": 0.7 - steps / 1e4 + shift + generator.normal(0, 0.0002)}
            for (choice, weights), shift in shifts.items() for seed in range(seeds)
            for steps in (0, 50) if not (steps and choice == "random")
        ]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        call_main(*words, "--output", tmp_path)
        losses, *tested = capsys.readouterr().out.split("\n\n")
        assert "| random choice | 8 " in losses or seeds == 7
        assert bool(tested) == (seeds == 8)
    results = {tuple(line[2:].split(" | ")[:3]): line for line in tested[0].splitlines()[2:]}
    assert len(results) == 8
    for steps in ("0", "50"):
        assert results["choice", "gate", steps].endswith("| equivalent |")
        assert results["both", "gate", steps].endswith("| worse |")
        assert results["choice", "weights", steps].endswith("| better |")


Line = tuple[str, str]  # the head of a Markdown table, and one of its lines


def sections(page: str) -> list[tuple[str, str]]:
    """Returns the headings and texts of a page of docs/."""
    parts = re.split(r"^## (.*)$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def lines_of(text: str) -> list[Line]:
    tables = (each.splitlines() for each in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE))
    return [(head, line) for head, _, *lines in tables for line in lines]


@pytest.fixture(scope="module")
def made_tables(tmp_path_factory) -> dict[str, list[Line]]:
    """Lines of the tables that one command prints, by question; "": all."""
    output, made, save = tmp_path_factory.mktemp("tables"), {"": []}, Figure.savefig

    def save_one_of_a_kind(figure: Figure, path: Path, **options) -> None:
        """Rendering a figure takes longer than making it: that of a question, or of samples."""
        if not any(output.glob(f"{path.stem.split('-')[0]}*.png")):
            save(figure, path, **options)

    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        patch.object(Figure, "savefig", save_one_of_a_kind),
    ):
        call_main("experiments.every_table", "--output", output)
    parts = re.split(r"^# (.*)$", printed.getvalue(), flags=re.MULTILINE)
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        for question in ("", *re.findall(r"\d+", title)):
            made.setdefault(question, []).extend(lines_of(text))
    return made


def test_the_documented_experiment_tables_are_reproduced_from_the_rows(made_tables):
    found = [line for _, text in sections("experiments.md") for line in lines_of(text)]
    assert len(found) > 100
    pages = lines_of((ROOT / "docs" / "tables.md").read_text())
    assert {*found, *pages} <= {*made_tables[""]} and pages


def test_one_command_prints_every_measured_number_of_the_claims(made_tables):
    printed = " ".join(line for _, line in made_tables[""])
    known = set(re.findall(r"[\d.]+%?", printed))
    for _, line in lines_of((ROOT / "docs" / "claims.md").read_text()):
        _, _, *measured = line.split(" | ")
        numbers = set(re.findall(r"(?<![\w.])\d+\.\d+%?|\d+%", " ".join(measured)))
        assert numbers <= known | {"1.5"}, line  # 1.5 is a guidance scale


def statements() -> list[tuple[list[str], str]]:
    """Returns questions and text of the sections and answers of experiments.md, and of claims."""
    found = [
        (re.findall(r"^\d+", title) or [""], text) for title, text in sections("experiments.md")
    ]
    answers, claims = (
        (ROOT / "docs" / name).read_text() for name in ("experiments.md", "claims.md")
    )
    found += [([n], text) for n, text in re.findall(r"^\| \[(\d+)[ab-z]?\](.*)$", answers, re.M)]
    for _, line in lines_of(claims):
        _, _, *cells = line.split(" | ")
        found.append((re.findall(r"\[(\d+)\]\(experiments", cells[1]), " | ".join(cells)))
    return [(questions, " ".join(text.split())) for questions, text in found]


NUMBER = r"(?<![\w.])[+-]?(?:\d+\.\d+ ± \d+\.\d+|\d\.\d{4})(?!\d)"


def test_numbers_of_statements_are_printed_for_their_question(made_tables):
    """With their signs. A number without one may be the size of a difference.

    The numbers are those with an error and those of four digits.
    """
    wrong = []
    for questions, text in statements():
        lines = [line for question in questions for line in made_tables.get(question, [])]
        printed = " ".join(line for _, line in lines)
        known = set(re.findall(NUMBER, printed))
        known |= {number.partition(" ")[0] for number in known}
        known |= {number.lstrip("+-") for number in known}
        wrong += [(questions, number) for number in set(re.findall(NUMBER, text)) - known]
        for p, corrected in re.findall(r"\bp = (\d[\d.]*\d)(?:, corrected (\d[\d.]*\d))?", text):
            if f"| {p} ({corrected}" not in printed:
                wrong.append((questions, p, corrected))
        # `arm` NUMBER, and `arm` minus `reference` is NUMBER
        for *arms, number in re.findall(
            rf"(?:`([\w-]+)` minus )?`([\w-]+)`(?: is)? ({NUMBER})", text
        ):
            if not any(
                number in line
                and all(arm.replace("_", "-") in (head + line).replace("_", "-") for arm in arms)
                for head, line in lines
            ):
                wrong.append((questions, arms, number))
    assert wrong == []


def test_arms_are_compared_with_a_reference_at_equal_intervals_of_guidance(tmp_path, capsys):
    rows = ROOT / "experiments/rows" / "pixels.jsonl"
    flags = ("--rows", rows, "--reference", "emoji-latents", "--output", tmp_path)
    call_main("experiments.report", *flags)
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| emoji-pixels | heun 13 at 3")]
    settings = [line.split(" | ")[1] for line in lines if "+" in line]
    assert {"heun 13 at 3", "heun 13 at 3 in 0.1 to 0.9"} <= {*settings}
    assert len(settings) == len({*settings})


@pytest.mark.parametrize("flags", [
    "routers.jsonl --reference no-arm", "routers.jsonl --arms race",
    "routers.jsonl --pairs race:no-arm", "routers.jsonl --pairs race",
    "passes.jsonl --reference flow", "routers.jsonl --times nothing",
    "passes.jsonl --pairs flow-900:mean-flow-600", "dropping.jsonl --reference demo",
    "reuse.jsonl --times experiments/rows/times.json", "passes.jsonl --times nothing",
    "specialisation.csv --arms no-arm", "dropping.jsonl --pairs load:damage",
])  # fmt: skip
def test_a_report_without_tables_is_a_one_line_error(flags, tmp_path, capsys):
    rows, *flags = flags.split()
    rows = ROOT / "experiments/rows" / f"{rows}"
    error = expect_error(capsys, "experiments.report", "--rows", rows, *flags, "--output", tmp_path)
    assert "got" in error or "has no effect with" in error


QUESTION = next(question for question in QUESTIONS.values() if question.has_own_lengths)


def test_the_name_of_an_arm_sets_its_recipe_learning_rate_and_steps():
    config = routers.ExperimentConfig(latents_path="latents", val_path="others", steps=7)
    for arm in QUESTION.arms:
        command = routers.command_of(config, arm, seed=0)
        asked = TrainConfig.default().changed(parse_training("train.py", None, command)[1])
        name, rate, steps = re.fullmatch(r"(.*)-(\de-3|\d\.\de-2)-(\d+)", arm).groups()
        assert (asked.step.lr, asked.run.max_steps) == (float(rate), int(steps))
        assert asked.engine.global_batch_size == 128 and asked.step.warmup_steps == 50
        assert asked.step.optimizer.name == (
            "muon" if name.startswith(("muon", "fast")) else "adamw"
        )


def test_steps_to_the_goal_are_interpolated_between_the_lengths_that_were_run():
    losses = {QUESTION.reference: 0.64, "fast-1.6e-2-320": 0.66, "fast-1.6e-2-400": 0.62,
              "published-4e-3-400": 0.69, "muon-1.6e-2-400": 0.63}  # fmt: skip
    rows = [{"arm": arm, "seed": 0, "val_loss": loss} for arm, loss in losses.items()]
    rows = [row | {"report_loss": row["val_loss"] - 0.1} for row in rows]
    times = {"fast-1.6e-2-320": 100.0}
    text = steps_to_quality(rows, QUESTION, times)
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    ends = "| 1, 1 | 0.6600, 0.6200 | 0.5600, 0.5200 |"
    assert f"{ends} 360 | 45% | 36 |" in lines["| fast-1.6e-2"]
    assert "| 800 | 100% |" in lines["| published-4e-3"]
    assert "| at most 400 | at most 50% |" in lines["| muon-1.6e-2"]


def test_a_guidance_scale_is_chosen_on_other_images_than_the_reported_ones():
    kids = {  # (seed, steps, scale): KID on the choosing and the reporting images
        (0, 1, 1): (0.9, 0.1), (0, 1, 2): (0.8, 0.5), (0, 4, 1): (0.3, 0.4), (0, 4, 2): (0.4, 0.3),
        (1, 1, 1): (0.6, 0.7), (1, 1, 2): (0.7, 0.1),
    }  # fmt: skip
    rows = [
        {"run": f"flow-600-{seed}", "sampler": "euler", "steps": steps, "passes": steps,
         "scale": scale, "choosing": [choosing, 0.1], "reporting": [reporting, 0.1],
         "groups": [reporting, reporting]}
        for (seed, steps, scale), (choosing, reporting) in kids.items()
    ]  # fmt: skip
    lines = kid_table(read_samples(rows)).splitlines()
    assert lines[0] == "| arm | sampler | runs | 1 pass | 4 passes |"
    assert lines[2] == "| flow-600 | euler | 2 | 0.600 ± 0.100 | 0.400 ± 0.000 (1) |"


def test_the_strongest_sampler_is_chosen_at_equal_passes_and_its_noise_is_between_groups():
    kids = [  # run, sampler, steps, scale, passes, KID on choosing images, KIDs of groups
        ("flow-0", "euler", 4, 1, 4, 0.5, (0.1, 0.2, 0.3)),
        ("flow-0", "heun", 2, 1, 3, 0.4, (0.6, 0.7, 0.8)),
        ("flow-0", "euler", 2, 2, 4, 0.6, (0.0, 0.0, 0.0)),
        ("mean-0", "mean", 1, 1, 1, 0.9, (0.9, 1.0, 1.4)),
        ("mean-0", "mean", 2, 1.5, 4, 0.7, (0.6, 0.5, 0.4)),
    ]  # fmt: skip
    rows = [
        {"run": run, "sampler": sampler, "steps": steps, "scale": scale, "passes": passes,
         "choosing": [chosen, 0.1], "reporting": [sum(groups) / 3, stdev(groups)], "groups": groups}
        for run, sampler, steps, scale, passes, chosen, groups in kids
    ]  # fmt: skip
    head, _, euler, heun, mean, noise = kid_table(read_samples(rows)).splitlines()
    assert head == "| arm | sampler | runs | 1 pass | 3 passes | 4 passes |"
    assert euler == "| flow | euler | 1 |  |  | 0.200 ± 0.058 |"
    assert noise == "| deviation between groups |  |  | 0.265 | 0.100 | 0.100 |"
    lines = [
        line.split(" | ") for line in comparisons_table(read_samples(rows), "flow").splitlines()[2:]
    ]
    assert [line[1] for line in lines] == ["3", "4"]  # one pass of the flow was not sampled
    assert lines[0][2:6] == ["1.100 ± 0.153", "0.700 ± 0.058", "mean 1", "heun 2"]
    assert lines[1][4:8] == ["mean 2 at 1.5", "heun 2", "3 groups", "-0.200 ± 0.115"]


def test_rows_of_several_guidance_intervals_have_a_line_each_and_one_is_chosen():
    kids = [(1, (0.1, 0.9), 0.5), (3, (0.0, 1.0), 0.4), (3, (0.1, 0.9), 0.2)]
    rows = [
        {"run": "pixels", "sampler": "heun", "steps": 13, "scale": scale, "interval": interval,
         "passes": 25 * scale, "choosing": [chosen, 0.1], "reporting": [2.0, 1.0],
         "groups": [1, 2, 3], "border_contrast": 1.26}
        for scale, interval, chosen in kids
    ]  # fmt: skip
    best, lines = (
        kid_table(read_samples(rows)).splitlines()[-1],
        guidance_table(read_samples(rows)).splitlines()[2:],
    )
    assert best == "| pixels | 3 in 0.1 to 0.9 | 0.200 ± 0.100 | 2.000 ± 1.000 |"
    assert [line.split(" | ")[2] for line in lines] == ["1", "3 in 0 to 1", "3 in 0.1 to 0.9"]
    assert lines[1].endswith("| 75 | 0.40 | 2.00 ± 0.58 | 1.26 |")


def test_border_contrast_is_large_only_if_patches_show():
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 50
    columns = torch.tensor([0, 200]).repeat_interleave(8)
    assert border_contrast(pixels, 8) == pytest.approx(1, abs=0.1)
    squares = pixels + columns + columns[:, None]
    assert border_contrast(squares, 8) > 5 and border_contrast(squares, 4) < 5


def test_experts_with_a_small_weight_are_left_out():
    """The kept rows are unchanged, and the hook counts them."""
    router, hook = TopKRouter(hidden_size=8, num_experts=4, num_experts_per_tok=3), DropSmall(0.3)
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    every = rows_of(router(x, NOTHING))
    router.register_forward_hook(hook)
    kept = rows_of(router(x, NOTHING))
    assert kept == [row for row in every if row[2] >= 0.3] and 0 < len(kept) < len(every)
    assert hook.rows_per_token == [len(kept) / 32]


def rows_of(routing: Routing) -> list[tuple]:
    tensors = routing.token, routing.expert, routing.weight
    return list(zip(*(values.tolist() for values in tensors), strict=True))


def test_experts_are_reused_within_a_batch_and_never_across_batches(config):
    """The times of two batches by Heun's method, with three passes each."""
    fields = routers.train_config(config, "topk").model
    torch.manual_seed(0)
    model = DiT(**vars(fields)).eval()
    x = torch.randn(6, 2, fields.in_channels, fields.input_size, fields.input_size)
    experts, outputs = model.blocks[0].moe.experts, []
    experts.register_forward_hook(lambda module, inputs, output: outputs.append((inputs, output)))
    reuse = Reuse(model, every=2)
    with torch.no_grad():
        for image, time in zip(x, (1.0, 0.5, 0.5, 1.0, 0.5, 0.5), strict=True):
            model(image, torch.full((2,), time), torch.tensor([0, 1]))
        model(x[0, :1], torch.full((1,), 0.5), torch.tensor([0]))  # guidance ended: half the batch
        assert len(outputs[6][1]) == len(outputs[0][1]) // 2
        reuse.remove()
        fresh = [torch.equal(output, experts(*inputs)) for inputs, output in outputs[:6]]
    assert fresh == [True, False, True, True, False, True]
    assert torch.equal(outputs[1][1], outputs[0][1])


def test_shares_of_kept_experts():
    """Two steps, one layer, two images of one token; image 1 changes one of its two experts."""
    chosen = torch.zeros(2, 1, 2, 1, 4, dtype=torch.bool)
    for step, image, experts in ((0, 0, (0, 1)), (1, 0, (0, 1)), (0, 1, (0, 2)), (1, 1, (0, 3))):
        chosen[step, 0, image, 0, list(experts)] = True
    found = dict(shares(chosen))
    assert found["next"] == found["ends"] == [0.75] and found["other"] == [0.5]
    assert found["chance"] == pytest.approx([(1 + 1 / 4 + 1 / 16 + 1 / 16) / 2])


@pytest.mark.parametrize("words", [
    "persistence --runs RUN --val-path VAL", "specialisation --runs RUN --val-path VAL",
    "dropping --ckpt RUN --ablation x --choosing-latents x --latents-path x",
    "samples --runs RUN --choosing x --reporting x",
])  # fmt: skip
def test_a_run_that_went_on_with_other_settings_gives_no_row(config, words, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 3, "changed": ["--lr: was 1, is 2"]}\n')
    script, *words = words.replace("RUN", str(tmp_path)).replace("VAL", config.val_path).split()
    output = tmp_path / "rows.jsonl"
    line = expect_error(capsys, f"experiments.{script}", *words, "--output", output)
    assert "went on with changes: --lr: was 1, is 2" in line and not output.exists()


def test_copies_are_compared_by_weights_and_by_changes():
    assert mean_cosine(torch.tensor([[1.0, 0], [0, 2], [3, 0]])) == pytest.approx(1 / 3)
    config = SimpleNamespace(num_experts=2, sparse_blocks=(1,))
    name, start = "blocks.1.moe.experts.up_proj", torch.ones(2, 2, 2)
    now = start.clone()
    now[0, 0, 0], now[1, 1, 1] = 2, 3
    before, after = (SimpleNamespace(config=config, state_dict={name: w}) for w in (start, now))
    found = compare(after, before)
    assert found["change_cosine"] == [0] and found["unchanged"] == [0.75]
    assert found["change"] == pytest.approx([(1 + 2) / 2 / 2])
    assert found["cosine"] == pytest.approx([7 / math.sqrt(7 * 12)])
    assert compare(before, before)["cosine"] == pytest.approx([1])


def test_noise_changes_only_the_routed_experts():
    names = "blocks.0.moe.experts.up_proj", "blocks.0.moe.gate.weight"
    weights = {name: 3 + torch.randn(4, 50, 50) for name in names}
    (experts, gate), before = with_noise(weights, 0.1, seed=0).values(), weights[names[0]]
    assert torch.equal(gate, weights[names[1]])
    assert (experts - before).std().item() == pytest.approx(0.1, rel=0.05)


def test_small_updates_of_bf16_weights_are_lost(plugins):
    weight = torch.nn.Parameter(torch.tensor([1.0, 0.01, 0.3]))
    optimizer = plugins.RoundedAdamW().make({"weight": weight}, 1e-3, {})
    for _ in range(3):  # updates of 1e-3; the distance at 1 is 2^-8 below and 2^-7 above
        weight.grad = torch.tensor([-1.0, -1.0, 0.0])
        optimizer.step()
    assert weight.tolist() == pytest.approx([1, 0.013, 0.3], rel=0.01) and weight[0] == 1
    assert torch.equal(weight, weight.bfloat16().float())


def test_the_weights_of_nucleus_sum_to_its_scale(plugins):
    router = plugins.NucleusRouter(hidden_size=8, num_experts=4, num_experts_per_tok=2, scale=3.0)
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    routing = router(x, NOTHING)
    total = torch.zeros(32).index_add(0, routing.token, routing.weight.detach())
    chosen = routing.token.bincount(minlength=32) > 0
    assert chosen.sum() > 0 and total[chosen].tolist() == pytest.approx([3.0] * int(chosen.sum()))


SIZES = dict(hidden_size=8, num_experts=4, num_experts_per_tok=2)


def test_a_frozen_gate_chooses_as_topk_until_its_step_and_then_keeps_its_choice(plugins):
    """The weights of the experts follow the learned gate; so does the balance loss, before."""
    generator = torch.Generator().manual_seed(0)
    router, topk = plugins.FrozenRouter(**SIZES, after=2), TopKRouter(**SIZES)
    for step in range(5):
        x = torch.randn(2, 16, 8, generator=generator)
        if step < 3:  # the choice learns in two steps
            topk.load_state_dict({"weight": router.weight})
        got, want = router(x, NOTHING), topk(x, NOTHING)
        assert torch.equal(got.expert, want.expert)
        scores = router.score(x.flatten(0, 1)).softmax(dim=-1)
        assert torch.equal(got.weight, scores[got.token, got.expert])
        assert got.loss == (want.loss if step < 2 else 0)
        router.update(got.observed, skipped=True)  # changes nothing
        with torch.no_grad():
            router.weight += torch.randn(router.weight.shape, generator=generator)
        router.update(got.observed, skipped=False)
    assert router.steps == 5


def test_random_tables_are_balanced_and_leave_the_first_gates_of_topk(config):
    arms = ("topk-8e-3-400", "position-8e-3-400", "class-8e-3-400", "frozen-0-8e-3-400")
    models = {}
    for arm in arms:
        torch.manual_seed(0)
        models[arm] = DiT(**vars(routers.train_config(config, arm).model))
    topk, *others = (model.state_dict() for model in models.values())
    for other in others:
        assert all(torch.equal(weight, other[name]) for name, weight in topk.items())
    position, classes, frozen = (models[arm].blocks for arm in arms[1:])
    for blocks, rows in ((position, 1), (classes, 11)):
        tables = torch.cat([block.moe.gate.table for block in blocks])  # (2 * rows, 16, 2)
        assert len(tables.unique(dim=0)) == 2 * rows
        assert (tables[..., 0] != tables[..., 1]).all()
        assert (F.one_hot(tables.flatten(1)).sum(dim=1) == 4).all()  # each expert, in each image
    assert all(torch.equal(b.moe.gate.frozen, b.moe.gate.weight) for b in frozen)


def test_a_table_gives_experts_by_class_and_position_and_no_class_its_own(config):
    """And each image the same experts, whatever its batch, content and time."""
    torch.manual_seed(0)
    fields = routers.train_config(config, "class-8e-3-400").model
    model, chosen = DiT(**vars(fields) | {"num_classes": 10}).eval(), []
    gate = model.blocks[1].moe.gate
    gate.register_forward_hook(lambda module, inputs, routing: chosen.append(routing))
    labels = torch.tensor([7, 10, 0, 7])
    for y in (labels, labels[1:]):
        x = torch.randn(len(y), fields.in_channels, fields.input_size, fields.input_size)
        model(x, torch.rand(len(y)), y)
    for routing, y in zip(chosen, (labels, labels[1:]), strict=True):
        assert torch.equal(routing.expert.view(-1, 16, 2), gate.table[y])
        assert routing.loss == 0 and routing.per_token == 2
    chosen[0].weight.sum().backward()
    assert gate.weight.grad.abs().sum() > 0


def test_a_warm_gate_has_the_choice_of_its_table_and_then_that_of_topk(plugins):
    generator = torch.Generator().manual_seed(0)
    router, topk = plugins.WarmRouter(**SIZES, classes=3, after=2), TopKRouter(**SIZES)
    router.reset_parameters()
    topk.load_state_dict({"weight": router.weight})
    context = Context({"classes": torch.tensor([3, 0])})
    for step in range(4):
        x = torch.randn(2, 16, 8, generator=generator)
        got, want = router(x, context), topk(x, context)
        if step < 2:
            assert torch.equal(got.expert.view(2, 16, 2), router.table[context["classes"]])
            assert got.loss == 0
        else:
            assert torch.equal(got.expert, want.expert) and got.loss == want.loss
        scores = router.score(x.flatten(0, 1)).softmax(dim=-1)
        assert torch.equal(got.weight, scores[got.token, got.expert])
        router.update(got.observed, skipped=True)  # changes nothing
        router.update(got.observed, skipped=False)


@pytest.mark.parametrize("name", ["embedded", "biased"])
def test_places_start_as_topk_and_then_act_by_class_and_position(plugins, name):
    """On one class and one position alone, as a table does."""
    model = {"hidden_size": 16, "depth": 1, "num_heads": 2, "input_size": 8, "num_classes": 3}
    generator, routed = torch.Generator().manual_seed(0), []
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, generator=generator)
    for router in ("topk", f"{name}:classes=3"):
        torch.manual_seed(0)
        made = DiT(**model, router=router).eval()
        made.blocks[0].moe.gate.register_forward_hook(lambda _, inputs, out: routed.append(out))
        made(x, t, torch.tensor([0, 3]))
    assert torch.equal(routed[0].expert, routed[1].expert)
    assert torch.equal(routed[0].weight, routed[1].weight)
    with torch.no_grad():
        made.blocks[0].moe.gate.places[3, 5] += torch.arange(
            made.blocks[0].moe.gate.places.shape[2]
        )
    made(x, t, torch.tensor([0, 3]))
    before, after = (one.weight.view(2, 16, 2) for one in routed[1:])
    differs = (before != after).any(dim=2)
    assert differs.nonzero().tolist() == [[1, 5]]  # adaLN-Zero: no attention yet


@pytest.fixture(scope="module")
def fixed():
    path = os.path.realpath(ROOT / "experiments" / "fixed_routers.py")
    with patch.dict(ROUTERS):
        import_plugins([path])
        yield sys.modules[f"plugin:{path}"]


def test_a_gate_is_replaced_by_what_it_chose_and_the_weights_that_it_gave(config, fixed, tmp_path):
    """And the rows have the loss of each replacement, as the loss of the model itself."""
    run = config.output / "runs" / "topk-8e-3-400-2"
    call_main("train.py", *routers.command_of(config, "topk-8e-3-400", 2), "--max-steps", 2)
    output = tmp_path / "rows.jsonl"
    words = ["--latents-path", config.latents_path, "--report-path", config.report_path]
    words += ["--runs", run, "--steps", 0, 1, "--batch-size", 2, "--output", output]
    call_main("experiments.replaced_gates", *words)
    rows = DataFrame(map(json.loads, output.read_text().splitlines()))
    losses = rows.set_index(["choice", "weights", "steps"])["replaced_loss"]
    assert len(losses) == 10
    assert losses["gate", "gate", 0] == pytest.approx(routers.report_loss(config, "topk", run))
    source, latents = read_checkpoint(run), CachedLatents(config.latents_path)
    (batch,) = latent_batches(latents, range(8), None, latents.classes, batch_size=8)
    x, y, t = batch["latents"], batch["label"], torch.full((8,), 0.5)
    found = Tables(*count_by_class_and_position(build_model(source), x, y))
    routed = []
    for choice, weights in (("table", "gate"), ("gate", "table"), ("table", "table")):
        model = build_model(replaced(source, found, choice, weights))
        model.blocks[1].moe.gate.register_forward_hook(lambda _, x, out: routed.append(out))
        model(x, t, y)
    experts = [one.expert.view(8, 16, 2) for one in routed]
    most = found.count[1].topk(2).values.sum(-1)  # (C + 1, T)
    for number in (0, 2):
        assert torch.equal(found.count[1][y].gather(2, experts[number]).sum(-1), most[y])
    for number in (1, 2):
        count, weight = (one[1][y].gather(2, experts[number]) for one in vars(found).values())
        known = count > 0
        got = routed[number].weight.view(8, 16, 2)[known]
        assert torch.allclose(got, (weight / count)[known])


def test_experts_at_some_times_are_those_of_topk_and_one_dense_layer_elsewhere(fixed):
    generator, routed = torch.Generator().manual_seed(0), []
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.1, 0.5])
    for router in ("at_times:high=0.3", "two_by_time:boundary=0.3"):
        model = DiT(
            hidden_size=16, depth=1, num_heads=2, input_size=8, num_experts=4, router=router
        )
        gate = model.blocks[0].moe.gate
        gate.register_forward_hook(lambda _, inputs, out: routed.append((inputs[0], out)))
        _, loss = model(x, t, torch.tensor([0, 1]))
        loss.backward()
        assert bool(gate.weight.grad.any()) == (router == "at_times:high=0.3")
        if router == "at_times:high=0.3":
            topk = TopKRouter(hidden_size=16, num_experts=4, num_experts_per_tok=2)
            topk.load_state_dict(gate.state_dict())
    (tokens, some), (_, two) = routed
    want = topk(tokens[:1], NOTHING)  # of the first image, at 0.1
    assert torch.equal(some.expert[:32], want.expert)
    assert torch.allclose(some.weight[:32], want.weight) and torch.allclose(some.loss, want.loss)
    assert some.expert[32:].view(16, 2).tolist() == [[4, 5]] * 16 and (some.weight[32:] == 1).all()
    assert two.expert.view(2, 16, 2)[:, 0].tolist() == [[2, 3], [0, 1]] and (two.weight == 1).all()


def test_images_are_shifted_around_by_their_names():
    pixels = np.arange(12).reshape(3, 4)
    moved = [shifted(pixels, f"bag/{number}.png") for number in range(500)]
    places = [tuple(np.argwhere(one == 0)[0]) for one in moved]
    assert {*places} == {(row, column) for row in range(3) for column in range(4)}
    row, column = places[7]
    assert np.array_equal(moved[7], np.roll(pixels, (row, column), (0, 1)))
    assert np.array_equal(moved[7], shifted(pixels, "bag/7.png"))


def test_the_table_of_a_run_holds_what_its_partner_chooses_most(config, tmp_path):
    output = config.output / "runs"
    for seed in (0, 1):
        call_main("train.py", *routers.command_of(config, "topk-8e-3-400", seed), "--max-steps", 2)
    run, words = output / "topk-8e-3-400-1", ["--latents-path", config.latents_path]
    call_main("experiments.choice_tables", "--runs", run, *words, "--num-images", 8)
    command = routers.command_of(config, "trained-8e-3-400", 0)
    command = [word.replace("classes=10", "classes=4") for word in command]
    call_main("train.py", *command, "--max-steps", 2)
    model, partner = load_model(output / "trained-8e-3-400-0"), load_model(run)
    latents = CachedLatents(config.latents_path)
    chosen = evenly_spaced(len(latents), 8)
    (batch,) = latent_batches(latents, chosen, None, latents.classes, batch_size=8)
    counts, _ = count_by_class_and_position(partner, batch["latents"], batch["label"])
    times_and_experts = 10 * 2
    assert (counts.sum(-1)[:, -1] == 8 * times_and_experts).all()
    present = batch["label"].bincount(minlength=4) * times_and_experts
    assert torch.equal(counts.sum(-1)[0, :-1], present[:, None].expand(4, 16))
    for number, block in enumerate(model.blocks):
        most = counts[number].gather(2, block.moe.gate.table)  # (5, 16, 2)
        assert torch.equal(most.sum(-1), counts[number].topk(2).values.sum(-1))


def test_silenced_experts_are_experts_with_outputs_of_zero(config):
    fields = routers.train_config(config, "race").model
    torch.manual_seed(0)
    model = DiT(**vars(replace(fields, depth=2, sparse_layers=(0, 1))))
    for parameter in model.parameters():  # no layer starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    latents = torch.randn(20, fields.in_channels, fields.input_size, fields.input_size)
    batch = {"latents": latents, "label": torch.arange(20) % fields.num_classes}
    settings = SimpleNamespace(objective="rectified_flow")
    pipeline, gone = SimpleNamespace(model=model, settings=settings), [[0, 3], [5, 6]]
    silenced = losses_without(gone, pipeline, None, [batch])
    whole = losses_without([[], []], pipeline, None, [batch])
    with torch.no_grad():
        for block, experts in zip(model.blocks, gone, strict=True):
            block.moe.experts.down_proj[experts] = 0
    np.testing.assert_allclose(
        silenced, losses_without([[], []], pipeline, None, [batch]), rtol=1e-6
    )
    assert abs(silenced - whole).max() > 1e-3


def test_the_scores_of_experts_are_those_of_their_weighted_outputs():
    model = DiT(**TINY_MODEL | {"depth": 1, "num_experts_per_tok": 2})
    block, seen = model.blocks[0].moe, []
    x = torch.randn(2, 16, 32)
    scores = scores_of(model, lambda: seen.append(block(x)[1]))
    (routing,) = seen
    norms = torch.zeros(len(routing.token), 4)
    for row, (token, expert, weight) in enumerate(zip(*routing[:3], strict=True)):
        one = routing._replace(token=token[None], expert=expert[None], weight=weight[None])
        norms[row, expert] = block.experts(x.flatten(0, 1), one).norm()
    load = (norms > 0).sum(0)
    want = load, norms.sum(0), norms.sum(0) / load.clamp_min(1)
    for got, expected in zip(scores, want, strict=True):
        np.testing.assert_allclose(got[0], expected.detach(), rtol=1e-5)


def test_choices_of_experts_are_compared_over_runs_after_the_mean_over_draws():
    changes = {"damage": [(1, 2, 4)], "random": [(2, 4, 8), (4, 4, 12)]}  # by draw, for each run
    rows = [
        {"run": f"topk-{seed}", "quantize": "none", "choice": choice, "draw": draw, "dropped": 2,
         "of_layers": [[0, 1]], "experts": 8, "change": change, "error": 0.1}
        for choice, draws in changes.items() for draw, values in enumerate(draws)
        for seed, change in enumerate(values)
    ]  # fmt: skip
    lines = dropping_tables(rows).splitlines()
    assert lines[2] == "| topk | 2 of 8 | +2.3333 ± 0.8819 | +5.6667 ± 2.1858 |"
    pairs = Series([1 - 3, 2 - 4, 4 - 10])
    p = stats.ttest_1samp(pairs, 0).pvalue
    want = f"| topk | damage minus random | 3 | {with_error(pairs)} | {p:.2g} ({p:.2g}) |"
    assert lines[-1].startswith(want)
    other = [row | {"run": row["run"].replace("topk", "race"), "change": 0.0} for row in rows]
    means = with_error(Series([pairs.mean(), 0]))
    assert f"| 2 arms | damage minus random | 2 | {means} |" in dropping_tables(rows + other)


def test_the_experts_dropped_in_int8_are_compared_with_those_in_fp32():
    """Also in a file that has the rows of silenced experts."""
    rows = [
        {"run": "topk-0", "quantize": kind, "silenced": silenced, "choice": "damage", "draw": 0,
         "dropped": 2, "of_layers": experts, "experts": 8, "change": 0.1, "error": 0.1}
        for kind, experts in (("none", [[0, 1]]), ("int8", [[1, 2]])) for silenced in (False, True)
    ]  # fmt: skip
    lines = [line.split(" | ")[-1] for line in dropping_tables(rows).splitlines()]
    assert lines[2:] == [" |", " |", "1 of 2 |", "1 of 2 |"]


def test_trained_and_random_routers_are_compared_over_runs():
    ends = {"trained": (0.5, 0.6, 0.7), "random": (0.3, 0.2, 0.4)}
    same = dict.fromkeys(("next", "other", "chance"), [0.2, 0.4])
    rows = [
        {"run": f"topk-{seed}", "router": router, "ends": [value - 0.1, value + 0.1], **same}
        for router, values in ends.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    lines = persistence_tables(rows).splitlines()
    assert lines[2] == "| topk | trained | 3 | 30.0 ± 0.0 | 60.0 ± 5.8 | 30.0 ± 0.0 | 30.0 ± 0.0 |"
    assert "| topk | first to last step | 3 | +30.0 ± 5.8 | 0.035 (0.07) |" in lines[-1]
