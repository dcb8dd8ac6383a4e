"""Images of a checkpoint for evaluation: generated on all processes, stored as files, resumable.

Batch k holds the images k*B to (k+1)*B - 1 for any number of processes, and process r generates the
batches r, r + W, ... An image depends only on its seed and label. It is bit-identical, because it
is always generated in the same batch: the rounding of matrix products depends on shapes.

Shape legend: N images, B of a batch, W processes
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latents.image_grid import write_png
from runtime.errors import check_same
from runtime.files import prepare_output, read_json, write_durably
from runtime.processes import Distributed
from runtime.progress import progress
from sampling.pipeline import SamplingPipeline


def open_folder(folder: Path, settings: dict, dist: Distributed) -> None:
    """Creates the folder of an evaluation, or checks an existing folder."""
    path, text = folder / "settings.json", json.dumps(settings, indent=1)
    prepare_output("--output", path)
    if path.is_file():
        check_same(f"{folder} was created with other settings", json.loads(text), read_json(path))
    if dist.is_main:
        (folder / "images").mkdir(exist_ok=True)
        write_durably(path, text)
    dist.barrier()


def sample_labels(sampling: str, num_images: int, num_classes: int, seed: int) -> list[int]:
    """Returns labels: with sampling "equal" the classes in turn, with "random" uniform draws."""
    if sampling == "random":
        return np.random.default_rng((seed, 1)).integers(num_classes, size=num_images).tolist()
    return [i % num_classes for i in range(num_images)]


def generate_images(
    pipeline: SamplingPipeline, folder: Path, labels: Sequence[int], *,
    seed: int, batch_size: int, dist: Distributed,
) -> list[Path]:  # fmt: skip
    """Generates the missing images; the seed of image i is seed + i.

    Files are written atomically. A batch is generated again only if one of its images is missing.
    Returns all paths, in order, once all processes are done.
    """
    names = (f"{i:06d}-class-{label:04d}.png" for i, label in enumerate(labels))
    paths = [folder / "images" / name for name in names]
    starts = range(dist.rank * batch_size, len(paths), dist.world_size * batch_size)
    for start in progress(starts, unit="batch", disable=not dist.is_main):
        batch = paths[start : start + batch_size]
        if all(path.is_file() for path in batch):
            continue
        seeds = range(seed + start, seed + start + len(batch))
        images = pipeline.images(labels[start : start + batch_size], seeds)
        for image, path in zip(images, batch, strict=True):
            if not path.is_file():
                write_png(image, path)
    dist.barrier()
    return paths
