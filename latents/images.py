"""Image files of strangers: decoded to RGB in bounded memory, or refused with the reason.

image = read_rgb(path)                       # PIL, upright, over white where it is transparent
image = center_crop_arr(image, 256)
"""

import io
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, WebPImagePlugin

from runtime.untrusted import open_regular

# By content, whatever the name says. Not among them: EPS, which Pillow hands to Ghostscript.
FORMATS = (
    "BMP", "GIF", "JPEG", "PNG", "PPM", TiffImagePlugin.TiffImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)  # fmt: skip
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million: 358 MB of RGBA


def read_rgb(source: Path | str | io.BytesIO | Image.Image) -> Image.Image:
    """Reads an image file, or one that is opened, as RGB; of several frames the first.

    It is turned as its EXIF orientation says. 16-bit grey keeps its upper 8 bits, transparent
    pixels show white. Raises ValueError, whatever went wrong, with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; too many pixels are an error here
            if isinstance(source, Image.Image):
                return to_rgb(source)
            file = source if isinstance(source, io.BytesIO) else open_regular(source)
            with file, Image.open(file, formats=FORMATS) as image:
                return to_rgb(image)
    except Exception as error:  # a damaged file can raise anything in its decoder
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(" ".join(reason.split())[:200]) from None


def to_rgb(image: Image.Image) -> Image.Image:
    kind = image.format
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}"
        )
    image.load()
    turn_upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)  # (H, W), 0 to 65535
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"got {image.mode} pixels, of a range that nothing tells, expected 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def turn_upright(image: Image.Image) -> None:
    """Turns an image as its EXIF orientation says; leaves it when its EXIF cannot be read."""
    with suppress(Exception):  # damaged metadata of good pixels
        ImageOps.exif_transpose(image, in_place=True)


def center_crop_arr(image: Image.Image, image_size: int) -> Image.Image:
    """Halves the image while it is twice too large, scales the shorter side, crops the centre.

    The preprocessing of ADM (Dhariwal and Nichol 2021), which FID statistics assume. ValueError for
    an image so narrow that scaling it would take more than MAX_PIXELS.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = image_size / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"got {image.width} x {image.height} pixels, expected no narrower an image: scaled to "
            f"{image_size} it has more than {MAX_PIXELS}"
        )
    image = image.resize(size, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
