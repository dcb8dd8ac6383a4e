"""The config of a run: recipes in order, the command over them, and presets of sizes."""

import json
import os
import re
from pathlib import Path

import pytest
from helpers import HAS_EXTRAS, config_of_command

from runtime.errors import UserError
from train import run
from training.config import RECIPES, TrainConfig, parse_training
from training.run_folder import CONFIG_FILE, write_config


@pytest.fixture
def recipe(tmp_path):
    """Function that writes a recipe, and returns the config of a command with it."""
    number = iter(range(100))

    def make(text: str, *arguments) -> TrainConfig:
        path = tmp_path / f"{next(number)}.yaml"
        path.write_text(text)
        return config_of_command("--config", path, *arguments)

    return make


def config_file(folder: Path, config: TrainConfig) -> Path:
    write_config(folder, config, config.record())
    return folder / CONFIG_FILE


def test_the_command_overrides_a_recipe_whose_values_are_words_or_typed(recipe):
    """YAML reads 1e-4 as text. A section of a config.yaml has no meaning."""
    text = (
        "router: sigmoid:scale=2.5\nlr: 1e-3\nrf: true\nnum-experts-per-tok: 1\n"
        "step: {grad_clip: 2, ema: ['exponential:decay=0.9,warmup=True', power]}\n"
        "optimizer: adamw:betas=0.9,0.95\nsparse_layers: every-second\nval_path: ~\nwandb: null\n"
    )
    config = recipe(text, "--lr", "2e-3", "--sparse-layers", "6,8")
    assert config.data.val_path is None and config.run.wandb is None
    assert (config.step.lr, config.step.grad_clip) == (2e-3, 2.0)
    assert config.model.router.options["scale"] == 2.5 and config.model.num_experts_per_tok == 1
    assert config.step.objective.name == "rectified_flow"
    assert config.optimizer.betas == (0.9, 0.95)
    assert [ema.name for ema in config.ema] == ["0.9", "power-0.1"] and config.ema[0].warmup
    assert config.model.sparse_blocks == (6, 8)


def test_a_word_of_the_command_keeps_the_options_of_the_recipe(recipe):
    text = (
        "router: sigmoid:scale=2.5\noptimizer: adamw:betas=0.9,0.95\nema:\n"
        "- exponential:decay=0.9,warmup=True\nrf: 1\n"
    )
    words = ["--router", "sigmoid:bias_step=0", "--optimizer", "adamw:weight_decay=0.1"]
    words += ["--ema", "power", "exponential:decay=0.5"]
    config = recipe(text, *words)
    router = {"input": "modulated", "scale": 2.5, "bias_step": 0.0}
    assert config.model.router.options == router
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.95), 0.1)
    assert [ema.name for ema in config.ema] == ["power-0.1", "0.5"] and config.ema[1].warmup
    assert recipe(text, "--router", "race").model.router.options["momentum"] == 0.99


def test_several_files_override_each_other_in_order(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: DiT-B/2\nlr: 1e-3\nrouter: sigmoid:scale=2\ndepth: 3\n")
    second.write_text("model: DiT-L/2\nlr: 2e-3\nrouter: sigmoid:bias_step=0.5\n")
    for words in (("--config", first, second), ("--config", first, "--config", second)):
        config = config_of_command(*words, "--warmup-steps", 7)
        assert (config.model.depth, config.step.lr, config.step.warmup_steps) == (24, 2e-3, 7)
        assert str(config.model.router) == "sigmoid:input=modulated,scale=2.0,bias_step=0.5"


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ({"depth": 6}, ("--model", "DiT-B/2"), {"depth": 12, "hidden_size": 768}),
        ({"model": "DiT-B/2", "depth": 6}, (), {"depth": 6, "hidden_size": 768}),
        ({"model": "DiT-B/2", "depth": 6}, ("--model", "DiT-S/2"), {"depth": 12, "num_heads": 6}),
        ({"model": "DiT-B/2"}, ("--model", "DiT-S/2", "--depth", 4), {"depth": 4, "num_heads": 6}),
        ({"depth": 6}, ("--depth", 4), {"depth": 4, "hidden_size": 384}),
        ({"num-experts": 32}, ("--model", "DiT-B/2"), {"num_experts": 32, "depth": 12}),
        ({"num-experts": 32}, ("--model", "JiTMoE-B/16"), {"num_experts": 16, "norm": "rms"}),
        ({"num-experts": 0, "norm": "rms"}, ("--num_experts", 4),
         {"sparse_blocks": (*range(12),), "expert_mlp": "swiglu", "norm": "rms"}),
        ({"router": "sigmoid:scale=2", "sparse-layers": 6}, ("--num_experts", 0),
         {"sparse_blocks": (), "dense_mlp": "gelu", "num_experts_per_tok": 2}),
    ],
)  # fmt: skip
def test_a_preset_sets_its_sizes_over_files_and_flags_of_sizes_override_both(
    file, words, expected, recipe
):
    model = recipe(json.dumps(file), *words).model
    assert {name: getattr(model, name) for name in expected} == expected


def test_the_config_file_of_a_run_is_a_recipe_for_the_same_config(tmp_path):
    """What follows from other settings follows from the flags beside the file."""
    words = ("--depth", 6, "--objective", "flow_x:mean=0.5", "--sparse-layers", "deep-half")
    words += ("--ema", "power", "exponential:decay=0.9")
    words += ("--auxiliary", "dispersive:weight=0.1") if HAS_EXTRAS else ()
    words += ("--freeze", "blocks.*.attn.*", "--val-share", 0.1, "--max-steps", 5)
    config = config_of_command(*words)
    file = config_file(tmp_path, config)
    assert config_of_command("--config", file) == config
    assert config_of_command("--config", file, "--depth", 8).model.sparse_blocks == (4, 5, 6, 7)
    epochs = config_of_command("--config", file, "--epochs", 3).run
    assert (epochs.epochs, epochs.max_steps) == (3, None)
    held_out = config_of_command("--config", file, "--val-path", "x").data
    assert (held_out.val_path, held_out.val_share) == ("x", 0.0)
    lines = file.read_text()
    assert lines.count("optimizer: adamw:betas=0.9,0.999,") == 1


def test_the_config_file_of_a_run_leaves_out_what_has_no_effect(tmp_path):
    """A run that goes on may stop sharding, and a preset names a router."""
    words = "--model", "JiTMoE-B/16", "--num_experts", 0
    config = config_of_command(*words).changed({"expert_parallel": 2})
    again = config_of_command("--config", config_file(tmp_path, config))
    assert again.engine.expert_parallel == 1 and not again.model.num_experts


def test_a_later_alternative_replaces_an_earlier_one(recipe):
    config = recipe("max-steps: 5\nlatents-path: x\nval-path: y\n", "--epochs", 3,
                    "--data-path", "z", "--val-share", 0.5)  # fmt: skip
    assert (config.run.epochs, config.run.max_steps) == (3, None)
    assert (config.data.latents_path, config.data.data_path) == (None, "z")
    assert (config.data.val_path, config.data.val_share) == (None, 0.5)
    kept = recipe("val-path: y\n", "--val-share", 0)  # says nothing about images
    assert kept.data.val_path == "y"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lr": "fast"}, "--lr: got 'fast', expected a number"),
        ({"lr": 10**400}, "--lr: got 1000"),
        ({"num_experts": 2.5}, "--num-experts: got 2.5, expected an integer"),
        ({"optimizer": "adamw:betas=0.9"}, "--optimizer: adamw:betas: got '0.9', expected 2 num"),
        ({"ema_decay": 0.9}, "--ema exponential:decay="),
        ({"batch_size": 8}, "--batch-size: unknown flag; did you mean --global-batch-size"),
        ({"config": "no.yaml"}, "--config no.yaml (no such file)"),
        ({"config": "stable"}, f"did you mean {os.path.relpath(RECIPES / 'stable.yaml')}?"),
        ({"input_size": 8}, "--input-size: unknown flag"),  # follows from the data
        ({"train_batch_size": 8}, "train_deepspeed.py"),
    ],
)
def test_train_run_checks_its_arguments_like_command_line_flags(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        run(**flags)


def test_train_run_takes_paths():
    file = RECIPES / "stable.yaml"
    command, said = parse_training("train.py", arguments={"config": file, "data_path": Path("x")})
    assert command.config == (str(file),) and said["data_path"] == "x" and "ema" in said


def test_two_averages_of_one_name_are_refused():
    with pytest.raises(ValueError, match="ema: got power-0.1, power-0.1, expected different"):
        config_of_command("--ema", "power", "power:length=0.1")


def test_an_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match="^learning_rate: unknown"):
        TrainConfig.default().changed({"learning_rate": 1.0})
