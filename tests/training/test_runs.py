"""Run folders: names and numbers, going on, damaged checkpoints, and protected files."""

import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    ROOT,
    assert_same_state,
    assert_unaveraged,
    call_main,
    config_of_command,
    expect_error,
    in_process,
    list_files,
    needs_extras,
    only_run,
    rows,
    step_folder,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from test_models import Forgetful

import train
from checkpoints import MODEL_FILE, read_record, step_folders
from checkpoints.checkpoint import averages_of
from checkpoints.meta import build_meta
from latents.loading import BatchStream
from models import MEANINGS, DiT, DiTConfig
from options.parts import option
from options.settings import differences
from routers import ROUTERS
from runtime.errors import UserError
from training import going_on, loop, preview, start
from training.config import OF_DATA, TrainConfig, parse_training
from training.engines.ddp import DDPEngine
from training.engines.state import STATE_FILES
from training.log import RunLog
from training.manifest import MANIFEST_FILE, fault_of
from training.memory import state_bytes
from training.optimizers import OPTIMIZERS, AdamW
from training.run_folder import (
    CONFIG_FILE,
    enter_run_folder,
    named_folder,
    new_folder,
    parent_folder,
    write_config,
)
from training.saving import Saver
from training.sections import CommandFlags

STATE_FILE = STATE_FILES.format(0)
NAME = "DiT-Ti-2-2E2A-rectified_flow"


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


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """Checkpoint of a run that took six steps without a stop."""
    results = tmp_path_factory.mktemp("whole")
    call_main("train.py", *flags(results, **{"max-steps": 6, "ckpt-every": 6}))
    return step_folder(results, 6)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """Copy of the results folder of the finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


def steps_of(results: Path, name: str = "run") -> list[int]:
    return sorted(int(folder.name) for folder in step_folders(results / name))


def changes_of(run: Path) -> list[str]:
    """The changes that the log of a run names."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for row in log for line in row.get("changed", ())]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file except the lock, which stores the last process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_a_run_without_a_name_gets_the_next_number(tmp_path):
    """Only names of this form count. Runs that start at once get different numbers."""
    others = "12-DiT-B-2-dense", "099-DiTs", "DiT-900", "300"
    for name in ("007-DiT-S-2-8E2A", "041-my-model-2E2A-flow_x", *others):
        (tmp_path / name).mkdir()
    config = config_of_command("--rf", "--model=DiT-Ti/2")
    command = CommandFlags(results_dir=str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: new_folder(command, config), range(8)))
    ending = "DiT-Ti-2-8E2A-rectified_flow"
    assert sorted(path.name for path in found) == [f"{42 + n:03d}-{ending}" for n in range(8)]


def test_a_run_without_a_name_is_always_new(copied, flags):
    for number in (0, 1):
        call_main("train.py", *flags(copied, **{"run-name": None, "max-steps": 1}))
        assert steps_of(copied, f"{number:03d}-{NAME}") == [1]
    assert len(list(copied.iterdir())) == 3 and steps_of(copied) == [1, 2, 3]


def test_a_name_begins_a_run_and_goes_on_with_it_until_it_is_finished(flags, tmp_path, capsys):
    for steps in (1, 3):
        call_main("train.py", *flags(tmp_path, **{"max-steps": steps}))
    assert steps_of(tmp_path) == [1, 2, 3]
    assert changes_of(tmp_path / "run") == ["--max-steps: was 1, is 3"]
    before = snapshot(tmp_path)
    for steps in (3, 2):
        capsys.readouterr()
        call_main("train.py", *flags(tmp_path, **{"max-steps": steps}))
        assert f"{tmp_path / 'run'} is finished: step 3 of {steps}" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_a_run_that_larger_batches_end_too_early_is_an_error(flags, tmp_path, capsys):
    by_epochs = {"max-steps": None, "epochs": 1}  # of 40 images
    call_main("train.py", *flags(tmp_path, **by_epochs))
    before = snapshot(tmp_path)
    larger = {"global-batch-size": 20}
    call_main("train.py", *flags(tmp_path, **by_epochs, **larger))  # it was finished
    assert f"{tmp_path / 'run'} is finished: step 5 of 2" in capsys.readouterr().out
    for more in ([], ["--dry-run"]):
        command = flags(tmp_path, **{**by_epochs, "epochs": 2}, **larger)
        line = expect_error(capsys, "train.py", *command, *more)
        assert "has come to step 5 with 8 images a step, but with 20 it ends at step 4" in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("how", ["name", "resume", "branch"])
def test_three_and_three_steps_equal_six(copied, flags, whole, how):
    six = {"max-steps": 6}
    command = {
        "name": flags(copied, **six),
        "resume": ["--resume", f"{copied / 'run'}/", "--max-steps", 6],
        "branch": ["--resume", step_folder(copied, 3), "--run-name", "new", "--max-steps", 6],
    }[how]
    call_main("train.py", *command)
    run = copied / ("new" if how == "branch" else "run")
    assert_same_state(run / "checkpoints" / "0000006", whole)


@pytest.mark.parametrize("how", ["name", "resume", "branch"])
def test_every_change_of_a_run_is_a_line_on_the_screen_and_in_the_log(copied, flags, how, capsys):
    """What a command does not say is kept, also where it is not the default."""
    said = {
        "max-steps": 4, "lr": 5e-4, "lr-schedule": "cosine", "optimizer": "adamw:weight_decay=0.1",
        "aux-loss-alpha": 0.5, "expert-backend": "loop", "accum-iter": 2, "log-every": 2,
        "gradient-checkpointing": True, "global-seed": 1, "warmup-steps": 1, "grad-clip": 0.5,
        "grad-skip": 9, "precision": "bf16", "profile": 1, "gpus-per-node": 1,
        "global-batch-size": 12, "val-share": 0.5, "val-images": 20, "val-every": 3,
        "val-times": "training", "sample-every": 7, "sample-cfg-scale": 2, "keep-last": 5,
        "save-minutes": 5,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in said.items()]
    command = {
        "name": flags(copied, **said),
        "resume": ["--resume", copied / "run", *words],
        "branch": ["--resume", step_folder(copied, 3), "--run-name", "new", *words],
    }[how]
    call_main("train.py", *command)
    run = copied / ("new" if how == "branch" else "run")
    found, output = changes_of(run), capsys.readouterr().out
    assert sorted(line.split(":")[0] for line in found) == sorted(f"--{name}" for name in said)
    assert "--lr: was 0.001, is 0.0005" in found
    assert all(f"changed: {line}\n" in output for line in found)
    config = TrainConfig.of_record(read_record(run / "checkpoints" / "0000004"))
    assert (config.optimizer.weight_decay, config.step.lr) == (0.1, 5e-4)
    assert config.optimizer.betas == (0.9, 0.999) and config.model.aux_loss_alpha == 0.5


@needs_extras
def test_emas_and_auxiliary_losses_are_the_list_that_a_command_says(copied, flags):
    """`none` is the empty list. What a command does not say goes on."""
    goes_on = partial(call_main, "train.py", "--resume", copied / "run")
    goes_on("--max-steps=4", "--ema", "power:length=0.1", "exponential:decay=0.9,warmup=True",
            "--auxiliary", "dispersive")  # fmt: skip
    goes_on("--max-steps=5", "--auxiliary", "none", "--ema", "power:length=0.1")
    goes_on("--max-steps=6", "--ema", "none")
    goes_on("--max-steps=7")
    assert_unaveraged(step_folder(copied, 7))
    goes_on("--max-steps=8", "--ema", "power:length=0.1")
    lines = [line for line in changes_of(copied / "run") if "--" not in line]
    assert lines == [
        "EMA power-0.1 begins from these weights", "auxiliary loss dispersive begins anew",
        "EMA 0.9 ends", "auxiliary loss dispersive ends", "EMA power-0.1 ends",
        "EMA power-0.1 begins from these weights",
    ]  # fmt: skip
    folders = [step_folder(copied, step) for step in range(3, 9)]
    assert [[*averages_of(folder)] for folder in folders] == [
        ["0.9"], ["power-0.1", "0.9"], ["power-0.1"], ["none"], ["none"], ["power-0.1"]
    ]  # fmt: skip
    shares = [
        {name: read_record(path).ema_start_share for name, path in averages_of(folder).items()}
        for folder in folders
    ]
    power = TrainConfig.of_record(read_record(folders[2])).ema[0]
    assert shares == [
        {"0.9": pytest.approx(0.9**3)},
        # The warm-up at step 4 is 5 / 14. The power average began after step 3.
        {"power-0.1": pytest.approx(power.decay_at(4)), "0.9": pytest.approx(0.9**3 * 5 / 14)},
        {"power-0.1": pytest.approx(power.decay_at(4) * power.decay_at(5))},
        {"none": 0},
        {"none": 0},
        {"power-0.1": pytest.approx(power.decay_at(8))},
    ]


REFUSED = {
    "hidden-size": 64, "num_experts": 3, "model": "DiT-S/2", "router": "race",
    "objective": "flow_x", "optimizer": "muon", "freeze": "x_embedder", "train-router-only": True,
    "class-dropout-prob": 0.3, "vae-path": "pixels",
}  # fmt: skip


def test_what_shapes_the_state_of_a_run_cannot_change(copied, flags, capsys):
    """Also the options of the router. Other changes of the same command are not the fault."""
    before = snapshot(copied)
    branch = ["--resume", step_folder(copied, 3), "--run-name=new"]
    for name, value in [*REFUSED.items(), ("router", "topk:renormalize=True")]:
        said = {"max-steps": 4, name: value}
        words = [f"--{name}={value}" for name, value in said.items()]
        for command in (flags(copied, **said), ["--resume", copied / "run", *words],
                        [*branch, *words]):  # fmt: skip
            line = expect_error(capsys, "train.py", *command)
            flag = {"model": "hidden-size", "vae-path": "in-channels"}.get(name, name)
            assert f"--{flag.replace('_', '-')}: was " in line and "--max-steps" not in line
    with pytest.raises(UserError, match="was train.py, is train_deepspeed.py"):
        in_process(call_main, "train_deepspeed.py", "--resume", copied / "run")  # joins a group
    assert snapshot(copied) == before


class Photos:
    """A dataset of Python, with the class names that it is given."""

    targets = [0, 1] * 8

    def __init__(self, *classes: str):
        self.classes = classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return np.full((16, 16, 3), 10 * index, np.uint8), self.targets[index]


def shard(path: Path, labels: list[str]) -> Path:
    """A WebDataset shard of 16 images, with these labels in turn."""
    with tarfile.open(path, "w") as tar:
        for index in range(16):
            grid = io.BytesIO()
            Image.fromarray(Photos()[index][0]).save(grid, "png")
            label = labels[index % len(labels)].encode()
            for kind, content in (("png", grid.getvalue()), ("cls", label)):
                member = tarfile.TarInfo(f"{index:02d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_renamed_or_reordered_classes_are_refused(flags, image_tree, tmp_path, capsys):
    """A label would mean another class: of a folder, a shard or a dataset of Python."""
    data = Path(shutil.copytree(image_tree, tmp_path / "data"))
    call_main("train.py", *flags(tmp_path / "a", **{"data-path": data, "max-steps": 1}))
    (data / "class-0").rename(data / "class-9")
    line = expect_error(capsys, "train.py", *flags(tmp_path / "a", **{"data-path": data}))
    assert "(missing: class-0; new: class-9)" in line and "--finetune" in line

    tar = tmp_path / "photos.tar"
    of_tar = {"data-path": shard(tar, ["cat", "dog"]), "max-steps": 1}
    call_main("train.py", *flags(tmp_path / "b", **of_tar))
    shard(tar, ["cat", "hen"])
    line = expect_error(capsys, "train.py", *flags(tmp_path / "b", **of_tar))
    assert "(missing: dog; new: hen)" in line

    words = flags(tmp_path / "c", **{"data-path": None, "max-steps": 1})
    values = dict(word.removeprefix("--").split("=", 1) for word in words)
    train.run(data=Photos("cat", "dog"), **values)
    with pytest.raises(UserError, match="the same names in another order"):
        train.run(data=Photos("dog", "cat"), **values)


def test_other_images_or_latents_are_a_line_and_the_run_goes_on(
    copied, flags, image_tree, tiny_vae, tmp_path, capsys
):
    data = Path(shutil.copytree(image_tree, tmp_path / "data"))
    shutil.copy(data / "class-0" / "00.png", data / "class-0" / "more.png")
    call_main("train.py", *flags(copied, **{"data-path": data, "max-steps": 4}))
    (line,) = [line for line in changes_of(copied / "run") if "--" not in line]
    assert "images" in line and "was 40" in line and "is 41" in line
    (data / "class-0" / "more.png").rename(data / "class-0" / "other.png")
    config = Path(shutil.copytree(tiny_vae, tmp_path / "vae"), "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.25}))
    now = {"data-path": data, "vae-path": tmp_path / "vae", "max-steps": 5}
    capsys.readouterr()
    call_main("train.py", *flags(copied, **now), "--dry-run")
    assert "the images: was 41 images" in capsys.readouterr().out
    call_main("train.py", *flags(copied, **now))
    names, norm = [line for line in changes_of(copied / "run") if "--" not in line][1:]
    assert "scale 0.5, is " in norm and "scale 0.25" in norm and "41 images" in names
    assert steps_of(copied) == [1, 2, 3, 4, 5]


def test_a_run_keeps_its_folder(copied, flags, capsys):
    """The same name beside --resume is accepted. For a new run, a branch is named."""
    before, run = snapshot(copied), copied / "run"
    for changes in ({"run-name": "other"}, {"run-name": None, "results-dir": copied / "elsewhere"}):
        line = expect_error(capsys, "train.py", *flags(copied, resume=run, **changes))
        assert f"--resume {step_folder(copied, 3)} --run-name NEW" in line
    assert snapshot(copied) == before
    call_main("train.py", *flags(copied, resume=run, **{"max-steps": 4}))
    assert steps_of(copied) == [1, 2, 3, 4]


@pytest.mark.parametrize("flag", ["resume", "finetune"])
def test_the_name_of_a_run_wins_over_what_it_began_with(copied, flags, flag, capsys):
    """The same command goes on from its own checkpoint, also if the weights are gone since."""
    source = step_folder(copied, 2)
    begin = ["train.py", f"--{flag}", source, *flags(copied, **{"run-name": "new"})]
    call_main(*begin, "--max-steps=3")
    own = steps_of(copied, "new")
    shutil.move(source, copied / "gone") if flag == "finetune" else None
    call_main(*begin, "--max-steps=4")
    assert steps_of(copied, "new") == [*own, 4]
    other = {"resume": "finetune", "finetune": "resume"}[flag]
    steps = copied / "run" / "checkpoints"
    for origin in ([f"--{other}", steps / "0000003"], [f"--{flag}", steps / "0000001"]):
        line = expect_error(capsys, "train.py", *origin, *flags(copied, **{"run-name": "new"}))
        assert line.startswith("error: --run-name: ") and str(source) in line
    line = expect_error(capsys, "train.py", f"--{flag}", source, *flags(copied))
    assert "--run-name" in line and "new weights" in line


def test_a_resume_that_names_nothing_is_refused_beside_the_name_of_a_run(copied, flags, capsys):
    for source, reason in (("typo", "does not exist"), ("run/log.txt", "expected a run")):
        source = copied / source
        line = expect_error(capsys, "train.py", *flags(copied, resume=source))
        assert line.startswith("error: --resume: ") and reason in line and str(source) in line


@pytest.mark.parametrize(("variable", "launcher"), [
    ("TORCHELASTIC_MAX_RESTARTS", "--max-restarts"), ("DIT_MOE_SAVED", "slurm.sh"),
])  # fmt: skip
def test_a_launcher_that_restarts_commands_needs_a_name(
    copied, flags, monkeypatch, capsys, variable, launcher
):
    monkeypatch.setenv(variable, "1")
    monkeypatch.chdir(copied)  # where a save would note its checkpoint
    line = expect_error(capsys, "train.py", *flags(copied, **{"run-name": None}))
    assert line.startswith("error: --run-name: ") and launcher in line
    call_main("train.py", *flags(copied))
    call_main("train.py", "--resume", copied / "run")
    monkeypatch.delenv(variable)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    call_main("train.py", *flags(copied, **{"run-name": None, "max-steps": 1}))


def test_a_run_of_an_earlier_version_does_not_go_on(copied, flags, capsys):
    for step in (1, 2, 3):  # version 0.2 did not record its version
        folder = step_folder(copied, step)
        record = read_record(folder)
        weights = load_file(folder / MODEL_FILE)
        save_file(weights, folder / MODEL_FILE, replace(record, facts={}).to_metadata())
        list_files(folder)
    before = snapshot(copied)
    branch = ["--resume", step_folder(copied, 3), "--run-name=new", "--max-steps=4"]
    for command in (flags(copied), ["--resume", copied / "run"], branch):
        line = expect_error(capsys, "train.py", *command)
        assert "version before 0.3" in line and "--finetune" in line
    assert snapshot(copied) == before


def test_a_plan_of_a_run_that_exists_says_what_would_go_on(copied, flags, capsys):
    before = snapshot(copied)
    for command in (flags(copied, lr=5e-4), ["--resume", copied / "run", "--lr", 5e-4]):
        call_main("train.py", *command, "--max-steps=9", "--dry-run")
        output = capsys.readouterr().out
        assert re.search("^goes on +after step 3", output, re.MULTILINE)
        assert "--lr: was 0.001, is 0.0005" in output and re.search("^steps +9 of", output, re.M)
    line = expect_error(capsys, "train.py", *flags(copied, router="race"), "--dry-run")
    assert "--router: was topk" in line
    assert snapshot(copied) == before


def test_a_branch_is_put_beside_its_run(copied, monkeypatch):
    """Also from a link or a copy of a step; without --resume, wherever the command is started."""
    steps = copied / "run" / "checkpoints"
    (steps / "latest").symlink_to("0000003")
    for step in ("0000003", "latest"):
        assert parent_folder(CommandFlags(resume=str(steps / step))) == copied
    monkeypatch.chdir(steps / "0000003")
    assert parent_folder(CommandFlags()) == Path("results")
    assert named_folder(CommandFlags(resume=".", run_name="new")).resolve() == copied / "new"


def test_a_branch_that_would_train_no_steps_is_rejected_and_leaves_no_folder(copied, capsys):
    branch = ["--resume", step_folder(copied, 3), "--run-name=new"]
    line = expect_error(capsys, "train.py", *branch)
    assert line.startswith("error: --max-steps: ") and "step 3" in line
    assert not (copied / "new").exists()


def test_a_branch_without_checkpoints_restarts_from_its_source(finished, flags, tmp_path, capsys):
    """The source checkpoint may have any name. A branch without checkpoints reads it again."""
    best = shutil.copytree(step_folder(finished, 2), tmp_path / "best")
    results = tmp_path / "results"
    call_main("train.py", *flags(results, resume=best))
    shutil.rmtree(results / "run" / "checkpoints")
    line = expect_error(capsys, "train.py", *flags(results, resume=results / "run"))
    assert line.startswith(f"error: --resume: got {results / 'run'}, expected")
    call_main("train.py", *flags(results, resume=best))
    assert f"resumed from {best}" in capsys.readouterr().out
    assert_same_state(step_folder(results, 3), step_folder(finished, 3))


def test_a_run_without_checkpoints_starts_again_with_other_settings(copied, flags):
    """Nothing is lost: such a run has ended before its first save. Its pictures go."""
    run = copied / "run"
    shutil.rmtree(run / "checkpoints")
    for name in ("samples-0000002.png", "samples-best.png", "images.png"):
        (run / name).write_text("old")
    call_main("train.py", *flags(copied, lr=2e-3, **{"max-steps": 1}))
    assert steps_of(copied) == [1] and not changes_of(run)
    assert "lr: 0.002" in (run / CONFIG_FILE).read_text()
    assert not (run / "samples-0000002.png").exists() and (run / "samples-best.png").exists()
    assert (run / "images.png").stat().st_size > 3


def test_a_folder_of_runs_may_have_the_name_of_a_folder_of_steps(copied, tmp_path, capsys):
    runs = copied.rename(tmp_path / "checkpoints")
    (runs / "run").rename(runs / "0000007")
    call_main("train.py", "--resume", runs / "0000007")
    assert f"{runs / '0000007'} is finished" in capsys.readouterr().out


def test_all_settings_are_stored_in_the_run_folder_and_with_the_weights(finished, image_tree):
    """config.yaml is readable, and equals the metadata of the weights but for what the data set."""
    path = finished / "run" / CONFIG_FILE
    sections, facts = yaml.safe_load_all(path.read_text())
    assert sections["step"]["ema"] == ["exponential:decay=0.9,warmup=False"]
    assert sections["step"]["objective"].startswith("rectified_flow:times=logit-normal,")
    assert sections["model"]["depth"] == 2 and sections["step"]["lr"] == 1e-3
    assert sections["data"]["data_path"] == str(image_tree) and sections["data"]["flip"]
    record = read_record(step_folder(finished, 3))
    in_weights = TrainConfig.of_record(record).sections()
    assert {name: in_weights["model"].pop(name) for name in OF_DATA}.items() <= facts.items()
    sections["data"]["vae_path"] = record.vae_path
    assert in_weights == sections
    assert str(record.norm) == "shift 0.1 and scale 0.5"
    assert facts["images"] == record.images and facts["version"] == record.facts["version"]


def test_epochs_of_the_command_replace_the_steps_of_a_run_or_recipe(finished):
    recipe = ROOT / "config" / "recipes" / "diffmoe_s.yaml"
    stored = TrainConfig.of_record(read_record(step_folder(finished, 3)))
    _, said = parse_training("train.py", None, ["--epochs", "9"])
    for config in (stored.changed(said), config_of_command("--config", recipe, "--epochs", 9)):
        assert (config.run.epochs, config.run.max_steps) == (9, None)


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
    assert only_run(tmp_path).name == f"000-{NAME}"
    assert_same_state(step_folder(tmp_path, 3), step_folder(finished, 3))
    command, said = parse_training("train.py", None, ["--config", str(recipe), "--router", "race"])
    assert said["lr"] == 1e-3 and said["router"].name == "race"
    assert command.run_name is None and not said.keys() & {*OF_DATA}


@pytest.mark.parametrize("name", ["", "../out", "/tmp/out", "..", ".", "a\0b", "x" * 300, "a\nb"])
def test_a_run_name_cannot_leave_the_results_folder(name):
    with pytest.raises(UserError, match="--run-name: got"):
        going_on.find_start(CommandFlags(run_name=name))


def test_a_results_folder_that_cannot_be_created_is_a_one_line_error(flags, tmp_path, capsys):
    for name in (tmp_path / ("x" * 300), "/proc/nothing", "/dev/null/x"):
        assert "--results-dir" in expect_error(capsys, "train.py", *flags(name))


def test_a_router_without_initial_values_is_a_one_line_error(flags, tmp_path, monkeypatch, capsys):
    """The same command may start again in the folder."""
    with monkeypatch.context() as patch:
        patch.setitem(ROUTERS, "topk", Forgetful)
        line = expect_error(capsys, "train.py", *flags(tmp_path))
    assert "blocks.0.moe.gate.noise: has no initial value" in line
    call_main("train.py", *flags(tmp_path, **{"max-steps": 1}))
    assert steps_of(tmp_path) == [1]


class Mine(AdamW):
    more: float = option(1.0, help="an option that goes")


def test_a_run_with_a_component_of_a_plugin_needs_the_plugin_and_its_options(
    flags, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setitem(OPTIMIZERS, "mine", Mine)
        call_main("train.py", *flags(tmp_path, optimizer="mine:more=2", **{"max-steps": 1}))
    resume = "train.py", "--resume", tmp_path / "run", "--max-steps=2"
    line = expect_error(capsys, *resume)
    assert "optimizer: got 'mine'" in line and "--plugin" in line
    monkeypatch.setitem(OPTIMIZERS, "mine", AdamW)
    line = expect_error(capsys, *resume)
    assert "optimizer: got mine:more" in line and "declare it again" in line


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
    assert not [line for line in changes_of(copied / "run") if "images" in line.split(":")[0]]


def test_a_run_of_a_version_with_other_options_goes_on(copied, flags, capsys):
    """An option that the run did not have has its default; one that is gone is named."""
    folder = step_folder(copied, 3)
    record = read_record(folder)
    del record.settings["optimizer"], record.settings["lr_schedule"]
    record.settings.update(ema=["exponential"], gone=1)
    config, default = TrainConfig.of_record(record), TrainConfig.default()
    assert config.step == replace(default.step, objective=config.step.objective, lr=1e-3,
                                  precision="fp32")  # fmt: skip
    save_file(load_file(folder / MODEL_FILE), folder / MODEL_FILE, record.to_metadata())
    list_files(folder)
    call_main("train.py", *flags(copied, **{"max-steps": 4}), "--dry-run")
    assert "ignored unknown settings of the checkpoint: gone" in capsys.readouterr().out


def hold(run: Path, pipe) -> None:
    lock = enter_run_folder(run)
    pipe.send(lock.name)
    pipe.recv()


def test_images_held_out_by_a_run_that_goes_on_were_trained_on(copied, flags, capsys):
    more = {"max-steps": 4, "val-share": 0.5, "val-images": 20}
    call_main("train.py", *flags(copied, **more))
    assert "--val-share 0.5 holds out images that" in capsys.readouterr().out
    call_main("train.py", *flags(copied, **more | {"max-steps": 5}))
    assert "holds out images that" not in capsys.readouterr().out


def test_a_state_that_does_not_load_leaves_the_run_unchanged(copied, flags, monkeypatch, capsys):
    def fail(*_):
        raise UserError("the state does not fit")

    monkeypatch.setattr(DDPEngine, "load_state", fail)
    truncate(step_folder(copied, 3) / MODEL_FILE)  # its row of the log would be cut
    before = snapshot(copied)
    with pytest.raises(UserError, match="the state does not fit"):
        call_main("train.py", *flags(copied, **{"max-steps": 4, "lr": 1e-5}))
    assert "skipped the checkpoint" in capsys.readouterr().out and snapshot(copied) == before


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


def test_the_checkpoints_folder_of_a_run_may_be_a_link(copied, flags, tmp_path):
    shutil.move(copied / "run" / "checkpoints", tmp_path / "large-disk")
    (copied / "run" / "checkpoints").symlink_to(tmp_path / "large-disk")
    call_main("train.py", *flags(copied, **{"max-steps": 4}))
    assert steps_of(copied) == [1, 2, 3, 4]


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
    assert "--lr: was" not in log.read_text()
    call_main("train.py", *resume[:3], 5, "--lr", 1)
    call_main("train.py", *resume[:3], 6)
    assert log.read_text().count("--lr: was 0.001, is 1") == 1


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "truncated state": (STATE_FILE, truncate),
    "truncated weights": (MODEL_FILE, truncate),
    "missing state": (STATE_FILE, Path.unlink),
    "missing manifest": (MANIFEST_FILE, Path.unlink),
    "damaged manifest": (MANIFEST_FILE, lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_a_checkpoint_is_found(copied, kind):
    name, damage = DAMAGE[kind]
    damage(step_folder(copied, 3) / name)
    assert name in fault_of(step_folder(copied, 3)) and fault_of(step_folder(copied, 2)) is None


def test_a_run_resumes_from_the_newest_intact_checkpoint(finished, copied, flags, capsys):
    name, damage = DAMAGE["truncated weights"]
    newest = step_folder(copied, 3)
    damage(newest / name)
    call_main("train.py", *flags(copied))
    output = capsys.readouterr().out.splitlines()
    assert any(str(newest) in line and name in line for line in output)
    assert any("resumed from" in line and str(step_folder(copied, 2)) in line for line in output)
    assert_same_state(newest, step_folder(finished, 3))  # step 3 was saved again
    assert [row["step"] for row in rows(copied)] == [1, 2, 3]


def test_a_run_that_goes_on_from_an_older_checkpoint_has_its_settings(copied):
    resume = ["train.py", "--resume", copied / "run"]
    call_main(*resume, "--max-steps", 4, "--lr", 5e-4)
    truncate(step_folder(copied, 4) / STATE_FILE)
    before = read_record(step_folder(copied, 3)).settings["lr"]
    call_main(*resume, "--max-steps", 5)
    assert read_record(step_folder(copied, 5)).settings["lr"] == before != 5e-4


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
    assert str(damaged) in line


def test_a_forged_manifest_is_a_fault_and_no_traceback(copied):
    (step_folder(copied, 3) / MANIFEST_FILE).write_text('{"a\\u0000": 1}')
    assert "cannot be read" in fault_of(step_folder(copied, 3))


def test_a_manifest_of_an_earlier_version_is_named_as_such_and_not_as_damage(copied, flags, capsys):
    for folder in step_folders(copied / "run"):
        path = folder / MANIFEST_FILE
        sizes = json.loads(path.read_text())
        sizes = {name: {"bytes": size, "crc32": "0f0f0f0f"} for name, size in sizes.items()}
        path.write_text(json.dumps(sizes))
    line = expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 4}))
    assert "earlier version" in line and "--finetune" in line and "damaged" not in line


def test_a_branch_from_a_damaged_checkpoint_names_it(copied, capsys):
    damaged = step_folder(copied, 3)
    truncate(damaged / STATE_FILE)
    line = expect_error(capsys, "train.py", "--resume", damaged, "--run-name", "branch")
    assert str(damaged) in line and STATE_FILE in line and "run/checkpoints/0000002" not in line


def test_an_empty_resume_is_none(copied, flags, capsys):
    """As of --resume "$LAST" in a script whose variable is empty."""
    call_main("train.py", *flags(copied), "--resume", "")
    assert "run is finished" in capsys.readouterr().out


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
    assert "is finished: step 3" in capsys.readouterr().out
    call_main("train.py", "--resume", copied / "run", "--dry-run", "--data-path", "elsewhere")
    plan = capsys.readouterr().out
    assert "elsewhere is not on this machine; assuming the run's 40 images" in plan
    assert "the images: was" not in plan
    assert "after step 3: finished; a larger --max-steps adds steps" in plan
    assert sorted(copied.rglob("*")) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard
def test_a_full_disk_does_not_stop_a_run_before_its_end(flags, tmp_path, monkeypatch, capsys):
    """Nothing can be written in step 2. A failed save after the last step ends with an error."""
    step, full = loop.TrainingLoop.step, ExitStack()

    def start_step(self, number, micro_batches):
        if self.saver.writing:
            self.saver.writing.exception()  # wait: the limit is that of all threads
        full.close()
        if number + 1 in (2, 5):
            full.enter_context(file_size_limit(100))
        return step(self, number, micro_batches)

    monkeypatch.setattr(loop.TrainingLoop, "step", start_step)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    changes = {"num-sample": 1, "sample-every": 1}
    call_main("train.py", *flags(tmp_path, **changes, **{"max-steps": 4}))
    assert steps_of(tmp_path) == [1, 3, 4]
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4]  # every row is valid JSON
    output = capsys.readouterr()
    assert output.out.count("run/checkpoints is too small: ") == 1
    state = [path.stat().st_size for path in tmp_path.rglob("0000004/state/*.safetensors")]
    planned = state_bytes(TrainConfig.of_record(read_record(step_folder(tmp_path, 4))))
    assert 0 < sum(state) - planned["weights"] - planned["optimizer"] < 100_000  # headers
    assert "WARNING: the checkpoint of step 2" in output.out
    assert all(name in output.err for name in ("log.jsonl", "tensorboard", "samples-0000002.png"))
    with full, pytest.raises(UserError, match="step 5 .* from step 4"):
        call_main("train.py", *flags(tmp_path, **{"max-steps": 5}))
    with full, pytest.raises(UserError, match="fix the cause and begin again"):
        call_main("train.py", *flags(tmp_path / "new", **{"max-steps": 2, "ckpt-every": 2}))
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


def test_a_changed_default_is_a_line_with_its_values():
    """Two experts a token and two shared ones make 10. What only follows is no line."""
    was = DiTConfig(sparse_layers="every-second")
    lines = dict(differences(was, replace(was, num_experts_per_tok=1, depth=4), MEANINGS))
    assert lines.keys() == {"num_experts_per_tok", "depth"}
    lines = dict(differences(was, replace(was, dense_mlp_ratio=6), MEANINGS))
    assert lines == {"dense_mlp_ratio": "--dense-mlp-ratio: was 10.0, is 6.0"}
    assert not [*differences(was, replace(was, dense_mlp_ratio=10), MEANINGS)]


def test_none_over_a_value_of_a_preset_is_in_the_config_of_the_run(tmp_path):
    config = config_of_command("--model=JiT-B/16", "--patch-bottleneck=None", "--num-classes=10")
    write_config(tmp_path, config, config.record())
    again = config_of_command(f"--config={tmp_path / CONFIG_FILE}")
    assert again.preset == config.preset and again.model.patch_bottleneck is None
