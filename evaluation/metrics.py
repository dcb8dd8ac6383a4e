"""Metrics on image features, computed by torch-fidelity with the conventions of ADM's evaluator.

Shape legend: N images of a batch, M images whose features are kept, D features, W processes
"""

import contextlib
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.extractors import InceptionFeatures
from evaluation.image_sets import ImageSet, open_image_set
from latents.autoencoder import weights_digest
from latents.loading import evenly_spaced
from options.parts import Size
from runtime.errors import UserError
from runtime.files import open_npz, write_durably
from runtime.processes import ALONE, Distributed
from runtime.progress import progress

KEPT_FEATURES = 10_000  # images of a reference whose features are kept, as in ADM's evaluator
SUFFIXES = {"pool": "", "spatial": "_s"}  # kind of feature -> suffix in the names of its moments
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
INCEPTION_SPLIT = 5_000  # images per split of the Inception score, as in ADM's evaluator


@dataclass
class Statistics:
    """Statistics of an image set, from which the metrics are computed.

    moments: mean mu (D,) and covariance sigma (D, D) of the pool features, mu_s and sigma_s of the
        spatial features, float64; the names are those of ADM's files
    features: "pool" (M, D) and "logits" (M, 1008), fp32
    info: number and size of the images, digest of the images' digests in order, backbone and its
        digest
    """

    moments: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    info: dict = field(default_factory=dict)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Lets all GPUs compute the same features: PyTorch's default for convolutions is TF32."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@torch.inference_mode()
@without_tf32()
def collect(
    images: ImageSet, extractor, batch_size: int, keep: int | None = None,
    dist: Distributed = ALONE,
) -> Statistics:  # fmt: skip
    """Passes images through an extractor and collects their statistics.

    All processes call this function. Each process handles every W-th batch, and all processes
    return the same statistics.

    keep: number of evenly spaced images whose features are kept; None: all
    """
    device, count = next(extractor.parameters()).device, images.count
    kept = set(evenly_spaced(count, keep or count))
    starts = range(dist.rank * batch_size, count, dist.world_size * batch_size)
    total, outer, features = defaultdict(float), defaultdict(float), defaultdict(list)
    digests, order = {}, []  # pixel digests by image; numbers of the images with kept features

    def pass_batches() -> None:
        for start in progress(starts, unit="batch", disable=not dist.is_main):
            batch = images.read(start, min(start + batch_size, count))  # (N, 3, H, W) uint8
            for number, pixels in enumerate(batch.contiguous().numpy(), start):
                digests[number] = hashlib.sha256(pixels).digest()
            chosen = [i for i in range(len(batch)) if start + i in kept]
            order.extend(start + i for i in chosen)
            for name, rows in extractor.features(batch.to(device)).items():  # (N, D)
                if name != "spatial":
                    features[name].append(rows[chosen].float().cpu())
                if name != "logits":
                    rows = rows.double()
                    total[name] += rows.sum(0)
                    outer[name] += rows.T @ rows

    dist.run_on_all(pass_batches)
    statistics = Statistics()
    for name, width in dist.broadcast({name: len(sums) for name, sums in total.items()}).items():
        zeros = torch.zeros(1 + width, width, dtype=torch.float64, device=device)
        local = torch.cat([total[name][None], outer[name]]) if starts else zeros
        sums = dist.sum(local)  # (1 + D, D)
        mean = sums[0] / count  # (D,)
        covariance = (sums[1:] - count * torch.outer(mean, mean)) / max(count - 1, 1)
        statistics.moments[f"mu{SUFFIXES[name]}"] = mean.cpu().numpy()
        statistics.moments[f"sigma{SUFFIXES[name]}"] = covariance.cpu().numpy()
    parts = dist.gather(
        (digests, order, {name: torch.cat(rows) for name, rows in features.items()})
    )
    order = torch.tensor([number for _, numbers, _ in parts for number in numbers]).argsort()
    for name in parts[0][2]:
        rows = torch.cat([rows[name] for _, _, rows in parts if rows])
        statistics.features[name] = rows[order]
    digests = {number: digest for part, _, _ in parts for number, digest in part.items()}
    pixels = hashlib.sha256(b"".join(digests[number] for number in range(count)))
    statistics.info = {
        "num_images": count, "image_size": list(images.size), "sha256": pixels.hexdigest(),
        "backbone": extractor.name, "backbone_sha256": weights_digest(extractor),
    }  # fmt: skip
    if images.is_resized:
        statistics.info["resized"] = True
    return statistics


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an .npz file for `load_statistics`."""
    buffer, info = io.BytesIO(), json.dumps(statistics.info)
    np.savez(buffer, features=statistics.features["pool"], info=info, **statistics.moments)
    write_durably(path, buffer.getvalue())


def load_statistics(path: Path) -> Statistics | None:
    """Reads the statistics in an .npz file, ours or ADM's; None if the file has only images."""
    with open_npz(path, "a complete .npz of statistics") as arrays:
        if "mu" not in arrays:
            return None
        moments = {n: arrays[n].astype(np.float64) for n in MOMENTS if n in arrays}
        statistics = Statistics(moments)
        if "info" in arrays:  # written by `save_statistics`
            statistics.info = json.loads(str(arrays["info"]))
            statistics.features["pool"] = torch.from_numpy(arrays["features"])
    return statistics


def check_reference(path: Path, resize: Size | None) -> None:
    """Checks early that `open_reference` can read the statistics or images there."""
    if path.suffix != ".npz" or load_statistics(path) is None:
        open_image_set(path, resize)


def open_reference(
    path: Path, extractor, image_size: tuple[int, int], resize: Size | None, batch_size: int,
    dist: Distributed = ALONE,
) -> Statistics:  # fmt: skip
    """Returns the statistics of --reference, computing them if the file has images instead.

    ADM's reference batches have the moments of the complete set and 10,000 images, from which the
    features are computed. Statistics without a recorded backbone are taken for Inception's.
    Backbone and image size have to be the extractor's and `image_size`.
    """
    stored = load_statistics(path) if path.suffix == ".npz" and path.is_file() else None
    if stored and (got := stored.info.get("backbone", InceptionFeatures.name)) != extractor.name:
        raise UserError(f"--reference {path}: got statistics of {got}, expected {extractor.name}")
    images = None
    if stored is None:
        images = open_image_set(path, resize)
    elif "pool" not in stored.features:
        with contextlib.suppress(UserError):  # the file has statistics only
            images = open_image_set(path)
    size = images.size if images else tuple(stored.info.get("image_size", image_size))
    if size != image_size:
        raise UserError(
            f"--reference {path}: got images of {size} pixels, expected {image_size} "
            "(--resize crops and scales a folder)"
        )
    if images is None:
        return stored
    reference = collect(images, extractor, batch_size, KEPT_FEATURES, dist)
    if stored:
        reference.moments |= stored.moments
    return reference


def choose_metrics(
    backbone: str, reference: Statistics | None, num_images: int, kid_subset_size: int
) -> list[str]:
    """Returns the metrics that backbone, reference and number of images allow.

    Prints why metrics are skipped. FID, sFID and the Inception score require the Inception network.
    Frechet distances require more images than feature dimensions.
    """
    reference = reference or Statistics()
    count = min(num_images, reference.info.get("num_images", num_images))
    kept = min(num_images, len(reference.features.get("pool", ())))
    images = {"precision_recall": (kept, 4), "kid": (kept, kid_subset_size)}  # got, required
    if backbone == InceptionFeatures.name:
        images["fid"] = (count if "mu" in reference.moments else 0, 2049)
        images["sfid"] = (count if "mu_s" in reference.moments else 0, 2024)
        images["inception_score"] = (num_images, 1)
    if backbone.startswith("timm:"):
        images["fd"] = (count if reference.moments else 0, 1 + len(reference.moments.get("mu", ())))
    for metric, (got, expected) in images.items():
        if got < expected:
            few = f"the smaller set has {got} images, expected at least {expected}"
            none = "requires a --reference with the statistics of this metric"
            print(f"no {metric}: {few if got else none}")
    return [metric for metric, (got, expected) in images.items() if got >= expected]


def score(
    generated: Statistics, reference: Statistics | None, metrics: list[str], kid_subset_size: int
) -> dict[str, float]:
    """Computes metrics by name.

    fid, sfid: Frechet distance of pool and spatial features (Heusel et al. 2017; Nash et al. 2021)
    fd: Frechet distance of another network's features (Stein et al. 2023, arXiv 2306.04675)
    inception_score: exp of the mean KL divergence, averaged over splits of 5,000 consecutive images
        (Salimans et al. 2016)
    precision, recall: 3 nearest neighbours in pool features (Kynkaanniemi et al. 2019)
    kid, kid_std: polynomial kernel of degree 3, mean and standard deviation of 100 subsets
        (Binkowski et al. 2018)
    """
    scores, sets = {}, [generated, reference] if reference else [generated]
    pools = [s.features.get("pool") for s in sets]
    for metric, suffix in (("fid", ""), ("sfid", "_s"), ("fd", "")):
        if metric in metrics:
            moments = [{n: s.moments[n + suffix] for n in ("mu", "sigma")} for s in sets]
            scores[metric] = fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID]
    if "inception_score" in metrics:
        logits = generated.features["logits"]
        splits = max(1, len(logits) // INCEPTION_SPLIT)
        values = isc_features_to_metric(logits, splits=splits, shuffle=False)
        scores["inception_score"] = values["inception_score_mean"]
    if "precision_recall" in metrics:
        options = {"prc_neighborhood": 3, "save_cpu_ram": True, "verbose": False}
        values = prc_features_to_metric(*pools, **options)
        scores["precision"], scores["recall"] = values["precision"], values["recall"]
    if "kid" in metrics:
        values = kid_features_to_metric(*pools, kid_subset_size=kid_subset_size, verbose=False)
        scores["kid"] = values["kernel_inception_distance_mean"]
        scores["kid_std"] = values["kernel_inception_distance_std"]
    return scores
