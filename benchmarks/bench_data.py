r"""Images per second of training's loader: from images, and from the cache of cache_latents.py.

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --data-path IMAGENET/train --latents-path LATENTS \
        --workers 0 4 8

Rows:
    decode   images off the disk, decoded, cropped and in batches, as training from images has them
    encode   those batches through an autoencoder on the device, without loading
    cached   moments from the page cache, in batches, as training from a cache has them
Training from images needs decode and encode, training from a cache "cached" alone. Without paths
the images are made up (half as wide again as high, 500 x 333, JPEG and PNG) and so is the cache.
Without --vae-path the autoencoder is of Stable Diffusion's shape with random weights: as fast.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from report import print_table, write_json

from latents.autoencoder import encode_moments, load_autoencoder
from latents.cache import CachedLatents, CacheSettings, begin_cache, write_shard
from latents.loading import BatchStream, batches_of, make_loader
from latents.sources import open_images
from runtime import options
from runtime.errors import exit_on_user_error
from runtime.files import file_digest

STABLE_DIFFUSION = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
)


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    parser.add_argument("--data-path", help="as in training; default: made up")
    parser.add_argument("--latents-path", help="a cache; default: made up")
    parser.add_argument("--vae-path", help="default: Stable Diffusion's shape, random weights")
    parser.add_argument("--image-size", type=options.image_size, default=256, help="pixels a side")
    parser.add_argument(
        "--workers", type=options.count, nargs="+", default=[0, 1, 2], help="loading processes"
    )
    parser.add_argument(
        "--batch-size", type=options.positive_int, default=32, help="images of a batch"
    )
    parser.add_argument(
        "--encode-batch-size", type=options.positive_int, default=2, help="images encoded at a time"
    )
    parser.add_argument(
        "--precision", choices=list(options.DTYPES), default="fp32", help="of the autoencoder"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="measured for each row, after a warm-up"
    )
    parser.add_argument(
        "--num-images", type=options.positive_int, default=512, help="of each made-up folder"
    )
    parser.add_argument(
        "--num-latents", type=options.positive_int, default=8192, help="of the made-up cache"
    )
    parser.add_argument("--output", default="results/bench_data.json", help="where the JSON goes")
    return parser.parse_args()


def make_images(root: Path, kind: str, count: int) -> Path:
    """Writes `count` smooth pictures of 500 x 333 pixels with some grain, in one class."""
    folder = root / kind / "class"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 333), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.{kind}")
    return folder.parent


def make_autoencoder(folder: Path) -> Path:
    AutoencoderKL(**STABLE_DIFFUSION).save_pretrained(folder)
    return folder


def make_cache(folder: Path, image_size: int, count: int) -> Path:
    """Writes a cache of random moments in the shape of Stable Diffusion's latents."""
    size = image_size // 8
    settings = CacheSettings(
        image_size=image_size, latent_shape=[4, size, size], scaling_factor=0.18215,
        shift_factor=0.0, vae_path="random", vae_sha256="", precision="fp32", flip=True,
        shard_images=4096, listing={"count": count}, classes=["class"],
    )  # fmt: skip
    for shard in begin_cache(folder, settings):
        shape = (len(settings.images_of(shard)), 2, 8, size, size)
        write_shard(folder, shard, torch.randn(shape).half(), torch.zeros(shape[0]))
    return folder


def loading_speed(dataset, num_workers: int, args: argparse.Namespace) -> float:
    """Images/s of the loader, from its second batch on: the first waits for the workers' start."""
    stream = BatchStream(len(dataset), micro_batch=args.batch_size, end_step=10**9)
    batches = batches_of(make_loader(dataset, stream, num_workers, pin=torch.cuda.is_available()))
    next(batches)
    return args.batch_size * per_second(batches, args.seconds)


def encoding_speed(images: torch.Tensor, vae: AutoencoderKL, seconds: float) -> float:
    """Images/s of the autoencoder's encoder, given a batch (N, 3, H, W) uint8 on its device."""

    def passes() -> Iterator[None]:
        while True:
            encode_moments(vae, images)
            if images.is_cuda:
                torch.cuda.synchronize()
            yield

    rounds = passes()
    next(rounds)
    return len(images) * per_second(rounds, seconds)


def per_second(rounds: Iterator, seconds: float) -> float:
    """How many rounds a second, over some seconds or until there are no more."""
    start = time.perf_counter()
    for count, _ in enumerate(rounds, start=1):
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return count / elapsed
    return count / elapsed


def image_rows(args: argparse.Namespace, scratch: Path, device: torch.device) -> Iterator[dict]:
    """Measures what training from images does: decode, and encode the last folder's images."""
    folders = {args.data_path: args.data_path} if args.data_path else {
        f"made up, {kind}": str(make_images(scratch, kind, args.num_images))
        for kind in ("jpg", "png")
    }  # fmt: skip
    for name, folder in folders.items():
        images = open_images(folder, args.image_size)
        for workers in args.workers:
            speed = loading_speed(images, workers, args)
            yield {"row": "decode", "source": name, "workers": workers, "images_per_sec": speed}
    vae_path = args.vae_path or make_autoencoder(scratch / "vae")
    vae = load_autoencoder(str(vae_path), device, options.DTYPES[args.precision])
    batch = torch.stack([images[i, False][0] for i in range(args.encode_batch_size)]).to(device)
    speed = encoding_speed(batch, vae, args.seconds)
    source = f"{args.precision}, batches of {args.encode_batch_size}"
    yield {"row": "encode", "source": source, "images_per_sec": speed}


def cache_rows(args: argparse.Namespace, scratch: Path) -> Iterator[dict]:
    """Measures what training from a cache does: shuffled reading."""
    folder = Path(args.latents_path or make_cache(scratch / "l", args.image_size, args.num_latents))
    for path in folder.glob("*.safetensors"):
        file_digest(path)  # reads all of it into the page cache
    for workers in args.workers:
        speed = loading_speed(CachedLatents(folder), workers, args)
        yield {"row": "cached", "workers": workers, "images_per_sec": speed}


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        rows = [*image_rows(args, Path(scratch), device), *cache_rows(args, Path(scratch))]
    print_table(rows)
    write_json(args.output, rows, settings=vars(args), device=device)


if __name__ == "__main__":
    main(parse_args())
