"""Command lines: --help, published commands, and one-line errors for wrong flags."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT, command_line, config_of_command, expect_error, needs_extras

from options.parts import Component, Config, Word, option
from runtime.errors import run_main
from runtime.flags import parse_config
from training import log

SCRIPTS = (
    "train", "train_deepspeed", "cache_latents", "sample", "evaluate", "export",
    "expert_data", "expert_ablation", "expert_report", "heatmap_class", "heatmap_timestep",
    "check_gpu", pytest.param("upcycle", marks=needs_extras),
)  # fmt: skip


@pytest.fixture
def parser_of(monkeypatch):
    """Function that returns the argument parser that a script's parse_args creates."""

    def find(script: str) -> argparse.ArgumentParser:
        made = []

        parse = argparse.ArgumentParser.parse_known_args

        def stop(parser, *args):
            if not parser.add_help:  # that of --plugin, whose components have options
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


@pytest.fixture
def help_of(capsys):
    """Function that returns the help that a script prints."""

    def show(script: str, *words: str) -> str:
        with command_line(script, words) as module, pytest.raises(SystemExit) as stopped:
            module.parse_args()
        assert stopped.value.code in (0, None)
        return capsys.readouterr().out

    return show


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"^  (--[\w-]+)", text.partition("\ncomponents, ")[0], re.MULTILINE))


def test_help_of_training_shows_few_flags_and_help_all_shows_all(help_of):
    few, all_flags = (flags_in(help_of("train.py", *w)) for w in (("--help",), ("--help", "all")))
    wanted = {"--model", "--run-name", "--resume", "--lr", "--router", "--epochs"}
    assert len(few) < 20 and wanted <= few < all_flags


def test_help_of_sampling_begins_with_the_images_and_ends_with_the_components(help_of):
    text, _, components = help_of("sample.py", "--help").partition("\ncomponents, ")
    flags = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    assert {"--class-labels", "--output"} <= {*flags[:5]}
    assert "--router batch_pool" in components


def test_help_of_a_word_shows_the_flags_groups_and_components_with_it(help_of):
    assert flags_in(help_of("train.py", "--help", "router")) == {"--router", "--train-router-only"}
    assert flags_in(help_of("train.py", "--help", "sigmoid")) == {"--router"}
    assert {"--shard", "--expert-parallel"} <= flags_in(help_of("train.py", "--help", "sharding"))


def test_help_has_a_table_of_components_with_their_options_defaults_and_ranges(help_of):
    words = " ".join(help_of("train.py", "--help", "all").split())
    for line in (
        "--router sigmoid",
        "scale=X lambda, a factor of the outputs of the routed experts (default: 1.0); a number "
        "above 0",
        "renormalize=True|False",
        "(default: 0.9,0.999); 2 numbers",
        "--ema power",
        "--lr-schedule trapezoid",
        "--objective flow_x",
    ):
        assert line in words


def test_help_shows_each_default_once(help_of):
    words = " ".join(help_of("train.py", "--help", "all").split())
    for default in ("learning rate (default: 0.0001)", "optimizer (default: adamw)"):
        assert default in words
    assert "default: None" not in words and ") (default" not in words


def test_usage_names_required_flags_and_help_names_values_by_type(parser_of):
    assert parser_of("export").format_usage().endswith(" --output PATH --ckpt CKPT [flags]\n")
    words = " ".join(parser_of("train").format_help().split())
    for shown in ("--lr X", "--depth N", "--rope [True|False]", "--norm {layer,rms}"):
        assert f" {shown} " in words


def test_a_flag_of_the_other_training_script_is_refused_and_not_in_the_help(help_of, capsys):
    own = {
        "train.py": {"--global-batch-size": 3, "--shard": True, "--shard-size": 3,
                     "--reshard-after-forward": False, "--expert-parallel": 3},
        "train_deepspeed.py": {"--train-batch-size": 3, "--deepspeed-config": "x.json"},
    }  # fmt: skip
    shown = {script: flags_in(help_of(script, "--help", "all")) for script in own}
    for script, other in (own, [*own][::-1]):
        assert shown[script] - shown[other] == own[script].keys()
        for flag, value in own[other].items():
            line = expect_error(capsys, script, flag, value, "--data-path", "x")
            assert flag in line and other in line


# Commands from the authors' README and scripts, with different paths, and one with all flags.
PUBLISHED = {
    "train.py --model DiT-XL/2 --num_experts 8 --num_experts_per_tok 2 --data-path DATA "
    "--image-size 256 --global-batch-size 256 --vae-path VAE --pretraining_tp 1 --accum_iter 1 "
    "--rf False": {
        "model": "DiT-XL/2", "num_experts": 8, "num_experts_per_tok": 2, "image_size": 256,
        "global_batch_size": 256, "vae_path": "VAE", "accum_iter": 1,
        "objective": "gaussian:schedule=linear",
    },
    "train.py --data_path DATA --results_dir results --model DiT-S/2 --vae_path VAE --image_size "
    "512 --num_classes 10 --epochs 3 --global_batch_size 64 --global_seed 1 --num_workers 2 "
    "--log_every 5 --ckpt_every 7 --num-experts 4 --num-experts-per-tok 1 --pretraining-tp 1 "
    "--accum-iter 2 --local-rank 0 --rf True": {
        "data_path": "DATA", "image_size": 512, "num_classes": 10, "epochs": 3,
        "global_batch_size": 64, "global_seed": 1, "num_workers": 2, "log_every": 5,
        "ckpt_every": 7, "num_experts": 4, "num_experts_per_tok": 1, "accum_iter": 2,
        "objective": "rectified_flow:times=logit-normal,mean=0.0,std=1.0,shift=1.0",
    },
    "train_deepspeed.py --deepspeed_config config/zero2.json --model DiT-XL/2 --num_experts 8 "
    "--num_experts_per_tok 2 --data-path DATA --vae-path VAE --train_batch_size 32 --rf True "
    "--local_rank=0": {
        "deepspeed_config": "config/zero2.json", "train_batch_size": 32,
        "objective": "rectified_flow:times=logit-normal,mean=0.0,std=1.0,shift=1.0",
    },
    "sample.py --model DiT-XL/2 --ckpt model.pt --vae-path VAE --image-size 256 --cfg-scale 4.0 "
    "--num-sampling-steps 250 --num_experts 8 --num_experts_per_tok 2 --num-classes 1000 --seed 0 "
    "--rf False": {
        "ckpt": "model.pt", "cfg_scale": 4.0, "num_sampling_steps": 250, "num_experts": 8,
        "rf": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_command_lines_are_accepted(line):
    script, *arguments = shlex.split(line)
    if script == "sample.py":
        with command_line(script, arguments) as module:
            found = vars(module.parse_args())
    else:
        config = config_of_command(*arguments, script=script)
        found = {"model": config.preset}
        for section in config.by_section.values():
            found = vars(section) | found
    for name, value in PUBLISHED[line].items():
        got = found[name]
        assert (str(got) if isinstance(value, str) else got) == value, name


class Constant(Component):
    factor: float = option(1.0, gt=0, help="factor")


class Zero(Component):
    """Has no options."""


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    path: str = option(help="needed")
    count: int = option(3, ge=1, help="a number", group="numbers")
    the_scale: float | None = option(None, ge=0, help="another")
    wide: bool = option(False, help="on or off")
    names: tuple[str, ...] = option((), help="some")
    speed: Word = option("constant", table={"constant": Constant, "zero": Zero}, help="speed")


def test_a_config_dataclass_is_parsed_from_a_command_line():
    words = ["--path=x", "--the_scale", "2", "--wide", "--names", "a", "--speed=constant:factor=2"]
    speed = Word("constant", {"factor": 2.0})
    assert parse_config(Example, None, words) == Example(
        path="x", the_scale=2.0, wide=True, names=("a",), speed=speed
    )
    for word in ("True", "true", "1"):
        assert parse_config(Example, None, ["--path", "x", "--wide", word]).wide is True
    for word in ("False", "false", "0"):
        assert parse_config(Example, None, ["--path", "x", "--wide", word]) == Example(path="x")


@pytest.mark.parametrize(
    "arguments", ["", "--path", "--path=x --count=0", "--path=x --the_scale=nan",
                  "--path=x --coun=1", "--path=x --wide=maybe", "--path=x extra\nline",
                  "--path=x --speed", "--path=x --speed fast", "--path=x --speed constant:factor=0",
                  "--path=x --speed zero:factor=2", "--path=x --speed={}"],
)  # fmt: skip
def test_a_wrong_flag_is_a_one_line_error_with_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: parse_config(Example, None, arguments.split(" ") if arguments else []))
    output = capsys.readouterr()
    assert stopped.value.code == 2 and not output.out
    assert output.err.startswith("error: ") and output.err.count("\n") == 1


def test_importing_train_imports_no_slow_packages():
    """What Ctrl-C would interrupt is imported before the run folder is created."""
    slow = "{'diffusers', 'torchvision', 'matplotlib', 'huggingface_hub.hf_api', 'training.loop'}"
    code = f"import sys, train\nassert not {slow} & sys.modules.keys(), sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "SummaryWriter" in vars(log)
