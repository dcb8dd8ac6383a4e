"""Command lines: what --help says of every script, and that shared flags are the same flags."""

import argparse
import importlib

import pytest

SCRIPTS = (
    "train", "train_deepspeed", "cache_latents", "sample", "evaluate", "upcycle", "export",
    "expert_data", "heatmap_class", "heatmap_timestep", "heatmap_patch",
)  # fmt: skip


@pytest.fixture
def parser_of(monkeypatch):
    """Gives the parser of a script, as its parse_args makes it."""

    def find(script: str) -> argparse.ArgumentParser:
        made = []

        def stop(parser, *args):
            made.append(parser)
            raise SystemExit

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args()
        return made[0]

    return find


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_the_commands_and_something_on_every_flag(script, parser_of):
    parser = parser_of(script)
    assert importlib.import_module(script).__doc__ in parser.format_help()
    assert [action.option_strings for action in parser._actions if not action.help] == []


def test_help_says_a_default_once(parser_of):
    words = " ".join(parser_of("train").format_help().split())
    assert "AdamW learning rate, constant (default: 0.0001)" in words
    assert "AdamW weight decay (default: 0.0)" in words
    assert "experts chosen for each token (default: 2) --n-shared" in words  # the weights may say
    assert "rectified flow instead of Gaussian diffusion --accum_iter" in words
    assert "default: None" not in words and "(default: as many as the data has) " in words


def test_both_training_scripts_take_the_same_flags_but_for_the_batch_size(parser_of):
    def flags(script: str) -> list[tuple]:
        return [
            (action.option_strings, action.help, action.default, action.type, action.choices)
            for action in parser_of(script)._actions
        ]

    ddp, deepspeed = flags("train"), flags("train_deepspeed")
    assert [names for names, *_ in ddp if names not in [other for other, *_ in deepspeed]] == [
        ["--global-batch-size"]
    ]
    assert [flag for flag in ddp if flag in deepspeed] == [f for f in deepspeed if f in ddp]
    assert len([flag for flag in ddp if flag in deepspeed]) == len(ddp) - 1
