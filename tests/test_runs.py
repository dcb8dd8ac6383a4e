"""Run folders: one run each, its settings, its checkpoints kept and passed over, its own files."""

import json
import multiprocessing
import os
import re
import resource
import shutil
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import assert_same_state, call_main, expect_error, only_run, rows, step_folder

from checkpoints import MODEL_FILE, read_record, step_folders
from engines.flags import DDPFlags
from engines.state import STATE_FILES, read_state
from latents.loading import BatchStream
from runtime.errors import UserError
from runtime.flags import read_values
from training import loop, preview
from training.config import parse_training, resolve, training_flags
from training.log import RunLog
from training.manifest import MANIFEST_FILE, facts_of, fault_of, write_manifest
from training.run_folder import CONFIG_FILE, RunLock, default_folder, named_run, read_run
from training.saving import Saver

STATE_FILE = STATE_FILES.format(0)


@pytest.fixture(scope="module")
def flags(train_flags):
    own = {
        "num_experts": 2, "n-shared-experts": 0, "run-name": "run", "log-every": 1, "max-steps": 3,
        "ckpt-every": 1, "global-batch-size": 8, "rf": True,
    }  # fmt: skip
    return partial(train_flags, **own)


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """A results folder whose run has checkpoints at steps 1 to 3."""
    results = tmp_path_factory.mktemp("finished")
    call_main("train.py", *flags(results))
    return results


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A results folder of one's own, with the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


def steps_of(results: Path) -> list[int]:
    return sorted(int(folder.name) for folder in step_folders(results / "run"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """The content of every file but the lock, which says who came last."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


FLAGS = training_flags(DDPFlags)


def folder_of(facts: dict | None = None, **changes) -> Path:
    given = read_values({"data_path": "data", **changes}, FLAGS)
    return default_folder(resolve(given, DDPFlags), given, facts or {})


def test_the_settings_name_the_run_and_what_may_change_does_not():
    """Nor does a flag that gives the default."""
    assert folder_of() == folder_of(num_experts=8, accum_iter=4, log_every=7, data_path="moved")
    others = [{"lr": 2e-4}, {"global_seed": 1}, {"freeze": ("pos",)}, {"rf": True}, {"flip": False}]
    assert len({folder_of(), *(folder_of(**change) for change in others)}) == 1 + len(others)
    assert folder_of({"zero": 2}) != folder_of()


def test_settings_are_stored_whole_and_read_as_they_are(finished):
    """For people and for --config, and the same in the metadata of the weights."""
    path, stored = finished / "run" / CONFIG_FILE, read_run(finished / "run", FLAGS)
    assert "\n  objective: rectified_flow\n" in path.read_text()
    assert stored["image_size"] == 16 and stored["freeze"] == () and stored["depth"] == 2
    assert stored["objective_std"] == 1.0 and stored["optimizer_betas"] == (0.9, 0.999)
    record = read_record(step_folder(finished, 3))
    stored, in_weights = (json.loads(json.dumps(v)) for v in (stored, record.values()))
    assert not {"decay_share", "gpus", "rf", "config"} & stored.keys()
    del stored["expert_backend"], stored["version"]  # no part of what a model is
    assert in_weights == {**stored, "vae_path": record.vae_path}


def test_a_runs_config_trains_the_same_as_another_run(finished, flags, tmp_path):
    """Its name is not taken over, nor what the data say; flags of the command win."""
    recipe = finished / "run" / CONFIG_FILE
    call_main("train.py", "--config", recipe, "--results-dir", tmp_path)
    assert only_run(tmp_path).name != "run"
    assert_same_state(step_folder(tmp_path, 3), step_folder(finished, 3))
    given = parse_training(DDPFlags, None, ["--config", str(recipe), "--router", "race"])
    assert given["lr"] == 1e-3 and not {"run_name", "num_classes", "router_gating"} & given.keys()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "..", ".", "a\0b", "x" * 300, "a\nb"])
def test_a_run_name_cannot_leave_the_results_folder(name):
    with pytest.raises(UserError, match="--run-name: got"):
        named_run({"run_name": name}, FLAGS)


def test_a_results_folder_that_cannot_be_made_is_one_line(flags, tmp_path, capsys):
    for name in (tmp_path / ("x" * 300), "/proc/nothing", "/dev/null/x"):
        assert "--results-dir" in expect_error(capsys, "train.py", *flags(name))


def test_other_settings_do_not_enter_a_named_run(copied, flags, capsys):
    """Nor does anything while its config is damaged or of an earlier version.

    Where it is gone, a run is held to the newest checkpoint. A flag that was left out is noticed.
    """
    before, path = snapshot(copied), copied / "run" / CONFIG_FILE
    by_its_folder = {"run-name": None, "resume": f"{copied / 'run'}/"}
    for changes in ({}, by_its_folder):
        line = expect_error(capsys, "train.py", *flags(copied, lr=2e-3, num_experts=3, **changes))
        assert "--lr: was 0.001, is 0.002" in line and "--num-experts: was 2, is 3" in line
    assert "--lr: was 0.001, is 0.0001" in expect_error(
        capsys, "train.py", *flags(copied, lr=None), "--dry-run"
    )
    path.write_text("step: {lr: 0.00")
    for arguments in (flags(copied), ["--resume", copied / "run"]):
        assert str(path) in expect_error(capsys, "train.py", *arguments)
    path.unlink()
    assert "--lr: was 0.001" in expect_error(capsys, "train.py", *flags(copied, lr=2e-3))
    earlier = copied / "run" / "settings.json"
    earlier.write_text("{}")
    for arguments in (flags(copied), ["--resume", copied / "run"]):
        line = expect_error(capsys, "train.py", *arguments)
        assert f"--finetune {copied / 'run'} --run-name NEW" in line
    earlier.unlink()
    path.write_bytes(before["run/config.yaml"])
    assert snapshot(copied) == before


def test_a_run_goes_on_after_its_data_autoencoder_and_folder_moved(
    copied, flags, image_tree, tiny_vae, tmp_path, monkeypatch
):
    """By the whole command with other paths, by relative ones, and by the run folder alone.

    With a slash at the end, as a shell completes it.
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


def test_a_run_goes_on_that_began_before_an_option_existed(copied, flags, capsys):
    """It has the default of that option; another value is another setting."""
    path = copied / "run" / CONFIG_FILE
    gone = "rope|objective_shift|optimizer_betas|ema_decay|lr_schedule"
    text = re.sub(rf"\n  ({gone}): .*", "", path.read_text())
    path.write_text(text.replace("\nstep:\n", "\nstep:\n  gone: 1\n"))
    line = expect_error(capsys, "train.py", *flags(copied, **{"objective-shift": 2}))
    assert "--objective-shift: was 1.0, is 2.0" in line
    line = expect_error(capsys, "train.py", *flags(copied))
    assert "--ema-decay: was [0.9999], is [0.9]" in line
    path.write_text(text.replace("\nstep:\n", "\nstep:\n  ema_decay: [0.9]\n"))
    call_main("train.py", *flags(copied, **{"max-steps": 4}))
    assert steps_of(copied) == [1, 2, 3, 4]


def test_a_branch_of_another_run_begins_again_where_it_began(finished, flags, tmp_path, capsys):
    """At a step under any name, and not from new weights where no checkpoint was saved yet."""
    best = shutil.copytree(step_folder(finished, 2), tmp_path / "best")
    results = tmp_path / "results"
    call_main("train.py", *flags(results, resume=best))
    shutil.rmtree(results / "run" / "checkpoints")
    capsys.readouterr()
    call_main("train.py", *flags(results, resume=results / "run"))
    said = capsys.readouterr().out
    assert "no checkpoint yet" in said and f"resumed from {best}" in said
    assert_same_state(step_folder(results, 3), step_folder(finished, 3))


def test_a_branch_that_trains_other_parameters_is_refused(finished, flags, tmp_path, capsys):
    """Their moments would be taken for those of others, without a word where the shapes agree."""
    for change in ({"freeze": "blocks.0"}, {"train-router-only": True}):
        arguments = flags(tmp_path / "r", resume=step_folder(finished, 3), **change)
        assert f"--{next(iter(change))}: was" in expect_error(capsys, "train.py", *arguments)
    assert not (tmp_path / "r").exists()


def test_other_images_and_classes_do_not_enter_the_run(flags, image_tree, tmp_path, capsys):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(image_tree, data)
    call_main("train.py", *flags(results, **{"data-path": data, "max-steps": 1}))
    before, arguments = snapshot(results), flags(results, **{"data-path": data})
    one, more = data / "class-0" / "00.png", data / "class-0" / "more.png"
    shutil.copy(one, more)
    line = expect_error(capsys, "train.py", *arguments)
    assert "--data-path: got 41 images, expected the 40" in line
    one.rename(tmp_path / "00.png")
    assert "--data-path" in expect_error(capsys, "train.py", *arguments)  # as many, other names
    shutil.copytree(image_tree / "class-0", data / "class-9")
    assert "--num-classes: was 4, is 5" in expect_error(capsys, "train.py", *arguments)
    shutil.rmtree(data / "class-9")
    assert snapshot(results) == before
    words = line.split()  # as another run, as the first line said
    other = ["--run-name=other", f"--resume={words[words.index('--resume') + 1]}"]
    shutil.copy(tmp_path / "00.png", one)
    call_main("train.py", *arguments, *other)
    assert step_folders(results / "other")
    more.unlink()
    call_main("train.py", *arguments)
    assert steps_of(results) == [1, 2, 3]


def test_another_micro_batch_goes_on_and_says_so(copied, flags, monkeypatch, capsys):
    monkeypatch.setattr("training.loop.ANNOUNCED_SIZE", 0)  # parameters whose saves take a while
    call_main("train.py", *flags(copied, accum_iter=2, **{"max-steps": 4}))
    out = capsys.readouterr().out
    assert "micro-batches of 4" in out and out.index("saving step 4\n") < out.index("] saved ")
    assert steps_of(copied) == [1, 2, 3, 4]


def hold(run: Path, pipe) -> None:
    lock = RunLock(run)
    pipe.send(lock.file.name)
    pipe.recv()


def test_a_second_run_is_refused_until_the_first_is_gone(copied, flags, capsys):
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
def test_a_link_or_a_pipe_in_place_of_a_file_is_refused(
    copied, flags, kind, name, tmp_path, capsys
):
    """A pipe that nobody reads would block its writer."""
    precious, path = tmp_path / "precious", copied / "run" / name
    precious.write_text('{"step": 9}\n')
    path.unlink()
    path.symlink_to(precious) if kind == "link" else os.mkfifo(path)
    line = expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 4}))
    assert name in line or "--results-dir" in line
    assert precious.read_text() == '{"step": 9}\n' and steps_of(copied) == [1, 2, 3]


def test_nothing_outside_a_run_folder_is_deleted_or_written(copied, flags, tmp_path):
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
    assert steps_of(copied) == [1, 4]  # the first is a link, so not ours
    assert snapshot(outside) == {"precious": b"precious"}


def test_the_folder_of_checkpoints_may_be_a_link_and_that_of_tensorboard_not(
    copied, flags, tmp_path, capsys
):
    shutil.move(copied / "run" / "checkpoints", tmp_path / "large-disk")
    (copied / "run" / "checkpoints").symlink_to(tmp_path / "large-disk")
    call_main("train.py", *flags(copied, **{"max-steps": 4}))
    assert steps_of(copied) == [1, 2, 3, 4]
    shutil.move(copied / "run" / "tensorboard", tmp_path / "board")
    (copied / "run" / "tensorboard").symlink_to(tmp_path / "board")
    assert "tensorboard" in expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 5}))


def test_rows_of_later_steps_and_damaged_ones_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    good = [b'{"step": %d, "loss": 1.0}\n' % step for step in range(1, 5)]
    bad = [b"\xff\xfe\n", b"\0\0\n", b'{"step": "3"}\n', b"3\n"]
    path.write_bytes(b"".join([good[0], *bad, *good[1:], b'{"step": 3']))
    RunLog(tmp_path, BatchStream(8, 1, start_step=3, end_step=4), {}, None, is_main=True).close()
    assert path.read_bytes() == b"".join(good[:3])


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
def test_damage_sends_the_run_back_to_the_checkpoint_before(finished, copied, flags, kind, capsys):
    name, damage = DAMAGE[kind]
    newest = step_folder(copied, 3)
    damage(newest / name)
    call_main("train.py", *flags(copied))
    said = capsys.readouterr().out.splitlines()
    assert any(str(newest) in line and name in line for line in said)
    assert any("resumed from" in line and str(step_folder(copied, 2)) in line for line in said)
    assert_same_state(newest, step_folder(finished, 3))  # written anew
    assert [row["step"] for row in rows(copied)] == [1, 2, 3]


def test_only_own_checkpoints_are_deleted_and_damaged_ones_make_room(copied, flags, capsys):
    """The newest whole one is step 1: what is saved after it stays, though 3 was there before."""
    for step in (2, 3):
        truncate(step_folder(copied, step) / MODEL_FILE)
    foreign = step_folder(copied, 3).parent / "0009" / "thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("all of it")
    call_main("train.py", *flags(copied, **{"max-steps": 2, "keep-last": 1}))
    folders = foreign.parent.parent
    assert {f.name for f in folders.iterdir()} == {"0000002", "damaged-0000003", "0009"}
    assert foreign.read_text() == "all of it" and fault_of(folders / "0000002") is None


def test_without_a_whole_checkpoint_nothing_is_touched(copied, flags, capsys):
    for step in range(1, 4):
        truncate(step_folder(copied, step) / STATE_FILE)
    before = snapshot(copied)
    line = expect_error(capsys, "train.py", *flags(copied, **{"max-steps": 4}))
    assert "0000003" in line and STATE_FILE in line and "expected" in line
    assert snapshot(copied) == before


def test_saves_by_time_replace_each_other_and_others_stay(flags, tmp_path, monkeypatch):
    """Every step is saved by time, and each second is one to keep: also under other flags later."""
    seen, complete = [], Saver.complete

    def watched(self, *given):
        complete(self, *given)
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
    assert (tmp_path / "run" / "samples-0000007.png").exists()  # by time, too


@contextmanager
def file_size_limit(size: int):
    """The system writes no file beyond that many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_full_disk_costs_checkpoints_grids_and_log_lines_and_not_the_run(
    flags, tmp_path, monkeypatch, capsys
):
    """Nothing can be written in step 2. After the last step there is no next save to wait for."""
    step, full = loop.TrainingLoop.step, ExitStack()

    def start_step(self, number, micro_batches):
        full.close()
        if number + 1 in (2, 5):
            full.enter_context(file_size_limit(100))
        return step(self, number, micro_batches)

    monkeypatch.setattr(loop.TrainingLoop, "step", start_step)
    changes = {"num-sample": 1, "sample-every": 1}
    call_main("train.py", *flags(tmp_path, **changes, **{"max-steps": 4}))
    assert steps_of(tmp_path) == [1, 3, 4]
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4]  # and each is whole
    said = capsys.readouterr()
    assert "WARNING: step 2" in said.out
    assert all(name in said.err for name in ("log.jsonl", "tensorboard", "samples-0000002.png"))
    with full, pytest.raises(UserError, match="step 5 .*goes on from step 4"):
        call_main("train.py", *flags(tmp_path, **{"max-steps": 5}))
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("shard", [False, True])
def test_a_grid_that_cannot_be_drawn_is_a_warning_after_the_save(
    flags, tmp_path, monkeypatch, shard
):
    """It fails within a forward pass, as one that needs too much memory does, and costs no bit."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def generate_and_fail(model, *given, **conditions):
        with model.blocks[1].register_forward_pre_hook(fail):
            return generate(model, *given, **conditions)

    run = partial(flags, **{"max-steps": 4, "ckpt-every": 2, "shard": shard})
    call_main("train.py", *run(tmp_path / "without"))
    generate = preview.generate
    monkeypatch.setattr(preview, "generate", generate_and_fail)
    results, changes = tmp_path / "with", {"num-sample": 1, "sample-every": 1}
    call_main("train.py", *run(results, **changes))
    for step in (2, 4):
        assert_same_state(step_folder(results, step), step_folder(tmp_path / "without", step))
    said = (results / "run" / "log.txt").read_text()
    assert said.index("checkpoints/0000004") < said.index("WARNING: no sample grid of step 4 (CUDA")


@pytest.mark.parametrize("parts", [1, 2])
def test_checkpoints_of_former_versions_are_resumed(finished, copied, flags, parts):
    """DDP wrote one pickle, --shard one for each process, with some rows of every parameter."""
    shutil.rmtree(step_folder(copied, 3))
    former = step_folder(copied, 2)
    state = read_state(former, {}, torch.device("cpu"))
    parameters = state["optimizer"].keys()

    def cut(tree: dict, part: int, name: str = "") -> dict:
        """The rows of a part, of every tensor with rows that belongs to a parameter."""
        found = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                found[key] = cut(value, part, key)
            elif {key, name} & parameters and torch.is_tensor(value) and value.dim():
                size = -(-len(value) // parts)
                found[key] = value[part * size : (part + 1) * size].clone()
            else:
                found[key] = value
        return found

    for part in range(parts):
        path = former / ("training_state.pt" if parts == 1 else f"fsdp/rank_{part:05d}.pt")
        path.parent.mkdir(exist_ok=True)
        torch.save({"parts": parts, **cut(state, part)}, path)
    shutil.rmtree(former / "state")
    (former / MANIFEST_FILE).unlink()
    files = [str(path.relative_to(former)) for path in former.rglob("*") if path.is_file()]
    write_manifest(former, facts_of(former, files))
    call_main("train.py", *flags(copied))
    assert "resumed from" in (copied / "run" / "log.txt").read_text()
    assert_same_state(step_folder(copied, 3), step_folder(finished, 3))


def test_a_run_that_is_named_is_not_left_for_another_one(copied, flags, capsys):
    """Nor is one begun where what is to be gone on with has no such average."""
    before, run = snapshot(copied), copied / "run"
    for given in ({"run-name": "other"}, {"run-name": None, "results-dir": copied / "elsewhere"}):
        line = expect_error(capsys, "train.py", *flags(copied, resume=run, **given))
        assert f"--resume {run}: got " in line and "expected that run" in line
    branch = {"resume": step_folder(copied, 2), "run-name": "new"}
    arguments = [*flags(copied, **{**branch, "ema-decay": None}), "--ema-decay", 0.9, 0.5]
    assert "--ema: got 0.5, expected those in" in expect_error(capsys, "train.py", *arguments)
    assert snapshot(copied) == before and not (copied / "new").exists()


def test_fine_tuning_and_branching_from_the_same_weights_are_two_runs(copied, flags, capsys):
    step, other = step_folder(copied, 2), {"run-name": None}
    call_main("train.py", *flags(copied, resume=step, **other))
    call_main("train.py", *flags(copied, finetune=step, **other))
    new = [path for path in copied.iterdir() if path.name != "run"]
    by_start = {read_run(path, FLAGS)["start"].split()[0]: path.name for path in new}
    assert sorted(by_start) == ["finetune", "resume"]
    other = {"run-name": by_start["resume"]}
    line = expect_error(capsys, "train.py", *flags(copied, finetune=step, **other))
    assert "the start: was resume" in line and "is finetune" in line
