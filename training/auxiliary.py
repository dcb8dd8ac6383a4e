"""Auxiliary losses: losses that training adds to the objective's loss, one class per loss.

    train.py --auxiliary repa dispersive:weight=0.25

An auxiliary loss sees one forward pass of a training step: the tokens of one block, the network's
output, the tensors of the batch, noise and times. A loss may map the tokens by a trained projector.
During training the projectors are part of the model, so the engines handle them like other weights.
EMAs and exported models have no projectors.

To add a loss, write a subclass of `AuxiliaryLoss`, and add it to `AUXILIARY_LOSSES`.

Shape legend: N images of a micro-batch, T tokens of D features, S tokens of F features in the
cache, C channels, h x w latent size
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusion import Objective
from models import DiT, DiTConfig
from options.parts import Component, Registry
from runtime.processes import reseed

PROJECTORS = "projectors"  # attribute of a model during training
Shapes = Mapping[str, Sequence[int]]  # shapes of the tensors of one image, by name


@dataclass
class Pass:
    """One forward pass of a training step."""

    objective: Objective
    batch: Mapping[str, Tensor]  # (N, ...) by name
    noise: Tensor  # (N, C, h, w)
    t: Tensor  # (N,) times
    # ema_tokens(share, z, t): tokens (N, T, D) after the given fraction of the blocks, computed
    # with the weights of the first EMA, without gradient
    ema_tokens: Callable[[float, Tensor, Tensor], Tensor]
    z: Tensor | None = None  # (N, C, h, w) input of the network
    output: Tensor | None = None  # (N, C or 2C, h, w)
    # For each loss, by name: the tokens (N, T, D) of the block, mapped by the projector.
    tokens: dict[str, Tensor] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        """The data (N, C, h, w)."""
        return self.batch["latents"]


class AuxiliaryLoss(Component):
    """Base class of auxiliary losses; every subclass has an option `weight`."""

    name: ClassVar[str]  # in the log, and in `AUXILIARY_LOSSES`
    needs: ClassVar[tuple[str, ...]] = ()  # tensors of the batch that only this loss reads
    compares_images: ClassVar[bool] = False  # True: a micro-batch needs at least two images
    reads_ema: ClassVar[bool] = False  # True: calls `Pass.ema_tokens`

    def block(self, depth: int) -> int | None:
        """Returns the index of the block whose tokens the loss reads, at the relative depth
        `depth_share`; None without this option.
        """
        share = getattr(self, "depth_share", None)
        return None if share is None else block_at(share, depth)

    def projector(self, model: DiTConfig, shapes: Shapes) -> nn.Module | None:
        """Creates the trained module, which maps tokens (N, T, D); None for a loss without one."""
        return None

    def check(self, objective: Objective, shapes: Shapes) -> str | None:
        """Returns what the loss expects instead of this objective or these data; None if they fit.

        shapes: shapes of the tensors of one image; empty if no data are open
        """
        # An objective with its own `draw`, such as mean flow, calls the network more than once.
        if type(objective).draw is not Objective.draw:
            return "an objective that calls the network once per image"
        if shapes and not set(self.needs) <= shapes.keys():
            return "latents that cache_latents.py --features NETWORK --feature-tokens stored"
        return None

    def target(self, forward_pass: Pass) -> Tensor | None:
        """Returns the target of `loss`. Called before the forward pass."""
        return None

    def loss(self, forward_pass: Pass, target: Tensor | None) -> Tensor:
        """Returns the loss of a pass, a scalar, without its weight."""
        raise NotImplementedError


def block_at(share: float, depth: int) -> int:
    """Returns the index of the block at a relative depth: 1 is the last block of the model."""
    return max(1, round(share * depth)) - 1


AUXILIARY_LOSSES = Registry(
    elsewhere=dict.fromkeys(("repa", "sra", "dispersive", "contrastive"), "extras.auxiliary")
)


def projectors_of(
    config: DiTConfig, auxiliary: Sequence[AuxiliaryLoss], shapes: Shapes, seed: int
) -> nn.ModuleDict:
    """Makes the projectors of the losses, by the names of the losses."""
    found: dict[str, nn.Module] = {}
    for one in auxiliary:
        reseed(seed)
        if (projector := one.projector(config, shapes)) is not None:
            found[one.name] = projector
    return nn.ModuleDict(found)


def is_of_model(name: str) -> bool:
    """Returns whether a parameter belongs to the DiT and not to a projector."""
    return not name.startswith(f"{PROJECTORS}.")


@contextmanager
def listening(
    model: DiT, blocks: Mapping[str, int], tokens: dict[str, Tensor], project: bool = False
) -> Iterator[None]:
    """Stores the patches (N, P, D) after some blocks during forward passes.

    blocks: numbers of blocks, by name; tokens[name] receives the output of block blocks[name]
    project: whether the projector of the loss `name` maps tokens[name] within the forward pass
    """

    @torch.compiler.disable  # otherwise PyTorch compiles one graph per block
    def store(module: nn.Module, inputs: tuple, output: tuple) -> None:
        patches = model.patches_of(output[0])
        tokens.update({n: patches for n, number in blocks.items() if numbers[module] == number})

    def map_tokens(module: nn.Module, inputs: tuple, output: tuple) -> None:
        for name, projector in getattr(model, PROJECTORS, {}).items():
            tokens[name] = projector(tokens[name])

    numbers = {model.blocks[number]: number for number in blocks.values()}
    with ExitStack() as hooks:
        for block in numbers:
            hooks.enter_context(block.register_forward_hook(store))
        if project:
            # Must run before FSDP's hook of the model, which ends the forward pass.
            hooks.enter_context(model.register_forward_hook(map_tokens, prepend=True))
        yield
