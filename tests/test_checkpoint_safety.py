"""A run loses nothing: real damage, a full disk, other images and a second start."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_main
from safetensors.torch import load_file

from checkpoints import read_checkpoint, save_model, step_folders
from checkpoints.manifest import MANIFEST_FILE, find_fault
from runtime.errors import UserError
from runtime.processes import Distributed

ALONE = Distributed(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def flags(train_flags):
    own = {
        "num_experts": 2, "n-shared-experts": 0, "run-name": "run", "log-every": 1, "max-steps": 3,
        "ckpt-every": 1, "global-batch-size": 8, "rf": True,
    }  # fmt: skip
    return partial(train_flags, **own)


def train(arguments: list[str]) -> None:
    torch.manual_seed(0)
    call_main("train.py", *arguments)


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """A results folder whose run has checkpoints at steps 1 to 3."""
    results = tmp_path_factory.mktemp("finished")
    train(flags(results))
    return results


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A results folder of one's own, with the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


def step_folder(results: Path, step: int) -> Path:
    return results / "run" / "checkpoints" / f"{step:07d}"


def snapshot(folder: Path) -> dict[str, str]:
    """Hashes every file but the lock, which says who came last."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "truncated state": ("training_state.pt", truncate),
    "flipped weights": ("model.safetensors", flip_a_bit),
    "missing state": ("training_state.pt", Path.unlink),
    "missing manifest": (MANIFEST_FILE, Path.unlink),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_sends_the_run_back_to_the_checkpoint_before(finished, copied, flags, kind, capsys):
    name, damage = DAMAGE[kind]
    newest = step_folder(copied, 3)
    damage(newest / name)
    train(flags(copied))
    output = capsys.readouterr().out
    assert str(step_folder(copied, 2)) in output
    assert any(str(newest) in line and name in line for line in output.splitlines())
    assert find_fault(newest, ALONE) is None  # written anew
    got = load_file(newest / "model.safetensors")
    for name, want in load_file(step_folder(finished, 3) / "model.safetensors").items():
        assert torch.equal(got[name], want), name
    rows = (copied / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]


def test_without_a_whole_checkpoint_nothing_is_touched(copied, flags):
    for step in range(1, 4):
        truncate(step_folder(copied, step) / "training_state.pt")
    before = snapshot(copied)
    with pytest.raises(UserError, match="0000003.*training_state.pt.*got"):
        train(flags(copied, **{"max-steps": 6}))
    assert snapshot(copied) == before


def test_old_checkpoints_are_deleted_but_for_the_last(flags, tmp_path):
    train(flags(tmp_path, **{"max-steps": 4, "keep-last": 2}))
    assert step_folders(tmp_path / "run") == [step_folder(tmp_path, step) for step in (4, 3)]
    train(flags(tmp_path, **{"max-steps": 5, "keep-last": 1}))
    assert step_folders(tmp_path / "run") == [step_folder(tmp_path, 5)]


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


def start(arguments: list[str], processes: int = 0) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes else []), ROOT / "train.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen, text: str) -> None:
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return
    raise AssertionError(f"no {text!r} in:\n{read}\n{process.stderr.read()}")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(finished, flags, tmp_path):
    """Two processes; the disk is full until the first save has failed."""
    size = sum(path.stat().st_size for path in step_folder(finished, 3).iterdir()) / 2**20
    with small_disk(tmp_path / "disk", round(2.8 * size)) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(round(2.2 * size * 2**20)))
        arguments = flags(disk, **{"max-steps": 24, "ckpt-every": 2, "keep-last": 1})
        process = start(arguments, processes=2)
        read_until(process, "No space left on device")
        ballast.unlink()
        errors = process.communicate(timeout=200)[1]
        assert process.returncode == 0, errors
        assert step_folders(disk / "run") == [step_folder(disk, 24)]
        assert find_fault(step_folder(disk, 24), ALONE) is None


def test_a_second_run_is_refused_until_the_first_is_gone(flags, tmp_path):
    arguments = flags(tmp_path, **{"max-steps": 5000, "ckpt-every": 5000, "num-workers": 1})
    first = start(arguments)
    try:
        read_until(first, "step 0000001")
        with pytest.raises(UserError, match=f"process {first.pid}"):
            train(arguments)
    finally:
        first.kill()  # its data-loading process lives on for a while
        first.communicate()
    train(flags(tmp_path, **{"max-steps": 1}))
    assert step_folders(tmp_path / "run") == [step_folder(tmp_path, 1)]


def test_other_images_do_not_enter_the_run_unseen(flags, image_tree, tmp_path):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(image_tree, data)
    train(flags(results, **{"data-path": data, "max-steps": 1}))
    shutil.copy(data / "class-0" / "00.png", data / "class-0" / "more.png")
    before = snapshot(results)
    with pytest.raises(UserError, match="--data-path: got 41 images, expected the 40"):
        train(flags(results, **{"data-path": data, "max-steps": 2}))
    assert snapshot(results) == before
    (data / "class-0" / "more.png").unlink()
    train(flags(results, **{"data-path": data, "max-steps": 2}))


def test_weights_with_a_part_of_another_shape_are_one_line(finished, flags, tmp_path):
    stored, name = read_checkpoint(finished / "run"), "blocks.0.attn.proj.bias"
    changed = {**stored.state_dict, name: stored.state_dict[name][:1]}
    save_model(tmp_path / "changed.safetensors", changed, stored.record)
    with pytest.raises(UserError, match=f"{name}: got .*, expected .128,"):
        train(flags(tmp_path / "results", resume=tmp_path / "changed.safetensors"))
    assert not (tmp_path / "results").exists()
