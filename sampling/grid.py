"""Image grids with the names of the classes in them."""

import math
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

PADDING = 2
LONGEST = 24  # characters of a caption; a longer one is cut


def image_grid(images: Tensor, captions: list[str], images_per_class: int = 1) -> Tensor:
    """Lays uint8 images (N, 3, H, W) out as (3, H', W'): a row for each class, or four in a row if
    there is one image of each. `captions` names the class of each image."""
    if images_per_class > 1:
        return captioned_rows(images, captions[::images_per_class])
    return captioned_grid(images, captions, columns=min(len(images), 4))


def captioned_grid(images: Tensor, captions: list[str], columns: int) -> Tensor:
    """Lays images out with the caption of each below it."""
    height, width = images.shape[2:]
    font, lines, widest = fit_captions(captions, height)
    cells = []
    for image, line in zip(images, lines, strict=True):
        cell = Image.new("RGB", (max(width, widest), height + sum(font.getmetrics())))
        cell.paste(to_pil(image), ((cell.width - width) // 2, 0))
        ImageDraw.Draw(cell).text((cell.width / 2, height), line, "white", font, anchor="ma")
        cells.append(to_tensor(cell))
    return make_grid(torch.stack(cells), nrow=columns, padding=PADDING)


def captioned_rows(images: Tensor, captions: list[str]) -> Tensor:
    """Lays images out in as many rows as captions, each caption left of its row."""
    height = images.shape[2]
    font, lines, widest = fit_captions(captions, height)
    grid = to_pil(make_grid(images, nrow=len(images) // len(captions), padding=PADDING))
    margin = widest + 2 * PADDING
    canvas = Image.new("RGB", (margin + grid.width, grid.height))
    canvas.paste(grid, (margin, 0))
    for row, line in enumerate(lines):
        place = (margin - PADDING, PADDING + row * (height + PADDING) + height / 2)
        ImageDraw.Draw(canvas).text(place, line, "white", font, anchor="rm")
    return to_tensor(canvas)


def fit_captions(captions: list[str], height: int) -> tuple[ImageFont.FreeTypeFont, list[str], int]:
    """A font for images of that height, the captions cut to LONGEST, and the widest's pixels."""
    font = load_font(min(20, max(10, height // 12)))
    lines = [c if len(c) <= LONGEST else c[: LONGEST - 1] + "…" for c in captions]
    return font, lines, math.ceil(max(map(font.getlength, lines)))


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has accents, Greek and Cyrillic."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
