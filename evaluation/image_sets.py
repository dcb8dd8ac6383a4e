"""Sets of images for evaluation: a folder tree, or an .npz in the format of ADM's evaluator.

Shape legend: N images of a batch, H x W image
"""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from latents.autoencoder import Autoencoder
from latents.images import IMAGE_SUFFIXES, center_crop_arr, images_below, read_rgb
from options.parts import Size
from runtime.errors import UserError, pluralize, reported_as
from runtime.files import atomic_file, open_npz

MOST_NAMED = 20  # files in an error


@dataclass
class ImageSet:
    """Images of one size (H, W). `read(start, stop)` returns images as uint8 (N, 3, H, W)."""

    count: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor]
    is_resized: bool = False  # whether the files were scaled and cropped to this size

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yields all images in order."""
        for start in range(0, self.count, batch_size):
            yield self.read(start, min(start + batch_size, self.count))


def open_image_set(path: Path, resize: Size | None = None) -> ImageSet:
    """Opens a folder (with its sub-folders) or an .npz with arr_0 (N, H, W, 3) uint8.

    An .npz is read at once, a folder's images when they are used.

    resize: scale and crop a folder's images to this size, as training does (ADM's
        `center_crop_arr`); None: all images must have the same size
    """
    if path.is_dir():
        return image_files(path, sorted(map(Path, images_below(path))), resize)
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"{path}: expected a folder of images or an .npz with arr_0")
    with open_npz(path, "a complete .npz of images") as arrays:
        pixels = arrays["arr_0"]
        if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,) or 0 in pixels.shape:
            raise ValueError(f"got {pixels.dtype} {pixels.shape}, expected uint8 (N, H, W, 3)")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (N, 3, H, W)
    return ImageSet(len(images), tuple(images.shape[2:]), lambda start, stop: images[start:stop])


def image_files(folder: Path, files: list[Path], resize: Size | None = None) -> ImageSet:
    """Makes an image set from files of a folder, in order."""
    if not files:
        raise UserError(f"{folder}: got no images, expected some of {', '.join(IMAGE_SUFFIXES)}")
    size = None

    def read(start: int, stop: int) -> Tensor:
        try:
            return torch.stack([read_image(file, resize, size) for file in files[start:stop]])
        except ValueError:
            raise UserError(bad_files(folder, files, resize, size)) from None

    size = tuple(read(0, 1).shape[2:])
    return ImageSet(len(files), size, read, is_resized=resize is not None)


def read_image(
    path: Path, resize: Size | None = None, size: tuple[int, int] | None = None
) -> Tensor:
    """Reads an image as uint8 (3, H, W). ValueError if it cannot be read, or has another size."""
    image = read_rgb(path)
    image = center_crop_arr(image, resize) if resize else image
    pixels = pil_to_tensor(image)
    if size and (got := tuple(pixels.shape[1:])) != size:
        raise ValueError(f"got {got} pixels, expected {size}; see --resize")
    return pixels


def bad_files(
    folder: Path, files: list[Path], resize: Size | None, size: tuple[int, int] | None
) -> str:
    """Describes all files that `read_image` refuses, by reading every file."""
    faults = []
    for file in files:
        try:
            size = tuple(read_image(file, resize, size).shape[1:])
        except ValueError as error:
            faults.append(f"{file.relative_to(folder)} ({error})")
    more = f" and {len(faults) - MOST_NAMED:,} more" if len(faults) > MOST_NAMED else ""
    return (
        f"{folder}: {len(faults):,} of {pluralize(len(files), 'image')} cannot be evaluated: "
        f"{', '.join(faults[:MOST_NAMED])}{more}; repair or delete them, because every image of "
        "the folder is evaluated"
    )


def write_npz(path: Path, images: ImageSet, batch_size: int) -> None:
    """Writes a set atomically as arr_0 (N, H, W, 3), one batch at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (images.count, *images.size, 3)}
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for batch in images.batches(batch_size):
            file.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())


def reconstructed(images: ImageSet, vae: Autoencoder) -> ImageSet:
    """Returns the set after encoding and decoding by an autoencoder."""
    with reported_as(f"--reconstruct: images of {images.size} pixels", UserError):
        vae.latent_size(images.size)

    def read(start: int, stop: int) -> Tensor:
        return vae.reconstruct(images.read(start, stop).to(vae.device)).cpu()

    return replace(images, read=read)
