"""Images of a checkpoint for evaluation: spread over processes, kept as files, resumed.

Batch k holds images k*B to (k+1)*B - 1 whatever the number of processes, and process r draws the
batches r, r + W, ... An image is drawn from its seed and label alone; that its batch is always the
same one makes it the same bit for bit, since matrix products round by the shapes they are given.

Shape legend: N images, B of a batch, W processes
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import write_png
from torchvision.utils import make_grid
from tqdm import tqdm

from evaluation.images import read_image
from runtime.errors import UserError
from runtime.processes import Distributed
from sampling.pipeline import SamplingPipeline

SETTINGS_FILE = "settings.json"


def labels_of(num_images: int, classes: list[int], scheme: str, seed: int) -> list[int]:
    """The label of each image: by turns ("balanced"), or drawn ("uniform") with a seed.

    The first n labels do not depend on the number of images.
    """
    if scheme == "balanced":
        return [classes[i % len(classes)] for i in range(num_images)]
    drawn = np.random.default_rng(seed).integers(len(classes), size=num_images)
    return [classes[i] for i in drawn]


def image_path(folder: Path, index: int, label: int) -> Path:
    return folder / "images" / f"{index:06d}-class-{label:04d}.png"


def open_folder(folder: Path, settings: dict, dist: Distributed) -> None:
    """Makes the folder of an evaluation; UserError if it was begun with other settings."""
    path = folder / SETTINGS_FILE
    if path.is_file():
        try:
            stored = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}: damaged ({error}), expected the settings of {folder}"
            ) from None
        settings = json.loads(json.dumps(settings))  # tuples are lists there
        differing = [
            f"{name} got {settings.get(name)}, expected {stored.get(name)}"
            for name in sorted(stored.keys() | settings.keys())
            if stored.get(name) != settings.get(name)
        ]
        if differing:
            raise UserError(f"{folder} was begun with other settings: {'; '.join(differing)}")
    elif dist.is_main:
        try:
            (folder / "images").mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(settings, indent=1))
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"--output: cannot write to {folder} ({error.strerror})") from None
    dist.barrier()


def generate_images(
    pipeline: SamplingPipeline,
    folder: Path,
    labels: list[int],
    *,
    seed: int,
    batch_size: int,
    dist: Distributed,
) -> int:
    """Draws the images that `folder` lacks; returns how many this process had to draw.

    Image i is drawn from seed + i. Files get their name when they are whole, and a batch is drawn
    again only if one of its images is missing. Returns when all processes are done.
    """
    drawn = 0
    starts = range(dist.rank * batch_size, len(labels), dist.world_size * batch_size)
    for start in tqdm(starts, disable=not (dist.is_main and sys.stderr.isatty()), unit="batch"):
        indices = range(start, min(start + batch_size, len(labels)))
        paths = [image_path(folder, index, labels[index]) for index in indices]
        if all(path.is_file() for path in paths):
            continue
        batch_labels = [labels[index] for index in indices]
        images = pipeline.images(batch_labels, [seed + index for index in indices])
        for image, path in zip(images, paths, strict=True):
            if not path.is_file():
                write_whole(image, path)
                drawn += 1
    dist.barrier()
    return drawn


def write_whole(image: Tensor, path: Path) -> None:
    """Writes uint8 (3, H, W) under a temporary name, then renames it."""
    temporary = path.with_suffix(".tmp")
    write_png(image, str(temporary))
    temporary.replace(path)


def generated_batches(folder: Path, labels: list[int], batch_size: int) -> Iterator[Tensor]:
    """Yields the images of a finished folder in their order, uint8 (N, 3, H, W)."""
    for start in range(0, len(labels), batch_size):
        stop = min(start + batch_size, len(labels))
        yield torch.stack(
            [read_image(image_path(folder, i, labels[i])) for i in range(start, stop)]
        )


def write_sheet(path: Path, batches: Iterator[Tensor], columns: int) -> None:
    """Writes the first images of the set (ten rows of them) as one picture."""
    images = []
    for batch in batches:
        images.extend(batch)
        if len(images) >= 10 * columns:
            break
    write_png(make_grid(torch.stack(images[: 10 * columns]), nrow=columns), str(path))
