"""Writes Fashion-MNIST as 32 x 32 RGB PNG images, one folder per class.

    python -m tools.prepare_fashion_mnist --output data/fashion-mnist

The default images are the 10,000 test images in assets/fashion-mnist. Images of 28 x 28 pixels are
padded with zeros, and files are named after the index. After an interruption, run the same command
again to write the missing files.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from options.parts import option
from runtime.errors import UserError, reported_as, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config

ROOT = Path(__file__).resolve().parents[1]

ASSETS = ROOT / "assets" / "fashion-mnist"
LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle-boot",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    images: Path = option(ASSETS / "t10k-images-idx3-ubyte.gz", help="gzipped idx file of images")
    labels: Path = option(ASSETS / "t10k-labels-idx1-ubyte.gz", help="gzipped idx file of labels")
    output: Path = option(Path("data/fashion-mnist"), help="folder for the class folders")


def parse_args() -> PrepareConfig:
    return parse_config(PrepareConfig, __doc__)


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Reads a gzipped idx file of unsigned bytes (http://yann.lecun.com/exdb/mnist)."""
    message = f"got {path}, expected a gzipped idx file of {num_dims} dimensions"
    with reported_as(message, OSError, EOFError, zlib.error, struct.error, ValueError):
        content = gzip.decompress(path.read_bytes())
        shape = struct.unpack(f">{num_dims}I", content[4 : 4 + 4 * num_dims])
        if content[:4] != bytes([0, 0, 8, num_dims]):  # 8: unsigned bytes
            raise ValueError(f"header {content[:4].hex()}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def main(config: PrepareConfig) -> None:
    images = read_idx(config.images, num_dims=3)  # (N, 28, 28)
    labels = read_idx(config.labels, num_dims=1)  # (N,)
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max() > 9:
        raise UserError(
            f"--images: got {images.shape} and {len(labels)} labels up to {labels.max()}, expected "
            "(N, 28, 28) and N labels up to 9"
        )
    paths = [
        config.output / LABELS[label] / f"{index:05d}.png" for index, label in enumerate(labels)
    ]
    prepare_output("--output", config.output / "images.png")
    existing = set(config.output.glob("*/*.png"))
    if foreign := existing - set(paths):
        raise UserError(
            f"--output: {config.output} has other images, such as {min(foreign)}; expected a new "
            "folder or this data set"
        )
    for name in LABELS:
        (config.output / name).mkdir(parents=True, exist_ok=True)
    for path, image in zip(paths, images, strict=True):
        if path not in existing:
            temporary = path.with_suffix(".tmp")
            pixels = np.repeat(np.pad(image, 2)[:, :, None], 3, axis=2)  # (32, 32, 3)
            Image.fromarray(pixels).save(temporary, format="PNG")
            temporary.replace(path)
    print(f"{config.output}: {len(images)} images in {len(LABELS)} classes")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
