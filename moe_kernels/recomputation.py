"""Gradient checkpointing: the backward pass computes a block again, completely or in part.

    y = checkpoint(block, x, **checkpoint_options(KEPT_OPERATORS))    # (): keep only x

With kept operators, the forward pass keeps their outputs, and the backward pass computes only what
lies between them again (torch's selective activation checkpointing). What the block draws at random
is drawn again: torch keeps the state of the generators, which the host holds also for a GPU.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

from torch._ops import OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

# The experts of a layer, and their exchange of rows with other processes.
EXPERT_OPERATORS = frozenset({"dit_moe::experts", "dit_moe::exchange"})
KEPT_OPERATORS = EXPERT_OPERATORS | {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash_attn::_flash_attn_forward",
}


def checkpoint_options(kept: Collection[str]) -> dict[str, Any]:
    """Returns the options of torch's `checkpoint`.

    kept: names of operators whose outputs are kept
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if kept:
        policy = partial(keep_outputs, frozenset(kept))
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return options


def keep_outputs(kept: Collection[str], _: Any, operator: OpOverload, *args, **named):
    """A policy of torch's selective checkpointing."""
    is_kept = operator.name() in kept
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
