"""Recipes of published models: parameter counts, training settings and commands."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call_main

from checkpoints.costs import count_parameters
from models import DiT
from training.config import TrainConfig, parse_training
from training.plan import open_planned
from training.run_folder import CONFIG_FILE, write_config

FOLDER = ROOT / "config" / "recipes"
PRESETS = ROOT / "tests" / "reference" / "published" / "presets.json"
DSMOE = "Flow_half_misx"
SOURCES = {  # recipe: (list of presets.json, name in the list)
    "promoe_s": ("promoe", "ProMoE_TC_S"), "promoe_b": ("promoe", "ProMoE_TC_B"),
    "promoe_l": ("promoe", "ProMoE_TC_L"), "promoe_xl": ("promoe", "ProMoE_TC_XL"),
    "promoe_l_ec": ("promoe", "ProMoE_EC_L"), "promoe_dit_b": ("promoe", "DiT_B"),
    "promoe_dit_l": ("promoe", "DiT_L"), "promoe_dit_xl": ("promoe", "DiT_XL"),
    "promoe_tcdit_l": ("promoe", "TCDiT_L_E8"), "promoe_ecdit_l": ("promoe", "ECDiT_L_E8"),
    "promoe_diffmoe_b": ("promoe", "DiffMoE_B_E8"),
    "promoe_diffmoe_l": ("promoe", "DiffMoE_L_E8"),
    "promoe_diffmoe_xl": ("promoe", "DiffMoE_XL_E8"),
    "diffmoe_s_128": ("diffmoe", "DiffMoE_S_E16_Flow"),
    "diffmoe_s": ("dsmoe", "DiffMoE_S_E16_Flow"), "diffmoe_b": ("dsmoe", "DiffMoE_B_E16_Flow"),
    "diffmoe_l": ("diffmoe", "DiffMoE-L-E16-Flow"),
    "diffmoe_l_e8": ("diffmoe", "DiffMoE-L-E8-Flow"),
    "diffmoe_tcdit_l": ("diffmoe", "TC-DiT-L-E16-Flow"),
    "diffmoe_ecdit_l": ("diffmoe", "EC-DiT-L-E16-Flow"),
    "diffmoe_dit_l": ("diffmoe", "Dense-DiT-L-Flow"),
    "diffmoe_dit_xl": ("diffmoe", "Dense-DiT-XL-Flow"),
    "dsmoe_s_e16": ("dsmoe", f"DSMoE_S_E16_{DSMOE}2_s1a2_rope2d_l10"),
    "dsmoe_b_e16": ("dsmoe", f"DSMoE_B_E16_{DSMOE}2_s1a2_rope2d_l10"),
    "dsmoe_l_e16": ("dsmoe", f"DSMoE_L_E16_{DSMOE}2_s1a2_rope2d_l20"),
    "dsmoe_3b_e16": ("dsmoe", f"DSMoE_3B_E16_{DSMOE}2.5_s1a2_rope2d_l30"),
    "dsmoe_s_e48": ("dsmoe", f"DSMoE_S_E48_{DSMOE}0.3_s1a5_rope2d_l12"),
    "dsmoe_b_e48": ("dsmoe", f"DSMoE_B_E48_{DSMOE}0.3_s1a5_rope2d_l12"),
    "dsmoe_l_e48": ("dsmoe", f"DSMoE_L_E48_{DSMOE}0.4_s1a5_rope2d_l24"),
}  # fmt: skip
JIT = {f"jit_{size.lower()}16": ("jitmoe", f"JiT-{size}/16") for size in "BLH"}
JIT |= {f"jitmoe_{size.lower()}16_e16": ("jitmoe", f"JiT-{size}/16-E16") for size in "BLH"}
SOURCES |= JIT
# Parameters of the dense models in presets.json; total and active millions in DiT-MoE's paper.
DENSE = {"dit_b2": 130_315_808, "dit_l2": 457_840_672, "dit_xl2": 674_834_720}
MILLIONS = {
    "dit_moe_s2_8e2a": (199, 71), "dit_moe_s2_16e2a": (369, 71), "dit_moe_b2_8e2a": (795, 286),
    "dit_moe_l2_8e2a": (2_800, 1_000), "dit_moe_xl2_8e2a": (4_100, 1_500),
    "dit_moe_g2_16e2a": (16_500, 3_100),
}  # fmt: skip


def config_of(*arguments: str | Path) -> TrainConfig:
    """The config of a command, with ImageNet's classes."""
    _, said = parse_training("train.py", None, [*map(str, arguments)])
    base = TrainConfig.default()
    images = open_planned(base.changed(said).data, said, None, [])
    return base.fitted(said, images)


@functools.cache
def recipe(name: str) -> TrainConfig:
    return config_of("--config", FOLDER / f"{name}.yaml")


def preset_of(name: str) -> dict:
    group, preset = SOURCES[name]
    (found,) = [p for p in json.loads(PRESETS.read_text())[group] if p["name"] == preset]
    return found


FAMILIES = sorted({group for group, _ in SOURCES.values()})


def of_family(family: str) -> list[str]:
    return [name for name, (group, _) in SOURCES.items() if group == family]


@pytest.mark.parametrize("family", FAMILIES)
def test_published_recipes_have_exactly_the_published_trainable_parameters(family):
    for name in of_family(family):
        config, preset = recipe(name).model, preset_of(name)
        with torch.device("meta"):
            model = DiT(**vars(config))
        trainable = sum(parameter.numel() for parameter in model.parameters())
        assert trainable == preset["trainable_parameters"], name
        assert list(config.sparse_blocks) == preset["sparse_blocks"], name
        sizes = tuple(preset["kwargs"][key] for key in ("num_heads", "input_size"))
        assert (config.num_heads, config.input_size) == sizes, name


@pytest.mark.parametrize("family", FAMILIES)
def test_published_recipes_have_the_published_training_settings(family):
    names = [name for name in of_family(family) if "training" in preset_of(name)]
    assert names
    for name in names:
        config, training = recipe(name), preset_of(name)["training"]
        check = check_settings_of_jit if name in JIT else check_settings
        assert list(config.optimizer.betas) == training["betas"], name
        assert config.engine.global_batch_size == training["batch_size"], name
        assert config.model.dropout == training["label_dropout"], name
        check(config, training)


def check_settings(config: TrainConfig, training: dict) -> None:
    step = config.step
    assert step.lr == training["lr"] and not step.warmup_steps
    assert config.optimizer.weight_decay == training["weight_decay"]
    assert step.grad_clip == (training["clip_grad_norm"] or 0)
    assert [ema.decay for ema in config.ema] == [training["ema_decay"]]
    assert config.objective.times == training["time"].split()[0].replace(",", "")
    assert (config.model.time_scale == 1000) == ("1000 t" in training["objective"])


def check_settings_of_jit(config: TrainConfig, training: dict) -> None:
    assert config.step.lr == 2e-4 and "2e-4 at 1024" in training["lr"]
    assert config.step.warmup_steps == 5 * 1_281_167 // 1024 and "5 epochs" in training["schedule"]
    assert [ema.decay for ema in config.ema] == training["ema_decay"]
    assert config.run.epochs == training["epochs_in_script"]
    assert training["time"] == "logit-normal mean -0.8 std 0.8, t = 1 data"
    objective = config.objective
    assert (objective.mean, objective.std, objective.clamp) == (0.8, 0.8, 0.05)
    assert objective.noise_scale == training["noise_scale"]


def test_dit_and_dit_moe_have_the_published_parameters():
    counts = {name: count_parameters(recipe(name).model) for name in (*DENSE, *MILLIONS)}
    assert {name: counts[name] for name in DENSE} == {name: (n, n) for name, n in DENSE.items()}
    for name, millions in MILLIONS.items():
        assert [n / 1e6 for n in counts[name]] == pytest.approx(list(millions), rel=0.027), name


EXAMPLES = ("promoe_b", "diffmoe_b", "dsmoe_b_e16", "dit_b2", "jitmoe_b16_e16")  # one a family


@pytest.mark.parametrize("name", [*EXAMPLES, "published", "stable", "fast", "pixels", "race"])
def test_the_config_file_of_a_run_with_a_recipe_is_a_recipe_for_the_same_config(name, tmp_path):
    write_config(tmp_path, recipe(name), recipe(name).record())
    assert config_of("--config", tmp_path / CONFIG_FILE) == recipe(name)


def test_every_recipe_names_its_command():
    for name in (*SOURCES, *DENSE, *MILLIONS):
        text = (FOLDER / f"{name}.yaml").read_text()
        assert f"--config config/recipes/{name}.yaml" in text, name


@pytest.mark.parametrize("name", ["diffmoe_b", "jitmoe_b16_e16"])  # of latents, of pixels
def test_a_published_recipe_passes_a_dry_run(name, capsys):
    """With two blocks, which are planned in less time."""
    few = ("--depth", 2, "--class-tokens-start", 1) if name in JIT else ("--depth", 2)
    call_main("train.py", "--config", FOLDER / f"{name}.yaml", "--dry-run", "--gpus", 8, *few)
    assert re.search(r"^parameters +[\d,]+ total", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", ["published", "stable", "fast", "pixels"])
def test_a_recipe_is_applied_and_command_line_flags_override_it(name):
    """The recipe `published` equals the defaults."""
    changed = config_of("--config", FOLDER / f"{name}.yaml", "--lr=1")
    assert (recipe(name) == config_of()) == (name == "published")
    assert changed.step == replace(recipe(name).step, lr=1)
