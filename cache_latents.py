r"""Encodes images once into the posterior of the autoencoder, for training without encoding.

    python cache_latents.py --data-path data/fashion-mnist --image-size 32 \
        --vae-path assets/vae-fashion-mnist --output data/fashion-mnist-latents
    torchrun --nproc_per_node=8 cache_latents.py --data-path IMAGENET/train --output LATENTS
    python train.py --latents-path LATENTS ...

Mean and log-variance are kept in fp16, of each image and of its mirror image. After an interruption
the same command goes on with the shards that are missing.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from latents.autoencoder import DEFAULT_VAE, load_autoencoder
from latents.cache import CacheSettings, begin_cache, settings_of, write_shard
from latents.config import ImagesConfig
from latents.loading import batches_of, make_loader
from latents.sources import ImageSource, open_images
from runtime.devices import DTYPES
from runtime.errors import counted, printable, say
from runtime.flags import flag, parse_config
from runtime.processes import close_distributed, run_process, setup_distributed
from runtime.progress import progress


@dataclass(frozen=True, kw_only=True)
class CacheConfig(ImagesConfig):
    data_path: str = flag(group="data", help="images, as train.py takes them")
    output: Path = flag(group="cache", help="folder of the cache")
    precision: str = flag("fp32", choices=list(DTYPES), help="of the autoencoder")
    batch_size: int = flag(32, least=1, help="images encoded at a time")
    shard_images: int = flag(4096, least=1, help="images of a file")


def parse_args() -> CacheConfig:
    return parse_config(CacheConfig, __doc__)


def write_shards(
    config: CacheConfig,
    images: ImageSource,
    settings: CacheSettings,
    shards: list[int],
    device: torch.device,
    bar: tqdm,
) -> None:
    """Encodes shards one after the other, each in batches of its own."""
    size = config.batch_size
    vae = load_autoencoder(settings.vae_path, device, DTYPES[config.precision])
    for shard in shards:
        keys = [(place, False) for place in settings.images_of(shard)]
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        loader = make_loader(images, batches, config.num_workers, pin=device.type == "cuda")
        parts, unreadable = [], []
        for batch, names in batches_of(loader):
            pixels = batch["image"].to(vae.device, non_blocking=True)  # (N, 3, H, W) uint8
            views = [pixels, pixels.flip(-1)] if settings.flip else [pixels]
            moments = torch.stack([vae.posterior(view) for view in views], dim=1)
            parts.append(
                {
                    "moments": moments.half().cpu(),  # (N, V, M, h, w)
                    "labels": batch["label"].to(torch.int32),
                    "size": torch.stack([batch["size"]] * len(views), dim=1),
                }
            )
            unreadable += names
            bar.update(len(pixels))
        for name in dict.fromkeys(unreadable):
            bar.write(printable(f"skipped an image that cannot be read: {name}"))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in settings.tensors}
        write_shard(config.output, shard, tensors, vae.channels)


def main(config: CacheConfig) -> None:
    dist, folder = setup_distributed(), config.output
    images = open_images(config.data_path, config.image_size or 256)
    plan = None
    if dist.is_main:
        vae_path = config.vae_path or DEFAULT_VAE
        settings = settings_of(images, vae_path, config.precision, config.flip, config.shard_images)
        plan = settings, begin_cache(folder, settings)
        size = 4 * math.prod(settings.latent_shape) * (2 if config.flip else 1) * len(images)
        say(
            f"{folder}: {counted(len(images), 'image')} take {size / 1e9:.3g} GB; "
            f"{len(plan[1])} of {counted(settings.num_shards, 'shard')} to write"
        )
    settings, missing = dist.broadcast(plan)
    close_distributed()  # processes need each other no more, and a barrier could time out
    shards = missing[dist.rank :: dist.world_size]
    total = sum(len(settings.images_of(shard)) for shard in shards)
    with progress(total=total, unit="image", disable=not dist.is_main) as bar:
        write_shards(config, images, settings, shards, dist.device, bar)


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
