"""Run folders: names, stored settings, resuming, damaged checkpoints, and protected files."""

import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, assert_same_state, call_main, expect_error, only_run, rows, step_folder
from safetensors import safe_open
from test_models import Forgetful

from checkpoints import MODEL_FILE, Record, read_record, step_folders
from checkpoints.meta import build_meta
from latents.loading import BatchStream
from models import DiT
from routers import ROUTERS
from runtime.errors import UserError
from runtime.processes import ALONE
from runtime.tensor_file import write_tensors
from training import loop, preview, start
from training.changes import check_earlier_names, compare
from training.config import (
    DataFacts,
    TrainConfig,
    complete,
    override,
    parse_training,
    resolve,
    training_flags,
)
from training.engines.flags import DDPFlags
from training.engines.state import FACTS_KEY, STATE_FILES
from training.log import RunLog
from training.manifest import MANIFEST_FILE, checksums_of, fault_of, write_manifest
from training.run_folder import (
    CONFIG_FILE,
    default_folder,
    enter_run_folder,
    named_folder,
    stored_settings,
)
from training.saving import Saver

STATE_FILE = STATE_FILES.format(0)


@pytest.fixture(scope="module")
def flags(train_flags):
    values = {
        "num_experts": 2, "n-shared-experts": 0, "run-name": "run", "log-every": 1, "max-steps": 3,
        "ckpt-every": 1, "global-batch-size": 8, "objective": "rectified_flow",
    }  # fmt: skip
    return partial(train_flags, **values)


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """Results folder with a finished run that has checkpoints at steps 1 to 3."""
    results = tmp_path_factory.mktemp("finished")
    call_main("train.py", *flags(results))
    return results


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """Copy of the results folder of the finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


def steps_of(results: Path) -> list[int]:
    return sorted(int(folder.name) for folder in step_folders(results / "run"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file except the lock, which stores the last process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def folder_of(facts: dict | None = None, **changes) -> Path:
    said = parse_training(DDPFlags, arguments={"data_path": "data", **changes})
    return default_folder(resolve(said, DDPFlags), facts or {})


def config_of(record: Record) -> TrainConfig:
    return complete(stored_settings(record, training_flags(DDPFlags))[0], {}, DDPFlags)


def test_run_folders_are_named_by_the_settings_that_cannot_change():
    """A flag that repeats the default does not change the name, nor does the order of flags."""
    assert folder_of() == folder_of(num_experts=8, accum_iter=4, log_every=7, data_path="moved")
    others = [{"lr": 2e-4}, {"global_seed": 1}, {"freeze": ("pos",)}, {"rf": True}, {"flip": False},
              {"aux_loss_alpha": 0.5}, {"ema_decay": [0.9, 0.99]}]  # fmt: skip
    assert len({folder_of(), *(folder_of(**change) for change in others)}) == 1 + len(others)
    assert folder_of({"zero": 2}) != folder_of()
    flags = {"router": "sigmoid", "router_scale": 2, "ema_decay": [0.9], "ema_warmup": True}
    assert folder_of(**flags) == folder_of(**dict(reversed(flags.items())))
    pairs = [[(0.9, False), (0.99, True)], [(0.9, True), (0.99, False)],
             [(0.99, True), (0.9, False)]]  # fmt: skip
    emas = [[{"exponential": dict(zip(("decay", "warmup"), ema, strict=True))} for ema in pair]
            for pair in pairs]  # fmt: skip
    assert len({folder_of(ema=several) for several in emas}) == 3
    assert folder_of(auxiliary=["sra", "dispersive"]) == folder_of(auxiliary=["dispersive", "sra"])
    first, second = ("label", "size"), ("size", "label")  # their weights are drawn in this order
    assert folder_of(conditions=first) != folder_of(conditions=second)


def test_all_settings_are_stored_in_the_run_folder_and_with_the_weights(finished, image_tree):
    """config.yaml is readable, works with --config, and equals the metadata of the weights."""
    path = finished / "run" / CONFIG_FILE
    sections, facts = yaml.safe_load_all(path.read_text())
    assert "\n  objective:\n    rectified_flow:\n      times: logit-normal" in path.read_text()
    assert sections["step"]["ema"] == [{"exponential": {"decay": 0.9, "warmup": False}}]
    assert sections["model"]["depth"] == 2 and sections["step"]["lr"] == 1e-3
    assert sections["data"]["data_path"] == str(image_tree) and sections["data"]["flip"]
    record = read_record(step_folder(finished, 3))
    in_weights = json.loads(json.dumps(record.sections()))
    assert str(record.norm) == "shift 0.1 and scale 0.5" == facts["normalisation"]
    assert not {"dry_run", "gpus", "rf", "config"} & sections["run"].keys()
    del sections["model"]["expert_backend"]  # not stored with weights
    sections["data"]["vae_path"] = record.vae_path
    assert in_weights == sections
    assert facts["images"] == record.images and facts["script"] == record.facts["script"]


def test_epochs_of_the_command_replace_the_steps_of_a_run_or_recipe(finished):
    record, flags = read_record(step_folder(finished, 3)), training_flags(DDPFlags)
    stored, _ = stored_settings(record, flags)
    recipe = str(ROOT / "config" / "recipes" / "diffmoe_s.yaml")
    recipe = parse_training(DDPFlags, None, ["--config", recipe, "--epochs", "9"])
    for values in (override(stored, {"epochs": 9}, flags), recipe):
        assert values["epochs"] == 9 and "max_steps" not in values


def test_a_start_builds_the_model_at_most_twice(flags, tmp_path, monkeypatch):
    """Once without data, for what the model costs, and once to train it."""
    built = []

    def count(self, *arguments, build=DiT.__init__, **fields) -> None:
        built.append(torch.empty(0).device.type)
        build(self, *arguments, **fields)

    monkeypatch.setattr(DiT, "__init__", count)
    build_meta.cache_clear()
    call_main("train.py", *flags(tmp_path, **{"max-steps": 1}))
    assert built == ["meta", "meta"]


def test_the_config_of_a_run_used_as_a_recipe_trains_the_same_weights(finished, tmp_path):
    """The run name and values derived from data are not copied. Command line flags override."""
    recipe = finished / "run" / CONFIG_FILE
    call_main("train.py", "--config", recipe, "--results-dir", tmp_path)
    assert only_run(tmp_path).name != "run"
    assert_same_state(step_folder(tmp_path, 3), step_folder(finished, 3))
    parsed = parse_training(DDPFlags, None, ["--config", str(recipe), "--router", "race"])
    assert parsed["lr"] == 1e-3 and parsed["router"] == "race"
    assert not {"run_name", "num_classes"} & parsed.keys()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "..", ".", "a\0b", "x" * 300, "a\nb"])
def test_a_run_name_cannot_leave_the_results_folder(name):
    with pytest.raises(UserError, match="--run-name: got"):
        named_folder({"run_name": name}, None)


def test_a_results_folder_that_cannot_be_created_is_a_one_line_error(flags, tmp_path, capsys):
    for name in (tmp_path / ("x" * 300), "/proc/nothing", "/dev/null/x"):
        assert "--results-dir" in expect_error(capsys, "train.py", *flags(name))


def test_a_router_without_initial_values_is_a_one_line_error(flags, tmp_path, monkeypatch, capsys):
    """The same command may start again in the folder."""
    with monkeypatch.context() as patch:
        patch.setitem(ROUTERS, "topk", Forgetful)
        line = expect_error(capsys, "train.py", *flags(tmp_path))
    assert "blocks.0.moe.gate.noise: has no initial value, expected Forgetful.reset_par" in line
    call_main("train.py", *flags(tmp_path, **{"max-steps": 1}))
    assert steps_of(tmp_path) == [1]


def test_resuming_a_named_run_with_different_settings_is_rejected(copied, flags, capsys):
    """The settings of the newest checkpoint count, and an edited config.yaml does not. Omitting a
    flag that the run was started with is also an error. With --resume, what a flag says changes,
    except what shapes the state.
    """
    before, path = snapshot(copied), copied / "run" / CONFIG_FILE
    line = expect_error(capsys, "train.py", *flags(copied, lr=2e-3, num_experts=3))
    assert "--lr: was 0.001, is 0.002" in line and "--num-experts: was 2, is 3" in line
    assert line.endswith("the same settings, or a new run (--run-name NEW, without --resume)")
    assert "--lr: was 0.001, is 0.0001" in expect_error(
        capsys, "train.py", *flags(copied, lr=None), "--dry-run"
    )
    resume = ["train.py", "--resume", f"{copied / 'run'}/"]
    line = expect_error(capsys, *resume, "--hidden-size", 64, "--lr", 2e-3)
    assert "--hidden-size: was" in line and "--lr: was" not in line
    line = expect_error(capsys, "train.py", *flags(copied, lr=2e-3))
    assert "--lr: was 0.001, is 0.002" in line
    assert f"or --resume {copied / 'run'} with the flags that are to change" in line
    assert line.endswith(f"or a branch (--resume {step_folder(copied, 3)} --run-name NEW)")
    assert snapshot(copied) == before
    path.write_text("step: {lr: 0.00")  # written for people
    call_main(*resume, "--max-steps", 4)
    assert steps_of(copied) == [1, 2, 3, 4] and "lr: 0.001" in path.read_text()
    text = path.read_bytes()
    call_main("train.py", *flags(copied, **{"max-steps": 2}))  # a finished run keeps its config
    assert path.read_bytes() == text


@pytest.mark.parametrize(
    ("flag", "value", "change"),
    [
        ("hidden-size", 64, "state"), ("num_experts", 3, "state"), ("router", "race", "state"),
        ("optimizer", "muon", "state"), ("objective", "flow_x", "state"),
        ("model", "DiT-S/2", "state"), ("freeze", "x_embedder", "state"),
        ("train-router-only", True, "state"), ("optimizer-weight-decay", 0.1, "result"),
        ("ema-decay", 0.5, "result"), ("aux-loss-alpha", 0.5, "result"), ("lr", 5e-4, "result"),
        ("lr-schedule", "cosine", "result"), ("global-seed", 1, "result"),
        ("accum_iter", 2, "how"), ("gradient-checkpointing", True, "how"),
        ("expert-backend", "loop", "how"), ("log-every", 2, "how"),
    ],
)  # fmt: skip
def test_what_a_run_may_change_follows_from_the_class_of_the_field(
    copied, flags, flag, value, change, capsys
):
    """The same command with a changed flag; a branch; and --resume RUN with the flag."""
    said, line = (f"--{flag}", str(value)), f"--{flag.replace('_', '-')}: was "
    same = ["train.py", *flags(copied, **{"max-steps": 4, flag: value})]
    branch = ["--resume", step_folder(copied, 3), "--run-name=new"]  # beside its source
    resume = ["train.py", "--resume", copied / "run", "--max-steps", 4, *said]
    if change == "state":
        for command in (same, resume, ["train.py", *branch, *said]):
            assert line in expect_error(capsys, *command)
        assert [folder.name for folder in copied.iterdir()] == ["run"]
        return
    if change == "result":
        assert line in expect_error(capsys, *same)
        call_main("train.py", *branch, "--max-steps", 4, *said)
        assert line in (copied / "new" / "log.txt").read_text()
    call_main(*resume)
    log = [json.loads(row) for row in (copied / "run" / "log.jsonl").read_text().splitlines()]
    changed = [one for row in log for one in row.get("changed", ())]
    assert [line in one for one in changed] == [True] * (change == "result")
    assert read_record(copied / "run" / "checkpoints" / "0000004").step == 4


@pytest.mark.parametrize("name", [STATE_FILE, MODEL_FILE])
def test_the_settings_of_a_damaged_checkpoint_hold(copied, name):
    """Also its number of steps, without which the run would be finished at step 3."""
    resume, newest = ["train.py", "--resume", copied / "run"], copied / "run/checkpoints/0000004"
    call_main(*resume, "--max-steps", 4, "--lr", 5e-4)
    truncate(newest / name)
    call_main(*resume)
    assert read_record(newest).settings["step"]["lr"] == 5e-4 and fault_of(newest) is None


def test_a_folder_of_runs_may_have_the_name_of_a_folder_of_steps(copied, tmp_path, capsys):
    runs = copied.rename(tmp_path / "checkpoints")
    (runs / "run").rename(runs / "0000007")
    call_main("train.py", "--resume", runs / "0000007")
    assert f"{runs / '0000007'} is finished" in capsys.readouterr().out


def test_a_branch_is_put_beside_its_run(copied, monkeypatch):
    """Also from a link or a copy of a step; without --resume, wherever the command is started."""
    facts = DataFacts(num_classes=4, input_size=8, in_channels=4, image_size=16, vae_path="")
    steps = copied / "run" / "checkpoints"
    (steps / "latest").symlink_to("0000003")
    plan = lambda **said: start.plan_run(said, DDPFlags, lambda *_: (None, facts), ALONE)  # noqa: E731
    for step in ("0000003", "latest"):
        assert plan(resume=str(steps / step)).config.run.results_dir == str(copied)
    monkeypatch.chdir(steps / "0000003")
    assert plan(depth=1).config.run.results_dir == "results"
    assert plan(resume=".", run_name="new").folder.resolve() == copied / "new"


def test_a_branch_that_would_train_no_steps_is_rejected_and_leaves_no_folder(copied, capsys):
    branch = ["--resume", step_folder(copied, 3), "--run-name=new"]
    line = expect_error(capsys, "train.py", *branch)
    assert "--max-steps: the branch would end at step 3, expected a later step than that of" in line
    assert not (copied / "new").exists()


def test_a_default_name_of_an_earlier_version_is_found(copied, flags, capsys):
    """Otherwise the same command would silently begin a second run beside the first."""
    unnamed = partial(flags, copied, **{"run-name": None, "max-steps": 1})
    old = (copied / "run").rename(copied / "DiT-Ti-2-2E2A-rectified_flow-01234567")
    line = expect_error(capsys, "train.py", *unnamed())
    assert f"--resume {old}, or begin a new run with --run-name NEW" in line
    call_main("train.py", *unnamed(lr=2e-3))
    assert len(list(copied.iterdir())) == 2


def test_a_run_of_an_earlier_version_has_as_many_images(finished, tmp_path, monkeypatch):
    """The digests of two versions cannot be compared, the numbers of images can."""
    record = read_record(step_folder(finished, 3))
    before = replace(record, images={"count": 40, "sha256": 64 * "0"})
    (tmp_path / "run-01234567").mkdir()
    monkeypatch.setattr("training.changes.newest_record", lambda steps: before)
    facts = {**record.facts, "vae_sha256": record.vae_sha256, "normalisation": str(record.norm)}
    check = partial(check_earlier_names, tmp_path / "run-89abcdef", config_of(record))
    with pytest.raises(UserError, match="run-01234567 has the same settings"):
        check(facts | {"images": record.images})
    check(facts | {"images": record.images | {"count": 41}})


def test_the_same_command_is_compared_with_the_settings_of_a_damaged_newest_checkpoint(
    copied, flags, capsys
):
    """In a run without a name, too: it would go back to the settings of an older checkpoint."""
    unnamed = flags(copied, **{"run-name": None, "max-steps": 1})
    call_main("train.py", *unnamed)
    (run,) = (folder for folder in copied.iterdir() if folder.name != "run")
    for name in (run, copied / "run"):
        steps = 2 if name == run else 4
        call_main("train.py", "--resume", name, "--max-steps", steps, "--lr", 5e-4)
        flip_bit(step_folders(name)[0] / STATE_FILE)
    for command in (unnamed, flags(copied)):
        line = expect_error(capsys, "train.py", *command)
        assert "--lr: was 0.0005, is 0.001" in line


def test_a_run_without_checkpoints_starts_again_with_other_settings(copied, flags, capsys):
    """Nothing is lost: such a run has ended before its first save."""
    shutil.rmtree(copied / "run" / "checkpoints")
    call_main("train.py", *flags(copied, lr=2e-3, **{"max-steps": 1}))
    output = capsys.readouterr().out
    assert "run has no checkpoint yet: training starts at step 0" in output
    assert steps_of(copied) == [1] and "lr: 0.002" in (copied / "run" / CONFIG_FILE).read_text()


def test_a_run_resumes_after_its_data_autoencoder_and_folder_moved(
    copied, flags, image_tree, tiny_vae, tmp_path, monkeypatch
):
    """Resumes by the full command with new paths, by relative paths, and by the run folder only.

    The run folder has a trailing slash, as shells complete it.
    """
    shutil.copytree(image_tree, tmp_path / "moved" / "images")
    shutil.copytree(tiny_vae, tmp_path / "moved" / "vae")
    now = {"data-path": tmp_path / "moved" / "images", "vae-path": tmp_path / "moved" / "vae"}
    call_main("train.py", *flags(copied, **now, **{"max-steps": 4}))
    (tmp_path / "elsewhere").mkdir()
    copied = copied.rename(tmp_path / "elsewhere" / "results")
    monkeypatch.chdir(tmp_path / "moved")
    near = {"data-path": "./images/", "vae-path": "../moved/vae", "max-steps": 5}
    call_main("train.py", *flags("../elsewhere/results", **near))
    paths = [f"--{name}={path}" for name, path in now.items()]
    call_main("train.py", "--resume", f"{copied / 'run'}/", "--max-steps", 6, *paths)
    assert steps_of(copied) == [1, 2, 3, 4, 5, 6] and not Path("results").exists()


def test_a_run_started_before_an_option_existed_resumes_with_the_default(finished):
    """A run of a version without an option had the default of the option."""
    record, flags = read_record(step_folder(finished, 3)), training_flags(DDPFlags)
    del record.settings["step"]["optimizer"], record.settings["step"]["lr_schedule"]
    record.settings["step"]["ema"] = [{"exponential": {}}]
    now = config_of(read_record(step_folder(finished, 3)))
    found = compare(record, now, {}, None)
    assert found == ([], ["--ema-decay: was [0.9999], is [0.9]"], [])
    assert not stored_settings(record, flags)[1]
    record.settings["run"]["gone"] = record.settings["step"]["ema"][0]["exponential"]["gone"] = 1
    (note,) = stored_settings(record, flags)[1]
    assert "unknown settings" in note and "ema: exponential: gone, gone" in note


def test_images_with_the_digest_of_an_earlier_version_go_on_with_data_path(finished):
    record = read_record(step_folder(finished, 3))
    config = config_of(record)
    before = replace(record, images={"count": 40, "sha256": 64 * "0"})
    facts = {"images": record.images}
    (line,) = (x for x in compare(before, config, facts, None).unsaid if "--data" in x)
    assert "was 40 images" in line and "--data-path beside --resume" in line
    assert line in compare(before, config, facts, {"data_path"}).said


def test_a_fact_changes_with_a_flag_of_its_own(finished):
    """Features that an auxiliary loss begins to read, or reads no longer, are no change."""
    record = read_record(step_folder(finished, 3))
    config, of_features = config_of(record), {**record.facts, "features_sha256": "a"}
    assert not any(compare(record, config, of_features, None))
    assert not any(compare(replace(record, facts=of_features), config, record.facts, None))
    norm = {"normalisation": "of another cache"}
    assert compare(record, config, norm, {"latents_path"}).said
    assert compare(record, config, norm, {"data_path"}).unsaid
    assert compare(record, config, {"start": "finetune a"}, {"finetune"}).state


def test_an_autoencoder_with_another_scaling_is_rejected(copied, flags, tiny_vae, tmp_path, capsys):
    config = Path(shutil.copytree(tiny_vae, tmp_path / "vae"), "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.25}))
    line = expect_error(capsys, "train.py", *flags(copied, **{"vae-path": tmp_path / "vae"}))
    assert "and scale 0.25" in line and "a branch" in line


def test_a_branch_without_checkpoints_restarts_from_its_source(finished, flags, tmp_path, capsys):
    """The source checkpoint may have any name. A branch without checkpoints reads it again."""
    best = shutil.copytree(step_folder(finished, 2), tmp_path / "best")
    results = tmp_path / "results"
    call_main("train.py", *flags(results, resume=best))
    shutil.rmtree(results / "run" / "checkpoints")
    capsys.readouterr()
    line = expect_error(capsys, "train.py", *flags(results, resume=results / "run"))
    assert "run the command that began it again" in line
    call_main("train.py", *flags(results, resume=best))
    output = capsys.readouterr().out
    assert "no checkpoint yet: training starts at step 2" in output
    assert f"resumed from {best}" in output
    assert_same_state(step_folder(results, 3), step_folder(finished, 3))


def test_resuming_with_different_images_or_classes_is_rejected(flags, image_tree, tmp_path, capsys):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(image_tree, data)
    call_main("train.py", *flags(results, **{"data-path": data, "max-steps": 1}))
    before, arguments = snapshot(results), flags(results, **{"data-path": data})
    one, more = data / "class-0" / "00.png", data / "class-0" / "more.png"
    shutil.copy(one, more)
    line = expect_error(capsys, "train.py", *arguments)
    assert "--data-path: was 40 images" in line and "is 41 images" in line
    one.rename(tmp_path / "00.png")
    assert "--data-path" in expect_error(capsys, "train.py", *arguments)  # 40 images, new names
    shutil.copytree(image_tree / "class-0", data / "class-9")
    assert "--num-classes: was 4, is 5" in expect_error(capsys, "train.py", *arguments)
    shutil.rmtree(data / "class-9")
    assert snapshot(results) == before
    (step,) = re.findall(r"--resume (\S+) --run-name NEW", line)
    other = ["--run-name=other", f"--resume={step}"]
    line = expect_error(capsys, "train.py", *other)  # one image has another name
    assert "saved with other settings: --data-path: was 40 images" in line
    assert line.endswith("expected the flags that are to change")
    shutil.copy(tmp_path / "00.png", one)
    call_main("train.py", *arguments, *other)
    assert step_folders(results / "other")
    more.unlink()
    call_main("train.py", *arguments)
    assert steps_of(results) == [1, 2, 3]


def test_resuming_with_a_different_micro_batch_is_noted(copied, flags, capsys):
    call_main("train.py", *flags(copied, accum_iter=2, **{"max-steps": 4}))
    assert "micro-batches have 4" in capsys.readouterr().out
    assert steps_of(copied) == [1, 2, 3, 4]
    batch = ["--global-batch-size=4", "--max-steps=5"]
    call_main("train.py", f"--resume={copied / 'run'}", "--accum-iter=1", *batch)
    assert "at image 16 of all epochs, after 4 steps of 8 images" in capsys.readouterr().out


def hold(run: Path, pipe) -> None:
    lock = enter_run_folder(run)
    pipe.send(lock.name)
    pipe.recv()


def test_a_second_process_cannot_train_a_run_until_the_first_has_ended(copied, flags, capsys):
    ours, theirs = multiprocessing.Pipe()
    first = multiprocessing.get_context("fork").Process(target=hold, args=(copied / "run", theirs))
    first.start()
    ours.recv()
    arguments = flags(copied, **{"max-steps": 4})
    line = expect_error(capsys, "train.py", *arguments)
    assert f"process {first.pid}" in line
    first.kill()
    first.join()
    call_main("train.py", *arguments)
    assert steps_of(copied) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["run.lock", "log.txt", "log.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_log_or_lock_that_is_a_link_or_pipe_is_rejected(
    copied, flags, kind, name, tmp_path, capsys
):
    """Writing to a pipe without a reader would block."""
    precious, path = tmp_path / "precious", copied / "run" / name
    precious.write_text('{"step": 9}\n')
    path.unlink()
    path.symlink_to(precious) if kind == "link" else os.mkfifo(path)
    line = expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 4}))
    assert name in line or "--results-dir" in line
    assert precious.read_text() == '{"step": 9}\n' and steps_of(copied) == [1, 2, 3]


def test_no_file_outside_the_run_folder_is_deleted_or_written(copied, flags, tmp_path):
    outside, run = tmp_path / "outside", copied / "run"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    shutil.rmtree(step_folder(copied, 1))
    for name in ("writing-0000004.tmp", "deleting-0000001.tmp", "0000001"):
        (run / "checkpoints" / name).symlink_to(outside)
    for name in ("log.jsonl.tmp", "samples-0000004.png.tmp"):
        (run / name).symlink_to(outside / "precious")
    changes = {"max-steps": 4, "num-sample": 1, "keep-last": 1}
    call_main("train.py", *flags(copied, **changes))
    assert steps_of(copied) == [1, 4]  # step 1 is a link, so it is not deleted
    assert snapshot(outside) == {"precious": b"precious"}


def test_the_checkpoints_folder_of_a_run_may_be_a_link(copied, flags, tmp_path, capsys):
    shutil.move(copied / "run" / "checkpoints", tmp_path / "large-disk")
    (copied / "run" / "checkpoints").symlink_to(tmp_path / "large-disk")
    call_main("train.py", *flags(copied, **{"max-steps": 4}))
    assert steps_of(copied) == [1, 2, 3, 4]
    shutil.move(copied / "run" / "tensorboard", tmp_path / "board")
    (copied / "run" / "tensorboard").symlink_to(tmp_path / "board")
    assert "tensorboard" in expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 5}))


def test_a_checkpoint_that_another_process_saved_meanwhile_is_not_overwritten(
    copied, flags, monkeypatch, capsys
):
    config = (copied / "run" / CONFIG_FILE).read_bytes()

    def enter(folder: Path):
        shutil.copytree(step_folder(copied, 3), folder / "checkpoints" / "0000009")
        return enter_run_folder(folder)

    with monkeypatch.context() as patch:
        patch.setattr(start, "enter_run_folder", enter)
        line = expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 12}))
        assert "another process saved a checkpoint" in line
    assert (copied / "run" / CONFIG_FILE).read_bytes() == config
    assert sorted(p.name for p in step_folders(copied / "run"))[-1] == "0000009"


def test_a_run_continues_after_its_terminal_was_closed(tmp_path, monkeypatch):
    """As after `disown` and the end of an SSH connection: writes to the terminal raise EIO."""
    master, slave = os.openpty()
    file = open(slave, "wb", buffering=0)  # noqa: SIM115
    terminal = io.TextIOWrapper(file, write_through=True)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    with RunLog(tmp_path, BatchStream(range(8), 1, end_step=4), {}, None, is_main=True) as log:
        os.close(master)
        log.advance()
        log.text("still training")
    assert "still training" in (tmp_path / "log.txt").read_text()


def test_resuming_drops_log_rows_of_later_steps_and_damaged_rows(tmp_path):
    path = tmp_path / "log.jsonl"
    good = [b'{"step": %d, "loss": 1.0}\n' % step for step in range(1, 5)]
    bad = [b"\xff\xfe\n", b"\0\0\n", b'{"step": "3"}\n', b"3\n"]
    path.write_bytes(b"".join([good[0], *bad, *good[1:], b'{"step": 3']))
    stream = BatchStream(range(8), 1, start_step=3, end_step=4)
    with RunLog(tmp_path, stream, {}, None, is_main=True):
        pass
    assert path.read_bytes() == b"".join(good[:3])


def test_a_change_that_no_checkpoint_has_leaves_the_log(copied, flags, monkeypatch):
    """The run is killed after the change and before a save."""
    resume = ["--resume", copied / "run", "--max-steps", 4]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(loop.TrainingLoop, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            call_main("train.py", *resume, "--lr", 1)
    log = copied / "run" / "log.jsonl"
    assert "--lr: was 0.001, is 1" in log.read_text()
    call_main("train.py", *resume)
    assert "changed" not in log.read_text()
    call_main("train.py", *resume[:3], 5, "--lr", 1)
    call_main("train.py", *resume[:3], 6)
    assert log.read_text().count("--lr: was 0.001, is 1") == 1


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of the state": (STATE_FILE, flip_bit),
    "a bit of the weights": (MODEL_FILE, flip_bit),
    "truncated weights": (MODEL_FILE, truncate),
    "missing state": (STATE_FILE, Path.unlink),
    "missing manifest": (MANIFEST_FILE, Path.unlink),
    "damaged manifest": (MANIFEST_FILE, lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_resumes_from_the_newest_intact_checkpoint(finished, copied, flags, kind, capsys):
    name, damage = DAMAGE[kind]
    newest = step_folder(copied, 3)
    damage(newest / name)
    call_main("train.py", *flags(copied))
    output = capsys.readouterr().out.splitlines()
    assert any(str(newest) in line and name in line for line in output)
    assert any("resumed from" in line and str(step_folder(copied, 2)) in line for line in output)
    assert_same_state(newest, step_folder(finished, 3))  # step 3 was saved again
    assert [row["step"] for row in rows(copied)] == [1, 2, 3]


def test_keep_last_deletes_only_checkpoints_of_the_run(copied, flags):
    """The newest intact checkpoint is step 1. A damaged step 3 must not displace the new step 2."""
    for step in (2, 3):
        truncate(step_folder(copied, step) / MODEL_FILE)
    foreign = step_folder(copied, 3).parent / "0009" / "thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("all of it")
    call_main("train.py", *flags(copied, **{"max-steps": 2, "keep-last": 1}))
    folders = foreign.parent.parent
    assert {f.name for f in folders.iterdir()} == {"0000002", "damaged-0000003", "0009"}
    assert foreign.read_text() == "all of it" and fault_of(folders / "0000002") is None


def test_a_run_with_only_damaged_checkpoints_is_rejected_and_left_unchanged(copied, flags, capsys):
    for step in range(1, 4):
        truncate(step_folder(copied, step) / STATE_FILE)
    before = snapshot(copied)
    line = expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 4}))
    assert "0000003" in line and STATE_FILE in line and "expected" in line
    assert snapshot(copied) == before
    for step in range(1, 4):  # not even the settings can be read
        step_folder(copied, step).joinpath(MODEL_FILE).write_bytes(b"{" * 100)
    line = expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 4}))
    assert "got no intact checkpoint" in line and "restore the damaged files" in line
    damaged = step_folder(copied, 3)
    line = expect_error(capsys, "train.py", "--resume", only_run(copied))
    assert f"{damaged / MODEL_FILE}" in line


@pytest.mark.parametrize("forged", [
    {"spikes": {"mean": "x"}}, {"spikes": {"factor": 1}}, {"spikes": [1]},
    {"scaler": {"scale": "x"}}, {"numbers": [1]}, {"numbers": {"pos_embed": 1}}, {"processes": {}},
])  # fmt: skip
def test_a_forged_state_is_a_one_line_error(copied, flags, forged, capsys):
    path = step_folder(copied, 3) / STATE_FILE
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    metadata[FACTS_KEY] = json.dumps(json.loads(metadata[FACTS_KEY]) | forged)
    write_tensors(path, tensors, metadata)
    names = json.loads((path.parents[1] / MANIFEST_FILE).read_text())
    write_manifest(path.parents[1], checksums_of(path.parents[1], names))
    line = expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 4}))
    assert str(path.parents[1]) in line and "damaged" in line


def test_a_forged_manifest_is_a_fault_and_no_traceback(copied):
    (step_folder(copied, 3) / MANIFEST_FILE).write_text('{"a\\u0000": {}}')
    assert "cannot be read" in fault_of(step_folder(copied, 3))


def test_a_branch_from_a_damaged_checkpoint_names_it(copied, capsys):
    damaged = step_folder(copied, 3)
    truncate(damaged / STATE_FILE)
    line = expect_error(capsys, "train.py", "--resume", damaged, "--run-name", "branch")
    assert line.startswith(f"error: --resume {damaged}: ") and STATE_FILE in line


def test_an_empty_resume_is_none(copied, flags, capsys):
    """As of --resume "$LAST" in a script whose variable is empty."""
    call_main("train.py", *flags(copied), "--resume", "")
    assert "nothing to do" in capsys.readouterr().out


def test_saves_by_time_replace_only_earlier_saves_by_time(flags, tmp_path, monkeypatch):
    """Saves at every step by time. Every second save is kept, also under different flags later."""
    seen, complete = [], Saver.complete

    def watched(self, *arguments):
        complete(self, *arguments)
        seen.append(self.step)

    monkeypatch.setattr(Saver, "complete", watched)
    by_time = {"save-minutes": 1e-9, "ckpt-every": 2}
    call_main("train.py", *flags(tmp_path, **by_time, **{"max-steps": 5}))
    assert seen == [1, 2, 3, 4, 5] and steps_of(tmp_path) == [2, 4, 5]
    call_main("train.py", *flags(tmp_path, **{"ckpt-every": 3, "max-steps": 7}))
    assert steps_of(tmp_path) == [2, 4, 5, 6, 7]
    last = {"keep-last": 2, "num-sample": 1, "max-steps": 8}
    call_main("train.py", *flags(tmp_path, **{**by_time, **last}))
    assert steps_of(tmp_path) == [7, 8]
    assert (tmp_path / "run" / "samples-0000007.png").exists()  # saves by time include a grid


@contextmanager
def file_size_limit(size: int):
    """Makes the system write at most `size` bytes per file, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_finished_run_has_nothing_to_do_on_a_full_disk(copied, flags, capsys):
    before = sorted(copied.rglob("*"))
    with file_size_limit(0):
        call_main("train.py", *flags(copied))
    assert "is finished: step 3, nothing to do" in capsys.readouterr().out
    assert sorted(copied.rglob("*")) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard
def test_a_full_disk_does_not_stop_a_run_before_its_end(flags, tmp_path, monkeypatch, capsys):
    """Nothing can be written in step 2. A failed save after the last step ends with an error."""
    step, full = loop.TrainingLoop.step, ExitStack()

    def start_step(self, number, micro_batches):
        full.close()
        if number + 1 in (2, 5):
            full.enter_context(file_size_limit(100))
        return step(self, number, micro_batches)

    monkeypatch.setattr(loop.TrainingLoop, "step", start_step)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    planned, disk_notes = [], loop.disk_notes
    noted = lambda config, steps, size, folder: (  # noqa: E731
        planned.append(size) or disk_notes(config, steps, size, folder)
    )
    monkeypatch.setattr(loop, "disk_notes", noted)
    changes = {"num-sample": 1, "sample-every": 1}
    call_main("train.py", *flags(tmp_path, **changes, **{"max-steps": 4}))
    assert steps_of(tmp_path) == [1, 3, 4]
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4]  # every row is valid JSON
    output = capsys.readouterr()
    assert output.out.count("run/checkpoints is too small: ") == 1
    state = [path.stat().st_size for path in tmp_path.rglob("0000004/state/*.safetensors")]
    assert 0 < sum(state) - planned[0] < 100_000  # headers
    assert "WARNING: the checkpoint of step 2" in output.out
    assert all(name in output.err for name in ("log.jsonl", "tensorboard", "samples-0000002.png"))
    with full, pytest.raises(UserError, match="step 5 .*resumes from step 4"):
        call_main("train.py", *flags(tmp_path, **{"max-steps": 5}))
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("shard", [False, True])
def test_a_failed_sample_grid_is_a_warning_after_the_save(flags, tmp_path, monkeypatch, shard):
    """Sampling fails in a forward pass, as when memory runs out. Training is not affected."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def generate_and_fail(model, *arguments, **conditions):
        with model.blocks[1].register_forward_pre_hook(fail):
            return generate(model, *arguments, **conditions)

    run = partial(flags, **{"max-steps": 4, "ckpt-every": 2, "shard": shard})
    call_main("train.py", *run(tmp_path / "without"))
    generate = preview.generate
    monkeypatch.setattr(preview, "generate", generate_and_fail)
    results, changes = tmp_path / "with", {"num-sample": 1, "sample-every": 1}
    call_main("train.py", *run(results, **changes))
    for step in (2, 4):
        assert_same_state(step_folder(results, step), step_folder(tmp_path / "without", step))
    log = (results / "run" / "log.txt").read_text()
    assert log.index("checkpoints/0000004") < log.index("WARNING: no sample grid of step 4 (Out")


def test_resuming_a_run_into_a_different_run_folder_is_rejected(copied, flags, capsys):
    before, run = snapshot(copied), copied / "run"
    for changes in ({"run-name": "other"}, {"run-name": None, "results-dir": copied / "elsewhere"}):
        line = expect_error(capsys, "train.py", *flags(copied, resume=run, **changes))
        assert f"--resume {run}: " in line and "expected the same folder" in line
    assert snapshot(copied) == before


def test_fine_tuning_and_branching_from_the_same_weights_are_separate_runs(copied, flags, capsys):
    step, other = step_folder(copied, 2), {"run-name": None}
    call_main("train.py", *flags(copied, resume=step, **other))
    call_main("train.py", *flags(copied, finetune=step, **other))
    new = [path for path in copied.iterdir() if path.name != "run"]
    starts = {path.name: read_record(step_folders(path)[0]).facts["start"] for path in new}
    by_start = {start.split()[0]: name for name, start in starts.items()}
    assert sorted(by_start) == ["finetune", "resume"]
    other = {"run-name": by_start["resume"]}
    line = expect_error(capsys, "train.py", *flags(copied, finetune=step, **other))
    assert "the weights that the run started from: was resume" in line and "is finetune" in line
