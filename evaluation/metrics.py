"""Metrics on features: torch-fidelity's, at ADM's conventions, and what they need of an image set.

    generated = collect(images, extractor, batch_size=64)
    scores = score(generated, reference, ["fid", "kid"])

Shape legend: N images of the set, M of them whose features are kept, D features
"""

import hashlib
import json
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.images import ImageSet
from latents.autoencoder import weights_digest
from runtime.errors import UserError

METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid")
KEPT_FEATURES = 10_000  # of a reference: as many as ADM's evaluator compares with
SUFFIXES = {"pool": "", "spatial": "_s"}  # of ADM's names
INCEPTION_SPLIT = 5_000  # images of one split of the Inception score, as ADM counts


@dataclass
class Statistics:
    """What the metrics read of an image set.

    mean, covariance: by kind of feature ("pool", "spatial"), (D,) and (D, D), float64
    features: "pool" (M, D) and "logits" (M, 1008), fp32
    info: of what they are: backbone and its digest, image size, digest of the pixels in order
    """

    count: int
    mean: dict[str, np.ndarray] = field(default_factory=dict)
    covariance: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    info: dict = field(default_factory=dict)


@torch.inference_mode()
def collect(images: ImageSet, extractor, batch_size: int, keep: int | None = None) -> Statistics:
    """Passes images through an extractor and gathers their statistics.

    keep: keep the features of that many images, evenly spaced; None keeps those of all
    """
    device = next(extractor.parameters()).device
    keep = min(keep or images.count, images.count)
    kept = set(np.linspace(0, images.count - 1, keep).round().astype(int).tolist())
    statistics, pixels, count = Statistics(images.count), hashlib.sha256(), 0
    total, outer, features = defaultdict(float), defaultdict(float), defaultdict(list)
    for batch in images.batches(batch_size):  # (N, 3, H, W) uint8
        pixels.update(batch.contiguous().numpy())
        chosen = [i for i in range(len(batch)) if count + i in kept]
        for name, rows in extractor.features(batch.to(device)).items():  # (N, D)
            if name != "spatial":
                features[name].append(rows[chosen].float().cpu())
            if name != "logits":
                rows = rows.double()
                total[name] += rows.sum(0)
                outer[name] += rows.T @ rows
        count += len(batch)
    for name in total:
        mean = total[name] / count  # (D,)
        covariance = (outer[name] - count * torch.outer(mean, mean)) / max(count - 1, 1)
        statistics.mean[name] = mean.cpu().numpy()
        statistics.covariance[name] = covariance.cpu().numpy()
    statistics.features = {name: torch.cat(rows) for name, rows in features.items()}
    statistics.info = {
        "backbone": extractor.name,
        "backbone_sha256": weights_digest(extractor),
        "image_size": list(images.size),
        "sha256": pixels.hexdigest(),
    }
    return statistics


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an .npz that `load_statistics` reads, with ADM's names: mu, sigma, mu_s, sigma_s."""
    info = json.dumps({**statistics.info, "count": statistics.count})
    arrays = {"features": statistics.features["pool"].numpy(), "info": np.array(info)}
    for name, mean in statistics.mean.items():
        suffix = SUFFIXES[name]
        arrays |= {f"mu{suffix}": mean, f"sigma{suffix}": statistics.covariance[name]}
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)


def load_statistics(path: Path) -> Statistics | None:
    """Reads the statistics in an .npz, ours or ADM's; None if it holds images alone.

    ADM's reference batches hold mu, sigma, mu_s and sigma_s of the whole set, and 10,000 images.
    Raises UserError for a damaged file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "mu" not in arrays:
                return None
            info = json.loads(str(arrays["info"])) if "info" in arrays else {}
            statistics = Statistics(info.pop("count", 0), info=info)
            for name, suffix in SUFFIXES.items():
                if f"mu{suffix}" in arrays:
                    statistics.mean[name] = arrays[f"mu{suffix}"].astype(np.float64)
                    statistics.covariance[name] = arrays[f"sigma{suffix}"].astype(np.float64)
            if "features" in arrays:
                statistics.features["pool"] = torch.from_numpy(arrays["features"])
        return statistics
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged or not an .npz of statistics ({error})") from None


def score(
    generated: Statistics, reference: Statistics | None, metrics: list[str], kid_subset_size: int
) -> dict[str, float]:
    """Computes metrics by name.

    fid, sfid: Frechet distance of pool and spatial features (Heusel et al. 2017; Nash et al. 2021)
    inception_score: exp of the mean KL, of splits of 5,000 images in order (Salimans et al. 2016)
    precision, recall: 3 neighbours in pool features (Kynkaanniemi et al. 2019)
    kid: polynomial kernel of degree 3, mean and deviation of 100 subsets (Binkowski et al. 2018)
    """
    scores, sets = {}, [generated, reference] if reference else [generated]
    pools = [s.features.get("pool") for s in sets]
    for metric, kind in (("fid", "pool"), ("sfid", "spatial")):
        if metric in metrics:
            moments = [{"mu": s.mean[kind], "sigma": s.covariance[kind]} for s in sets]
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
