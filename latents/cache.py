"""Latent caches: the posterior of every image, encoded once, for training without an autoencoder.

A cache is a folder with index.json (the CacheSettings) and shards, shard-00000.safetensors and so
on. Shard k holds the images from index k * shard_images, in the order of the source:

    moments       (n, V, M, h, w) fp16   raw posterior of V views: the image and, if `flip`, its
                                         mirror image
    channel_sums  (2, C)          fp64   for `--latents-norm data`, see `channel_sums`
    labels        (n,)            int32
    size          (n, V, 4)       fp32   other tensors of a batch, by name, have shape (n, V, ...)
    tokens        (n, 1, L, F)    bf16   features of the first captions, of both views, if a text
                                         encoder computed them

An unreadable image is replaced by the next readable one, as when training from images. A shard gets
its final name once it is complete, so a cache is finished when all shards exist.

Shape legend: N batch, n images of a shard, C latent channels, M channels of a raw posterior (see
`latents.autoencoder`), h x w latent size
"""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latents.autoencoder import (
    CONFIG_FILE,
    Autoencoder,
    LatentNorm,
    NoiseFn,
    sample_latents,
)
from latents.captions import SIDES, Captions
from latents.sources import (
    Batch,
    Source,
    images_name,
    open_images,
)
from options.parts import Size, convert, sides
from runtime.errors import UserError, check_same, reported_as
from runtime.files import check_new_folder, find_moved, read_json, write_durably
from runtime.tensor_file import write_tensors

INDEX_FILE = "index.json"
CAPTIONS_FILE = "captions.safetensors"
FEATURES = ("vector", "tokens")  # features of a network: pooled, and per token
REQUIRED = ("labels", "moments")
MAX_SHARDS = 99_999  # shards are named by five digits
ON_REQUEST = ("tokens",)  # large tensors, which are read only if they are requested


@dataclass(frozen=True)
class CacheSettings:
    """Settings that determine the contents of a cache."""

    image_size: Size
    latent_shape: tuple[int, int, int]  # C, h, w
    norm: dict  # the autoencoder's LatentNorm, which is not applied to the stored posteriors
    vae_path: str
    vae_sha256: str  # digest of the fp32 weights
    precision: str  # precision that the autoencoder computed in
    flip: bool  # whether the cache also has each image mirrored
    shard_images: int
    listing: dict  # fingerprint of the source
    classes: tuple[str, ...]
    features: dict = field(default_factory=dict)  # see `settings_of`
    tensors: tuple[str, ...] = ("labels", "moments")  # names in a shard
    captions: str | None = None  # digest of the captions in `CAPTIONS_FILE`

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            with reported_as(name, ValueError):
                object.__setattr__(self, name, convert(getattr(self, name), hint))
        if (shards := -(-self.num_images // self.shard_images)) > MAX_SHARDS:
            raise ValueError(f"got {shards:,} shards, expected at most {MAX_SHARDS:,}")

    @property
    def names(self) -> str | None:
        """Digest of the names of the images."""
        return self.listing.get("names")

    @property
    def num_images(self) -> int:
        return self.listing["count"]

    def views(self, name: str) -> int:
        """Number of views of a tensor of an image: features of its caption have one."""
        return 1 if name == "tokens" and self.text_encoder else 1 + self.flip

    @property
    def text_encoder(self) -> str | None:
        """Model and length of the encoder that computed the tokens, if any."""
        return self.features.get("text_encoder")

    def shards(self, folder: Path) -> dict[Path, range]:
        """Returns the files of the shards, each with the indices of its images in the source."""
        files = {}
        for number, start in enumerate(range(0, self.num_images, self.shard_images)):
            images = range(start, min(start + self.shard_images, self.num_images))
            files[folder / f"shard-{number:05d}.safetensors"] = images
        return files


def settings_of(
    images: Source, vae: Autoencoder, precision: str, flip: bool, shard_images: int,
    features: Mapping[str, Any],
) -> CacheSettings:  # fmt: skip
    """Returns the settings of a cache of these images.

    features: name ("network" or "text_encoder") and digest of the network whose features are
        stored, and the shapes of the stored "vector" and "tokens" of one image; empty without
    """
    size = images.image_size
    return CacheSettings(
        image_size=size,
        latent_shape=(vae.channels, *sides(vae.latent_size(size))),
        norm=vae.norm.to_dict(),
        vae_path=vae.path,
        vae_sha256=vae.weights_sha256,
        precision=precision,
        flip=flip,
        shard_images=shard_images,
        listing=images.fingerprint,
        classes=tuple(images.classes),
        features=dict(features),
        tensors=(*REQUIRED, "size", *(name for name in FEATURES if name in features)),
        captions=images.captions.sha256,
    )


def read_settings(flag: str, folder: Path) -> CacheSettings:
    """Reads the index of a cache."""
    message = f"{flag}: got {folder}, expected a folder that cache_latents.py wrote"
    with reported_as(message, OSError, ValueError, TypeError, UserError):
        return CacheSettings(**read_json(folder / INDEX_FILE))


def write_captions(folder: Path, captions: Captions) -> None:
    """Writes the captions of all images of a cache, if they have any."""
    if captions and not (path := folder / CAPTIONS_FILE).is_file():
        tensors = {"text": torch.tensor(captions.text), "ends": torch.tensor(captions.ends)}
        with reported_as(f"--output: cannot write {path}", OSError):
            write_tensors(path, tensors, {})


def read_captions(flag: str, folder: Path, settings: CacheSettings) -> Captions:
    """Reads the captions of a cache, which has them if its index records them."""
    if settings.captions is None:
        return Captions.of([None] * settings.num_images)
    path = folder / CAPTIONS_FILE
    message = f"{flag}: got {path}, expected the captions that cache_latents.py wrote"
    with reported_as(message, SafetensorError, OSError, ValueError):
        with safe_open(path, "np") as file:
            captions = Captions(file.get_tensor("text"), file.get_tensor("ends"))
        if captions.sha256 != settings.captions:
            raise ValueError("their digest differs from the one in the index")
    return captions


def check_shard(tensors: Batch, settings: CacheSettings, count: int) -> None:
    """Requires that the tensors of a shard of `count` images are what the index says."""
    channels, *grid = settings.latent_shape
    has_variance = tensors["moments"].shape[2:3] == (2 * channels,)
    shapes = {"labels": (), "moments": (channels * (1 + has_variance), *grid), "size": (4,)}
    shapes |= {name: settings.features.get(name, ()) for name in FEATURES}  # of one image
    for name in settings.tensors:
        is_label = name == "labels"
        expected = (count, *(() if is_label else (settings.views(name),)), *shapes[name])
        if (got := tuple(tensors[name].shape)) != expected:
            raise ValueError(f"{name}: got {got}, expected {expected}")
        if tensors[name].is_floating_point() == is_label:
            raise ValueError(f"{name}: got {tensors[name].dtype}")
    low, high = tensors["labels"].aminmax()
    if low < 0 or high >= len(settings.classes):
        got, most = f"{low} to {high}", len(settings.classes) - 1
        raise ValueError(f"labels: got {got}, expected 0 to {most}, the numbers of the classes")


def open_shard(flag: str, path: Path, settings: CacheSettings, count: int) -> Batch:
    """Maps the tensors of a shard of `count` images into memory, and reads the labels."""
    expected = "a complete shard; run the command of cache_latents.py again"
    message = f"{flag}: got {path}, expected {expected}"
    with reported_as(message, SafetensorError, OSError, ValueError):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in settings.tensors}
        check_shard(tensors, settings, count)
    return tensors


class CachedLatents(Source):
    """Latents in a folder written by cache_latents.py.

    An item has "moments" (M, h, w) fp16, "label", and the other tensors of the shards; the tensors
    in `ON_REQUEST` only if they are in `requested`. Shards are mapped into memory, so processes
    share the pages that they read.

    flag: the flag that names the folder, for messages
    norm: "autoencoder", or "data": each channel gets mean 0 and std 1 over the images of the cache
    """

    def __init__(self, folder: str | Path, flag: str = "--latents-path", norm: str = "autoencoder"):
        self.folder, self.flag = Path(folder), flag
        settings = self.settings = read_settings(flag, self.folder)
        self.classes, self.image_size = list(settings.classes), settings.image_size
        self.can_flip = settings.flip
        self.fingerprint = {"count": settings.num_images, "names": settings.names}
        self.vae_path = find_moved(settings.vae_path, CONFIG_FILE, self.folder)
        self.vae_sha256 = settings.vae_sha256
        self.features_sha256 = settings.features.get("sha256")
        self.text_encoder = settings.text_encoder
        files = settings.shards(self.folder)
        if missing := [path for path in files if not path.is_file()]:
            raise UserError(
                f"{flag}: {folder} lacks {len(missing)} of {len(files)} shards; run the command of "
                "cache_latents.py again"
            )
        self.shards = [
            open_shard(flag, path, settings, len(images)) for path, images in files.items()
        ]
        self.norm = data_norm(self) if norm == "data" else LatentNorm(**settings.norm)
        first = {name: tuple(values.shape[2:]) for name, values in self.shards[0].items()}
        self.shapes = {**first, "label": ()}

    def __len__(self) -> int:
        return self.settings.num_images

    def name(self, index: int) -> str:
        return f"image {index}"

    @cached_property
    def captions(self) -> Captions:
        return read_captions(self.flag, self.folder, self.settings)

    def __reduce__(self) -> tuple:
        # A spawned worker process maps the files again.
        return type(self), (self.folder,), {"requested": self.requested, "words": self.words}

    def __getitem__(self, key: tuple) -> tuple[Batch, list[str]]:
        index, flip, draw = (*key, 0.0)[:3]
        text, flip = self.text_of(index, flip, draw)
        if self.text_encoder and "tokens" in self.requested:
            flip = flip and not SIDES.search((self.captions[index] or [""])[0])
        shard, row = divmod(index, self.settings.shard_images)
        left_out = set(ON_REQUEST).difference(self.requested)
        tensors = self.shards[shard].items()
        views = {name: values[row] for name, values in tensors if name not in left_out}
        label = views.pop("labels").long()
        of_both = {"tokens"} if self.text_encoder else ()
        seen = {name: view[0 if name in of_both else int(flip)] for name, view in views.items()}
        return {"label": label, **seen, **text}, []

    def geometry(self, vae_path: str) -> tuple[Size, int]:
        channels, *size = self.settings.latent_shape
        return convert(size, Size), channels

    def to_latents(
        self, vae: Autoencoder | None, batch: Batch, noise_fn: NoiseFn | None = None
    ) -> Batch:
        others = {name: value for name, value in batch.items() if name != "moments"}
        channels = self.settings.latent_shape[0]
        latents = sample_latents(batch["moments"], channels, self.norm, noise_fn)
        return {"latents": latents, **others}

    def hold_out(self, is_held_out: np.ndarray) -> np.ndarray:
        """Also holds out the copies of a held-out image, which stand for unreadable neighbours."""
        held_out = is_held_out.copy()
        for index in np.flatnonzero(is_held_out):
            item = self[index, False][0]["moments"]
            for direction in (-1, 1):
                other = (index + direction) % len(self)
                while not held_out[other] and torch.equal(self[other, False][0]["moments"], item):
                    held_out[other] = True
                    other = (other + direction) % len(self)
        return held_out


def channel_sums(moments: Tensor, channels: int) -> Tensor:
    """Returns the expected sums of z and z^2 for each channel, (2, C) fp64.

    moments: raw posteriors (n, V, M, h, w), from which z is sampled
    """
    sums = torch.zeros(2, channels, dtype=torch.float64)
    for part in moments.split(64):
        z, log_variance = part.double().tensor_split([channels], dim=2)  # (n, V, C or 0, h, w) each
        squares = z.square() + log_variance.exp() if log_variance.shape[2] else z.square()
        sums += torch.stack([x.sum(dim=(0, 1, 3, 4)) for x in (z, squares)])
    return sums


def data_norm(latents: CachedLatents) -> LatentNorm:
    """Returns the norm that gives each channel mean 0 and standard deviation 1 over a cache."""
    settings, sums = latents.settings, torch.zeros(())
    channels, *grid = settings.latent_shape
    for path in settings.shards(latents.folder):
        with safe_open(path, "pt") as file:
            sums = sums + file.get_tensor("channel_sums")
    mean, square = sums / (len(latents) * (1 + settings.flip) * math.prod(grid))  # (C,) each
    std = (square - mean.square()).clamp_min(1e-10).sqrt()  # a channel may be constant
    return LatentNorm(tuple(mean.tolist()), tuple((1 / std).tolist()))


def open_data(path: str, image_size: Size | None, flag: str) -> Source:
    """Opens a latent cache or, if the path is no cache, images as --data-path does.

    image_size: in pixels; None: the size of the cache, or 256 for images
    flag: flag that named the path, for error messages
    """
    if not os.path.isfile(Path(path) / INDEX_FILE):  # False without permission
        return open_images(path, image_size or 256, flag)
    latents = CachedLatents(path, flag)
    if image_size not in (None, size := latents.image_size):
        raise UserError(f"--image-size: got {image_size}, expected {size}, the size of {path}")
    return latents


def check_networks(
    images: Source, vae_sha256: str | None, features_sha256: str | None, flag: str
) -> None:
    """Refuses latents of another autoencoder, and features of another network.

    A digest of None is unknown, and equals every digest.
    """
    pairs = {
        f"latents of a different autoencoder ({images.vae_path})": (images.vae_sha256, vae_sha256),
        "features of a different network": (images.features_sha256, features_sha256),
    }
    for got, digests in pairs.items():
        if len({digest for digest in digests if digest}) > 1:
            raise UserError(f"{flag}: got {got}, expected the one that the model was trained with")


def begin_cache(folder: Path, settings: CacheSettings) -> dict[Path, range]:
    """Creates a cache, or resumes one of the same settings; returns the missing and the damaged
    shards, see `CacheSettings.shards`."""
    if not os.path.isfile(folder / INDEX_FILE):
        check_new_folder("--output", folder)
        with reported_as(f"--output: cannot write {folder}", OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(folder / INDEX_FILE, json.dumps(asdict(settings), indent=1) + "\n")
    stored = read_settings("--output", folder)
    moved = replace(stored, vae_path=settings.vae_path)  # the same weights may have been moved
    if len(stored.classes) == len(settings.classes) == 1:  # the name of the folder, which may move
        moved = replace(moved, classes=settings.classes)
    message = f"--output: {folder} was created with other settings"
    named = [asdict(s) | {"listing": images_name(s.listing)} for s in (settings, moved)]
    check_same(message, *named)
    missing = {}
    for path, images in settings.shards(folder).items():
        try:
            open_shard("--output", path, settings, len(images))
        except UserError:
            missing[path] = images
    return missing


def lock_cache(folder: Path, *, is_main: bool) -> BinaryIO:
    """Excludes other commands from writing to a cache until the returned file is closed.

    The processes of one command share the lock, and the main process takes it first. A file system
    without locks excludes nobody.
    """
    with reported_as(f"--output: cannot write {folder}", OSError):
        file = open(folder / INDEX_FILE, "r+b")  # noqa: SIM115
    try:
        if is_main:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        other = "another cache_latents.py writes to it; wait for it, or choose another folder"
        raise UserError(f"--output: {folder}: {other}") from None
    except OSError:
        pass
    return file


def write_shard(path: Path, tensors: Batch, channels: int) -> None:
    """Writes a shard atomically: labels (n,), other tensors (n, V, ...), all moments finite."""
    if not tensors["moments"].isfinite().all():
        raise UserError(
            f"--precision: got inf or nan in {path.name}, expected finite numbers; try fp32"
        )
    sums = channel_sums(tensors["moments"], channels)
    with reported_as(f"--output: cannot write {path}", OSError):
        write_tensors(path, {**tensors, "channel_sums": sums}, {})
