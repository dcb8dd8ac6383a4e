"""Latents from a cache in place of images: the posterior of every image, encoded once.

    latents = CachedLatents("path/to/latents")      # written by cache_latents.py
    moments, label, unreadable = latents[17, True]  # image 17, mirrored
    x = latents.sample(moments[None])

latents/index.py describes the files.

Shape legend: N images, C latent channels, h x w latent size
"""

import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from latents.autoencoder import sample_posterior
from latents.index import (
    INDEX_FILE,
    UNFINISHED,
    Index,
    expect,
    layout_of,
    parse_index,
    shard_name,
)
from runtime.errors import UserError


class CachedLatents(Dataset):
    """The latents of a folder that cache_latents.py wrote, in place of an ImageSource.

    Keys are (index, flip); an item is (moments (2C, h, w) fp16, label, unreadable images), the last
    being those that training from images would have met in its place. Files are mapped into
    memory, so that all processes of a machine read the same pages and none holds a copy. Sizes and
    shapes are checked when the folder is opened, checksums of the moments whenever some are read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        settings = self.settings = self.index.settings
        self.classes, self.image_size = list(settings.classes), settings.image_size
        self.shards: dict[int, dict[str, Tensor]] = {}
        for shard in range(settings.num_shards):
            self.open_shard(shard)

    def __len__(self) -> int:
        return self.settings.images

    @property
    def listing(self) -> dict:
        """What tells these latents' images from others, as `ImageSource.listing`."""
        return {"count": len(self), "source_sha256": self.settings.source_sha256}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "shards": {}}  # a worker that is spawned maps the files itself

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int, list[str]]:
        index, flip = key
        shard, row = divmod(index, self.settings.shard_images)
        tensors = self.open_shard(shard)
        moments, label = tensors["moments"][row, int(flip)], int(tensors["labels"][row])
        is_label = 0 <= label < len(self.classes)
        if not is_label or checksum(moments, label) != int(tensors["checksums"][row, int(flip)]):
            raise UserError(
                f"{self.folder / shard_name(shard)}: damaged at image {index}; run the command of "
                "cache_latents.py again, which encodes this shard anew"
            )
        return moments, label, self.unreadable(index)

    def unreadable(self, index: int) -> list[str]:
        """Names the images at a place and after it that could not be read."""
        names = []
        while index in self.index.skipped:
            names.append(self.index.skipped[index])
            index = (index + 1) % len(self)
        return names

    def sample(self, moments: Tensor) -> Tensor:
        """Draws latents (N, C, h, w) fp32, scaled, from moments (N, 2C, h, w)."""
        settings = self.settings
        return sample_posterior(
            moments, scaling_factor=settings.scaling_factor, shift_factor=settings.shift_factor
        )

    def open_shard(self, shard: int) -> dict[str, Tensor]:
        """Maps a shard into memory; UserError if it is not what the index says."""
        if shard not in self.shards:
            path, count = self.folder / shard_name(shard), len(self.settings.images_of(shard))
            self.shards[shard] = map_shard(path, count, self.settings.latent_shape)
        return self.shards[shard]


def read_index(folder: Path) -> Index:
    """Reads a folder's index and compares it with the sizes of its files."""
    if not (folder / INDEX_FILE).is_file():
        begun = (folder / UNFINISHED).is_dir()
        raise UserError(
            f"--latents-path: got {folder}, expected a folder that cache_latents.py "
            + ("has finished: run its command again" if begun else "wrote")
        )
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    try:
        return parse_index((folder / INDEX_FILE).read_bytes(), sizes)
    except UserError as error:
        raise UserError(f"--latents-path {folder / INDEX_FILE}: {error}") from None


def map_shard(path: Path, count: int, latent_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The tensors of a shard file, mapped into memory and not read; UserError if it is another."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged shard ({str(error).splitlines()[0]})") from None
    got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    expect(got == layout_of(count, latent_shape), str(path), got, layout_of(count, latent_shape))
    return tensors


def checksum(moments: Tensor, label: int) -> int:
    """CRC-32 of the moments (2C, h, w) of one image, begun at its label."""
    return zlib.crc32(moments.numpy(), label)
