"""What each token of a layer stands for: a patch of an image, something else, or nothing.

Shape legend: N conditional images of a batch, B images in the model's batch, T tokens per image
"""

import math
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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


class NucleusPlaces(ExitStack):
    """Every token is a patch. With guidance, the first of two calls is conditional."""

    def __init__(self, pipeline: Any):
        super().__init__()
        self.grid = (0, 0)
        hook = pipeline.transformer.register_forward_pre_hook(self.note, with_kwargs=True)
        self.enter_context(hook)

    def note(self, model: nn.Module, inputs: tuple, values: dict) -> None:
        self.grid = tuple(values["img_shapes"][0][1:])
        self.device = values["hidden_states"].device

    def start_batch(self) -> None:
        pass

    def first_conditional(self, batch: int, images: int) -> int:
        return 0

    def places(self, tokens: int) -> Tensor:
        return torch.arange(tokens, device=self.device)


class HiDreamPlaces(ExitStack):
    """A guided batch is [unconditional; conditional].

    The tokens are the patches, padded to the model's largest number unless the image is square. In
    the single-stream blocks the text follows: T5's tokens, and twice Llama's, padded as the masks
    of the text encoders show.
    """

    def __init__(self, pipeline: Any):
        super().__init__()
        self.grid, self.padded, self.masks = (0, 0), 0, {}
        self.enter_context(
            pipeline.transformer.register_forward_pre_hook(self.note, with_kwargs=True)
        )
        self.encoders = (pipeline.text_encoder_3, pipeline.text_encoder_4)
        for encoder in self.encoders:
            hook = encoder.register_forward_pre_hook(self.note_mask, with_kwargs=True)
            self.enter_context(hook)

    def start_batch(self) -> None:
        self.masks.clear()

    def note_mask(self, encoder: nn.Module, inputs: tuple, values: dict) -> None:
        self.masks.setdefault(encoder, values["attention_mask"])  # the prompts come first

    def note(self, model: nn.Module, inputs: tuple, values: dict) -> None:
        x, patch = values["hidden_states"], model.config.patch_size
        height, width = x.shape[-2:]
        self.grid, self.device = (height // patch, width // patch), x.device
        self.padded = math.prod(self.grid) if height == width else model.max_seq

    def first_conditional(self, batch: int, images: int) -> int:
        return batch - images

    def places(self, tokens: int) -> Tensor:
        patches = torch.arange(self.padded, device=self.device)
        patches[math.prod(self.grid) :] = PADDING
        if tokens == self.padded:
            return patches
        t5, llama = (self.masks[encoder].to(self.device) for encoder in self.encoders)
        text = torch.cat([t5, llama, llama], dim=1)  # (N, T - padded)
        text = torch.where(text > 0, OTHER, PADDING)
        return torch.cat([patches.expand(len(text), -1), text], dim=1)
