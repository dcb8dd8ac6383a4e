"""Auxiliary losses: what training minimises beside the objective's loss, one class each.

    train.py --auxiliary dispersive contrastive --auxiliary-dispersive-weight 0.25

An auxiliary loss sees one forward pass of a training step: the tokens of the blocks that it asks
for, the network's output, and what the objective drew. It has no weights, so a checkpoint has
nothing of it. To add one: a subclass of `AuxiliaryLoss`, and its name in `AUXILIARY_LOSSES`.

Shape legend: N images of a micro-batch, T tokens, D width, C channels, h x w latent size
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusion import Objective
from diffusion.guidance import first_channels
from diffusion.rectified_flow import RectifiedFlow
from models import DiT
from parts import Part, option


@dataclass
class Pass:
    """One forward pass of a training step."""

    objective: Objective
    x: Tensor  # (N, C, h, w) data
    noise: Tensor  # (N, C, h, w)
    t: Tensor  # (N,) times
    z: Tensor | None = None  # (N, C, h, w) what the network saw
    output: Tensor | None = None  # (N, C or 2C, h, w)
    tokens: dict[int, Tensor] = field(default_factory=dict)  # (N, T, D) by the number of the block


class AuxiliaryLoss(Part):
    """A loss that is added to the objective's; every subclass has an option `weight`."""

    name: ClassVar[str]  # in the log, and in `AUXILIARY_LOSSES`

    def blocks(self, depth: int) -> Sequence[int]:
        """The numbers of the blocks whose tokens the loss needs, of a model of this depth."""
        return ()

    def check(self, objective: Objective) -> str | None:
        """What is expected of the objective, where the loss cannot be computed beside this one."""
        is_plain = type(objective).draw is Objective.draw
        return None if is_plain else "an objective that calls the network once"

    def loss(self, seen: Pass) -> Tensor:
        """The loss of a pass, a scalar, without its weight."""
        raise NotImplementedError


class Dispersive(AuxiliaryLoss):
    """Dispersive loss (Wang and He 2025, arXiv 2506.09027, InfoNCE with squared distances).

    log of the mean over all pairs i, j of exp(-|h_i - h_j|^2 / (T D tau)), with h_i all tokens of
    image i after a block; pairs i = i are among them. The paper's code divides by T D too.
    """

    name = "dispersive"
    weight: float = option(0.5, help="of the dispersive loss", least=0)
    temperature: float = option(0.5, help="tau, which distances are divided by", above=0)
    depth_share: float = option(
        0.25, help="how deep the block is, as a share of all blocks", above=0, most=1
    )

    def blocks(self, depth: int) -> Sequence[int]:
        return (max(1, round(self.depth_share * depth)) - 1,)

    def loss(self, seen: Pass) -> Tensor:
        (tokens,) = seen.tokens.values()
        h = tokens.float().flatten(1)  # (N, T D)
        squares = (h[:, None] - h[None]).square().mean(dim=2)  # (N, N)
        return (-squares / self.temperature).exp().mean().log()


class Contrastive(AuxiliaryLoss):
    """Contrastive flow matching (Stoica et al. 2025, arXiv 2506.05350, equation 4): the velocity of
    an image is pushed away from the right velocity of another image of the micro-batch.

    Minus the mean of |v_i - (noise_j - x_j)|^2 with j = i + 1, the last image's j the first.
    """

    name = "contrastive"
    weight: float = option(0.05, help="of the contrastive loss: lambda", least=0)

    def check(self, objective: Objective) -> str | None:
        is_flow = getattr(type(objective), "losses", None) is RectifiedFlow.losses
        return None if is_flow else "a rectified flow"

    def loss(self, seen: Pass) -> Tensor:
        velocity = seen.objective.velocity(first_channels(seen.output, seen.x), seen.z, seen.t)
        other = (seen.noise - seen.x).roll(-1, dims=0)  # (N, C, h, w)
        return -(velocity - other).square().mean()


AUXILIARY_LOSSES: dict[str, type[AuxiliaryLoss]] = {
    "dispersive": Dispersive,
    "contrastive": Contrastive,
}


@contextmanager
def listening(model: DiT, blocks: Sequence[int], tokens: dict[int, Tensor]) -> Iterator[None]:
    """Collects what blocks return, the tokens (N, T, D), by their numbers."""

    @torch.compiler.disable  # or a graph would be built for every block
    def note(module: nn.Module, given: tuple, output: tuple) -> None:
        tokens.setdefault(numbers[module], output[0])

    numbers = {model.blocks[number]: number for number in blocks}
    with ExitStack() as hooks:
        for block in numbers:
            hooks.enter_context(block.register_forward_hook(note))
        yield
