"""What each token of a layer stands for: a patch of an image, something else, or nothing.

Shape legend: N conditional images of a batch, B images in the model's batch, T tokens per image
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from models import DiT

OTHER, PADDING = -1, -2  # places of tokens that are no patches: text; padding, which is not counted


class TokenPlaces(Protocol):
    """The conditional images in a model's batch, and the places of their tokens."""

    grid: tuple[int, int]  # patches per column and per row

    def first_conditional(self, batch: int, images: int) -> int:
        """Returns the index of the first of the `images` conditional images in a batch."""

    def places(self, tokens: int) -> Tensor:
        """Returns (T,) or (N, T) int64: number of the patch, `OTHER` or `PADDING`."""


class DiTPlaces:
    """A guided batch is [conditional; unconditional]; the last tokens are the patches."""

    def __init__(self, model: DiT):
        self.grid = model.config.grid
        self.device = model.pos_embed.device

    def first_conditional(self, batch: int, images: int) -> int:
        return 0

    def places(self, tokens: int) -> Tensor:
        places = torch.arange(tokens, device=self.device) - (tokens - math.prod(self.grid))
        return places.clamp_min(OTHER)
