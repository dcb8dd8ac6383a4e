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
    font = caption_font(height)
    lines = [shorten(caption, font) for caption in captions]
    cell_width = max(width, *(text_width(line, font) for line in lines))
    cells = []
    for image, line in zip(images, lines, strict=True):
        cell = Image.new("RGB", (cell_width, height + sum(font.getmetrics())))
        cell.paste(to_pil(image), ((cell_width - width) // 2, 0))
        ImageDraw.Draw(cell).text((cell_width / 2, height), line, "white", font, anchor="ma")
        cells.append(to_tensor(cell))
    return make_grid(torch.stack(cells), nrow=columns, padding=PADDING)


def captioned_rows(images: Tensor, captions: list[str]) -> Tensor:
    """Lays images out in as many rows as captions, each caption left of its row."""
    columns, height = len(images) // len(captions), images.shape[2]
    font = caption_font(height)
    lines = [shorten(caption, font) for caption in captions]
    grid = to_pil(make_grid(images, nrow=columns, padding=PADDING))
    margin = max(text_width(line, font) for line in lines) + 2 * PADDING
    canvas = Image.new("RGB", (margin + grid.width, grid.height))
    canvas.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        middle = PADDING + row * (height + PADDING) + height / 2
        draw.text((margin - PADDING, middle), line, "white", font, anchor="rm")
    return to_tensor(canvas)


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has accents, Greek and Cyrillic."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def caption_font(height: int) -> ImageFont.FreeTypeFont:
    return load_font(min(20, max(10, height // 12)))


def text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(np.ceil(font.getlength(text)))


def shorten(text: str, font: ImageFont.FreeTypeFont) -> str:
    if text_width(text, font) <= WIDEST:
        return text
    while text and text_width(text + "...", font) > WIDEST:
        text = text[:-1]
    return text + "..."


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
