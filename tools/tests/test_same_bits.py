"""tools/same_bits.py finds a planted difference, and only that."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import call_main, step_folder
from safetensors.torch import load_file, save_file

from checkpoints.weights import read_tensors
from tools.same_bits import compare


@pytest.fixture(scope="module")
def base(tmp_path_factory, train_flags) -> Path:
    """The runs of a commit: one run, named `ddp`."""
    folder = tmp_path_factory.mktemp("base")
    call_main("train.py", *train_flags(folder / "ddp" / "1", **{"max-steps": 1, "log-every": 1}))
    return folder


def change_a_weight(results: Path) -> None:
    """Changes the sign of a zero, which a comparison of numbers does not see."""
    path = step_folder(results, 1) / "model.safetensors"
    weights = load_file(path)
    zero = next(name for name, weight in weights.items() if not weight.any())
    save_file({**weights, zero: -weights[zero]}, path)


def change_the_training_state(results: Path) -> None:
    path = max(step_folder(results, 1).glob("state/*.safetensors"), key=lambda p: p.stat().st_size)
    state, metadata = read_tensors(path)
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name].view(-1)[0] = torch.nextafter(state[name].view(-1)[0], torch.tensor(1e9))
    save_file(state, path, metadata)


def change_the_log(results: Path, name: str = "loss", by: float = 1e-7) -> None:
    (path,) = results.glob("*/log.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1][name] = rows[-1].get(name, 0.0) + by
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("plant", [change_a_weight, change_the_training_state, change_the_log])
def test_a_planted_difference_is_found(base, tmp_path, plant, capsys):
    shutil.copytree(base, tmp_path / "other")
    assert compare(["ddp"], [base, tmp_path / "other"]) == 0
    assert " same" in capsys.readouterr().out
    plant(tmp_path / "other" / "ddp" / "1")
    assert compare(["ddp"], [base, tmp_path / "other"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_times_and_values_of_one_commit_only_are_no_differences(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "other")
    change_the_log(tmp_path / "other" / "ddp" / "1", "images_per_sec", by=1.0)
    change_the_log(tmp_path / "other" / "ddp" / "1", "new", by=1.0)
    assert compare(["ddp"], [base, tmp_path / "other"]) == 0
    assert "in one only: 1, such as log 1: new" in capsys.readouterr().out
