"""What --dry-run counts is what a step keeps."""

from dataclasses import replace

import torch

from checkpoints import config_of
from training.memory import model_activations


def test_a_plan_for_gpus_has_no_attention_weights():
    """A GPU keeps none, one number a head and token apart, where a CPU in bf16 keeps T x T."""
    config = replace(config_of("DiT-S/2"), depth=2, sparse_layers=(0, 1))
    few, many = (
        model_activations(replace(config, num_heads=heads), 4, "bf16", False) for heads in (3, 12)
    )
    tokens, heads = (config.input_size // config.patch_size) ** 2, 12 - 3
    assert many - few == 2 * 4 * heads * tokens * torch.float32.itemsize
