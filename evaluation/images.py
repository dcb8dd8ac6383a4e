"""Sets of images as evaluation reads them: a folder tree, or an .npz as ADM's evaluator takes it.

    images = open_images("samples.npz")
    for batch in images.batches(64):                           # (N, 3, H, W) uint8
        ...

Shape legend: N images of a batch, H x W image
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latents.autoencoder import downsampling_of, reconstruct
from latents.images import IMAGE_SUFFIXES, center_crop_arr, read_rgb
from runtime.errors import UserError
from runtime.files import file_digest


@dataclass
class ImageSet:
    """Images of one size (H, W).

    digest: computes the SHA-256 of what the images are read from
    stream: see `batches`
    """

    name: str
    count: int
    size: tuple[int, int]
    digest: Callable[[], str]
    stream: Callable[[int], Iterator[Tensor]]

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yields all images in order, uint8 (N, 3, H, W); UserError for one that is damaged."""
        return self.stream(batch_size)


def reconstructed(images: ImageSet, vae: AutoencoderKL) -> ImageSet:
    """The set as an autoencoder gives it back; UserError for a size that it cannot halve so often.

    Its digest is that of what was read.
    """
    factor = downsampling_of(vae.config)
    if any(pixels % factor for pixels in images.size):
        raise UserError(
            f"--reconstruct: got images of {shape_of(images.size)} pixels, expected multiples of "
            f"the autoencoder's factor {factor} (--resize crops and scales a folder)"
        )

    def stream(batch_size: int) -> Iterator[Tensor]:
        for batch in images.batches(batch_size):
            yield reconstruct(vae, batch.to(vae.device)).cpu()

    return replace(images, stream=stream)


def open_images(path: Path, resize: int | None = None) -> ImageSet:
    """Opens a folder (with its sub-folders) or an .npz with arr_0 (N, H, W, 3) uint8.

    resize: bring a folder's images to that many pixels a side, as training does (ADM's
        `center_crop_arr`); without it they must all have one size already

    Raises UserError for a path that holds no such images.
    """
    if path.is_dir():
        return open_folder(path, resize)
    if path.suffix == ".npz" and path.is_file():
        return open_npz(path)
    raise UserError(f"{path}: expected a folder of images or an .npz with arr_0")


def open_folder(path: Path, resize: int | None) -> ImageSet:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{path}: got no images, expected some of {', '.join(IMAGE_SUFFIXES)}")
    size = read_image(files[0], resize).shape[1:]

    def stream(batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(files), batch_size):
            images = [read_image(file, resize) for file in files[start : start + batch_size]]
            for image, file in zip(images, files[start:], strict=False):
                if image.shape[1:] != size:
                    raise UserError(
                        f"{path}: images of mixed sizes: {file.name} is {shape_of(image.shape[1:])}"
                        f", {files[0].name} is {shape_of(size)}; --resize brings a folder to one"
                    )
            yield torch.stack(images)

    def digest() -> str:
        sha = hashlib.sha256()
        for file in files:
            sha.update(f"{file.relative_to(path).as_posix()}\0".encode())
            sha.update(hashlib.sha256(file.read_bytes()).digest())
        return sha.hexdigest()

    return ImageSet(str(path), len(files), tuple(size), digest, stream)


def read_image(path: Path, resize: int | None = None) -> Tensor:
    """Reads an image as uint8 (3, H, W); UserError for a file that is not one."""
    try:
        image = read_rgb(path)
        image = center_crop_arr(image, resize) if resize else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except ValueError as error:
        raise UserError(f"{path}: damaged or not an image ({error})") from None


def open_npz(path: Path) -> ImageSet:
    """Opens the images of an .npz, of which never more than a batch is in memory."""
    with open_array(path) as (_, shape):
        count, height, width, _ = shape

    def stream(batch_size: int) -> Iterator[Tensor]:
        with open_array(path) as (file, _):
            for start in range(0, count, batch_size):
                rows = min(batch_size, count - start)
                pixels = read_bytes(file, rows * height * width * 3, path)
                batch = np.frombuffer(pixels, np.uint8).reshape(rows, height, width, 3)
                yield torch.from_numpy(batch.copy()).permute(0, 3, 1, 2)

    return ImageSet(str(path), count, (height, width), lambda: file_digest(path), stream)


class open_array:  # noqa: N801 (a context manager, named like open)
    """Opens arr_0 of an .npz: gives the file at its first pixel, and the shape (N, H, W, 3)."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        try:
            self.archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: damaged or not an .npz ({error})") from None
        try:
            self.file = self.archive.open("arr_0.npy")
            long_header = np.lib.format.read_magic(self.file) >= (2, 0)
            read_header = (
                np.lib.format.read_array_header_2_0
                if long_header
                else np.lib.format.read_array_header_1_0
            )
            shape, fortran, dtype = read_header(self.file)
        except (KeyError, ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            self.archive.close()
            raise UserError(f"{self.path}: no readable arr_0 in it ({error})") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
            self.archive.close()
            raise UserError(f"{self.path}: arr_0: got {dtype} {shape}, expected uint8 (N, H, W, 3)")
        return self.file, shape

    def __exit__(self, *exception) -> None:
        self.file.close()
        self.archive.close()


def read_bytes(file, number: int, path: Path) -> bytes:
    """Reads exactly `number` bytes of a zip member; UserError where it ends or is corrupt."""
    try:
        pixels = file.read(number)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if len(pixels) != number:
        raise UserError(f"{path}: damaged: arr_0 ends early")
    return pixels


def write_npz(path: Path, count: int, size: tuple[int, int], batches: Iterator[Tensor]) -> None:
    """Writes uint8 images (N, 3, H, W) as arr_0 (count, H, W, 3), a batch at a time.

    Under a temporary name first, so that a file with its final name is whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    with (
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            file.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    temporary.replace(path)


def shape_of(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
