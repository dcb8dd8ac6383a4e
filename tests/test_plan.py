"""The memory plan of --dry-run, and its note about the EMA."""

from dataclasses import replace

import torch
from conftest import call_main

from checkpoints import config_of
from training.memory import model_activations


def test_the_memory_plan_for_gpus_includes_no_attention_weights():
    """A GPU keeps one number per head and token; a CPU in bf16 keeps T x T attention weights."""
    config = replace(config_of("DiT-S/2"), depth=2, sparse_layers=(0, 1))
    few, many = (
        model_activations(replace(config, num_heads=heads), 4, "bf16", False) for heads in (3, 12)
    )
    tokens, heads = (config.input_size // config.patch_size) ** 2, 12 - 3
    assert many - few == 2 * 4 * heads * tokens * torch.float32.itemsize


def test_the_plan_warns_that_a_short_run_leaves_the_initial_weights_in_the_ema(capsys):
    plan = ("train.py", "--dry-run", "--model", "DiT-Ti/2", "--max-steps", 1000)
    call_main(*plan)
    assert (
        "after 1,000 steps 90% of EMA 0.9999 will still be the initial" in capsys.readouterr().out
    )
    call_main(*plan, "--ema-warmup", True)
    assert "initial weights" not in capsys.readouterr().out
