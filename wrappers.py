"""Gradient checkpointing and torch.compile, applied to the blocks of a finished model.

    wrap_blocks(model, recomputed="selective", compiled=True)

Under gradient checkpointing, the backward pass computes a block again, completely or except for
operators whose outputs were kept (torch's selective activation checkpointing). What the block draws
at random is drawn again: torch keeps the state of its default generators, which the host holds also
for a GPU. A block that computes something else the second time, because it reads what a later block
has written or draws from a `torch.Generator` of its own, is an error: its calls 1, 2, 4, 8, ... are
compared on the host.

The recomputed call includes the hooks of a block, such as those that gather sharded weights, so it
replaces `DiT.call`. A compiled graph does not include them, so it replaces the block's `forward`.
"""

from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from models import DiT, DiTBlock
from moe_kernels.forward_mode import has_tangent
from routers import NOTHING, Context, Routing

# The experts of a layer, and their exchange of rows with other processes.
EXPERT_OPERATORS = frozenset({"dit_moe::experts", "dit_moe::exchange"})
KEPT_OPERATORS = EXPERT_OPERATORS | {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash_attn::_flash_attn_forward",
}
# Relative errors up to which a block computes the same the second time. A GPU may add outputs of
# experts in another order, but not before the router.
TOLERANCES = {"tokens": 0.1, "routing weights": 0.01, "expert load": 0.01}
KEPT = {"nothing": (), "all": (), "selective": KEPT_OPERATORS}  # by what is recomputed


def wrap_blocks(model: DiT, *, recomputed: str = "nothing", compiled: bool = False) -> None:
    """Wraps the blocks of a model whose weights are in place.

    recomputed: what the backward pass computes again instead of storing it: "nothing", "all" of
        each block, or "selective", all but attention and experts
    compiled: compile each block; blocks of the same structure share one graph
    """
    kept = KEPT[recomputed]
    is_spread = any(block.moe is not None and block.moe.experts.is_spread for block in model.blocks)
    if compiled and is_spread:  # the experts are outside the graphs
        kept = EXPERT_OPERATORS.intersection(kept)
    if compiled:  # a graph for each structure of blocks, mode and batch size
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    options = checkpoint_options(kept)
    # A graph may overwrite what its operators return, so the outputs of operators inside a graph
    # can be kept only by the graph itself.
    is_inside = compiled and recomputed == "selective" and not is_spread
    calls: Counter[DiTBlock] = Counter()
    if recomputed != "nothing" and not is_inside:
        model.call = lambda block, *inputs: recompute(options, calls, block, block, *inputs)
    for block in model.blocks if compiled else ():
        eager = block.forward
        if is_inside:
            eager = partial(recompute, options, calls, block, eager)
        block.forward = partial(compiled_or_eager, block, torch.compile(eager), eager)


def recompute(
    options: dict[str, Any], calls: Counter[DiTBlock], block: DiTBlock, forward: Callable,
    x: Tensor, c: Tensor, context: Context = NOTHING, rotation: Tensor | None = None,
) -> tuple[Tensor, Routing | None]:  # fmt: skip
    """Calls the forward of a block, whose activations are recomputed during training.

    calls: numbers of calls of the blocks so far
    """
    if not (block.training and torch.is_grad_enabled()):
        return forward(x, c, context, rotation)
    names, before = tuple(context), None

    def call(x: Tensor, c: Tensor, rotation: Tensor | None, *tensors: Tensor):
        nonlocal before
        found = forward(x, c, Context(dict(zip(names, tensors, strict=True))), rotation)
        if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
            return found  # a graph computes the same again
        if before is None:
            calls[block] += 1
            before = traces_of(x, *found) if calls[block].bit_count() == 1 else {}
        elif before:
            check_same(block, before, traces_of(x, *found))
        return found

    # The tensors of the context are arguments, so that autograd reports one changed in place.
    return checkpoint(call, x, c, rotation, *context.values(), **options)


@torch.no_grad()
def traces_of(x: Tensor, output: Tensor, routing: Routing | None) -> dict[str, np.ndarray]:
    """Returns what a block has computed, in few numbers: how far each token moves (N, T), and the
    weights and load of its routing."""
    found = {"tokens": (output - x).norm(dim=-1)}
    if routing:
        found |= {"routing weights": routing.weight, "expert load": routing.load}
    return {name: values.float().cpu().numpy().copy() for name, values in found.items()}


def check_same(block: DiTBlock, before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> None:
    """Raises RuntimeError if a block has computed something else the second time."""
    for name, values in before.items():
        limit = TOLERANCES[name] * np.linalg.norm(values)
        if values.shape == now[name].shape and not np.linalg.norm(values - now[name]) > limit:
            continue
        where = "a dense block" if block.moe is None else f"block {block.moe.gate.layer}"
        raise RuntimeError(
            f"gradient checkpointing: {where} computes other {name} the second time, expected the "
            "same: it may depend only on its inputs and context, not on an attribute that a later "
            "block writes (return Routing.passed_on), nor on a random generator of its own"
        )


def compiled_or_eager(
    block: DiTBlock, compiled: Callable, eager: Callable, x: Tensor, *inputs: Any
) -> tuple[Tensor, Routing | None]:
    """Calls the compiled forward of a block where possible.

    Uncompiled are blocks whose router returns a varying number of rows, because a graph has fixed
    shapes, and all blocks under torch.func.jvp.
    """
    mode = "training" if block.training else "evaluation"
    varies = block.moe is not None and mode in block.moe.gate.varies_in
    return (eager if varies or has_tangent(x) else compiled)(x, *inputs)


def checkpoint_options(kept: Collection[str]) -> dict[str, Any]:
    """Returns the options of torch's `checkpoint`.

    kept: names of operators whose outputs are kept
    """
    options: dict[str, Any] = {
        "use_reentrant": False, "preserve_rng_state": True,
        "early_stop": False,  # so that the whole block can be compared
    }  # fmt: skip
    if kept:
        policy = partial(keep_outputs, frozenset(kept))
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return options


def keep_outputs(kept: Collection[str], _: Any, operator: Any, *args, **named):
    """A policy of torch's selective checkpointing."""
    is_kept = operator.name() in kept
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
