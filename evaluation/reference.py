"""What generated images are compared with: stored statistics, or real images to take them of."""

import contextlib
from pathlib import Path

from evaluation.features import InceptionFeatures
from evaluation.images import open_images
from evaluation.metrics import METRICS, Statistics, collect, load_statistics
from runtime.errors import UserError
from runtime.files import file_digest


def open_reference(
    path: Path, extractor, image_size: tuple[int, int], resize: int | None, batch_size: int
) -> Statistics:
    """Returns the statistics of --reference, computed where the file holds images instead.

    ADM's reference batches hold moments and, beside them, images: those give the features.
    Statistics that do not say their backbone are Inception's. Raises UserError for another backbone
    than the extractor's and for another image size.
    """
    stored = load_statistics(path) if path.suffix == ".npz" and path.is_file() else None
    if stored and (got := stored.info.get("backbone", InceptionFeatures.name)) != extractor.name:
        raise UserError(f"--reference {path}: got statistics of {got}, expected {extractor.name}")
    images = None
    if stored is None:
        images = open_images(path, resize)
    elif "pool" not in stored.features:
        with contextlib.suppress(UserError):  # statistics alone
            images = open_images(path)
    size = images.size if images else tuple(stored.info.get("image_size", image_size))
    if size != tuple(image_size):
        raise UserError(
            f"--reference {path}: got images of {size} pixels, expected {tuple(image_size)} "
            "(--resize crops and scales a folder)"
        )
    if images is not None:
        statistics = collect(images, extractor, batch_size)
        if stored:
            statistics.count = stored.count
            statistics.mean.update(stored.mean)
            statistics.covariance.update(stored.covariance)
        stored = statistics
    if path.is_file():
        stored.info["sha256"] = file_digest(path)
    return stored


def choose_metrics(
    wanted: tuple[str, ...], backbone: str, reference: Statistics | None, num_images: int,
    kid_subset_size: int,
) -> list[str]:  # fmt: skip
    """Returns `wanted`, or all metrics that backbone and reference allow if it is empty.

    Raises UserError for a metric that is wanted and impossible, and for too few images. FID, sFID
    and the Inception score are defined by the Inception network.
    """
    count = min(num_images, reference.count or num_images) if reference else 0
    kept = min(num_images, len(reference.features.get("pool", ()))) if reference else 0
    has_spatial = reference is not None and "spatial" in reference.mean
    enough = {  # images at hand and needed: more than a covariance has dimensions
        "fid": (count, 2049), "sfid": (count if has_spatial else 0, 2024),
        "inception_score": (num_images, 1), "precision_recall": (kept, 4),
        "kid": (kept, kid_subset_size),
    }  # fmt: skip
    possible = METRICS if backbone == InceptionFeatures.name else ("precision_recall", "kid")
    metrics = wanted or [metric for metric in possible if enough[metric][0] > 0]
    for metric in metrics:
        got, expected = enough[metric]
        if metric not in possible:
            raise UserError(f"--metrics {metric}: got backbone {backbone}, expected inception")
        if got < expected:
            raise UserError(
                f"{metric}: got {got} images with a --reference for it, expected at least "
                f"{expected}" + (" (--kid-subset-size)" if metric == "kid" else "")
            )
    return list(metrics)
