"""Weight files: ours and the published ones are read, damaged and hostile ones are refused."""

import argparse
import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, relative_error
from safetensors.torch import load_file, save_file

from checkpoints import Record, load_model, read_checkpoint, save_model, step_folders
from models import DiT
from runtime.errors import UserError
from training.saving import begin_checkpoint, checkpoint_folder, finish_checkpoint

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[Path, DiT]:
    """A checkpoint in our format with a class dropout that shapes would not tell."""
    torch.manual_seed(0)
    model = DiT(**{**TINY_MODEL, "class_dropout_prob": 0.2, "num_experts_per_tok": 3})
    path = tmp_path_factory.mktemp("own") / "model.safetensors"
    save_model(path, model.state_dict(), Record(config=model.config, step=7, objective="gaussian"))
    return path, model


@pytest.mark.parametrize("name", ["dit_moe_timm", "dit_moe_flash", "dit_moe_grads"])
def test_published_files_load_with_what_their_shapes_tell(name):
    io = load_file(REFERENCE / f"{name}.io.safetensors")
    config = json.loads((REFERENCE / f"{name}.config.json").read_text())
    model = load_model(REFERENCE / f"{name}.pt", num_heads=config["num_heads"])
    assert not model.training
    assert model.config.qk_norm == config["use_flash_attn"]
    for field in ("input_size", "patch_size", "depth", "mlp_ratio", "num_classes", "num_experts"):
        assert getattr(model.config, field) == config[field], field
    with torch.no_grad():
        prediction, _ = model(io["x"], io["t"], io["y"])
    assert relative_error(prediction, io["output"]) < 1e-5


def test_published_files_say_their_objective_and_size():
    record = read_checkpoint(REFERENCE / "dit_moe_timm.pt", num_heads=2).record
    assert record == Record(config=record.config, image_size=64, objective="gaussian")


def test_own_checkpoint_comes_back_whole(own):
    path, model = own
    stored = read_checkpoint(path)
    assert stored.record == Record(config=model.config, step=7, objective="gaussian")
    loaded = load_model(path.parent)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert all(weight.requires_grad for weight in loaded.parameters())


def test_overrides_choose_the_back_end_and_not_the_weights(own):
    path, model = own
    assert load_model(path, expert_backend="loop").blocks[0].moe.experts.backend == "loop"


def test_weights_lie_at_multiples_of_16_bytes_wherever_the_file_has_them(own, tmp_path):
    _, model = own
    was_misplaced = False
    for note in ("x", 9 * "x"):  # moves all that comes after it by 8 bytes
        path = tmp_path / f"model-{len(note)}.safetensors"
        save_model(path, model.state_dict(), Record(config=model.config, vae_path=note))
        in_file = read_checkpoint(path).state_dict.values()
        was_misplaced |= any(weight.data_ptr() % 16 for weight in in_file)
        assert not any(weight.data_ptr() % 16 for weight in load_model(path).parameters())
    assert was_misplaced


def test_a_model_that_was_trained_with_triton_runs_without(own, tmp_path, monkeypatch):
    _, model = own
    path, config = tmp_path / "model.safetensors", replace(model.config, expert_backend="triton")
    save_model(path, model.state_dict(), Record(config=config))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    loaded = load_model(path)
    assert loaded.config.expert_backend == "grouped"
    loaded(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1]))


def test_a_preset_width_gives_the_heads(tmp_path):
    model = DiT(**{**TINY_MODEL, "hidden_size": 128, "num_heads": 4, "depth": 1, "num_experts": 2})
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert load_model(tmp_path / "bare.pt").config.num_heads == 4


class Gadget:
    """Unpickled without care, this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged_files(folder: Path, own_path: Path) -> dict[str, tuple[Path, str]]:
    """Returns {kind: (file, what the message says)}."""
    weights = load_file(own_path)
    whole = own_path.read_bytes()
    pt = (REFERENCE / "dit_moe_flash.pt").read_bytes()
    files = {
        "truncated.safetensors": (whole[: len(whole) // 2], "damaged"),
        "empty.safetensors": (b"", "damaged"),
        "truncated.pt": (pt[: len(pt) // 2], "damaged"),
        "empty.pt": (b"", "damaged"),
        "text.pt": (b"these are not weights", "damaged"),
        "gadget.pt": (pickle.dumps({"model": Gadget(folder / "executed")}), "refused"),
        "list.pt": (None, "got a list, expected a dict of weights"),
        "foreign.pt": (None, "not a DiT-MoE state dict"),
        "no-weights.pt": (None, "expected a state dict of tensors"),
    }
    for name, (content, _) in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    torch.save([1, 2], folder / "list.pt")
    torch.save({"fc.weight": torch.ones(2)}, folder / "foreign.pt")
    torch.save({"ema": {"a": 1}}, folder / "no-weights.pt")
    torch.save({"model": Gadget(folder / "executed")}, folder / "zipped-gadget.pt")

    info = {"config": asdict(read_checkpoint(own_path).config)}
    for name, config in (
        ("unknown-field", {**info["config"], "evil": 1}),
        ("wrong-type", {**info["config"], "depth": "many"}),
        ("impossible", {**info["config"], "num_experts_per_tok": 9}),
        ("other-shape", {**info["config"], "hidden_size": 64}),
    ):
        path = folder / f"{name}.safetensors"
        save_file(weights, path, metadata={"dit_moe": json.dumps({"config": config})})
        files[path.name] = (None, "")
    save_file(weights, folder / "not-json.safetensors", metadata={"dit_moe": "{"})
    files["not-json.safetensors"] = (None, "not a DiT-MoE checkpoint")
    files["other-shape.safetensors"] = (None, "another model")
    files["zipped-gadget.pt"] = (None, "refused")
    return {name: (folder / name, message) for name, (_, message) in files.items()}


def test_damaged_and_hostile_files_are_one_clear_line_and_run_nothing(own, tmp_path):
    for name, (path, message) in damaged_files(tmp_path, own[0]).items():
        with pytest.raises(UserError) as caught:
            load_model(path)
        text = str(caught.value)
        assert "\n" not in text, name
        assert str(path) in text and message in text, f"{name}: {text}"
    assert not (tmp_path / "executed").exists()


def test_a_namespace_of_arguments_is_all_that_a_pickle_may_hold(tmp_path):
    state = torch.load(REFERENCE / "dit_moe_flash.pt", weights_only=True)
    args = argparse.Namespace(num_heads=2, rf=True, num_experts_per_tok=1)
    torch.save({"ema": state, "args": args}, tmp_path / "fine.pt")
    stored = read_checkpoint(tmp_path / "fine.pt")
    assert stored.config.num_heads == 2 and stored.config.num_experts_per_tok == 1
    assert stored.record.objective == "rectified_flow"


def test_a_checkpoint_counts_only_once_it_is_whole(own, tmp_path):
    path, model = own
    for step in (5, 12):
        temporary = checkpoint_folder(tmp_path, step, temporary=True)
        begin_checkpoint(temporary)
        save_model(temporary / "model.safetensors", model.state_dict(), Record(config=model.config))
        if step == 5:
            finish_checkpoint(temporary, tmp_path, step)
    assert step_folders(tmp_path) == [checkpoint_folder(tmp_path, 5)]
    assert read_checkpoint(tmp_path).path == checkpoint_folder(tmp_path, 5) / "model.safetensors"
    finish_checkpoint(temporary, tmp_path, 12)
    assert step_folders(tmp_path) == [checkpoint_folder(tmp_path, step) for step in (12, 5)]


def test_a_folder_without_a_checkpoint_and_a_missing_path_say_so(tmp_path):
    with pytest.raises(UserError, match="folder without a checkpoint, expected a run"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        load_model(tmp_path / "nothing")
