r"""Shifts each image of a folder at random, so that the position of a patch says nothing.

    python -m experiments.shifted_images --images data/choosing --output data/choosing-shifted

What leaves at one side comes in at the other: all shifts of rows and columns are equally probable,
so all positions have the same distribution of pixels. The shift of an image depends on its class
and name alone.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import check_new_folder
from runtime.flags import parse_config


@dataclass(frozen=True, kw_only=True)
class ShiftedImagesConfig:
    images: Path = option(help="folder of class folders of .png")
    output: Path = option(help="a new folder for the same classes and names")


def shifted(pixels: np.ndarray, name: str) -> np.ndarray:
    """Rolls an image (h, w, ...) by rows and columns that its name draws."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return np.roll(pixels, generator.integers(0, pixels.shape[:2]), axis=(0, 1))


def main(config: ShiftedImagesConfig) -> None:
    paths = sorted(config.images.glob("*/*.png"))
    if not paths:
        raise UserError(f"--images: got {config.images}, expected folders of .png")
    check_new_folder("--output", config.output)
    for path in paths:
        name = path.relative_to(config.images)
        (config.output / name).parent.mkdir(parents=True, exist_ok=True)
        moved = shifted(np.asarray(Image.open(path)), name.as_posix())
        Image.fromarray(moved).save(config.output / name)


def parse_args() -> ShiftedImagesConfig:
    return parse_config(ShiftedImagesConfig, __doc__)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
