"""Images of a checkpoint for evaluation: spread over processes, kept as files, resumed.

Batch k holds images k*B to (k+1)*B - 1 whatever the number of processes, and process r draws the
batches r, r + W, ... An image is drawn from its seed and label alone. Its batch is always the same
one, so that it is the same bit for bit: matrix products round by the shapes they are given.

Shape legend: N images, B of a batch, W processes
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.io import write_png
from torchvision.utils import make_grid
from tqdm import tqdm

from evaluation.images import ImageSet, image_files, open_images, read_image, write_npz
from runtime.errors import UserError
from runtime.files import write_durably
from runtime.processes import Distributed
from sampling.pipeline import SamplingPipeline


def labels_of(num_images: int, classes: list[int], scheme: str, seed: int) -> list[int]:
    """The label of each image: by turns ("balanced"), or drawn ("uniform") with a seed.

    The first n labels do not depend on the number of images.
    """
    if scheme == "balanced":
        return [classes[i % len(classes)] for i in range(num_images)]
    drawn = np.random.default_rng(seed).integers(len(classes), size=num_images)
    return [classes[i] for i in drawn]


def image_paths(folder: Path, labels: list[int]) -> list[Path]:
    names = (f"{index:06d}-class-{label:04d}.png" for index, label in enumerate(labels))
    return [folder / "images" / name for name in names]


def open_folder(folder: Path, settings: dict, dist: Distributed) -> None:
    """Makes the folder of an evaluation; UserError if it was begun with other settings."""
    path, text = folder / "settings.json", json.dumps(settings, indent=1)
    try:
        stored = json.loads(path.read_bytes()) if path.is_file() else json.loads(text)
        for name, value in json.loads(text).items():
            if stored.get(name) != value:
                raise UserError(f"{path}: got {name} {value}, expected {stored.get(name)}")
        if dist.is_main:
            (folder / "images").mkdir(parents=True, exist_ok=True)
            write_durably(path, text)
    except (OSError, ValueError) as error:
        raise UserError(f"--output: cannot use {folder} ({error})") from None
    dist.barrier()


def generate_images(
    pipeline: SamplingPipeline, paths: list[Path], labels: list[int], *,
    seed: int, batch_size: int, dist: Distributed,
) -> None:  # fmt: skip
    """Draws the images that are not there yet: image i from seed + i, with labels[i].

    Files get their name when they are whole, and a batch is drawn again only if one of its images
    is missing. Returns when all processes are done.
    """
    starts = range(dist.rank * batch_size, len(labels), dist.world_size * batch_size)
    for start in tqdm(starts, disable=not (dist.is_main and sys.stderr.isatty()), unit="batch"):
        batch = paths[start : start + batch_size]
        if all(path.is_file() for path in batch):
            continue
        seeds = range(seed + start, seed + start + len(batch))
        images = pipeline.images(labels[start : start + batch_size], seeds)
        for image, path in zip(images, batch, strict=True):
            if not path.is_file():
                write_png(image, str(path.with_suffix(".tmp")))
                path.with_suffix(".tmp").replace(path)
    dist.barrier()


def gather_images(folder: Path, paths: list[Path], batch_size: int, columns: int) -> ImageSet:
    """Writes samples.npz and sheet.png, ten rows of the first images; returns the set."""
    images = image_files(folder, paths)
    write_npz(folder / "samples.npz", images, batch_size)
    sheet = torch.stack([read_image(path) for path in paths[: 10 * columns]])
    write_png(make_grid(sheet, nrow=columns), str(folder / "sheet.png"))
    return open_images(folder / "samples.npz")
