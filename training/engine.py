"""What the loop asks of an engine: the class that holds a model, its optimizer and its EMAs.

`engines/` has them: data parallelism (`DDPEngine`), FSDP2 (`FSDPEngine`) and DeepSpeed. To add one:
a class with these methods, and a script that hands it to `training.loop.train`. Each begins with
`freeze`, which says what of the model is trained.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from checkpoints import Checkpoint
from checkpoints.tensor_file import Box
from conditions import Conditions
from models import DiT
from runtime.errors import UserError
from runtime.processes import Distributed
from training.config import StepConfig, TrainConfig
from training.ema import EMA

Bytes = dict[str, float]  # by what they are for


class Engine(Protocol):
    """All but `model`, `emas` and `is_finite` are called by all processes together."""

    model: DiT
    emas: list[EMA]  # the first is what a checkpoint's model.safetensors has

    def __init__(self, dist: Distributed, config: TrainConfig, weights: Checkpoint | None): ...

    @classmethod
    def check(cls, config: TrainConfig, dist: Distributed) -> dict[str, Any]:
        """Refuses a config that it cannot run (UserError); returns what else decides the result."""

    @classmethod
    def micro_batch(cls, config: TrainConfig, world_size: int) -> int:
        """Images of one micro-step of one process; UserError if they cannot be shared out."""

    @classmethod
    def memory(
        cls, config: TrainConfig, world_size: int, micro_batch: int
    ) -> tuple[Bytes, Bytes, str]:
        """Plans the memory of a process: of its GPU, and of its host; and the layout, in words."""

    def network(self, x: Tensor, t: Tensor, y: Conditions) -> tuple[Tensor, Tensor]:
        """The model in the training precision: (prediction fp32, aux_loss)."""

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients those of a micro-batch's share of the loss."""

    def optimizer_step(self, step: int, rate: float) -> dict[str, Tensor]:
        """Updates weights and EMAs.

        step: its number, from 1; rate: what the optimizer's own rates are multiplied by

        Returns scalars on the device: "skipped", whether the gradient was infinite or nan and the
        step changed nothing but, in fp16, the loss scale, and others to be logged, such as
        "grad_norm".
        """

    def is_finite(self) -> Tensor:
        """Whether this process's weights, EMAs and buffers are finite, a bool scalar."""

    def ema_weights(self, number: int = 0) -> AbstractContextManager:
        """The model computes with its EMA of that number, in eval mode, in training's precision."""

    def average(self, number: int) -> dict[str, Box]:
        """What this process writes of an EMA, in the layout of `DiT`, buffers included."""

    def state(self) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        """What this process writes beside the EMAs, for a run to resume from: the name of its file
        in the step folder, and that file's tensors and metadata."""

    def load_state(self, folder: Path) -> None:
        """Takes up what a step folder has, EMAs included; UserError when it does not fit."""


def node_size(config: TrainConfig, world_size: int) -> int:
    """The processes of a node: --gpus-per-node, or as launched, or 8."""
    launched = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # by deepspeed
    return config.run.gpus_per_node or int(launched or min(8, world_size))


def share_out(sizes: Mapping[str, int], copies: int) -> dict[str, int]:
    """Which of the processes that have the same values writes each: the one with the least yet."""
    written, writer = [0] * copies, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        writer[name] = min(range(copies), key=written.__getitem__)
        written[writer[name]] += sizes[name]
    return writer


def freeze(model: nn.Module, config: StepConfig) -> None:
    """Freezes the parameters that --freeze names (shell style; a module stands for all in it), and
    with --train-router-only all but the gates.

    UserError when a pattern names nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in config.freeze:
        matching = [
            n for n in parameters if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")
        ]
        if not matching:
            raise UserError(
                f"--freeze: got {pattern}, expected the name of a parameter, such as "
                f"{next(iter(parameters))}"
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if config.train_router_only:
        for name, weight in parameters.items():
            weight.requires_grad_(weight.requires_grad and ".moe.gate." in name)
    if not any(weight.requires_grad for weight in parameters.values()):
        flag = "--train-router-only" if config.train_router_only else "--freeze"
        raise UserError(f"{flag}: got a model with nothing left to train, expected some of it")
