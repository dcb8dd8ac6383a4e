"""Damaged and hostile weight files give a one-line error at once and execute no code."""

import argparse
import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY_MODEL, expect_error, needs_extras
from safetensors.torch import save_file

from checkpoints import Record, load_model, save_model
from latents.autoencoder import open_autoencoder
from latents.cache import open_data
from models import DiT
from options.settings import stored
from runtime.errors import UserError

REFERENCE = ROOT / "tests" / "reference" / "dit_moe_flash.pt"
MODEL = DiT(**TINY_MODEL)
WEIGHTS = MODEL.state_dict()
CONFIG = stored(MODEL.config)
POS_EMBED = WEIGHTS["pos_embed"]


class Gadget:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_config(path: Path, config: object, **facts) -> None:
    text = json.dumps({"config": config, **facts})
    save_file(WEIGHTS, path, metadata={"dit_moe": text})


def with_weights(path: Path, changes: dict) -> None:
    weights = {k: v for k, v in {**WEIGHTS, **changes}.items() if v is not None}
    save_model(path, weights, Record(config=MODEL.config))


def half(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[: len(whole) // 2])


def half_safetensors(path: Path) -> None:
    with_config(path, CONFIG)
    half(path, path.read_bytes())


def pipeline(path: Path, config: str) -> None:
    """A folder in diffusers' format."""
    (path / "transformer").mkdir(parents=True)
    (path / "transformer" / "config.json").write_text(config)


executed = "executed"  # the folder that a Gadget creates
BAD = {
    "gadget.pt": lambda p: torch.save({"model": Gadget(p.parent / executed)}, p),
    "bare-pickle.pt": lambda p: p.write_bytes(pickle.dumps({"a": Gadget(p.parent / executed)})),
    "truncated.pt": lambda p: half(p, REFERENCE.read_bytes()),
    "text.pt": lambda p: p.write_text("# A README"),
    "empty.pt": lambda p: p.write_bytes(b""),
    "list.pt": lambda p: torch.save([1, 2], p),
    "no-weights.pt": lambda p: torch.save({"ema": {}}, p),
    "foreign.pt": lambda p: torch.save({"fc.weight": torch.ones(2)}, p),
    "sparse.pt": lambda p: torch.save({**WEIGHTS, "pos_embed": POS_EMBED.to_sparse()}, p),
    "no-expert.pt": lambda p: torch.save({"blocks.0.moe.experts.1.up_proj.weight": POS_EMBED}, p),
    "truncated.safetensors": half_safetensors,
    "garbage.safetensors": lambda p: p.write_bytes(b"\xff" * 100),
    "integers.safetensors": lambda p: with_weights(p, {"pos_embed": POS_EMBED.long()}),
    "float8.safetensors": lambda p: with_weights(p, {"pos_embed": POS_EMBED.to(torch.float8_e5m2)}),
    "shape.safetensors": lambda p: with_weights(p, {"final_layer.linear.bias": torch.ones(3)}),
    "missing.safetensors": lambda p: with_weights(p, {"pos_embed": None}),
    "unknown-weight.safetensors": lambda p: with_weights(p, {"more": torch.ones(3)}),
    "not-json.safetensors": lambda p: save_file(WEIGHTS, p, metadata={"dit_moe": "{"}),
    "no-config.safetensors": lambda p: save_file(WEIGHTS, p, metadata={"dit_moe": "{}"}),
    "class-names.safetensors": lambda p: with_config(p, CONFIG, class_names=["cat"]),
    "model-name.safetensors": lambda p: with_config(p, CONFIG, model="../../out"),
    "objective.safetensors": lambda p: with_config(p, CONFIG, objective="guessing"),
    "origin.safetensors": lambda p: with_config(p, CONFIG, initialized_from={"step": 1}),
    "step.safetensors": lambda p: with_config(p, CONFIG, step="many"),
    "folder": lambda p: p.mkdir(),
    "nothing.pt": lambda p: None,
    "pipeline-garbage": lambda p: pipeline(p, "{"),
    "pipeline-of-others": lambda p: pipeline(p, '{"_class_name": "UNet2DModel"}'),
}
for name, value in {
    "num_experts": -1, "num_heads": 0, "num_experts_per_tok": 9, "mlp_ratio": float("nan"),
    "patch_size": "two", "num_classes": True, "sparse_layers": [99], "evil": 1,
    "mlp_type": "conv", "router": "dice", "hidden_size": 2**40, "input_size": 2**20,
    "depth": 20_000_000,
}.items():  # fmt: skip
    BAD[f"config-{name}.safetensors"] = lambda p, n=name, v=value: with_config(p, {**CONFIG, n: v})


@pytest.mark.parametrize("name", BAD)
def test_a_bad_weight_file_is_a_one_line_error_at_once_and_executes_nothing(name, tmp_path):
    path = tmp_path / name
    BAD[name](path)
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert time.process_time() - start < 10
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 1000
    assert not (tmp_path / executed).exists()


@pytest.mark.parametrize("read", [load_model, open_autoencoder, lambda p: open_data(p, 16, "--x")])
def test_a_path_in_a_folder_without_permission_is_a_one_line_error(read, tmp_path, monkeypatch):
    stat = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path / "locked")):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match="locked/run"):
        read(str(tmp_path / "locked" / "run"))


def test_a_file_that_holds_no_weights_is_not_called_damaged():
    with pytest.raises(UserError, match="README.md: not a file of weights, expected"):
        load_model(Path(__file__).parents[2] / "README.md")


@pytest.mark.parametrize(
    "script", ["sample", "export", pytest.param("upcycle", marks=needs_extras)]
)
def test_scripts_report_a_bad_weight_file_in_one_line_with_exit_code_2(script, tmp_path, capsys):
    BAD["gadget.pt"](tmp_path / "gadget.pt")
    output = tmp_path / ("grid.png" if script == "sample" else "out")
    line = expect_error(
        capsys, f"{script}.py", "--ckpt", tmp_path / "gadget.pt", "--output", output
    )
    assert "gadget.pt" in line and not (tmp_path / executed).exists() and not output.exists()
    if script == "sample":
        guide = ("--guide-ckpt", tmp_path / "gadget.pt", "--cfg-scale", 2)
        line = expect_error(capsys, "sample.py", "--ckpt", REFERENCE, "--num_heads", 2, *guide)
        assert line.startswith(f"error: --guide-ckpt {tmp_path / 'gadget.pt'}")


def test_published_weights_load_whatever_types_their_stored_arguments_have(tmp_path):
    args = argparse.Namespace(num_heads=2, rf=True, num_experts_per_tok=1, betas=[0.9, None])
    torch.save({"ema": torch.load(REFERENCE), "opt": {}, "args": args}, tmp_path / "fine.pt")
    assert load_model(tmp_path / "fine.pt").config.num_experts_per_tok == 1
