"""Command lines: published commands, --help, recipes, and one-line errors for wrong flags."""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import ROOT, command_line, expect_error

from checkpoints import Record
from models import DiT_models, DiTConfig
from options.parts import Component, Part, option
from options.settings import flags_of
from runtime.errors import UserError, run_main
from runtime.flags import parse_config, parse_flags, read_values
from train import run
from training.config import RECIPES, DataFacts, override, parse_training, resolve, training_flags
from training.ema import EMAS, ExponentialEMA
from training.engines.flags import DDPFlags

SCRIPTS = (
    "train", "train_deepspeed", "cache_latents", "sample", "evaluate", "upcycle", "export",
    "expert_data", "expert_ablation", "expert_report", "heatmap_class", "heatmap_timestep",
    "check_gpu",
)  # fmt: skip


@pytest.fixture
def parser_of(monkeypatch):
    """Function that returns the argument parser that a script's parse_args creates."""

    def find(script: str) -> argparse.ArgumentParser:
        made = []

        parse = argparse.ArgumentParser.parse_known_args

        def stop(parser, *args):
            if not parser.add_help:  # that of --plugin, whose components have flags
                return parse(parser, *args)
            made.append(parser)
            raise SystemExit

        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args()
        return made[0]

    return find


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_docstring_and_describes_every_flag(script, parser_of):
    parser = parser_of(script)
    assert importlib.import_module(script).__doc__ in parser.format_help()
    assert [action.option_strings for action in parser._actions if not action.help] == []


def test_help_of_training_shows_ten_flags_and_help_all_shows_all(capsys):
    shown = []
    for words in (["--help"], ["--help", "all"]):
        with command_line("train.py", words) as module, pytest.raises(SystemExit) as stopped:
            module.parse_args()
        assert stopped.value.code in (0, None)
        shown.append(set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)))
    assert len(shown[0]) == 10 and {"--model", "--resume"} <= shown[0] < shown[1]


def test_help_shows_each_default_once(parser_of):
    words = " ".join(parser_of("train").format_help().split())
    for line in (
        "learning rate (default: 0.0001)",
        "sigmoid: lambda, a factor of the outputs of the routed experts (default: 1.0)",
    ):
        assert line in words
    assert "default: None" not in words and ") (default" not in words


def test_usage_names_required_flags_and_help_names_values_by_type(parser_of):
    assert parser_of("export").format_usage().endswith(" --ckpt CKPT --output PATH [flags]\n")
    words = " ".join(parser_of("train").format_help().split())
    for shown in ("--lr X", "--depth N", "--rope [True|False]", "--norm {layer,rms}"):
        assert f" {shown} " in words
    assert "--router-input {modulated,normalised,normalised_time} input of" in words  # of all
    assert "--router-scale X sigmoid: lambda" in words


def test_both_training_scripts_share_all_flags_except_batch_size_and_sharding(parser_of):
    def flags(script: str) -> list[tuple]:
        return [
            (action.option_strings, action.help, action.default, action.choices)
            for action in parser_of(script)._actions
        ]

    ddp, deepspeed = flags("train"), flags("train_deepspeed")
    ddp_only = [names for names, *_ in ddp if names not in [other for other, *_ in deepspeed]]
    assert ddp_only == [["--global-batch-size"], ["--shard"], ["--shard-size"],
                     ["--reshard-after-forward"], ["--expert-parallel"],
                     ["--copies-precision"]]  # fmt: skip
    assert len(ddp) - len(ddp_only) == len(deepspeed) - 4
    assert [flag for flag in ddp if flag in deepspeed] == [f for f in deepspeed if f in ddp]


# Commands from the authors' README and scripts, with different paths.
PUBLISHED = {
    "train.py --model DiT-XL/2 --num_experts 8 --num_experts_per_tok 2 --data-path DATA "
    "--image-size 256 --global-batch-size 256 --vae-path VAE --pretraining_tp 1 --accum_iter 1 "
    "--rf False": {
        "model": "DiT-XL/2", "num_experts": 8, "num_experts_per_tok": 2, "image_size": 256,
        "global_batch_size": 256, "vae_path": "VAE", "pretraining_tp": 1, "accum_iter": 1,
        "objective": "gaussian",
    },
    "train_deepspeed.py --deepspeed_config config/zero2.json --model DiT-XL/2 --num_experts 8 "
    "--num_experts_per_tok 2 --data-path DATA --vae-path VAE --train_batch_size 32 --rf True "
    "--local-rank=0": {
        "deepspeed_config": "config/zero2.json", "train_batch_size": 32,
        "objective": "rectified_flow",
    },
    "sample.py --model DiT-XL/2 --ckpt model.pt --vae-path VAE --image-size 256 --cfg-scale 4.0 "
    "--num-sampling-steps 250 --num_experts 8 --num_experts_per_tok 2": {
        "ckpt": "model.pt", "cfg_scale": 4.0, "num_sampling_steps": 250, "num_experts": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_command_lines_are_accepted(line):
    script, *arguments = shlex.split(line)
    with command_line(script, arguments) as module:
        parsed = module.parse_args()
    values = parsed if isinstance(parsed, dict) else vars(parsed)
    for name, value in PUBLISHED[line].items():
        got = values[name]
        assert (str(got) if isinstance(value, str) else got) == value, name


@dataclass(frozen=True, kw_only=True)
class Example:
    path: str = option(help="needed")
    count: int = option(3, ge=1, help="a number", group="numbers")
    the_scale: float | None = option(None, ge=0, help="another")
    wide: bool = option(False, help="on or off")
    names: tuple[str, ...] = option((), help="some")


def test_a_config_dataclass_is_parsed_from_a_command_line():
    config = parse_config(Example, None, ["--path=x", "--the_scale", "2", "--wide", "--names", "a"])
    assert config == Example(path="x", the_scale=2.0, wide=True, names=("a",))
    for word in ("True", "true", "1"):
        assert parse_config(Example, None, ["--path", "x", "--wide", word]).wide is True
    for word in ("False", "false", "0"):
        assert parse_config(Example, None, ["--path", "x", "--wide", word]) == Example(path="x")


@pytest.mark.parametrize(
    "arguments", ["", "--path", "--path=x --count=0", "--path=x --the_scale=nan",
                  "--path=x --coun=1", "--path=x --wide=maybe", "--path=x extra\nline"],
)  # fmt: skip
def test_a_wrong_flag_is_a_one_line_error_with_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: parse_config(Example, None, arguments.split(" ") if arguments else []))
    output = capsys.readouterr()
    assert stopped.value.code == 2 and not output.out
    assert output.err.startswith("error: ") and output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--router topk --router-scale 2", "--router-scale: has no effect without --router "
         "sigmoid"),
        ("--auxiliary-repa-width 9", "--auxiliary-repa-width: has no effect without --auxiliary "
         "repa"),
        ("--num_experts 0 --router-scale 2", "--router-scale: given with a dense model"),
        ("--dry-run --conditions vector", "--conditions: got"),
        ("--ema power --ema-decay 0.9", "--ema-decay: has no effect without --ema exponential"),
        ("--epochs 5 --max-steps 9", "--epochs: cannot be combined with --max-steps"),
        ("--router sigmoid --router-scale 0", "--router-scale: got 0.0, expected a number above 0"),
        ("--shared-experts 1", "--shared-experts: unknown flag; did you mean "
         "--n-shared-experts?"),
        ("--weight-decay 1", "did you mean --optimizer-weight-decay?"),
        ("--num-exprts 4", "did you mean --num-experts?"),
        ("--batch-size 4", "did you mean --global-batch-size?"),
        ("--steps 4", "did you mean --warmup-steps or --max-steps?"),
        ("--num_experts 0 --router race", "--router: given with a dense model"),
        ("--num_experts 0 --aux-loss-alpha 1", "--aux-loss-alpha: given with a dense model"),
        ("--num_experts 0 --n-shared-experts 1", "--n-shared-experts: given with a dense model"),
        ("--num_experts 0 --num_experts_per_tok 1", "--num-experts-per-tok: given with a dense"),
        ("--num_experts 0 --sparse-layers 6", "--sparse-layers: given with a dense model"),
        ("--model JiT-B/16 --num_experts_per_tok 4", "--num-experts-per-tok: given with a dense"),
        ("--auxiliary sra sra", "--auxiliary: got sra, sra, expected different ones"),
        ("--shard --precision fp16", "--precision: got fp16 with --shard"),
        pytest.param(
            "--shard --objective mean_flow", "--objective: got mean_flow with --shard and torch",
            marks=pytest.mark.skipif(torch.__version__ >= (2, 13), reason="not refused"),
        ),
        ("--objective flow_x --rf False", "--objective: flow_x contradicts rf False"),
    ],
)  # fmt: skip
def test_a_flag_that_has_no_effect_is_rejected_with_a_suggestion(command, words, capsys):
    arguments = [*command.split(), "--data-path", "x", "--dry-run"]
    assert words in expect_error(capsys, "train.py", *arguments)


def test_command_line_flags_override_a_recipe_whose_values_are_parsed_as_flags(tmp_path, capsys):
    """YAML values such as 1e-4 are read as numbers. If the command replaces a component, the
    recipe's options of that component are dropped, and the options of others are kept."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "router: sigmoid\nrouter-scale: 2.5\nlr: 1e-3\noptimizer_betas: [0.9, 0.95]\nrf: true\n"
        "num-experts-per-tok: 1\n"
    )
    with command_line("train.py", ("--config", recipe, "--lr", "2e-3")) as module:
        config = resolve(module.parse_args(), DDPFlags)
    assert config.step.lr == 2e-3 and config.optimizer.betas == (0.9, 0.95)
    assert config.model.router_options["scale"] == 2.5
    assert config.step.objective.name == "rectified_flow"
    with command_line("train.py", ("--config", recipe, "--router", "race")) as module:
        assert resolve(module.parse_args(), DDPFlags).model.router.name == "race"
    with command_line("train.py", ("--config", recipe, "--sparse-layers", "6,8")) as module:
        assert resolve(module.parse_args(), DDPFlags).model.sparse_layers == (6, 8)
    with command_line("train.py", ("--config", recipe, "--num_experts", "0")) as module:
        dense = resolve(module.parse_args(), DDPFlags)
        assert "dense" in dense.name
    stored = tmp_path / "config.yaml"
    stored.write_text(json.dumps(dense.sections()) + "\n---\n{}\n")
    with command_line("train.py", ("--config", stored, "--num_experts", "4")) as module:
        assert resolve(module.parse_args(), DDPFlags).model.sparse_layers == tuple(range(12))
    recipe.write_text("num_experts: 0\nsparse_layers: every-second\n")
    with command_line("train.py", ("--config", recipe, "--num_experts", "4")) as module:
        assert resolve(module.parse_args(), DDPFlags).model.sparse_layers == (1, 3, 5, 7, 9, 11)
    recipe.write_text("ema-decay: 0.99\nema-warmup: true\n")  # options of the default EMA
    with command_line("train.py", ("--config", recipe, "--ema", "power")) as module:
        assert [ema.name for ema in resolve(module.parse_args(), DDPFlags).ema] == ["power-0.1"]
    recipe.write_text(
        "auxiliary: [sra, dispersive]\nauxiliary-sra-weight: 0.3\n"
        "auxiliary-dispersive-weight: 0.4\nema-decay: 0.99\nrouter-scale: 2.5\n"
    )
    words = ("--auxiliary", "dispersive", "contrastive", "--ema", "exponential", "power")
    with command_line("train.py", ("--config", recipe, *words, "--rf", "--router", "sigmoid")) as m:
        config = resolve(m.parse_args(), DDPFlags)
    assert [one.weight for one in config.auxiliary] == [0.4, 0.05]
    assert [ema.name for ema in config.ema] == ["0.99", "power-0.1"]
    assert config.model.router_options["scale"] == 2.5
    recipe.write_text("# Starts with a marker.\n---\nrf: true\nobjective-mean: -0.4\n")
    for words, objective in ((("--objective", "flow_x"), "flow_x"), (("--rf", "0"), "gaussian")):
        with command_line("train.py", ("--config", recipe, *words)) as module:
            assert resolve(module.parse_args(), DDPFlags).step.objective.name == objective
    for text, words, expected in (
        ("num-experts: 0\nnum-experts-per-tok: 4", (), "--num-experts-per-tok: given with a dense"),
        ("router-scale: 2.5", ("--router", "topk"), "--router-scale: has no effect without"),
    ):
        recipe.write_text(text)
        assert expected in expect_error(capsys, "train.py", "--config", recipe, *words, "--dry-run")
    for text, words in (
        ("learning: 1", "--learning: unknown flag"),
        ("config: x", "got the key config"),
        ("lr: x", "--lr: got 'x'"),
        ("- 1", "YAML"),
        ("image-size: [[256], [256]]", "--image-size: got"),
        ("max-steps: [5, 5]", "--max-steps: got"),
        ("lr: 1e-3\nlr: 2e-3", "lr: is given twice"),
        ("lr: 1e-3\nstep: {lr: 2e-3}", "lr: is given twice"),
        ("steps: {lr: 1e-3}", "steps: got a section, expected a flag or one of model, data, step"),
        ("lr: {floor: 1e-3}", "lr: got a section, expected a number"),
        ("router: {sigmoid: {scale: 2}}\nrouter-scale: 3", "--router-scale: is given twice"),
        ("auxiliary: [sra, sra]", "--auxiliary: got sra, sra"),
    ):
        recipe.write_text(text)
        line = expect_error(capsys, "train.py", "--config", recipe)
        assert words in line and str(recipe) in line
    for content in (b"\xb8\x05 weights", "run_name: caf\u00e9".encode("latin-1")):
        recipe.write_bytes(content)
        line = expect_error(capsys, "train.py", "--config", recipe)
        assert "expected a YAML file in UTF-8, such as a recipe or the config.yaml of a run" in line
    assert "Is a directory" in expect_error(capsys, "train.py", "--config", tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lr": "fast"}, "--lr: got 'fast', expected a number"),
        ({"lr": 10**400}, "--lr: got 1000"),
        ({"num_experts": 2.5}, "--num-experts: got 2.5, expected an integer"),
        ({"optimizer_betas": [0.9]}, "--optimizer-betas: got '0.9', expected 2 numbers"),
        ({"auxiliary": {"repa": {"weight": -1}}}, "--auxiliary-repa-weight: got -1.0, expected"),
        ({"batch_size": 8}, "--batch-size: unknown flag; did you mean --global-batch-size?"),
        ({"config": "no.yaml"}, "--config no.yaml (no such file)"),
        ({"config": "stable"}, f"did you mean {os.path.relpath(RECIPES / 'stable.yaml')}?"),
        ({"input_size": 8}, "--input-size: unknown flag"),  # derived from the data
    ],
)
def test_train_run_checks_its_arguments_like_command_line_flags(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        run(**flags)


def test_a_flag_that_another_flag_makes_useless_is_dropped_from_recipe_and_stored_settings():
    flags = training_flags(DDPFlags)
    sharded = {"shard": True, "reshard_after_forward": False, "expert_parallel": 2}
    assert override(sharded, {"shard": False}, flags) == {"shard": False}
    trapezoid = read_values({"lr_schedule": "trapezoid", "decay_share": 0.3}, flags)
    config = resolve(override(trapezoid, {"lr_schedule": "cosine"}, flags), DDPFlags)
    assert config.step.lr_schedule == Part("cosine", {"lr_floor": 0.0})
    kept = read_values({"lr_schedule": {"cosine": {"lr_floor": 0.1}}}, flags)
    config = resolve(override(kept, {"lr_schedule": "cosine"}, flags), DDPFlags)
    assert config.lr_schedule.lr_floor == 0.1


def test_flags_beside_the_config_of_a_run_replace_what_follows_from_the_flags_of_the_run(tmp_path):
    """The sizes of a preset, the blocks of a rule, the inputs of an objective, and defaults."""

    def beside(path, **flags):
        return resolve(parse_training(DDPFlags, arguments={"config": str(path), **flags}), DDPFlags)

    run = tmp_path / "config.yaml"
    config = resolve({"depth": 6, "objective": "mean_flow", "sparse_layers": "deep-half"}, DDPFlags)
    run.write_text(json.dumps(config.sections()) + "\n---\n{}\n")
    assert beside(run).model == config.model
    assert beside(run, depth=8).model.sparse_layers == (4, 5, 6, 7)
    other = beside(run, model="DiT-B/2").model
    assert (other.depth, other.hidden_size, other.num_heads) == (6, 768, 12)
    assert beside(run, model="DiT-S/2").model.depth == 6  # the preset of the run
    assert beside(run, model="DiT-B/2", depth=4).model.depth == 4
    assert beside(run).model.conditions == ("label", "span")
    assert beside(run, objective="rectified_flow").model.conditions == ("label",)
    for said, flags, name, value in (
        ({}, {"sparse_layers": "every-second"}, "dense_mlp_ratio", 10),
        ({"dense_mlp_ratio": 3}, {"sparse_layers": "every-second"}, "dense_mlp_ratio", 3),
        ({"sparse_layers": "6"}, {"num_experts_per_tok": 1}, "dense_mlp_ratio", 6),
        ({"num_experts": 0}, {"num_experts": 4}, "mlp_type", "swiglu"),
        ({"model": "JiTMoE-H/16", "num_experts": 0}, {"depth": 12}, "num_experts", 0),
        ({"depth": 1}, {"depth": 2}, "sparse_layers", (0, 1)),
        ({"num_classes": 1}, {"num_classes": 2}, "class_dropout_prob", 0.1),
        ({"num_experts": 16, "num_experts_per_tok": 12}, {"depth": 4}, "num_experts_per_tok", 12),
        ({"hidden_size": 64, "num_heads": 4}, {"model": "DiT-L/2"}, "num_heads", 4),
    ):
        config = resolve(said, DDPFlags)
        run.write_text(json.dumps(config.sections()) + "\n---\n{}\n")
        assert beside(run, num_classes=config.model.num_classes).model == config.model
        assert getattr(beside(run, **flags).model, name) == value


@pytest.mark.parametrize(
    ("file", "preset", "expected"),
    [
        ({"depth": 6}, "DiT-B/2", {"depth": 6, "hidden_size": 768}),
        ({"model": "DiT-Ti/2", "patch-size": 8, "num-experts": 8}, "DiT-S/2",
         {"patch_size": 8, "hidden_size": 384}),
        ({"num-experts": 32, "router": {"expert_choice": {}}}, "JiTMoE-B/16",
         {"num_experts": 32, "router": "expert_choice"}),
        ({"model": "DiT-S/2", "router-scale": 3}, "JiTMoE-B/16",
         {"num_experts": 16, "router": "sigmoid", "scale": 3}),
        ({"model": "JiTMoE-B/16", "router": "sigmoid", "router-bias-step": 0.001}, "DiT-S/2",
         {"num_experts": 8, "router": "sigmoid", "scale": 1}),
        ({"model": "JiTMoE-B/16", "num-experts": 16, "router": {"sigmoid": {"scale": 2.5}}},
         "DiT-S/2", {"num_experts": 8, "router": "topk"}),
        ({"model": "DiT-S/2", "run": 1}, "JiT-B/16", {"num_experts": 0, "depth": 12}),
        ({"model": "JiTMoE-B/16", "run": 1}, "DiT-S/2",
         {"num_experts": 8, "router": "topk", "norm": "layer", "sparse_layers": (*range(12),)}),
        ({"model": "JiTMoE-B/16", "router": "race", "run": 1}, "JiTMoE-L/16",
         {"depth": 20, "router": "race"}),
    ],
)  # fmt: skip
def test_a_preset_beside_a_file_replaces_only_what_the_preset_of_the_file_sets(
    file, preset, expected, tmp_path
):
    """In a recipe and, with "run", in the config.yaml of a run, which states all settings."""
    path = tmp_path / "file.yaml"
    path.write_text(json.dumps(file))
    if file.pop("run", None):
        path.write_text(json.dumps(resolve(file, DDPFlags).sections()) + "\n---\n{}\n")
    arguments = {"config": str(path), "model": preset}
    model = resolve(parse_training(DDPFlags, arguments=arguments), DDPFlags).model
    has = vars(model) | model.router_options | {"router": model.router and model.router.name}
    assert {name: has[name] for name in expected} == expected


def test_a_preset_beside_a_file_that_sets_all_sizes_is_rejected(tmp_path, capsys):
    """It would change only the name of the model."""
    path, sizes = tmp_path / "file.yaml", {"depth": 2, "hidden-size": 32, "num-heads": 2}
    for file, extra in ((sizes, {}), (sizes | {"model": "DiT-S/2"}, {"patch-size": 2})):
        path.write_text(json.dumps(file | extra))
        line = expect_error(capsys, "train.py", "--config", path, "--model", "DiT-B/2")
        assert "--model: DiT-B/2 has no effect, because the recipe sets --depth, " in line
        assert parse_training(DDPFlags, arguments={"config": str(path), "model": "DiT-S/2"})
    sections = resolve({"depth": 7}, DDPFlags).sections()
    del sections["model"]["model"]  # as in a run from weights that have sizes of no preset
    path.write_text(json.dumps(sections) + "\n---\n{}\n")
    line = expect_error(capsys, "train.py", "--config", path, "--model", "DiT-B/2")
    assert "--model: DiT-B/2 has no effect" in line
    path.write_text(json.dumps(dict(DiT_models["DiT-B/2"].keywords)))
    assert parse_training(DDPFlags, arguments={"config": str(path), "model": "DiT-B/2"})


def test_several_files_override_each_other_in_order(tmp_path):
    """Also from several flags; a preset replaces the sizes of the files before it."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: DiT-B/2\nlr: 1e-3\nrouter: {sigmoid: {scale: 2}}\nmax-steps: 5\n")
    second.write_text("model: DiT-L/2\nlr: 2e-3\nrouter-bias-step: 0.5\nepochs: 3\n")
    for words in (("--config", first, second), ("--config", first, "--config", second)):
        with command_line("train.py", (*words, "--warmup-steps", 7)) as module:
            config = resolve(module.parse_args(), DDPFlags)
        assert (config.model.depth, config.step.lr, config.step.warmup_steps) == (24, 2e-3, 7)
        assert config.model.router_options | {"scale": 2, "bias_step": 0.5} == (
            config.model.router_options
        )
        assert (config.run.max_steps, config.run.epochs) == (None, 3)
    first.write_text("val-path: x\n")
    second.write_text("val-share: 0.0\n")  # as in the config.yaml of any run
    said = parse_training(DDPFlags, arguments={"config": [str(first), str(second)]})
    assert said["val_path"] == "x"
    names = ("jit_b16", "jit_l16", "pixels")
    recipes = [RECIPES / f"{name}.yaml" for name in names]
    for files, decays in ((recipes[:2], (0.9999, 0.9996)), (recipes[::2], (0.998,))):
        with command_line("train.py", ("--config", *files)) as module:
            emas = resolve(module.parse_args(), DDPFlags).ema
        assert [ema.decay for ema in emas] == [*decays]


def test_the_config_of_a_run_overrides_files_and_weights_with_its_defaults_too(tmp_path):
    run, recipe = tmp_path / "run.yaml", tmp_path / "recipe.yaml"
    config = resolve({"model": "DiT-Ti/2", "qk_norm": False}, DDPFlags)
    run.write_text(json.dumps(config.sections()) + "\n---\n{}\n")
    others = {"qk-norm": True, "num-experts-per-tok": 1, "router": {"sigmoid": {"scale": 3}}}
    recipe.write_text(json.dumps(others))
    said = parse_training(DDPFlags, arguments={"config": [str(recipe), str(run)]})
    assert resolve(said, DDPFlags).model == config.model
    before = replace(config.model, qk_norm=True, num_experts_per_tok=1)
    said = parse_training(DDPFlags, arguments={"config": [str(run)], "finetune": "weights"})
    assert resolve(said, DDPFlags, weights=Record(config=before)).model == config.model


def test_a_setting_that_the_data_contradict_is_reported_with_its_origin():
    data = DataFacts(num_classes=4, input_size=8, in_channels=4, image_size=32, vae_path="vae")
    stored = {"model": "DiT-S/2", "patch_size": 2, "num_classes": 10}
    record = Record(config=DiTConfig(num_classes=10))
    with pytest.raises(UserError, match="--num-classes: got 10 from the run, expected 4"):
        resolve({}, DDPFlags, stored=stored, weights=record, data=data)
    said = {"config": "recipe.yaml", "image_size": 64}
    with pytest.raises(UserError, match="--image-size: got 64 from the command or recipe.yaml"):
        resolve(said, DDPFlags, data=data)


def test_a_flag_of_the_experts_beside_a_stored_dense_model_is_rejected():
    record = Record(config=DiTConfig(num_experts=0))
    stored = {"model": record.model_name, "num_experts": 0}
    resolve({"num_experts_per_tok": 2}, DDPFlags, stored=stored, weights=record)  # the default
    with pytest.raises(UserError, match="--sparse-layers: given with a dense model"):
        resolve({"sparse_layers": "0"}, DDPFlags, stored=stored, weights=record)


def test_options_of_several_components_are_set_by_component_name():
    class Weighted(Component):
        weight: float = option(1.0, help="of this loss", ge=0)

    Config = losses_config({"one": Weighted, "two": type("Two", (Weighted,), {})})
    words = ["--losses", "two", "one", "--losses-two-weight", "0.5"]
    expected = (Part("one", {"weight": 1.0}), Part("two", {"weight": 0.5}))  # in any order
    assert parse_config(Config, None, words).losses == expected
    with pytest.raises(UserError, match="--losses-two-weight: got -1.0"):
        parse_config(Config, None, ["--losses-two-weight", "-1"])

    class One(Component):
        loss_x: int = option(1, help="x")

    class Other(Component):
        x: int = option(1, help="x")

    Clash = losses_config({"my": One, "my-loss": Other})
    with pytest.raises(TypeError, match="losses_my_loss_x is a flag"):
        flags_of((Clash,))


def losses_config(table: dict[str, type]) -> type:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        losses: tuple[Part, ...] = option(
            (), table=table, by_component=True, help="any number of them"
        )

    return Config


def test_an_option_of_several_components_accepts_what_one_of_the_components_accepts():
    class Left(Component):
        to: str = option("a", choices=("a", "b"), help="target")
        size: int = option(1, ge=1, le=9, help="size")

    class Right(Component):
        to: str = option("c", choices=("b", "c"), help="target")
        size: int = option(1, ge=1, le=20, help="size")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        side: Part = option(Part("left"), table={"left": Left, "right": Right}, help="side")

    flags = flags_of((Config,))
    assert parse_flags(flags, None, ["--side-to", "a", "--side-size", "20"])["side_to"] == "a"
    with pytest.raises(UserError, match="--side-size: got 0, expected an integer at least 1$"):
        parse_flags(flags, None, ["--side-size", "0"])
    with pytest.raises(UserError, match="--side-to: got 'a', expected one of b, c"):
        parse_config(Config, None, ["--side", "right", "--side-to", "a"])


def test_a_recipe_may_be_nested_or_flat():
    """Words, as in a command, typed values of YAML and a stored config give equal settings."""
    flat = {"router": "sigmoid", "router-scale": 2.5, "aux-loss-alpha": 0.1, "lr": 1e-3,
            "ema-decay": [0.9, 0.99], "lr-schedule": "trapezoid", "decay-share": 0.5,
            "auxiliary": ["sra"], "auxiliary-sra-weight": 0.3}  # fmt: skip
    file = {
        "model": {"router": {"sigmoid": {"scale": "2.5", "aux-loss-alpha": "0.1"}}},
        "step": {"lr": "1e-3", "ema": [{"exponential": {"decay": "0.9"}}, {"exponential":
                 {"decay": "0.99"}}], "lr_schedule": {"trapezoid": {"decay_share": "0.5"}}},
        "auxiliary": {"sra": {"weight": "0.3"}},
    }  # fmt: skip
    configs = [resolve(values, DDPFlags) for values in (flat, file)]
    stored = configs[0].sections()
    configs.append(resolve(stored, DDPFlags))
    for config in configs[1:]:
        assert config.sections() == stored
        assert [ema.name for ema in config.ema] == ["0.9", "0.99"]
    assert stored["model"]["router"]["sigmoid"]["aux_loss_alpha"] == 0.1


def test_several_values_of_an_option_go_to_one_component_each():
    def emas(*words, recipe=None):
        said = parse_training(DDPFlags, None, words)
        emas = resolve(override(recipe or {}, said, training_flags(DDPFlags)), DDPFlags).ema
        return [(ema.name, getattr(ema, "warmup", None)) for ema in emas]

    two = ("--ema-decay", "0.9", "0.99")
    assert emas(*two) == [("0.9", False), ("0.99", False)]
    assert emas(*two, "--ema-warmup", "True") == [("0.9", True), ("0.99", True)]
    pairs = ("--ema-warmup", "True", "False")
    assert emas(*two, *pairs) == emas(*pairs, *two) == [("0.9", True), ("0.99", False)]
    flags = training_flags(DDPFlags)
    kinds = [{"exponential": {"decay": 0.9}}, "power",
             {"exponential": {"decay": 0.99, "warmup": True}}]  # fmt: skip
    stored = read_values({"ema": kinds}, flags)
    assert emas("--ema-decay", "0.5", "0.6", recipe=stored) == [
        ("0.5", False), ("0.6", True), ("power-0.1", None)
    ]  # fmt: skip
    over, base = (
        read_values({"ema": [{"exponential": {"decay": d}} for d in decays]}, flags)
        for decays in ((0.5, 0.6), (0.9, 0.99))
    )
    assert override(base, over, flags) == over
    pair = [{"exponential": {"decay": decay, "warmup": False}} for decay in (0.9, 0.99)]
    stored = read_values({"ema": pair}, flags)
    for count in (1, 3):  # another number of averages than the run has
        decays = [f"0.{number}" for number in range(1, count + 1)]
        assert emas("--ema-decay", *decays, recipe=stored) == [(d, False) for d in decays]
    mixed = resolve({"ema": [pair[0], "power", pair[1]]}, DDPFlags)
    assert [ema.name for ema in mixed.ema] == ["0.9", "power-0.1", "0.99"]
    with pytest.raises(UserError, match="^--ema-warmup: got 3 values, expected one or 2$"):
        emas(*two, "--ema-warmup", "True", "False", "True")
    with pytest.raises(UserError, match="^--ema: got 0.9, 0.9, expected different averages$"):
        emas("--ema-decay", "0.9", "0.9")


def test_a_component_that_a_file_gives_no_value_has_its_own_default(monkeypatch):
    """Also if a component of another kind has an option of the same flag, with a value."""

    class LateEMA(ExponentialEMA):
        decay: float = option(0.5, help="decay")

    monkeypatch.setitem(EMAS, "late", LateEMA)
    pair = [{"exponential": {"decay": decay}} for decay in (0.9, 0.99)]
    config = resolve({"ema": [*pair, "late"]}, DDPFlags)
    assert [ema.decay for ema in config.ema] == [0.9, 0.99, 0.5]
    assert resolve(config.sections(), DDPFlags).step == config.step


def test_an_option_of_a_preset_and_of_its_router_is_given_twice():
    with pytest.raises(ValueError, match="^router_scale: is given twice, alone and as an option"):
        DiT_models["JiTMoE-B/16"](router={"sigmoid": {"scale": 3}})


def test_importing_train_imports_no_slow_packages():
    """What Ctrl-C would interrupt is imported before the run folder is created."""
    slow = "{'diffusers', 'torchvision', 'matplotlib', 'huggingface_hub.hf_api', 'training.loop'}"
    code = f"import sys, train\nassert not {slow} & sys.modules.keys(), sys.modules.keys()\n"
    code += "import training.log\nassert 'torch.utils.tensorboard' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
