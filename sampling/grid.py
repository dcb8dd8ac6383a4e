"""Image grids with the names of the classes in them."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

PADDING = 2
WIDEST = 160  # pixels of a caption; a longer one is cut


def image_grid(images: Tensor, captions: list[str] | None, images_per_class: int = 1) -> Tensor:
    """Lays uint8 images (N, 3, H, W) out as (3, H', W'): a row for each class, or four in a row if
    there is one image of each. `captions` names the class of each image; None for no text."""
    columns = images_per_class if images_per_class > 1 else min(len(images), 4)
    if captions is None:
        return make_grid(images, nrow=columns, padding=PADDING)
    if images_per_class > 1:
        return captioned_rows(images, captions[::images_per_class])
    return captioned_grid(images, captions, columns)


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
        middle = PADDING + row * (height + PADDING) + height / 2
        place = (margin - PADDING, middle)
        ImageDraw.Draw(canvas).text(place, line, "white", font, anchor="rm")
    return to_tensor(canvas)


def fit_captions(captions: list[str], height: int) -> tuple[ImageFont.FreeTypeFont, list[str], int]:
    """A font for images of that height, the captions cut to WIDEST, and the widest one's pixels."""
    font, lines = load_font(min(20, max(10, height // 12))), []
    for line in captions:
        while font.getlength(line) > WIDEST:
            line = line.removesuffix("...")[:-1] + "..."
        lines.append(line)
    return font, lines, int(np.ceil(max(map(font.getlength, lines))))


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has accents, Greek and Cyrillic."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
