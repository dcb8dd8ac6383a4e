"""Image grids with the names of the classes in them."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

PADDING = 2
WIDEST = 160  # pixels of a caption; a longer one is cut


def captioned_grid(images: Tensor, captions: list[str], columns: int) -> Tensor:
    """Lays images (N, 3, H, W) uint8 out as (3, H', W'), the caption of each below it."""
    font = caption_font(images.shape[2])
    lines = [shorten(caption, font) for caption in captions]
    width = max(images.shape[3], *(text_width(line, font) for line in lines))
    cells = []
    for image, line in zip(images, lines, strict=True):
        cell = Image.new("RGB", (width, images.shape[2] + line_height(font)))
        cell.paste(to_pil(image), ((width - image.shape[2]) // 2, 0))
        ImageDraw.Draw(cell).text(
            (width / 2, images.shape[2]), line, font=font, anchor="ma", fill="white"
        )
        cells.append(to_tensor(cell))
    return make_grid(torch.stack(cells), nrow=columns, padding=PADDING)


def captioned_rows(images: Tensor, captions: list[str]) -> Tensor:
    """Lays images (N, 3, H, W) uint8 out in as many rows as captions, each left of its row."""
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
        draw.text((margin - PADDING, middle), line, font=font, anchor="rm", fill="white")
    return to_tensor(canvas)


def caption_font(height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=min(20, max(10, height // 12)))


def text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(np.ceil(font.getlength(text)))


def line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def shorten(text: str, font: ImageFont.FreeTypeFont) -> str:
    if text_width(text, font) <= WIDEST:
        return text
    while text and text_width(text + "...", font) > WIDEST:
        text = text[:-1]
    return text + "..."


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
