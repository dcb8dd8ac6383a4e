"""Races of tiny runs in turns, and what makes a run no record."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import call_main, expect_error

from checkpoints import load_model, read_checkpoint
from evaluation.heldout import held_out_loss, latent_batches
from experiments import routers, speedrun
from experiments.rows import read_lines
from latents.cache import CachedLatents
from runtime.errors import UserError
from runtime.files import read_json
from training.config import TrainConfig

SCRIPT, RUN = "experiments.speedrun", subprocess.run
RECIPE = """
model: DiT-Ti/2
hidden-size: 32
depth: 1
num-heads: 2
num_experts: 4
objective: rectified_flow
precision: fp32
global-batch-size: 4
num-workers: 0
lr: 1e-3
max-steps: 3
log-every: 1
"""


def train_here(command: list, **options) -> SimpleNamespace:
    """Trains in this process, because another process starts slowly."""
    if command[1] != speedrun.ROOT / "train.py":
        return RUN(command, **options)
    call_main("train.py", *command[2:])
    return SimpleNamespace(returncode=0)


@pytest.fixture(scope="module")
def data(image_tree, tiny_vae, latent_cache, tmp_path_factory) -> list:
    """Flags of training, choosing and reporting latents, of 40, 39 and 38 images."""
    folder, flags = tmp_path_factory.mktemp("race"), ["--latents-path", latent_cache]
    shutil.copytree(image_tree, folder / "images")
    for name in ("val", "report"):
        next((folder / "images").glob("*/0*.png")).unlink()
        call_main(
            "cache_latents.py", "--data-path", folder / "images", "--vae-path", tiny_vae,
            "--image-size", 16, "--output", folder / name, "--num-workers", 0,
        )  # fmt: skip
        flags += [f"--{name}-path", folder / name]
    return flags


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(data, recipe, tmp_path_factory) -> Path:
    """The folder of a race with two seeds between the recipe and a change of it."""
    folder = tmp_path_factory.mktemp("race") / "race"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", train_here)
        patch.setattr(os, "sched_setaffinity", lambda *_: None)  # also holds for later tests
        patch.setattr(speedrun, "matrix_peaks", lambda *_: {"fp32": 2e11})  # takes seconds
        call_main(
            SCRIPT, f"{recipe} --optimizer muon:precision=fp32 --max-steps 2", *data,
            "--reference", recipe, "--seeds", 2, "--cores", 1, "--output", folder,
        )  # fmt: skip
    return folder


def test_a_race_trains_in_turns_and_prints_a_row_for_each_entry(finished):
    rows = read_lines(finished / "rows.jsonl")
    assert [row["run"] for row in rows] == ["0-tiny-0", "1-tiny-0", "1-tiny-1", "0-tiny-1"]
    assert all(row["seconds"] > 0 and {"loss", "report_loss"} <= row.keys() for row in rows)
    result = read_json(finished / "race.json")
    reference, entry = result["rows"]
    assert reference["share of the time"] == "1.000 ± 0.000" and reference["reached"] == "yes"
    assert entry["share of the images"] == "0.667" and entry["seeds"] == 2
    assert result["peaks"] == {"fp32": 2e11} and "commit" in result["machine"]


@pytest.mark.parametrize(
    "flags", ["--latents-norm data", "--objective flow_x:noise_scale=2"], ids=["norm", "noise"]
)
def test_an_entry_with_a_loss_in_other_units_is_refused(flags, data, recipe, tmp_path, capsys):
    output = ("--reference", recipe, "--output", tmp_path / "race")
    line = expect_error(capsys, SCRIPT, f"{recipe} {flags}", *data, *output)
    assert "the loss is not that of the target" in line


def test_a_record_is_raced_again_from_the_config_of_its_run(finished, data):
    run = finished / "runs" / "1-tiny-1"
    words = speedrun.words_of(str(run / "config.yaml"))
    again = speedrun.resolved(words, CachedLatents(data[1]))
    assert (again.run.max_steps, again.optimizer.precision, again.run.global_seed) == (2, "fp32", 1)


def test_an_arm_has_the_settings_of_its_experiment(data):
    dataset = CachedLatents(data[1])
    experiment = routers.ExperimentConfig(
        latents_path=str(data[1]), val_path=str(data[3]), precision="fp32"
    )
    for arm in ("published-ema-fp32-800", "fast-fp32-400", "dense-8e-3-400"):
        raced = speedrun.resolved(speedrun.words_of(f"{arm} --precision fp32"), dataset)
        expected = routers.train_config(experiment, arm)
        assert (raced.model, raced.step) == (expected.model, expected.step)
        assert raced.run.max_steps == expected.run.max_steps


def test_the_table_compares_runs_of_one_seed_and_the_means_of_losses():
    def row(entry: str, seed: int, seconds: float, loss: float, images: int) -> dict:
        return dict(entry=entry, seed=seed, seconds=seconds, loss=loss, images=images, busy=1.0)

    rows = [row("a", 0, 100, 0.6, 10), row("a", 1, 200, 0.8, 10)]  # 0.7, standard error 0.1
    rows += [row("b", 1, 100, 0.79, 5), row("b", 0, 30, 0.8, 5)]
    rows += [row("c", 0, 100, 0.9, 20), row("c", 1, 200, 0.72, 20)]
    a, b, c = speedrun.table(rows, {"fp32": 2e12})
    assert (a["target"], a["reached"], b["reached"], c["reached"]) == ("0.8000", "yes", "yes", "no")
    assert b["share of the time"] == "0.400 ± 0.100" and b["share of the images"] == "0.500"
    assert b["fp32 peak x s, PFLOP"] == "0.13"  # 65 s on cores that compute 2e12 FLOP/s


def test_a_run_in_a_process_of_its_own_is_timed(data, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "kept")
    config = speedrun.SpeedrunConfig(
        latents_path=str(data[1]), val_path=str(data[3]), cores=1, output=tmp_path
    )
    row = speedrun.train_entry(config, str(recipe), seed=3, number=1)
    assert row["run"] == "1-tiny-3" and row["images"] == 12
    assert row["seconds"] > 1 and 0 < row["busy"] < 1.2
    failing = [sys.executable, "-c", "import sys; print('error: x', file=sys.stderr); sys.exit(2)"]
    start = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _, **options: start(failing, **options))
    with pytest.raises(UserError, match=r"2-tiny-0: training failed with exit code 2: error: x"):
        speedrun.train_entry(config, str(recipe), seed=0, number=2)


def test_the_target_is_a_loss_of_velocities_whatever_a_run_weighs(data, recipe, tmp_path):
    latents = CachedLatents(data[3])
    for name in ("rectified_flow:mean=1", "flow_x:clamp=1"):
        words = ["--objective", name, "--latents-path", data[1], "--num-sample", 0]
        call_main("train.py", "--config", recipe, *words, "--results-dir", tmp_path,
                  "--run-name", name[:6])  # fmt: skip
        run = tmp_path / name[:6]
        batches = latent_batches(latents, range(len(latents)), None, latents.classes, batch_size=9)
        own = TrainConfig.of_record(read_checkpoint(run).record).objective
        of_own = held_out_loss(load_model(run), own, batches).mean
        is_equal = speedrun.race_loss(run, data[3]) == pytest.approx(of_own, rel=1e-5)
        assert is_equal == name.startswith("rectified")


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("fats.yaml", "fats.yaml (no such file"),
        ("fats-400", "got the entry 'fats-400'"),
        ("RECIPE --max-steps None --epochs 1", "got no --max-steps, expected the length"),
        ("RECIPE --objective gaussian", "objective gaussian, expected rectified_flow or flow_x"),
        ("RECIPE --finetune assets/demo", "expected training from new weights"),
        ("RECIPE --lr -1", "--lr: got -1"),
    ],
)
def test_an_entry_that_cannot_be_a_record_is_refused(entry, line, data, recipe, tmp_path, capsys):
    words = [entry.replace("RECIPE", str(recipe)), *data, "--output", tmp_path / "new"]
    assert line in expect_error(capsys, SCRIPT, *words)
    assert not (tmp_path / "new").exists()


def test_a_race_needs_an_entry_a_new_folder_and_separate_images(data, recipe, finished, capsys):
    assert "got no entry" in expect_error(capsys, SCRIPT, *data)
    message = expect_error(capsys, SCRIPT, recipe, *data, "--output", finished)
    assert "--output: got" in message and "expected a new or empty folder" in message
    same = [*data[:2], "--val-path", data[1]]
    assert "has the images of --latents-path" in expect_error(capsys, SCRIPT, recipe, *same)
