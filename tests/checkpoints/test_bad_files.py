"""Damaged and hostile weight files give a one-line error at once and execute no code."""

import argparse
import json
import os
import pickle
import re
import time
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from helpers import ROOT, TINY_MODEL, expect_error
from safetensors.torch import save_file

from checkpoints import Record, load_model, save_model
from latents.autoencoder import open_autoencoder
from latents.cache import open_data
from models import DiT, DiTConfig
from options.settings import stored
from runtime.errors import UserError
from runtime.files import read_json

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


def many_blocks(path: Path) -> None:
    """Small file whose record specifies more blocks than the file contains."""
    blocks = {f"blocks.{i}.x": torch.zeros(1) for i in range(1000)}
    metadata = {"dit_moe": json.dumps({"config": {**CONFIG, "depth": 1000}})}
    save_file({**blocks, "pos_embed": POS_EMBED}, path, metadata=metadata)


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
    "gadget-in-args.pt": lambda p: torch.save(
        {"ema": WEIGHTS, "args": argparse.Namespace(x=Gadget(p.parent / executed))}, p
    ),
    "bare-pickle.pt": lambda p: p.write_bytes(pickle.dumps({"a": Gadget(p.parent / executed)})),
    "truncated.pt": lambda p: half(p, REFERENCE.read_bytes()),
    "text.pt": lambda p: p.write_text("# A README"),
    "empty.pt": lambda p: p.write_bytes(b""),
    "list.pt": lambda p: torch.save([1, 2], p),
    "no-weights.pt": lambda p: torch.save({"ema": {}}, p),
    "foreign.pt": lambda p: torch.save({"fc.weight": torch.ones(2)}, p),
    "sparse.pt": lambda p: torch.save({**WEIGHTS, "pos_embed": POS_EMBED.to_sparse()}, p),
    "terabytes.pt": lambda p: torch.save({"pos_embed": torch.zeros(1).expand(2**20, 2**18)}, p),
    "no-expert.pt": lambda p: torch.save({"blocks.0.moe.experts.1.up_proj.weight": POS_EMBED}, p),
    "truncated.safetensors": half_safetensors,
    "garbage.safetensors": lambda p: p.write_bytes(b"\xff" * 100),
    "integers.safetensors": lambda p: with_weights(p, {"pos_embed": POS_EMBED.long()}),
    "float8.safetensors": lambda p: with_weights(p, {"pos_embed": POS_EMBED.to(torch.float8_e5m2)}),
    "shape.safetensors": lambda p: with_weights(p, {"final_layer.linear.bias": torch.ones(3)}),
    "missing.safetensors": lambda p: with_weights(p, {"pos_embed": None}),
    "unknown-weight.safetensors": lambda p: with_weights(p, {"more": torch.ones(3)}),
    "many-blocks.safetensors": many_blocks,
    "not-json.safetensors": lambda p: save_file(WEIGHTS, p, metadata={"dit_moe": "{"}),
    "nested.safetensors": lambda p: save_file(WEIGHTS, p, metadata={"dit_moe": "[" * 100_000}),
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
    "depth": 20_000_000, "hidden_size": 2**40, "input_size": 2**20, "num_experts": -1,
    "num_heads": 0, "num_experts_per_tok": 9, "mlp_ratio": float("nan"), "patch_size": "two",
    "num_classes": True, "sparse_layers": [99], "evil": 1, "mlp_type": "conv", "router": "dice",
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


@pytest.mark.parametrize("name", ["conditions", "sparse_layers", "router"])
def test_a_long_list_in_a_record_is_an_error_at_once(name):
    start = time.process_time()
    with pytest.raises(ValueError, match=f"^{name}: got 1,000,000 values, expected at most"):
        DiTConfig(**CONFIG | {name: ["label" if name == "conditions" else 0] * 10**6})
    assert time.process_time() - start < 2


@pytest.mark.parametrize("content, message", [
    (b"a: &a [x, x]\nb: [*a, *a]", "alias"), (b"a: " + b"[" * 5000, "nested"),
    (b"a: " + b"{a: " * 5000, "nested"), (b"#" * 200_000, "more than 100,000 bytes"),
    (b"[a]", "expected a YAML file"), (b"a: [", "expected a YAML file"),
])  # fmt: skip
def test_a_bad_yaml_file_is_a_one_line_error_at_once(content, message, tmp_path, capsys):
    path, start = tmp_path / "recipe.yaml", time.process_time()
    path.write_bytes(content)
    line = expect_error(capsys, "train.py", "--config", path)
    assert f"--config {path} (" in line and message in line
    assert time.process_time() - start < 5


@pytest.mark.parametrize("path", ["/dev/zero", "nested", "large"])
def test_a_bad_json_file_is_an_error_at_once(path, tmp_path):
    (tmp_path / "nested").write_text("[" * 100_000)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises((OSError, ValueError)):
        read_json(tmp_path / path)


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


def test_every_size_in_a_checkpoint_record_has_an_upper_bound():
    """A config with a larger number is rejected before memory of that size is allocated."""
    no_sizes = ("class_dropout_prob", "aux_loss_alpha", "time_scale", "qk_norm_eps", "mlp_norm_eps")
    numbers = [
        name
        for name, hint in get_type_hints(DiTConfig).items()
        if re.search("int|float", str(hint)) and name not in no_sizes
    ]
    assert {"depth", "input_size", "num_classes", "dense_mlp_ratio"} <= set(numbers)
    for name in numbers:
        with pytest.raises(ValueError, match="2000000000"):
            DiTConfig(**{**CONFIG, name: 2_000_000_000})


def test_a_file_that_holds_no_weights_is_not_called_damaged():
    with pytest.raises(UserError, match="README.md: not a file of weights, expected"):
        load_model(Path(__file__).parents[2] / "README.md")


def test_the_gadget_executes_when_torch_loads_it_without_protection(tmp_path):
    torch.save({"model": Gadget(tmp_path / executed)}, tmp_path / "gadget.pt")
    torch.load(tmp_path / "gadget.pt", weights_only=False)
    assert (tmp_path / executed).is_dir()


@pytest.mark.parametrize("script", ["sample", "export", "upcycle"])
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
