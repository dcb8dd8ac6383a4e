"""Protocol of the engines. An engine holds the model, its optimizer and its EMAs.

The engines in `training/engines/`: data parallelism (`DDPEngine`), FSDP2 (`FSDPEngine`), DeepSpeed.
To add one, write a class with the methods of `Engine`, a field of `EngineConfig` that chooses it,
and a branch in `training.engines.engine_for`. An engine calls `freeze` before it creates the
optimizer, or rejects --freeze and --train-router-only.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from checkpoints.meta import initial_weights
from conditions import Conditions
from models import DiT
from runtime.errors import UserError
from runtime.processes import Distributed, reseed
from runtime.tensor_file import Box
from training.config import TrainConfig
from training.ema import EMA
from training.sections import StepConfig

Bytes = dict[str, float]  # numbers of bytes, by purpose


class Engine(Protocol):
    """Interface between the training loop and an engine.

    All processes call each method together. A single process may also call `is_finite`,
    `micro_batch` and `memory`.
    """

    dist: Distributed
    config: TrainConfig
    model: DiT
    emas: list[EMA]  # at least one; model.safetensors of a checkpoint holds the first
    copy_size: int  # processes that hold one copy of the model, and compute with it together

    def __init__(
        self, dist: Distributed, config: TrainConfig, weights: Iterable[tuple[str, Tensor]]
    ):
        """Creates model, optimizer and EMAs.

        weights: initial weights by name in `DiT.state_dict`, see `new_weights`; none if
            `load_state` follows
        """

    @classmethod
    def check(cls, config: TrainConfig, world_size: int) -> dict[str, Any]:
        """Refuses a config that the engine cannot run; returns the engine's settings that affect
        the result, by name."""

    @classmethod
    def micro_batch(cls, config: TrainConfig, world_size: int) -> int:
        """Returns the number of images in a micro-batch of one process; refuses a global batch that
        cannot be divided equally."""

    @classmethod
    def memory(cls, config: TrainConfig, world_size: int) -> tuple[Bytes, Bytes, str]:
        """Estimates the memory of one process.

        Returns the bytes on the GPU, the bytes on the host, and a description of how the model is
        distributed over the processes.
        """

    def network(self, x: Tensor, t: Tensor, y: Conditions) -> tuple[Tensor, Tensor]:
        """Calls the model in the training precision; returns (prediction in fp32, aux_loss)."""

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        """Returns the context for the forward and backward pass of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the loss of a micro-batch to the gradients of the step.

        loss: loss of the micro-batch, divided by the number of micro-batches in the step
        """

    def optimizer_step(self, step: int, rate: float) -> dict[str, Tensor]:
        """Updates the weights and EMAs.

        step: number of the step, from 1
        rate: factor of the optimizer's learning rates

        Returns scalars on the device: "skipped", and values to log such as "grad_norm". A step is
        skipped if the gradient is infinite or nan, or a spike (--grad-skip). A skipped step changes
        only the fp16 loss scale.
        """

    def is_finite(self) -> Tensor:
        """Returns whether weights and EMAs of this process are finite, and no buffer is nan, a bool
        scalar."""

    def ema_weights(self, number: int = 0) -> AbstractContextManager:
        """Returns a context in which the model uses the weights of EMA `number`.

        The model is in eval mode and computes in the training precision.
        """

    def average(self, number: int) -> dict[str, Box]:
        """Returns the part of EMA `number` that this process saves, by name in `DiT.state_dict`."""

    def state(self) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        """Returns the state that this process saves for resuming, in addition to the EMAs.

        The result is the file's name within the step folder, its tensors and its metadata.
        """

    def load_state(self, folder: Path) -> None:
        """Loads the state and EMAs of a step folder."""


def new_weights(config: TrainConfig) -> Iterator[tuple[str, Tensor]]:
    """Draws the weights of a new run, one module at a time."""
    reseed(config.run.global_seed)
    yield from initial_weights(config.model)


def node_size(config: TrainConfig, world_size: int) -> int:
    """Returns the number of processes per node: --gpus-per-node, else the launcher's number, else
    the number of all processes, at most 8.
    """
    launched = os.environ.get("LOCAL_WORLD_SIZE", min(8, world_size))
    return config.run.gpus_per_node or int(launched)


def share_out(sizes: Mapping[str, int], copies: int) -> dict[str, int]:
    """Chooses a process to write each tensor, so that all processes write about the same amount.

    sizes: size of each tensor, by name
    copies: number of processes that have all of these tensors

    Returns the chosen process (0 to copies - 1) of each tensor, by name.
    """
    written, writer = [0] * copies, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        writer[name] = min(range(copies), key=written.__getitem__)
        written[writer[name]] += sizes[name]
    return writer


def freeze(model: nn.Module, config: StepConfig) -> None:
    """Freezes the parameters that --freeze and --train-router-only name, see `frozen_names`."""
    frozen = {*frozen_names(model, config)}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)


def frozen_names(model: nn.Module, config: StepConfig) -> list[str]:
    """Returns the names of the parameters that --freeze or --train-router-only freezes.

    --freeze has shell-style patterns for names of parameters or modules. Each has to match, and
    some parameter has to be left to train.
    """
    parameters, frozen = [name for name, _ in model.named_parameters()], set()
    for pattern in config.freeze:
        matching = [
            n for n in parameters if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")
        ]
        if not matching:
            raise UserError(
                f"--freeze: got {pattern}, expected a name (such as {next(iter(parameters))}) or a "
                "pattern of parameters or modules"
            )
        frozen.update(matching)
    if config.train_router_only:
        frozen.update(name for name in parameters if ".moe.gate." not in name)
    if len(frozen) == len(parameters):
        flag = "--train-router-only" if config.train_router_only else "--freeze"
        raise UserError(f"{flag}: freezes all parameters, expected some left to train")
    return [name for name in parameters if name in frozen]
