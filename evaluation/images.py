"""Sets of images as evaluation reads them: a folder tree, or an .npz as ADM's evaluator takes it.

Shape legend: N images of a batch, H x W image
"""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latents.autoencoder import Autoencoder
from latents.images import IMAGE_SUFFIXES, center_crop_arr, images_below, read_rgb
from runtime.errors import UserError, reported_as
from runtime.files import open_npz, replacing


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


def open_images(path: Path, resize: int | None = None) -> ImageSet:
    """Opens a folder (with its sub-folders) or an .npz with arr_0 (N, H, W, 3) uint8.

    A folder's images are read when they are needed, an .npz at once.

    resize: bring a folder's images to that many pixels a side, as training does (ADM's
        `center_crop_arr`); without it they must all have one size already

    Raises UserError for a path that holds no such images.
    """
    if path.is_dir():
        return image_files(path, sorted(map(Path, images_below(path))), resize)
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"{path}: expected a folder of images or an .npz with arr_0")
    with open_npz(path, "a whole .npz of images") as arrays:
        pixels = arrays["arr_0"]
        if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,) or 0 in pixels.shape:
            raise ValueError(f"got {pixels.dtype} {pixels.shape}, expected uint8 (N, H, W, 3)")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (N, 3, H, W)
    return ImageSet(len(images), tuple(images.shape[2:]), lambda start, stop: images[start:stop])


def image_files(folder: Path, files: list[Path], resize: int | None = None) -> ImageSet:
    """The images of a folder's files, in their order; UserError for none and for two sizes."""
    if not files:
        raise UserError(f"{folder}: got no images, expected some of {', '.join(IMAGE_SUFFIXES)}")
    size = tuple(read_image(files[0], resize).shape[1:])

    def read(start: int, stop: int) -> Tensor:
        images = [read_image(file, resize) for file in files[start:stop]]
        for image, file in zip(images, files[start:stop], strict=True):
            if (got := tuple(image.shape[1:])) != size:
                raise UserError(f"{file}: got {got}, expected {size} pixels (or --resize)")
        return torch.stack(images)

    return ImageSet(len(files), size, read)


def read_image(path: Path, resize: int | None = None) -> Tensor:
    """Reads an image as uint8 (3, H, W); UserError for a file that is not one."""
    with reported_as(f"{path}: damaged or not an image", ValueError):
        image = read_rgb(path)
        image = center_crop_arr(image, resize) if resize else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def write_npz(path: Path, images: ImageSet, batch_size: int) -> None:
    """Writes a set as arr_0 (N, H, W, 3), a batch at a time, whole or not at all."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (images.count, *images.size, 3)}
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for batch in images.batches(batch_size):
            file.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())


def reconstructed(images: ImageSet, vae: Autoencoder) -> ImageSet:
    """The set as an autoencoder gives it back; UserError for a size that it does not take."""
    with reported_as(f"--reconstruct: images of {images.size} pixels", UserError):
        for pixels in images.size:
            vae.latent_side(pixels)

    def read(start: int, stop: int) -> Tensor:
        return vae.reconstruct(images.read(start, stop).to(vae.device)).cpu()

    return replace(images, read=read)
