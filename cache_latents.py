r"""Encodes images once into the posterior of the autoencoder, for training without encoding.

    python cache_latents.py --data-path data/fashion-mnist --image-size 32 \
        --vae-path assets/vae-fashion-mnist --output data/fashion-mnist-latents
    torchrun --nproc_per_node=8 cache_latents.py --data-path IMAGENET/train --output LATENTS
    python train.py --latents-path LATENTS ...

Mean and log-variance are kept in fp16, of each image as it is and mirrored. Run the same command
again to go on after an interruption, or to check a finished cache and encode damaged shards anew.
A shard's bytes do not depend on the number of processes. They do on --batch-size as far as matrix
products round by their shapes, at most in the last place of some numbers.
"""

import argparse
from pathlib import Path

from latents import caching
from latents.autoencoder import (
    autoencoder_digest,
    latent_geometry,
    load_autoencoder,
    load_autoencoder_config,
)
from latents.index import Settings
from latents.loading import ImageSource
from latents.sources import open_images
from runtime import options
from runtime.errors import exit_on_user_error
from runtime.processes import Distributed, close_distributed, run_process, setup_distributed


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    options.add_image_flags(parser, data_required=True)
    group = parser.add_argument_group("cache")
    group.add_argument("--output", type=Path, required=True, help="folder of the cache")
    group.add_argument(
        "--precision", choices=list(options.DTYPES), default="fp32", help="of the autoencoder"
    )
    options.add_batch_size_flag(group)
    group.add_argument(
        "--shard-images", type=options.positive_int, default=4096, help="images of a file"
    )
    return parser.parse_args()


def settings_of(args: argparse.Namespace, images: ImageSource, dist: Distributed) -> Settings:
    """What decides the contents of the cache."""
    config = load_autoencoder_config(args.vae_path)
    size, channels = latent_geometry(config, args.image_size)
    return Settings(
        image_size=args.image_size,
        latent_shape=(channels, size, size),
        scaling_factor=config["scaling_factor"],
        shift_factor=config["shift_factor"] or 0.0,
        vae_path=args.vae_path,
        vae_sha256=autoencoder_digest(args.vae_path),
        precision=args.precision,
        classes=tuple(images.classes),
        images=len(images),
        shard_images=args.shard_images,
        source_sha256=dist.broadcast(caching.source_digest(images) if dist.is_main else None),
    )


def describe(folder: Path, settings: Settings, num_missing: int, free: int) -> str:
    """One line on what the cache takes and what of it is to be done."""
    channels, height, width = settings.latent_shape
    whole = settings.images * settings.image_bytes
    return (
        f"{settings.images:,} images at {settings.image_size} take {whole / 1e9:.3g} GB (2 flips x "
        f"mean and log-variance x {channels} x {height} x {width} x 2 bytes) in "
        f"{settings.num_shards} shards: {num_missing} to write to {folder}, "
        f"{free / 1e9:,.0f} GB free there"
    )


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    options.fill_flags(args, options.DATA_DEFAULTS)
    dist, folder = setup_distributed(), args.output
    images = open_images(args.data_path, args.image_size)
    settings = caching.stored_settings(folder, settings_of(args, images, dist))
    kept = caching.finished_shards(folder, settings, dist)
    missing = [place for place in range(settings.num_shards) if place not in kept]
    free = caching.check_disk(folder, settings, missing)
    dist.barrier()  # all have looked at the folder before one changes it
    if dist.is_main:
        print(describe(folder, settings, len(missing), free), flush=True)
        if missing:
            caching.begin(folder, settings, missing)
    dist.barrier()
    if missing:
        caching.check_shared(folder, dist)
        vae = load_autoencoder(args.vae_path, dist.device, options.DTYPES[args.precision])
        caching.write_missing(
            images, vae, folder, settings, missing,
            batch_size=args.batch_size, num_workers=args.num_workers, dist=dist,
        )  # fmt: skip
    if dist.is_main:
        index = caching.finish(folder, settings, kept)
        print(
            f"{folder} is whole: {len(kept)} shards were there and as they should be, "
            f"{len(missing)} written, {len(index.skipped)} images skipped"
        )
    close_distributed()


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
