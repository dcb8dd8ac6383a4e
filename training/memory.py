"""What training needs on each process: bytes of weights, state and activations, and kept rows.

Nothing is allocated: tensors are on the meta device or fake, see `checkpoints.costs.pass_costs`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from checkpoints.costs import pass_costs
from checkpoints.meta import meta_model
from models import DiTConfig
from runtime.devices import pinned_bytes
from training.auxiliary import PROJECTORS, is_of_model, projectors_of
from training.config import TrainConfig
from training.engine import Bytes, frozen_names, share_out
from training.optimizers import hidden_matrices, planned_state

Shapes = Mapping[str, torch.Size]


def planned_weights(config: TrainConfig) -> dict[str, nn.Parameter]:
    """Returns the weights of the model and of the projectors, without data."""
    with torch.device("meta"):
        projectors = projectors_of(
            config.model, config.auxiliary, config.shapes, config.run.global_seed
        )
    model = meta_model(config.model)
    return dict([*model.named_parameters(), *projectors.named_parameters(PROJECTORS)])


def state_tensors(
    config: TrainConfig, shapes: Shapes | None = None
) -> tuple[Shapes, Shapes, dict[str, dict[str, Any]]]:
    """Describes the state that a process holds from step to step.

    shapes: shapes of the parameters, or of this process's shards; None: the complete parameters
    Returns the shapes of all parameters and of the trained ones, and the optimizer's state of each
    of the latter, see `training.optimizers.planned_state`.
    """
    model = meta_model(config.model)
    shapes = shapes or {name: weight.shape for name, weight in planned_weights(config).items()}
    frozen = {*frozen_names(model, config.step)}
    trained = {name: shape for name, shape in shapes.items() if name not in frozen}
    return shapes, trained, planned_state(config.optimizer, trained, hidden_matrices(model))


def tensor_bytes(state: Mapping[str, Any]) -> list[int]:
    """Returns the bytes of the tensors of a parameter's state."""
    return [value.nbytes for value in state.values() if torch.is_tensor(value)]


def state_bytes(config: TrainConfig, shapes: Shapes | None = None) -> Bytes:
    """Returns the bytes that a process holds from step to step; see `state_tensors`."""
    shapes, trained, state = state_tensors(config, shapes)
    averaged = {name: shape for name, shape in shapes.items() if is_of_model(name)}
    of_weights, of_gradients, of_average = (
        4 * sum(shape.numel() for shape in kept.values()) for kept in (shapes, trained, averaged)
    )
    return {
        "weights": of_weights, "gradients": of_gradients,
        "optimizer": sum(sum(tensor_bytes(kept)) for kept in state.values()),
        "EMA": of_average * len(config.ema),
    }  # fmt: skip


def copied_bytes(config: TrainConfig, copies: int, shapes: Shapes | None = None) -> Bytes:
    """Returns the bytes that a process copies to pinned host memory at a save.

    copies: number of processes that hold the same state and share the saving
    """
    shapes, _, state = state_tensors(config, shapes)
    sizes = {name: weight.numel() for name, weight in planned_weights(config).items()}
    totals = [0] * copies
    for name, writer in share_out(sizes, copies).items():
        weights = [4 * shapes[name].numel()] * (1 + is_of_model(name) * len(config.ema))
        totals[writer] += sum(map(pinned_bytes, weights + tensor_bytes(state.get(name, {}))))
    return {"copy at a save": max(totals)}


def activation_bytes(config: TrainConfig, micro_batch: int) -> int:
    """Returns the bytes that a forward pass saves for backward, from tensors without data."""
    step = config.step
    return model_activations(config.model, micro_batch, step.precision, step.recomputed)


def received_rows(config: TrainConfig, micro_batch: int) -> int:
    """Returns the number of rows that a process receives under --expert-parallel and keeps for the
    backward pass, for an even load."""
    model, kept = config.model, max if config.step.recomputed == "all" else sum
    tokens = kept(map(model.tokens_of, model.sparse_blocks))
    return micro_batch * tokens * model.num_experts_per_tok


def model_activations(config: DiTConfig, batch: int, precision: str, recomputed: str) -> int:
    """Computes `activation_bytes`; see `StepConfig.recomputed`.

    With checkpointing, the activations are the inputs of the blocks and all that one block saves.
    Selective checkpointing also keeps the outputs of some operators in the other blocks.
    """
    costs = pass_costs(config, batch, precision)
    inputs, saved, kept = zip(*costs.blocks, strict=True)
    if recomputed == "nothing":
        return costs.outside + sum(saved)
    largest = max(saved)
    total = costs.outside + sum(inputs) + largest
    if recomputed == "selective":
        total += sum(kept) - kept[saved.index(largest)]
    return total
