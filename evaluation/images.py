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
from runtime.errors import UserError, reported_as
from runtime.files import atomic_file, open_npz


@dataclass
class ImageSet:
    """Images of one size (H, W). `read(start, stop)` returns images as uint8 (N, 3, H, W)."""

    count: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor]

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
    size = tuple(read_image(files[0], resize).shape[1:])

    def read(start: int, stop: int) -> Tensor:
        images = [read_image(file, resize) for file in files[start:stop]]
        for image, file in zip(images, files[start:stop], strict=True):
            if (got := tuple(image.shape[1:])) != size:
                raise UserError(f"{file}: got {got} pixels, expected {size}; see --resize")
        return torch.stack(images)

    return ImageSet(len(files), size, read)


def read_image(path: Path, resize: Size | None = None) -> Tensor:
    """Reads an image as uint8 (3, H, W)."""
    fix = "repair or delete the file, because every image of the folder is evaluated"
    with reported_as(f"{path}: damaged or not an image; {fix}", ValueError):
        image = read_rgb(path)
        image = center_crop_arr(image, resize) if resize else image
        return pil_to_tensor(image)


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
