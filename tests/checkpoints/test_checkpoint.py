"""Weight files: saving and loading, published files, and the newest checkpoint of a run."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_MODEL, relative_error, save_checkpoint
from safetensors.torch import load_file, save_file

import models
from checkpoints import (
    Record,
    checkpoint,
    ema_file,
    load_model,
    read_checkpoint,
    read_record,
    step_folders,
)
from checkpoints.from_diffusers import OLD_CLASS
from models import DiT
from options import settings
from routers import ROUTERS, TopKRouter
from runtime.errors import UserError

REFERENCE = ROOT / "tests" / "reference"
FACTS = {
    "step": 7, "model": "DiT-S/2", "objective": "gaussian", "image_size": 16,
    "class_names": tuple("abcdefghij"), "settings": {"lr": 1e-4, "freeze": []},
    "facts": {"script": "train.py"},
    "initialized_from": {"path": "dense.pt"}, "images": {"count": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, DiT]:
    """Path and model of a checkpoint in our format. Its class dropout is not visible in shapes."""
    torch.manual_seed(0)
    model = DiT(**{**TINY_MODEL, "class_dropout_prob": 0.2, "num_experts_per_tok": 3})
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    return save_checkpoint(model, path, **FACTS), model


def test_a_saved_checkpoint_is_loaded_with_all_weights_and_metadata(saved):
    path, model = saved
    assert read_checkpoint(path).record == Record(config=model.config, **FACTS)
    assert read_record(path.parent) == Record(config=model.config, **FACTS)
    loaded = load_model(path.parent)
    assert not loaded.training
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert all(weight.requires_grad for weight in loaded.parameters())


class OneKey(models.Attention):
    """Attention whose heads share their keys and values, as multi-query attention."""

    def __init__(self, hidden_size: int, num_heads: int, *options):
        super().__init__(hidden_size, num_heads, *options)
        self.qkv = torch.nn.Linear(hidden_size, hidden_size + 2 * self.head_dim)


def test_a_model_with_attention_of_its_own_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "Attention", OneKey)
    model = DiT(**TINY_MODEL)
    loaded = load_model(save_checkpoint(model, tmp_path / "model.safetensors"))
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    with pytest.raises(UserError, match="got 2 blocks of width 32, expected 3"):
        shallow = model.state_dict(), Record(config=replace(model.config, depth=3))
        checkpoint.save_model(tmp_path / "model.safetensors", *shallow)
        load_model(tmp_path / "model.safetensors")


class CountingRouter(TopKRouter):
    """Router with a buffer of integers and one of booleans."""

    def __post_init__(self):
        super().__post_init__()
        self.register_buffer("counts", torch.empty(self.num_experts, dtype=torch.int64))
        self.register_buffer("is_used", torch.empty(self.num_experts, dtype=torch.bool))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.counts.fill_(2**40 + 1)  # no fp32 number
        self.is_used.fill_(True)


def test_a_router_may_have_buffers_of_integers(tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "counting", CountingRouter)
    model = DiT(**TINY_MODEL, router="counting")
    path = save_checkpoint(model, tmp_path / "model.safetensors")
    for value in load_model(path).state_dict(), read_checkpoint(path).state_dict:
        assert value["blocks.1.moe.gate.counts"].tolist() == 4 * [2**40 + 1]
        assert value["blocks.1.moe.gate.is_used"].tolist() == 4 * [True]
    model.blocks[1].moe.gate.counts = torch.ones(4)
    path = save_checkpoint(model, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="gate.counts: got torch.float32, expected torch.int64"):
        load_model(path)


def test_an_option_of_the_router_overrides_that_of_a_checkpoint_or_pipeline(tmp_path):
    model = DiT(**TINY_MODEL, router="sigmoid:scale=2.5,bias_step=0.1")
    folder = tmp_path / "pipe" / "transformer"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    stored = {"_class_name": OLD_CLASS, "dit": settings.stored(model.config)}
    (folder / "config.json").write_text(json.dumps(stored))
    for path in (save_checkpoint(model, tmp_path / "model.safetensors"), tmp_path / "pipe"):
        options = load_model(path, router="sigmoid:scale=3").config.router.options
        assert (options["scale"], options["bias_step"]) == (3.0, 0.1)
        with pytest.raises(UserError, match='router_scale.*router="sigmoid:scale='):
            load_model(path, router_scale=3.0)


def test_file_permissions_of_saved_weights_follow_the_umask(saved, tmp_path):
    _, model = saved
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            path = save_checkpoint(model, tmp_path / f"{mode}.safetensors")
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["dit_moe_timm", "dit_moe_flash", "dit_moe_grads"])
def test_published_files_load_with_the_config_and_facts_they_imply(name):
    io = load_file(REFERENCE / f"{name}.io.safetensors")
    config = json.loads((REFERENCE / f"{name}.config.json").read_text())
    model = load_model(REFERENCE / f"{name}.pt", num_heads=config["num_heads"])
    assert model.config.qk_norm == config["use_flash_attn"]
    for field in ("input_size", "patch_size", "depth", "mlp_ratio", "num_classes", "num_experts"):
        assert getattr(model.config, field) == config[field], field
    record = read_checkpoint(REFERENCE / f"{name}.pt", num_heads=config["num_heads"]).record
    facts = {"image_size": 64, "objective": "gaussian"}
    if name == "dit_moe_flash":  # a bare state dict, without the arguments of its training
        facts = {}
    assert record == Record(config=model.config, **facts)
    with torch.no_grad():
        prediction, _ = model(io["x"], io["t"], io["y"])
    assert relative_error(prediction, io["output"]) < 1e-5


def test_a_bare_file_with_the_width_of_a_preset_gets_its_heads_and_name(tmp_path):
    model = DiT(**{**TINY_MODEL, "hidden_size": 128, "num_heads": 4, "depth": 6, "num_experts": 2})
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    stored = read_checkpoint(tmp_path / "bare.pt")
    assert stored.config.num_heads == 4 and stored.record.model_name == "DiT-Ti/2"


def test_a_stored_config_may_contain_null_for_optional_fields():
    config = {**TINY_MODEL, "sparse_layers": None, "mlp_type": None, "dense_mlp_ratio": None}
    assert Record.from_dict({"config": config}).config == DiT(**TINY_MODEL).config


def test_the_dense_blocks_of_weights_keep_their_width_with_other_experts_per_token(tmp_path):
    """Their width follows from the experts per token only in a new model."""
    model = DiT(**TINY_MODEL, sparse_layers="every-second")
    path = save_checkpoint(model, tmp_path / "model.safetensors")
    fewer = load_model(path, num_experts_per_tok=1).config
    assert (fewer.num_experts_per_tok, fewer.dense_ratio) == (1, model.config.dense_ratio)


@pytest.mark.parametrize(
    "router, objective",
    [
        # With the sections of config.yaml, as all of these
        ({"router": "sigmoid:scale=2.5", "aux_loss_alpha": 0.1},
         {"objective": "rectified_flow:mean=-0.4"}),
        # Until version 0.3
        ({"router": {"sigmoid": {"scale": 2.5, "aux_loss_alpha": 0.1}}},
         {"objective": {"rectified_flow": {"mean": -0.4}}}),
        # Until version 0.2
        ({"router": "sigmoid", "router_scale": 2.5, "aux_loss_alpha": 0.1},
         {"objective": "rectified_flow", "objective_mean": -0.4}),
    ],
)  # fmt: skip
def test_the_metadata_of_every_version_give_the_same_model_and_objective(router, objective):
    model = {"model": "DiT-Ti/2", **TINY_MODEL, **router}
    config = {"model": model, "step": {"lr": 1e-3, **objective}}
    record = Record.from_dict({"config": config, "micro_batch": 8})
    want = DiT(**TINY_MODEL, router="sigmoid:scale=2.5", aux_loss_alpha=0.1).config
    assert record.config == want
    assert (record.objective.name, record.objective.options["mean"]) == ("rectified_flow", -0.4)
    assert Record.from_metadata(record.to_metadata()) == record
    assert (record.model, record.settings) == ("DiT-Ti/2", {"lr": 1e-3})


def test_loaded_weights_are_aligned_to_16_bytes_even_if_the_file_is_not(saved, tmp_path):
    _, model = saved
    was_misplaced = False
    for note in ("x", 9 * "x"):  # the longer note moves the tensors in the file by 8 bytes
        path = save_checkpoint(model, tmp_path / f"{len(note)}.safetensors", vae_path=note)
        in_file = read_checkpoint(path).state_dict.values()
        was_misplaced |= any(weight.data_ptr() % 16 for weight in in_file)
        assert not any(weight.data_ptr() % 16 for weight in load_model(path).parameters())
    assert was_misplaced


def test_the_autoencoder_next_to_the_weights_is_used_if_the_recorded_one_is_missing(
    saved, tmp_path
):
    _, model = saved
    recorded, neighbour = tmp_path / "my-vae", tmp_path / "vae"
    path = save_checkpoint(model, tmp_path / "model.safetensors", vae_path=str(recorded))
    assert read_checkpoint(path).record.vae_path == str(recorded)
    neighbour.mkdir()
    (neighbour / "config.json").write_text("{}")
    assert read_checkpoint(path).record.vae_path == str(neighbour)
    recorded.mkdir()
    assert read_checkpoint(path).record.vae_path == str(recorded)


def test_a_run_folder_opens_its_newest_readable_checkpoint(saved, tmp_path, capsys):
    path, _ = saved
    for name in ("0000005", "0000012", "writing-0000020.tmp", "notes"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(path.read_bytes())
    newest, older = step_folders(tmp_path)
    assert [newest.name, older.name] == ["0000012", "0000005"]
    assert read_checkpoint(tmp_path).path == newest / "model.safetensors"
    os.truncate(newest / "model.safetensors", 5000)
    assert read_checkpoint(tmp_path).path == older / "model.safetensors"
    assert str(newest) in capsys.readouterr().err
    (older / "model.safetensors").unlink()
    for given in (tmp_path, tmp_path / "checkpoints", tmp_path / "nothing"):
        with pytest.raises(UserError, match=f"{given}: .*, expected"):
            load_model(given)


@pytest.mark.parametrize(
    "name", ["step_folders", "open_safetensors", "read_record", "read_tensors"]
)
@pytest.mark.parametrize("ema", [None, "0.9"])
def test_a_run_is_read_while_a_new_checkpoint_replaces_the_one_that_is_read(
    saved, tmp_path, monkeypatch, capsys, name, ema
):
    run, (_, model) = tmp_path / "checkpoints", saved

    def save(step: int) -> None:
        for name in ("0.99", "0.9"):
            path = run / f"{step}.tmp" / ema_file(name, is_first=name == "0.99")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(model, path, **FACTS | {"step": step}, ema=name)
        path.parent.rename(run / f"{step:07d}")

    original = getattr(checkpoint, name)

    def replaced_before(*arguments):
        listed = original(*arguments) if name == "step_folders" else None
        if not (run / "0000002").exists():
            save(2)
            shutil.rmtree(run / "0000001")
        return original(*arguments) if listed is None else listed

    save(1)
    monkeypatch.setattr(checkpoint, name, replaced_before)
    assert read_checkpoint(tmp_path, ema=ema).record.step == 2
    assert not capsys.readouterr().err


def test_a_record_of_a_partly_sparse_model_says_what_it_was_given(tmp_path):
    """Only another number of experts per token fixes the width of the dense blocks."""
    model = DiT(**TINY_MODEL | {"sparse_layers": (1,), "dense_mlp_ratio": None})
    path = save_checkpoint(model, tmp_path / "model.safetensors")
    assert read_checkpoint(path).record.config == model.config
    k = model.config.num_experts_per_tok
    other = read_checkpoint(path, num_experts_per_tok=1).record.config
    assert k != 1 and other.dense_ratio == model.config.dense_ratio
