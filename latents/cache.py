"""Latents from a cache in place of images: the posterior of every image, encoded once.

A cache is a folder with index.json, the CacheSettings, and the shards shard-00000.safetensors and
so on. Shard k holds the images from k * shard_images on, in the order of the source:

    moments  (n, V, 2C, h, w) fp16   V views: the image, and mirrored if `flip`; mean | log-variance
    labels   (n,)             int32
    size     (n, V, 4)        fp32   and whatever else a batch has, by its name: (n, V, ...)

The place of an image that could not be read holds the next one that could, as in training from
images. A shard gets its name when it is whole, so a cache is finished when all shards are there.

Shape legend: N batch, n images of a shard, C latent channels, h x w latent size
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from latents.autoencoder import (
    CONFIG_FILE,
    NoiseFn,
    latent_geometry,
    load_autoencoder,
    resolve_vae_path,
    sample_posterior,
    weights_digest,
)
from latents.sources import Batch, ImageSource, Source, open_images, same_images
from runtime.errors import UserError, check_same, reported_as
from runtime.files import check_new_folder, find_moved, read_json, write_durably

INDEX_FILE = "index.json"


@dataclass(frozen=True)
class CacheSettings:
    """What decides the contents of a cache."""

    image_size: int
    latent_shape: list[int]  # C, h, w
    scaling_factor: float
    shift_factor: float
    vae_path: str
    vae_sha256: str  # of the fp32 weights
    precision: str  # that the autoencoder computed in
    flip: bool  # whether each image is there mirrored too
    shard_images: int
    listing: dict  # of the source
    classes: list[str]
    tensors: list[str] = field(default_factory=lambda: ["labels", "moments"])  # of a shard

    @property
    def num_images(self) -> int:
        return self.listing["count"]

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_images)

    def images_of(self, shard: int) -> range:
        """The places of a shard's images in the source."""
        start = shard * self.shard_images
        return range(start, min(start + self.shard_images, self.num_images))


def settings_of(
    images: ImageSource, vae_path: str, precision: str, flip: bool, shard_images: int
) -> CacheSettings:
    """The settings of a cache of these images; UserError for a size that is no latents' one."""
    vae = load_autoencoder(vae_path, "cpu", torch.float32)
    size, channels = latent_geometry(vae.config, images.image_size)
    return CacheSettings(
        image_size=images.image_size,
        latent_shape=[channels, size, size],
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor or 0.0,
        vae_path=resolve_vae_path(vae_path),
        vae_sha256=weights_digest(vae),
        precision=precision,
        flip=flip,
        shard_images=shard_images,
        listing=images.listing,
        classes=images.classes,
        tensors=["labels", "moments", "size"],
    )


def read_settings(flag: str, folder: Path) -> CacheSettings:
    """Reads the index of a cache; UserError when there is none or it is damaged."""
    message = f"{flag}: got {folder}, expected a folder that cache_latents.py wrote"
    with reported_as(message, OSError, ValueError, TypeError):
        return CacheSettings(**read_json(folder / INDEX_FILE))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def missing_shards(folder: Path, settings: CacheSettings) -> list[int]:
    shards = range(settings.num_shards)
    return [shard for shard in shards if not shard_path(folder, shard).is_file()]


class CachedLatents(Dataset):
    """The latents of a folder that cache_latents.py wrote, in place of an ImageSource: a Source.

    Keys are (index, flip); an item has "moments" (2C, h, w) fp16, "label", and what else the shards
    have. No image is unreadable: cache_latents.py has named those that it could not read. Shards
    are mapped into memory, and processes share the pages that they read. UserError when the cache
    is not finished.

    flag: that named the folder
    vae_path: where the autoencoder is or was; its digest counts, and nothing is read there
    """

    def __init__(self, folder: str | Path, flag: str = "--latents-path"):
        self.folder, self.flag = Path(folder), flag
        settings = self.settings = read_settings(flag, self.folder)
        self.classes, self.image_size = settings.classes, settings.image_size
        self.can_flip, self.listing = settings.flip, settings.listing
        self.vae_path = find_moved(settings.vae_path, CONFIG_FILE, self.folder)
        self.vae_sha256 = settings.vae_sha256
        if missing := missing_shards(self.folder, settings):
            raise UserError(
                f"{flag}: got {folder} without {len(missing)} of {settings.num_shards} "
                "shards, expected all: run the command of cache_latents.py again"
            )
        self.shards = [self.open_shard(shard) for shard in range(settings.num_shards)]

    def __len__(self) -> int:
        return self.settings.num_images

    def __reduce__(self) -> tuple:
        return type(self), (self.folder,)  # a worker that is spawned maps the files itself

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Batch, list[str]]:
        index, flip = key
        shard, row = divmod(index, self.settings.shard_images)
        views = {name: values[row] for name, values in self.shards[shard].items()}
        label = views.pop("labels").long()
        return {"label": label, **{name: view[int(flip)] for name, view in views.items()}}, []

    def open_shard(self, shard: int) -> Batch:
        """Maps a shard's tensors into memory without reading them; UserError when damaged."""
        path = shard_path(self.folder, shard)
        expected = "a whole shard: delete it and run the command of cache_latents.py again"
        message = f"{self.flag}: got {path}, expected {expected}"
        with reported_as(message, SafetensorError, OSError), safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in self.settings.tensors}

    def geometry(self, vae_path: str) -> tuple[int, int]:
        channels, size, _ = self.settings.latent_shape
        return size, channels

    def to_latents(
        self, vae: AutoencoderKL | None, batch: Batch, noise_fn: NoiseFn | None = None
    ) -> Batch:
        others = {name: value for name, value in batch.items() if name != "moments"}
        return {"latents": sample_posterior(batch["moments"], self.settings, noise_fn), **others}

    def hold_out(self, places: np.ndarray) -> np.ndarray:
        """Adds the neighbours that are copies: they stand for images that could not be read."""
        held_out = places.copy()
        for place in np.flatnonzero(places):
            item = self[place, False][0]
            for direction in (-1, 1):
                other = (place + direction) % len(self)
                while not held_out[other] and same_moments(self[other, False][0], item):
                    held_out[other] = True
                    other = (other + direction) % len(self)
        return held_out


def same_moments(item: Batch, other: Batch) -> bool:
    return torch.equal(item["moments"], other["moments"])


def open_data(path: str, image_size: int | None, flag: str) -> Source:
    """Opens the cache in a folder, or else the images that a path names as --data-path does.

    image_size: pixels of a side; None: those of the cache, 256 of images
    flag: that named the path

    Raises UserError when there is neither, and for a cache of another size.
    """
    if not (Path(path) / INDEX_FILE).is_file():
        return open_images(path, image_size or 256, flag)
    latents = CachedLatents(path, flag)
    if image_size not in (None, size := latents.image_size):
        raise UserError(f"--image-size: got {image_size}, expected {size}, that of {path}")
    return latents


def begin_cache(folder: Path, settings: CacheSettings) -> list[int]:
    """Makes a cache's folder and index, or continues it; returns the missing shards.

    UserError for a folder of something else and for a cache of other settings.
    """
    if not (folder / INDEX_FILE).is_file():
        check_new_folder("--output", folder)
        with reported_as(f"--output: cannot write {folder}", OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(folder / INDEX_FILE, json.dumps(asdict(settings), indent=1) + "\n")
    stored = read_settings("--output", folder)
    moved = replace(stored, vae_path=settings.vae_path)  # equal weights may be somewhere else now
    if same_images(stored.listing, settings.listing):
        moved = replace(moved, listing=settings.listing)
    message = f"--output: {folder} was begun with other settings"
    check_same(message, asdict(settings), asdict(moved))
    return missing_shards(folder, settings)


def write_shard(folder: Path, shard: int, tensors: Batch) -> None:
    """Writes the tensors of a shard, whole or not at all: labels (n,), others (n, V, ...).

    UserError for moments that are not finite and for a full disk.
    """
    path = shard_path(folder, shard)
    if not tensors["moments"].isfinite().all():
        raise UserError(f"--precision: got inf or nan in {path.name}, expected numbers: try fp32")
    content = safetensors.torch.save(tensors)
    with reported_as(f"--output: cannot write {path}", OSError):
        write_durably(path, content)
