"""
Writes Fashion-MNIST as a folder of 32x32 RGB PNG images, one sub-folder per class.

    python scripts/prepare_fashion_mnist.py --output data/fashion-mnist

The default input is the 10,000-image test split that ships in assets/fashion-mnist. Images are
zero-padded from 28x28 to 32x32 and the grey channel is repeated three times. The class folders
sort alphabetically, so torchvision's ImageFolder numbers them 0 to 9 in the order of CLASSES.
A file is named after its index in the idx file. To complete an interrupted run, or to check a
finished one, run the same command again.
"""

import argparse
import gzip
import math
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "fashion-mnist"

# The name of each label in the idx file, in the dataset's own order.
LABELS = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
]
CLASSES = sorted(LABELS)


def read_idx(path, num_dims):
    """
    Reads a gzipped idx file of unsigned bytes (http://yann.lecun.com/exdb/mnist).

    Returns a uint8 array with `num_dims` dimensions. Raises ValueError when the file is missing,
    is not gzip, or is not such an idx file.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: got {error}, expected a gzipped idx file") from error
    magic = bytes([0, 0, 8, num_dims])  # two zeros, the code for unsigned byte, dimensions
    header = 4 + 4 * num_dims
    if len(content) < header or content[:4] != magic:
        raise ValueError(f"{path}: got header {content[:4].hex()}, expected idx {magic.hex()}")
    shape = struct.unpack(f">{num_dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: got {len(content) - header} bytes of data, "
            f"expected {math.prod(shape)} for shape {shape}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def read_dataset(images_path, labels_path):
    """
    Reads and cross-checks an image file and its label file.

    Returns images (N, 28, 28) and labels (N,), both uint8. Raises ValueError on bad input.
    """
    images = read_idx(images_path, num_dims=3)
    labels = read_idx(labels_path, num_dims=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(
            f"{images_path}: got images of shape {images.shape[1:]}, expected (28, 28)"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"got {len(images)} images in {images_path} and {len(labels)} labels in "
            f"{labels_path}, expected equal counts"
        )
    if len(labels) and labels.max() >= len(LABELS):
        raise ValueError(
            f"{labels_path}: got label {labels.max()}, expected 0 to {len(LABELS) - 1}"
        )
    return images, labels


def write_png(path, image):
    """Writes image (28, 28) uint8 as a 32x32 RGB PNG; the final name appears only when complete."""
    image = np.pad(image, 2)  # (32, 32)
    image = np.repeat(image[:, :, None], 3, axis=2)  # (32, 32, 3)
    partial = path.with_suffix(".partial")
    Image.fromarray(image).save(partial, format="PNG")
    os.replace(partial, path)


def prepare(images, labels, output):
    """
    Writes every image that the tree under `output` does not have yet.

    Returns the number of files written. Raises ValueError when the tree holds PNG files of
    another data set, for example of the other split.
    """
    output = Path(output)
    paths = [output / LABELS[label] / f"{index:05d}.png" for index, label in enumerate(labels)]
    existing = set(output.glob("*/*.png"))
    foreign = existing.difference(paths)
    if foreign:
        raise ValueError(
            f"{output}: got {len(foreign)} files of another data set, such as "
            f"{min(foreign).relative_to(output)}, expected an empty folder or this data set"
        )
    for name in CLASSES:
        (output / name).mkdir(parents=True, exist_ok=True)
    missing = [index for index, path in enumerate(paths) if path not in existing]
    for index in missing:
        write_png(paths[index], images[index])
    return len(missing)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images",
        default=ASSETS / "t10k-images-idx3-ubyte.gz",
        help="gzipped idx file of images (default: the shipped test split)",
    )
    parser.add_argument(
        "--labels",
        default=ASSETS / "t10k-labels-idx1-ubyte.gz",
        help="gzipped idx file of labels (default: the shipped test split)",
    )
    parser.add_argument(
        "--output",
        default="data/fashion-mnist",
        help="folder that receives the class folders (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(args):
    try:
        images, labels = read_dataset(args.images, args.labels)
        written = prepare(images, labels, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.output}: {len(images)} images in {len(CLASSES)} classes, {written} written")


if __name__ == "__main__":
    main(parse_args())
