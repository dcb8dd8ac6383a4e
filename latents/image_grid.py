"""Image grids with class names, and writing of image files."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.io import encode_png
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from latents.fonts import drawable, font_file
from latents.loading import evenly_spaced
from latents.sources import Source
from models import DiT
from runtime.files import write_durably

PADDING = 2
LONGEST = 24  # characters; longer captions are truncated
SMALLEST = 112  # pixels; narrower images are enlarged


def image_grid(images: Tensor, captions: Sequence[str], images_per_class: int = 1) -> Tensor:
    """Arranges uint8 images (N, 3, H, W) in a grid (3, H', W'): one row per class, or four images
    per row if each class has one image.

    captions: class name of each image
    """
    images = enlarge(images)
    if images_per_class > 1:
        return captioned_rows(images, captions[::images_per_class])
    return captioned_grid(images, captions, columns=min(len(images), 4))


def contact_sheet(images: Source) -> Tensor:
    """Arranges up to 16 images of a source, preprocessed as for training, in a grid (3, H', W')."""
    items = [images[index, False][0] for index in evenly_spaced(len(images), 16)]
    captions = [class_caption(images.classes[item["label"]], int(item["label"])) for item in items]
    return image_grid(torch.stack([item["image"] for item in items]), captions)


def captioned_grid(images: Tensor, captions: Sequence[str], columns: int) -> Tensor:
    """Arranges images with a caption below each."""
    height, width = images.shape[2:]
    lines, widest, tallest = fit_captions(captions, height)
    cells = []
    for image, (line, font) in zip(images, lines, strict=True):
        cell = Image.new("RGB", (max(width, widest), height + tallest))
        cell.paste(to_pil_image(image), ((cell.width - width) // 2, 0))
        ImageDraw.Draw(cell).text((cell.width / 2, height), line, "white", font, anchor="ma")
        cells.append(pil_to_tensor(cell))
    return make_grid(torch.stack(cells), nrow=columns, padding=PADDING)


def captioned_rows(images: Tensor, captions: Sequence[str], headings: Sequence[str] = ()) -> Tensor:
    """Arranges images in one row per caption, with captions on the left and column headings."""
    height, width = images.shape[2:]
    lines, widest, _ = fit_captions(captions, height)
    titles, _, tallest = fit_captions(headings, height)
    grid = to_pil_image(make_grid(images, nrow=len(images) // len(captions), padding=PADDING))
    left, top = widest + 2 * PADDING, tallest
    canvas = Image.new("RGB", (left + grid.width, top + grid.height))
    canvas.paste(grid, (left, top))
    pen = ImageDraw.Draw(canvas)
    for row, (line, font) in enumerate(lines):
        position = (left - PADDING, top + PADDING + row * (height + PADDING) + height / 2)
        pen.text(position, line, "white", font, anchor="rm")
    for column, (line, font) in enumerate(titles):
        position = (left + PADDING + column * (width + PADDING) + width / 2, 0)
        pen.text(position, line, "white", font, anchor="ma")
    return pil_to_tensor(canvas)


def fit_captions(
    captions: Sequence[str], height: int
) -> tuple[list[tuple[str, ImageFont.FreeTypeFont]], int, int]:
    """Returns the shortened captions with their fonts for images of this height, and the width and
    height in pixels of the largest caption; 0 without captions."""
    lines = [one_line(caption) for caption in captions]
    fonts = [ImageFont.truetype(font_file(line), min(20, height // 9)) for line in lines]
    lines = list(zip(lines, fonts, strict=True))
    widest = max((math.ceil(font.getlength(line)) for line, font in lines), default=0)
    return lines, widest, max((sum(font.getmetrics()) for font in fonts), default=0)


def class_caption(name: str, label: int) -> str:
    """Returns the name of a class as one short line, or its number if no font has the letters."""
    line = one_line(name)
    return line and drawable(line) or str(label)


def class_captions(model: DiT, names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Returns the caption of each label; none for a model without the condition label."""
    if "label" not in model.conditions:
        return [""] * len(labels)
    return [class_caption(names[label], label) for label in labels]


def file_name(seed: int, label: int, name: str) -> str:
    """Returns the file name of an image: seed, label and the class name, unless it is a number."""
    words = re.sub(r"\W+", "-", name).strip("-")[:40]
    ending = "" if not words or words.isdecimal() else f"-{words}"
    return f"{seed:06d}-class-{label:04d}{ending}.png"


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def enlarge(images: Tensor, smallest: int = SMALLEST) -> Tensor:
    """Repeats pixels of images (N, 3, H, W) so that the images are at least `smallest` wide."""
    factor = math.ceil(smallest / images.shape[-1])
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def write_png(image: Tensor, path: Path) -> None:
    """Writes an image (3, H, W) uint8 atomically; unlike torchvision's, it reports a full disk."""
    write_durably(path, encode_png(image).numpy().tobytes())


def write_picture(path: Path, picture: Image.Image, **options) -> None:
    """Writes a picture atomically, in the format of the file's suffix."""
    content = io.BytesIO()
    picture.save(content, path.suffix.removeprefix("."), **options)
    write_durably(path, content.getvalue())
