r"""Encodes all images once and stores their posteriors, for training without an autoencoder.

    python cache_latents.py --data-path data/fashion-mnist --image-size 32 \
        --vae-path assets/vae-fashion-mnist --output data/fashion-mnist-latents
    torchrun --nproc_per_node=8 cache_latents.py --data-path IMAGENET/train --output LATENTS
    python train.py --latents-path LATENTS ...

The cache holds mean and log-variance in fp16, for each image and its mirror image. After an
interruption, run the same command again to write the missing shards. --features also stores
features of the images: ImageNet at 256 x 256, with 256 tokens of 768 features, needs 1 TB. Captions
are stored with the latents, and with --text-encoder also their features, in bf16.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from latents.autoencoder import (
    DEFAULT_VAE,
    Autoencoder,
    load_autoencoder,
    weights_digest,
)
from latents.cache import (
    FEATURES,
    CacheSettings,
    begin_cache,
    lock_cache,
    settings_of,
    write_captions,
    write_shard,
)
from latents.features import FeatureNetwork, load_features
from latents.image_grid import contact_sheet, write_png
from latents.images_config import IMAGES_HELP, ImagesConfig
from latents.loading import check_unreadable, read_batches
from latents.sources import Batch, Source, open_on_all, size_notes
from latents.text_encoder import TextEncoder, load_text_encoder
from options.parts import Size, option, sides
from runtime.devices import DTYPES
from runtime.errors import UserError, pluralize, print_safely, printable, reported_as
from runtime.flags import parse_config
from runtime.plugins import import_plugins
from runtime.processes import close_distributed, run_process, setup_distributed
from runtime.progress import note_saved, progress


@dataclass(frozen=True, kw_only=True)
class CacheConfig(ImagesConfig):
    data_path: str = option(group="data", help=IMAGES_HELP)
    output: Path = option(group="cache", help="folder of the cache")
    precision: str = option("fp32", choices=list(DTYPES), help="precision of the autoencoder")
    batch_size: int = option(32, ge=1, help="number of images per batch")
    shard_images: int = option(
        4096, ge=1, help="images per shard, which each process keeps in memory"
    )
    features: str | None = option(
        None, metavar="NETWORK", group="features",
        help="also store the pooled features of each image, for --conditions vector: "
        "efficientnet-lite0 or timm:MODEL[@PIXELS]",
    )  # fmt: skip
    feature_tokens: bool = option(
        False, help="also store the features of each token of the network"
    )
    text_encoder: str | None = option(
        None, metavar="MODEL[@LENGTH]",
        help="store the last hidden states of each image's first caption, for --conditions tokens: "
        "a text encoder of transformers (CLIP, T5, Gemma), hub id or folder; LENGTH tokens at most",
    )  # fmt: skip
    plugin: tuple[str, ...] = option(
        (), metavar="FILE.py",
        help="Python files to import, which define image sources or autoencoders of your own",
    )  # fmt: skip


def parse_args() -> CacheConfig:
    return parse_config(CacheConfig, __doc__)


class Networks(NamedTuple):
    vae: Autoencoder
    features: FeatureNetwork | None
    text: TextEncoder | None


def load_networks(config: CacheConfig, device: torch.device) -> Networks:
    features = load_features(config.features, device) if config.features else None
    text = load_text_encoder(config.text_encoder, device) if config.text_encoder else None
    vae = load_autoencoder(config.vae_path or DEFAULT_VAE, device, DTYPES[config.precision])
    return Networks(vae, features, text)


def describe_features(config: CacheConfig, networks: Networks, size: Size) -> dict:
    """Returns the facts about the feature network that `settings_of` records."""
    if (text := networks.text) is not None:
        facts = {"revision": text.revision, "tokens": [text.length, text.width]}
        return {"text_encoder": text.name, "sha256": text.sha256, **facts}
    if (network := networks.features) is None:
        return {}
    image = torch.zeros(1, 3, *sides(size), dtype=torch.uint8, device=networks.vae.device)
    vector, tokens = network(image)
    shapes = {"vector": list(vector.shape[1:])}
    if config.feature_tokens:
        shapes["tokens"] = list(tokens.shape[1:])
    return {"network": network.name, "sha256": weights_digest(network), **shapes}


def bytes_of(settings: CacheSettings, vae: Autoencoder) -> dict[str, int]:
    """Returns the sizes in bytes of latents and features in a cache."""
    shapes = {"latents": (1 + vae.has_variance, *settings.latent_shape), **settings.features}
    names = [name for name in ("latents", *FEATURES) if name in shapes]
    values = {name: math.prod(shapes[name]) * settings.views(name) for name in names}
    return {name: 2 * settings.num_images * value for name, value in values.items()}


def encode_view(networks: Networks, images: Tensor) -> dict[str, Tensor]:
    """Encodes images (N, 3, H, W) uint8 to raw posterior and features, in fp16 on the CPU."""
    tensors = {"moments": networks.vae.posterior(images)}  # (N, M, h, w)
    if networks.features is not None:
        tensors |= zip(FEATURES, networks.features(images), strict=True)  # (N, F), (N, T, F)
    return {name: value.half().cpu() for name, value in tensors.items()}


def write_shards(
    config: CacheConfig,
    images: Source,
    settings: CacheSettings,
    shards: dict[Path, range],
    num_done: int,
    networks: Networks,
    bar: tqdm,
) -> None:
    """Encodes and writes the shards one after another. A batch never spans two shards.

    num_done: images of the shards that exist, which count as read
    """
    size, device = config.batch_size, networks.vae.device
    num_unreadable, num_read = 0, num_done
    for path, indices in shards.items():
        keys = [(index, False) for index in indices]
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        tensors: Batch = {}
        unreadable, start = [], 0
        pin = device.type == "cuda"
        for batch, names in read_batches(images, batches, config.num_workers, pin):
            pixels = batch["image"].to(device, non_blocking=True)  # (N, 3, H, W) uint8
            views = [pixels, pixels.flip(-1)] if settings.flip else [pixels]
            seen = [encode_view(networks, view) for view in views]
            stored = seen[0].keys() & set(settings.tensors)
            part = {name: torch.stack([one[name] for one in seen], dim=1) for name in stored}
            if networks.text is not None:
                captions = [(images.captions[index] or [""])[0] for index, _ in keys[start:][:size]]
                part["tokens"] = networks.text.rows(captions).cpu().unsqueeze(1)  # (N, 1, L, F)
            part["labels"] = batch["label"].to(torch.int32)
            part["size"] = torch.stack([batch["size"]] * len(views), dim=1)
            for name, values in part.items():
                whole = tensors.setdefault(name, values.new_empty(len(keys), *values.shape[1:]))
                whole[start : start + size] = values
            start += size
            unreadable += names
            bar.update(len(pixels))
        for name in unreadable:
            bar.write(printable(f"skipped an image that cannot be read: {name}"))
        num_unreadable, num_read = num_unreadable + len(unreadable), num_read + len(keys)
        check_unreadable("--data-path", num_unreadable, num_read)
        write_shard(path, tensors, networks.vae.channels)
        note_saved(path)


def prepare(
    config: CacheConfig, images: Source, networks: Networks
) -> tuple[CacheSettings, dict[Path, range]]:
    """Creates or resumes the cache; returns its settings and its missing shards."""
    folder, features = config.output, describe_features(config, networks, images.image_size)
    with reported_as(f"--shard-images: got {config.shard_images}", ValueError):
        settings = settings_of(
            images, networks.vae, config.precision, config.flip, config.shard_images, features
        )
    sizes = bytes_of(settings, networks.vae)
    parts = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in sizes.items())
    missing = begin_cache(folder, settings)
    write_captions(folder, images.captions)
    if networks.text and len(without := images.captions.missing):
        print_safely(
            f"note: {len(without):,} of {pluralize(len(images), 'image')} have no caption, such as "
            f"{images.name(without[0])}; they are stored as no text"
        )
    for note in size_notes(images):
        print_safely(f"note: {note}")
    if not (sheet := folder / "images.png").exists():
        write_png(contact_sheet(images), sheet)
    print_safely(
        f"{folder}: {pluralize(len(images), 'image')} need {sum(sizes.values()) / 1e9:.3g} GB"
        f"{f' ({parts})' if len(sizes) > 1 else ''}; {len(missing)} of "
        f"{pluralize(len(settings.shards(folder)), 'shard')} to write"
    )
    return settings, missing


def main(config: CacheConfig) -> None:
    if config.feature_tokens and not config.features:
        raise UserError("--feature-tokens: has no effect without --features")
    if config.text_encoder and config.features:
        raise UserError("--text-encoder: cannot be combined with --features")
    import_plugins(config.plugin)
    dist = setup_distributed()
    images = open_on_all(config.data_path, config.image_size or 256, dist)
    if config.text_encoder and not images.captions:
        raise UserError("--text-encoder: got images without captions; see docs/your-data.md")
    load = partial(load_networks, config, dist.device)
    networks = dist.on_main(load) or load()  # the main process first: it may have to download
    settings, missing = dist.from_main(partial(prepare, config, images, networks))
    lock = dist.on_main(partial(lock_cache, config.output, is_main=True)) if missing else None
    if missing and not dist.is_main:
        lock = lock_cache(config.output, is_main=False)
    close_distributed()  # processes are independent from here on, and a barrier could time out
    shards = dict([*missing.items()][dist.rank :: dist.world_size])
    total = sum(map(len, shards.values()))
    num_done = (len(images) - sum(map(len, missing.values()))) // dist.world_size
    with progress(total=total, unit="image", disable=not (dist.is_main and total)) as bar:
        write_shards(config, images, settings, shards, num_done, networks, bar)
    if lock:
        lock.close()


if __name__ == "__main__":
    run_process(lambda: main(parse_args()), "interrupted; the same command goes on")
