"""Checkpoints and run folders lose nothing and do not mislead: real damage, disks and processes."""

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_main, run_script
from safetensors.torch import load_file
from test_hostile_files import take_step
from test_training import engine_of

from checkpoints import Record, load_model, manifest, read_checkpoint, save_model, step_folders
from runtime.errors import UserError
from runtime.processes import Distributed
from training import inputs, run
from training.log import RunLog

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def flags(train_flags):
    own = {
        "num_experts": 2, "n-shared-experts": 0, "run-name": "run", "log-every": 1, "max-steps": 4,
        "ckpt-every": 1, "global-batch-size": 8, "rf": True,
    }  # fmt: skip
    return partial(train_flags, **own)


def train(arguments: list[str]) -> None:
    torch.manual_seed(0)
    call_main("train.py", *arguments)


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """A results folder whose run has checkpoints at steps 1 to 4."""
    results = tmp_path_factory.mktemp("finished")
    train(flags(results))
    return results


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A results folder of one's own, with the finished run."""
    shutil.copytree(finished, tmp_path / "results")
    return tmp_path / "results"


def step_folder(results: Path, step: int) -> Path:
    return results / "run" / "checkpoints" / f"{step:07d}"


def assert_equal_checkpoints(a: Path, b: Path) -> None:
    got, want = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def snapshot(folder: Path) -> dict[str, str]:
    """Hashes every file but the lock, which says who came last."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != run.LOCK_FILE
    }


def flip_a_bit(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_the_manifest_notices_every_kind_of_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PIECE", 2**16)
    (tmp_path / "inner").mkdir()
    contents = {"empty": b"", "inner/large": os.urandom(3 * 2**16 + 5), "small": b"abc"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    manifest.write_manifest(tmp_path, ALONE)
    stored = json.loads((tmp_path / manifest.MANIFEST_FILE).read_text())["files"]
    assert stored.keys() == contents.keys()
    assert stored["small"] == {"bytes": 3, "sha256": [hashlib.sha256(b"abc").hexdigest()]}
    assert len(stored["inner/large"]["sha256"]) == 4
    assert manifest.find_fault(tmp_path, ALONE) is None
    large = tmp_path / "inner" / "large"
    for place in (0.0, 0.5, 0.99999):
        flip_a_bit(large, place)
        assert "inner/large is damaged" in manifest.find_fault(tmp_path, ALONE)
        flip_a_bit(large, place)
    assert manifest.find_fault(tmp_path, ALONE) is None
    (tmp_path / "empty").write_bytes(b"x")
    assert manifest.find_fault(tmp_path, ALONE) == "empty is damaged: got 1 bytes, expected 0"
    (tmp_path / "empty").unlink()
    assert manifest.find_fault(tmp_path, ALONE) == "empty is missing"
    for bad in (b"", b"[]", b'{"piece_bytes": 65536, "files": {"../x": {"bytes": 0}}}'):
        (tmp_path / manifest.MANIFEST_FILE).write_bytes(bad)
        assert "checksums.json is damaged" in manifest.find_fault(tmp_path, ALONE)


DAMAGE = {
    "truncated state": ("training_state.pt", truncate, "training_state.pt is damaged: got"),
    "flipped state": ("training_state.pt", flip_a_bit, "training_state.pt is damaged: it has not"),
    "flipped weights": ("model.safetensors", flip_a_bit, "model.safetensors is damaged: it has"),
    "missing state": ("training_state.pt", Path.unlink, "training_state.pt is missing"),
    "missing manifest": ("checksums.json", Path.unlink, "checksums.json is missing"),
    "truncated manifest": ("checksums.json", truncate, "checksums.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_sends_the_run_back_to_the_checkpoint_before(finished, copied, flags, kind, capsys):
    name, damage, message = DAMAGE[kind]
    newest = step_folder(copied, 4)
    damage(newest / name)
    train(flags(copied))
    output = capsys.readouterr().out
    assert f"resumed from {step_folder(copied, 3)}" in output
    (line,) = [line for line in output.splitlines() if "passed over" in line]
    assert str(newest) in line and message in line
    assert manifest.find_fault(newest, ALONE) is None  # written anew
    assert_equal_checkpoints(newest, step_folder(finished, 4))
    rows = (copied / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]


def test_without_a_whole_checkpoint_nothing_is_touched(copied, flags):
    for step in range(1, 5):
        truncate(step_folder(copied, step) / "training_state.pt")
    before = snapshot(copied)
    with pytest.raises(UserError) as error:
        train(flags(copied, **{"max-steps": 6}))
    line = str(error.value)
    assert "\n" not in line and "got no whole checkpoint (nothing was changed)" in line
    assert "0000004: training_state.pt is damaged: got" in line
    assert snapshot(copied) == before


def test_readers_of_weights_refuse_damaged_ones_and_pass_over_them_in_a_run(copied, capsys):
    whole = read_checkpoint(copied / "run")
    assert whole.path.parent == step_folder(copied, 4)
    flip_a_bit(whole.path, 0.9)
    for path in (whole.path, whole.path.parent):
        with pytest.raises(UserError, match="0000004: model.safetensors is damaged"):
            load_model(path)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        call_main("sample.py", "--ckpt", whole.path.parent)
    assert read_checkpoint(copied / "run").path.parent == step_folder(copied, 3)
    assert f"took {step_folder(copied, 3)}, since" in capsys.readouterr().err
    for step in range(1, 4):
        truncate(step_folder(copied, step) / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        load_model(copied / "run")


def test_old_checkpoints_are_deleted_but_for_the_last_and_every_mth(flags, tmp_path):
    train(flags(tmp_path, **{"max-steps": 7, "keep-last": 2, "keep-every": 3}))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["0000003", "0000006", "0000007"] and 6 % 3 == 0
    train(flags(tmp_path, **{"max-steps": 8, "keep-last": 1}))
    assert step_folders(tmp_path / "run") == [step_folder(tmp_path, 8)]
    with pytest.raises(UserError, match="--keep-every: got it without --keep-last"):
        train(flags(tmp_path, **{"keep-every": 3}))


def test_a_crash_while_deleting_leaves_nothing_that_counts(copied, flags):
    for number in range(20_000):
        (step_folder(copied, 1) / f"{number}").touch()
    program = (
        "import pathlib, sys; from training.saving import prune; print('go', flush=True); "
        "prune(pathlib.Path(sys.argv[1]), 4, keep_last=3, keep_every=None)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, copied / "run"], stdout=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.readline()
    half = copied / "run" / "checkpoints" / "deleting-0000001.tmp"
    while not half.exists() and process.poll() is None:
        time.sleep(0.0001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and half.exists(), "too late to show anything"
    steps = step_folders(copied / "run")
    assert steps == [step_folder(copied, step) for step in (4, 3, 2)]
    assert all(manifest.find_fault(folder, ALONE) is None for folder in steps)
    train(flags(copied))
    assert not half.exists()


@contextmanager
def small_disk(folder: Path, megabytes: int):
    """A file system of its own, of that size; skips where it cannot be had."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system, so no disk can be filled")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def immutable(folder: Path):
    """A folder that root too can write nothing to; skips where it cannot be had."""
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", folder]).returncode:
        pytest.skip("chattr +i does not work here, so root can write everywhere")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


def launch(launcher: list[str], script: Path | str, arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen, text: str) -> str:
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"no {text!r} in:\n{read}\n{process.stderr.read()}")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(finished, flags, tmp_path):
    """Two processes; the disk is full until the first save has failed."""
    size = sum(path.stat().st_size for path in step_folder(finished, 4).iterdir()) / 2**20
    with small_disk(tmp_path / "disk", round(2.8 * size)) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(round(2.2 * size * 2**20)))
        arguments = flags(disk, **{"max-steps": 24, "ckpt-every": 2, "keep-last": 1})
        process = launch(TORCHRUN, "train.py", arguments)
        output = read_until(process, "WARNING: step")
        ballast.unlink()
        errors = process.communicate(timeout=200)[1]
        assert process.returncode == 0, errors
        assert "step 2 could not be saved" in output and "No space left on device" in output
        assert "training goes on and saves again at step 4" in output
        (folder,) = (disk / "run" / "checkpoints").iterdir()
        assert folder == step_folder(disk, 24)
        assert manifest.find_fault(folder, ALONE) is None
        rows = (disk / "run" / "log.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, 25))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_log_lines_wait_for_room_on_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        log = RunLog(disk, is_main=True, start_step=0, total_steps=4)
        (disk / "ballast").write_bytes(bytes(900_000))
        for step in range(1, 5):
            if step == 4:
                (disk / "ballast").unlink()
            log.metrics(step, {"loss": 1.0, "load": [float(step)] * 6_000})
        log.close()
        rows = [json.loads(row) for row in (disk / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(row["load"] == [row["step"]] * 6_000 for row in rows)


def test_a_read_only_folder_is_said_and_the_steps_before_stay(finished, copied, flags, capsys):
    shutil.rmtree(step_folder(copied, 4))
    shutil.rmtree(step_folder(copied, 3))
    before = snapshot(copied / "run" / "checkpoints")
    with immutable(copied / "run" / "checkpoints"):
        with pytest.raises(UserError) as error:
            train(flags(copied))
        assert snapshot(copied / "run" / "checkpoints") == before
    output = capsys.readouterr().out
    assert "WARNING: step 3 could not be saved" in output and "Operation not permitted" in output
    assert "saves again at step 4" in output
    assert "step 4 could not be saved" in str(error.value) and "it was the last" in str(error.value)
    train(flags(copied))
    assert_equal_checkpoints(step_folder(copied, 4), step_folder(finished, 4))


def test_deepspeed_survives_a_failed_shard_and_a_missing_one(flags, tmp_path):
    """Rank 1 alone cannot write its shard at first; later its newest shard is lost."""
    (tmp_path / "limited.py").write_text(
        "import os, pathlib, resource, sys\n"
        "import train_deepspeed\n"
        "if os.environ['RANK'] == '1':\n"
        "    pathlib.Path(sys.argv.pop(1)).write_text(str(os.getpid()))\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "else:\n"
        "    sys.argv.pop(1)\n"
        "run = train_deepspeed.run_process\n"
        "run(lambda: train_deepspeed.main(train_deepspeed.parse_args()))\n"
    )
    own = {"global-batch-size": None, "train_batch_size": 2, "ckpt-every": 2, "keep-last": 2}
    arguments = flags(tmp_path / "results", **own, **{"max-steps": 14})
    process = launch(TORCHRUN, tmp_path / "limited.py", [str(tmp_path / "pid"), *arguments])
    output = read_until(process, "WARNING: step")
    resource.prlimit(
        int((tmp_path / "pid").read_text()),
        resource.RLIMIT_FSIZE,
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    )
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "step 2 could not be saved" in output and "File too large" in output
    results = tmp_path / "results"
    assert step_folders(results / "run") == [step_folder(results, step) for step in (14, 12)]
    assert not list((results / "run" / "checkpoints").glob("*.tmp"))

    newest = step_folder(results, 14)
    shutil.copytree(newest, tmp_path / "newest")
    (shard,) = newest.glob("deepspeed/state/*pp_rank_1_*optim_states.pt")
    shard.unlink()
    output = run_script("train_deepspeed.py", *arguments, processes=2).stdout
    assert f"passed over the checkpoint {newest}: {shard.relative_to(newest)} is missing" in output
    assert f"resumed from {step_folder(results, 12)}" in output
    assert_equal_checkpoints(newest, tmp_path / "newest")


def test_rows_of_later_steps_and_damaged_ones_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    good = [b'{"step": %d, "loss": 1.0}\n' % step for step in range(1, 5)]
    bad = [b"\xff\xfe\n", b"\0\0\n", b'{"step": "3"}\n', b"[" * 10_000 + b"\n", b"3\n"]
    path.write_bytes(b"".join([good[0], *bad, *good[1:], b'{"step": 3']))
    RunLog(tmp_path, is_main=True, start_step=3, total_steps=4).close()
    assert path.read_bytes() == b"".join(good[:3])
    before = path.stat().st_mtime_ns
    RunLog(tmp_path, is_main=True, start_step=3, total_steps=4).close()
    assert path.stat().st_mtime_ns == before  # on a full disk it could not be written again


def test_two_starts_at_once_do_not_mix_their_settings(tmp_path):
    """The second finds no folder when it begins, and the first one's when it wants to make it."""
    first, second = settings(lr=1e-3), settings(lr=2e-3)
    folder = tmp_path / "run"
    locks = [run.RunLock(folder, ALONE) for _ in range(2)]
    for lock in locks:
        lock.acquire()
    run.enter_run_folder(folder, first, locks[0])
    locks[0].file.close()  # ended
    before = snapshot(folder)
    with pytest.raises(UserError, match="begun with other settings: --lr got 0.002, expected 0.0"):
        run.enter_run_folder(folder, second, locks[1])
    assert snapshot(folder) == before


def test_a_start_that_was_overtaken_by_a_whole_run_does_not_begin_it_again(
    flags, tmp_path, monkeypatch
):
    """While the second loads its autoencoder, the first makes the folder, trains and ends."""
    arguments, load = flags(tmp_path), inputs.open_autoencoder

    def load_slowly(*args):
        monkeypatch.setattr(inputs, "open_autoencoder", load)
        train(arguments)
        before.update(snapshot(tmp_path))
        return load(*args)

    before = {}
    monkeypatch.setattr(inputs, "open_autoencoder", load_slowly)
    with pytest.raises(UserError, match="begun by another start meanwhile: run the command again"):
        train(arguments)
    assert before and snapshot(tmp_path) == before


def test_a_full_disk_behind_standard_output_stops_nothing(tmp_path, monkeypatch):
    log = RunLog(tmp_path, is_main=True, start_step=0, total_steps=1)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        log.text("said all the same")
        monkeypatch.undo()
        log.close()
        with suppress(OSError):
            full.close()
    assert "said all the same" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_branch_takes_the_flags_of_its_command_and_the_moments_of_its_origin(tmp_path, precision):
    origin, branch = engine_of(), engine_of(precision)
    take_step(origin)
    origin.save_state(tmp_path)
    weights = origin.ema_state_dict()
    save_model(tmp_path / "model.safetensors", weights, Record(config=origin.model.config, step=1))
    (group,) = branch.optimizer.param_groups
    group["weight_decay"] = 0.5
    branch.load_state(tmp_path)
    (group,) = branch.optimizer.param_groups
    assert group["weight_decay"] == 0.5
    moments = [engine.optimizer.state_dict()["state"] for engine in (origin, branch)]
    for number, entry in moments[0].items():
        for name, value in entry.items():
            assert torch.equal(moments[1][number][name], value)


@pytest.mark.parametrize(
    "change, flag", [({"freeze": "blocks.0"}, "--freeze"), ({"train-router-only": True}, "--train")]
)
def test_a_branch_that_trains_other_parameters_is_refused(finished, flags, tmp_path, change, flag):
    """Their moments would be taken for those of others, without a word where the shapes agree."""
    step = step_folder(finished, 4)
    with pytest.raises(UserError, match=f"{flag}.*: got .*, expected .* as {step} was trained"):
        train(flags(tmp_path / "results", resume=step, **change))
    assert not (tmp_path / "results").exists()


def test_weights_with_a_part_of_another_shape_are_one_line(finished, flags, tmp_path):
    stored = read_checkpoint(finished / "run")
    name = "blocks.0.attn.proj.bias"
    for number, part in enumerate((stored.state_dict[name][:1], None)):
        state_dict = {**stored.state_dict, name: part}
        state_dict = {key: value for key, value in state_dict.items() if value is not None}
        path = tmp_path / f"{number}.safetensors"
        save_model(path, state_dict, stored.record)
        with pytest.raises(UserError, match=f"another model: {name}: got .*, expected .128,") as e:
            train(flags(tmp_path / "results", resume=path))
        assert "\n" not in str(e.value)
    assert not (tmp_path / "results").exists()


def test_a_second_run_is_refused_until_the_first_is_gone(flags, tmp_path):
    arguments = flags(tmp_path, **{"max-steps": 5000, "ckpt-every": 5000, "num-workers": 1})
    first = launch([], "train.py", arguments)
    read_until(first, "step 0000001")
    holder = f"in use by process {first.pid} on {socket.gethostname()} since 20"
    with pytest.raises(UserError, match=holder):
        train(arguments)
    own = {"global-batch-size": None, "train_batch_size": 2, "max-steps": 5}
    second = launch(TORCHRUN, "train_deepspeed.py", flags(tmp_path, **own))
    errors = second.communicate(timeout=100)[1]
    assert second.returncode and holder in errors
    assert errors.startswith("error: ") and "exitcode  : 2" in errors
    first.kill()  # its data-loading process lives on for a while
    first.wait()
    train(flags(tmp_path, **{"max-steps": 1}))
    assert step_folders(tmp_path / "run") == [step_folder(tmp_path, 1)]


def settings(**changes) -> argparse.Namespace:
    defaults = {
        "data_path": None, "lr": 1e-4, "rf": False, "accum_iter": 1, "run_name": None,
        "resume": None, "results_dir": "results", "global_batch_size": 256,
    }  # fmt: skip
    filled = {"model": "DiT-S/2", "num_experts": 8, "num_experts_per_tok": 2}
    return argparse.Namespace(defaults=defaults, **{**defaults, **filled, **changes})


def test_a_new_flag_at_its_default_renames_no_run_and_another_value_does():
    before, after = settings(lr=3e-4), settings(lr=3e-4, new_flag=1.5)
    after.defaults = {**before.defaults, "new_flag": 1.5}
    assert run.choose_run_folder(before) == run.choose_run_folder(after)
    after.new_flag = 2.5
    assert run.choose_run_folder(before) != run.choose_run_folder(after)
    assert run.differences(run.settings_of(before), after) == ["--new-flag got 2.5, expected 1.5"]
    assert run.choose_run_folder(settings(lr=0.0)) != run.choose_run_folder(settings())
    assert run.choose_run_folder(settings(accum_iter=4)) == run.choose_run_folder(settings())


def test_a_run_of_an_older_digest_is_found_by_its_settings(finished, flags, tmp_path, capsys):
    old = tmp_path / "DiT-Ti-2-2E2A-rf-0123abcd"
    shutil.copytree(finished / "run", old)
    stored = json.loads((old / "settings.json").read_text())
    del stored["freeze"]  # a flag that came later
    (old / "settings.json").write_text(json.dumps({**stored, "accum_iter": 1}))
    train(flags(tmp_path, **{"run-name": None}))
    assert f"{old} is finished" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [old]


def test_another_split_of_the_global_batch_goes_on_and_says_what_changes(copied, flags, capsys):
    train(flags(copied, accum_iter=2, **{"max-steps": 5}))
    assert "micro-batches of 4 images, not 8 as before" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b'{"lr": 0.00', b"[1, 2]", b"\xff\xfe"])
def test_damaged_settings_are_one_line(copied, flags, content):
    (copied / "run" / "settings.json").write_bytes(content)
    before = snapshot(copied)
    with pytest.raises(UserError, match="settings.json: damaged") as error:
        train(flags(copied, **{"max-steps": 5}))
    assert "\n" not in str(error.value)
    assert snapshot(copied) == before


def test_other_images_do_not_enter_the_run_unseen(flags, image_tree, tmp_path, capsys):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(image_tree, data)
    arguments = flags(results, **{"data-path": data, "max-steps": 1})
    train(arguments)
    arguments = flags(results, **{"data-path": data, "max-steps": 2})
    shutil.copy(data / "class-0" / "00.png", data / "class-0" / "more.png")
    before = snapshot(results)
    with pytest.raises(
        UserError, match="--data-path: got 41 images, expected the 40 that"
    ) as error:
        train(arguments)
    (data / "class-0" / "00.png").unlink()
    with pytest.raises(UserError, match="their names differ"):
        train(arguments)
    assert snapshot(results) == before
    words = str(error.value).split()  # as another run the message says
    arguments += [words[words.index("--resume")], words[words.index("--resume") + 1]]
    train([*arguments, "--run-name=another"])
    output = capsys.readouterr().out
    assert "not the 40 that" in output and "resumed from" in output
    (data / "class-0" / "more.png").rename(data / "class-0" / "00.png")
    train(flags(results, **{"data-path": data, "max-steps": 2}))


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/out", "a/b", "..", ".", "a\0b", "x" * 300, "a\nb"]
)
def test_a_run_name_cannot_leave_the_results_folder(name):
    with pytest.raises(UserError, match="--run-name: got"):
        run.choose_run_folder(settings(run_name=name))


def test_a_results_folder_of_an_impossible_name_is_one_line(flags, tmp_path):
    for name in (tmp_path / ("x" * 300), "/proc/nothing"):
        for run_name in ("run", None):
            with pytest.raises(UserError, match="--results-dir: cannot write to"):
                train(flags(name, **{"run-name": run_name}))


@pytest.mark.parametrize("model", ["../../../out", "/etc/x", "a\0b", "y" * 400, "..", "", ["a", 1]])
def test_no_model_name_leads_out_of_the_results_folder(tmp_path, model):
    folder = run.choose_run_folder(settings(model=model, results_dir=tmp_path / "results"))
    folder.mkdir(parents=True)
    assert folder.resolve().parent == tmp_path / "results"


def test_a_model_name_from_a_file_is_refused_if_it_is_none(finished, flags, tmp_path):
    stored = read_checkpoint(finished / "run")
    for number, name in enumerate(("../../../out", "/etc/x", "a\0b", "y" * 400, "..", ["a", 1])):
        results, weights = tmp_path / f"results-{number}", tmp_path / f"{number}.safetensors"
        save_model(weights, stored.state_dict, replace(stored.record, model=name))
        arguments = flags(results, **{
            "run-name": None, "model": None, "num_experts": None, "n-shared-experts": None,
            "finetune": weights, "max-steps": 1, "lr": 0,
        })  # fmt: skip
        with pytest.raises(UserError, match="model: got"):
            train(arguments)
        assert not results.exists()
    assert not (tmp_path / "out").exists()
