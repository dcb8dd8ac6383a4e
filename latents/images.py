"""Image files: search in folders, reading as RGB, cropping, and scaling to the model's range.

Shape legend: N images, H x W pixels
"""

import errno
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError, features
from torch import Tensor

from latents.captions import METADATA
from options.parts import Size, sides
from runtime.errors import pluralize

# Formats that Pillow may decode, whatever the file's name, and suffixes of the files that count as
# images. The list excludes EPS, which Pillow would pass to Ghostscript.
FORMATS = {
    "BMP": (".bmp",), "GIF": (".gif",), "JPEG": (".jfif", ".jpeg", ".jpg"), "PNG": (".png",),
    "PPM": (".pgm", ".ppm"), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",),
}  # fmt: skip
if "avif" in features.modules and features.check_module("avif"):
    FORMATS["AVIF"] = (".avif",)
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS["HEIF"] = (".heic", ".heif")
IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in FORMATS.values() for suffix in suffixes))

# A read that fails with one of these tells nothing about the image: the storage failed.
STORAGE_FAULTS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
# What a folder is that has a file of this name, with these bytes in its first 4 KB.
FOLDERS_OF_OURS = {
    "index.json": (b'"latent_shape"', "a cache of latents, for train.py --latents-path"),
    "log.jsonl": (b'{"step"', "a run, for train.py --resume"),
    "config.yaml": (b"--resume", "a run, for train.py --resume"),
    "config.json": (b'"_class_name"', "an autoencoder or a pipeline, for --vae-path or --ckpt"),
}

MAX_ASPECT_RATIO = 16  # the ends of longer images are cropped before scaling
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def find_classes(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the image files by class, in the order of class names, and notes on ignored files.

    Raises ValueError if most images are outside the class folders.
    """
    others: Counter[str] = Counter()
    with os.scandir(root) as entries:
        is_folder = {entry.name: os.path.isdir(entry) for entry in entries}
    folders = sorted(name for name in is_folder if is_folder[name])
    loose = sorted(image_names((name for name in is_folder if not is_folder[name]), others))
    above = [root.resolve(), *root.resolve().parents]  # links to these would form a cycle
    classes = {
        name: images_below(root / name, above, others) for name in folders if is_visible(name)
    }
    classes = {name: paths for name, paths in classes.items() if paths}
    for folder in [root] * bool(loose) + [root / name for name in classes]:
        check_is_foreign(folder)
    left_out = []
    if classes and len(loose) > (inside := sum(map(len, classes.values()))):
        raise ValueError(
            f"{pluralize(len(loose), 'image')} outside the class folders, such as {loose[0]}, and "
            f"only {inside:,} inside; put each image into a class folder, or all into one folder"
        )
    if classes and loose:
        left_out.append(
            f"{pluralize(len(loose), 'image')} outside the class folders, such as {loose[0]}"
        )
    if unused := [name for name in folders if name not in classes]:
        left_out.append(f"hidden folders and folders without images: {', '.join(unused)}")
    if others:
        found = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
        heif = "" if "HEIF" in FORMATS else ", and .heic with pip install pillow-heif"
        left_out.append(
            f"files without an image suffix: {found} (known: {' '.join(IMAGE_SUFFIXES)}{heif})"
        )
    if not classes and loose:
        classes = {root.resolve().name: [os.path.join(root, name) for name in loose]}
    return classes, left_out


def check_is_foreign(folder: Path) -> None:
    """Refuses a folder that a script of ours wrote, whose images are figures."""
    for name, (mark, kind) in FOLDERS_OF_OURS.items():
        with suppress(OSError), open(folder / name, "rb") as file:
            if mark in file.read(4096):
                raise ValueError(f"{folder} is {kind}")


def images_below(
    folder: Path | str, above: Iterable[Path] = (), others: Counter[str] | None = None
) -> list[str]:
    """Lists the image files of a folder and its sub-folders, in order of paths.

    Links are followed, but no folder is visited twice.

    above: folders that are not visited
    others: receives the counts of visible files that are no images, by suffix
    """
    others = Counter() if others is None else others

    def pass_over_locked(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error

    seen, paths = {(status.st_dev, status.st_ino) for status in map(os.stat, above)}, []
    for parent, folders, names in os.walk(folder, onerror=pass_over_locked, followlinks=True):
        status = os.stat(parent)
        if (place := (status.st_dev, status.st_ino)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(filter(is_visible, folders), reverse=True)  # same order on all systems
        paths += [os.path.join(parent, name) for name in image_names(names, others)]
    return sorted(paths)


def is_visible(name: str) -> bool:
    """Returns whether a file or folder is visible; __MACOSX, added to archives by macOS, is not."""
    return not name.startswith(".") and name != "__MACOSX"


def image_names(names: Iterable[str], others: Counter[str]) -> list[str]:
    """Returns the visible names with an image suffix, and counts the others by suffix, without
    those of captions."""
    names = list(filter(is_visible, names))
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    captions = {os.path.splitext(name)[0] + ".txt" for name in images}.union(METADATA)
    for name in {*names}.difference(images, captions):
        others[os.path.splitext(name)[1].lower() or "without a suffix"] += 1
    return images


def read_rgb(source: Path | str | io.BytesIO) -> Image.Image:
    """Reads the first frame of an image file as RGB.

    The image is rotated according to its EXIF data, and transparent pixels become white. Raises
    ValueError, with the reason, if Pillow cannot read the image or finds it too large, and OSError
    if the storage failed.
    """
    try:
        file = source if isinstance(source, io.BytesIO) else open(source, "rb")  # noqa: SIM115
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
            with Image.open(file, formats=tuple(FORMATS)) as image:
                image.load()
                return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"its format is not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        if is_storage_fault(error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(" ".join(reason.split())[:200]) from None


def is_storage_fault(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in STORAGE_FAULTS


def to_rgb(image: Image.Image) -> Image.Image:
    is_grey_16 = image.format == "PNG" and image.mode[0] == "I"
    if image.mode[0] in "IF" and not is_grey_16:  # Pillow would clip these to white
        raise ValueError(f"got pixels of mode {image.mode}, expected 8 bits")
    with suppress(Exception):  # the metadata can be damaged while the pixels are fine
        # ImageOps.exif_transpose also writes the EXIF data anew, which takes long for many tags.
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        image = image if turn is None else image.transpose(turn)
    if is_grey_16:  # keep the high bytes, as Pillow does for colours of 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def center_crop_arr(image: Image.Image, image_size: Size) -> Image.Image:
    """Scales an image to cover the size and crops the centre, as ADM does (Dhariwal and Nichol
    2021); published FID statistics assume this preprocessing.

    While the image is at least twice as large as needed, it is halved with a box filter. The ends
    of very long images are cropped before: scaling 1 x 60,000 pixels would take 16 GB.
    """
    longest = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) > longest:
        image = crop_center(image, min(image.width, longest), min(image.height, longest))
    height, width = sides(image_size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, resample=Image.Resampling.BICUBIC)
    return crop_center(image, width, height)


def crop_center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def size_and_crop(size: tuple[int, int], image_size: Size) -> list[float]:
    """Returns height and width of an original image, and top and left of `center_crop_arr`'s crop.

    All values are in units of the height or width of the crop; see `SizeEmbedder`.

    size: width and height of the original image in pixels, in Pillow's order
    """
    crop, original = sides(image_size), (size[1], size[0])  # heights and widths
    scale = max(new / old for new, old in zip(crop, original, strict=True))
    pairs = list(zip(original, crop, strict=True))
    return [
        *(old / new for old, new in pairs),
        *((round(old * scale) - new) // 2 / new for old, new in pairs),
    ]


def to_model_range(images: Tensor) -> Tensor:
    """Maps uint8 images (N, 3, H, W) to fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Maps images (N, 3, H, W) in [-1, 1] to uint8, clamped and rounded."""
    return (images.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
