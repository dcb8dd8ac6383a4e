"""One image: from a file to RGB, cropped to a square, and in the range of the autoencoder.

image = read_rgb(path)                       # PIL, upright, white where it was transparent
image = center_crop_arr(image, 256)

Shape legend: N images, H x W pixels
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

# The files of a folder that are images, for training and for evaluation.
IMAGE_SUFFIXES = (
    ".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

# What Pillow may decode, whatever a file's name says. It would hand EPS to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def read_rgb(source: Path | str | io.BytesIO) -> Image.Image:
    """Reads an image file as RGB: turned as its EXIF says, white behind transparency, first frame.

    Raises ValueError with the reason when it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
            with Image.open(source, formats=FORMATS) as image:
                image.load()
                return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(" ".join(reason.split())[:200]) from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # Pillow would clip these to white
        raise ValueError(f"got pixels of mode {image.mode}, expected 8 bits")
    with suppress(Exception):  # the metadata can be damaged while the pixels are fine
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def center_crop_arr(image: Image.Image, image_size: int) -> Image.Image:
    """Halves the image while it is twice too large, scales the shorter side, crops the centre.

    The preprocessing of ADM (Dhariwal and Nichol 2021), which FID statistics assume.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = image_size / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def to_model_range(images: Tensor) -> Tensor:
    """Maps uint8 images (N, 3, H, W) to fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Maps images (N, 3, H, W) in [-1, 1] to uint8, clamped and rounded."""
    return (images.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
