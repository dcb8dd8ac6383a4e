"""Metrics on features: torch-fidelity's, at ADM's conventions, and what they need of an image set.

    generated = collect(images.batches(64), extractor)
    scores = score(generated, reference, ["fid", "kid"])

Shape legend: N images of the set, M of them whose features are kept, D features
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from runtime.errors import UserError
from runtime.untrusted import check_zip, open_regular, parse_json, read_npz

METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid")
KEPT_FEATURES = 10_000  # of a reference: as many as ADM's evaluator compares with
STORED = {"mu", "sigma", "mu_s", "sigma_s", "features", "info"}
MAX_BYTES = 2**31  # of stored statistics; ours of Inception have 2**27
INCEPTION_SPLIT = 5_000  # images of one split of the Inception score, as ADM counts


@dataclass
class Statistics:
    """What the metrics read of an image set.

    mean, covariance: by kind of feature ("pool", "spatial"), (D,) and (D, D), float64
    features: "pool" (M, D) and, of generated images, "logits" (N, 1008), fp32
    """

    count: int
    mean: dict[str, np.ndarray] = field(default_factory=dict)
    covariance: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    info: dict = field(default_factory=dict)


class RunningMoments:
    """Mean and covariance of rows that pass by in batches, in float64."""

    def __init__(self):
        self.count, self.total, self.outer = 0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        """Takes rows (N, D)."""
        rows = rows.double()
        if self.count == 0:
            self.offset = rows.mean(0)  # near the mean, so that nothing cancels
        rows = rows - self.offset
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.outer = self.outer + rows.T @ rows

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean (D,) and the covariance (D, D), unbiased as numpy.cov has it."""
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / max(self.count - 1, 1)
        return (mean + self.offset).cpu().numpy(), covariance.cpu().numpy()


@torch.inference_mode()
def collect(batches: Iterable[Tensor], extractor, keep: int | None = None) -> Statistics:
    """Passes uint8 images (N, 3, H, W) through an extractor and gathers their statistics.

    keep: keep the features of that many images, drawn at random with a fixed seed (a reservoir);
        None keeps all of them
    """
    device = next(extractor.parameters()).device
    moments: dict[str, RunningMoments] = {}
    features: dict[str, list[Tensor]] = {"pool": [], "logits": []}
    generator, count = np.random.default_rng(0), 0
    for batch in batches:
        rows = {name: value.float() for name, value in extractor.features(batch.to(device)).items()}
        for name in rows.keys() & {"pool", "spatial"}:
            moments.setdefault(name, RunningMoments()).add(rows[name])
        for name in rows.keys() & features.keys():
            if keep is None:
                features[name].append(rows[name].cpu())
        if keep is not None:
            fill_reservoir(features["pool"], rows["pool"].cpu(), count, keep, generator)
        count += len(batch)
    statistics = Statistics(count)
    for name, running in moments.items():
        statistics.mean[name], statistics.covariance[name] = running.moments()
    join = torch.cat if keep is None else torch.stack
    statistics.features = {name: join(rows) for name, rows in features.items() if rows}
    return statistics


def fill_reservoir(
    kept: list[Tensor], rows: Tensor, count: int, keep: int, generator: np.random.Generator
) -> None:
    """Adds rows number `count` and on to a uniform sample of `keep` rows (Vitter 1985)."""
    for index, row in enumerate(rows, start=count):
        if index < keep:
            kept.append(row.clone())
        elif (place := generator.integers(index + 1)) < keep:
            kept[place] = row.clone()


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an .npz that `load_statistics` reads, with ADM's names: mu, sigma, mu_s, sigma_s."""
    arrays = {"features": statistics.features["pool"].numpy()}
    for name, suffix in (("pool", ""), ("spatial", "_s")):
        if name in statistics.mean:
            arrays[f"mu{suffix}"] = statistics.mean[name]
            arrays[f"sigma{suffix}"] = statistics.covariance[name]
    info = {**statistics.info, "count": statistics.count}
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays, info=np.array(json.dumps(info)))
    temporary.replace(path)


def load_statistics(path: Path) -> Statistics | None:
    """Reads the statistics in an .npz, ours or ADM's; None if it holds images alone.

    ADM's reference batches hold mu, sigma, mu_s and sigma_s of the whole set, and 10,000 images.
    Raises UserError for a damaged file.
    """
    try:
        with open_regular(path) as file:
            names = {name.removesuffix(".npy") for name in check_zip(file, compressed=True)}
        if "mu" not in names:
            return None
        arrays = read_npz(path, names & STORED, MAX_BYTES)
        info = parse_json(str(arrays["info"])) if "info" in arrays else {}
        statistics = Statistics(int(info.get("count", 0)), info=info)
        for name, suffix in (("pool", ""), ("spatial", "_s")):
            if f"mu{suffix}" in arrays:
                statistics.mean[name] = arrays[f"mu{suffix}"].astype(np.float64)
                statistics.covariance[name] = arrays[f"sigma{suffix}"].astype(np.float64)
        if "features" in arrays:
            statistics.features["pool"] = torch.from_numpy(arrays["features"])
        return statistics
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged or not an .npz of statistics ({error})") from None


def check_counts(
    metrics: list[str], generated: int, reference: int, kept: int, kid_subset_size: int
) -> None:
    """Raises UserError for too few images: see the numbers in the messages.

    generated: images to score; reference: images behind the reference's statistics, 0 if unknown;
    kept: reference images whose features are at hand
    """
    smallest = min(generated, reference) if reference else generated
    if "fid" in metrics and smallest <= 2048:
        raise UserError(
            f"fid: got {smallest} images, expected more than 2048, for its covariance has 2048 "
            "dimensions; for fewer: --metrics kid"
        )
    if "sfid" in metrics and smallest <= 2023:
        raise UserError(f"sfid: got {smallest} images, expected more than 2023")
    if "kid" in metrics and min(generated, kept) < kid_subset_size:
        raise UserError(
            f"kid: got {min(generated, kept)} images, expected at least {kid_subset_size}, the "
            "size of its subsets (--kid-subset-size)"
        )
    if "precision_recall" in metrics and min(generated, kept) <= 3:
        raise UserError(
            f"precision_recall: got {min(generated, kept)} images, expected more than 3"
        )


def score(
    generated: Statistics,
    reference: Statistics,
    metrics: list[str],
    *,
    suffix: str = "",
    kid_subset_size: int = 1000,
) -> dict[str, float]:
    """Computes metrics by name; `suffix` marks the numbers of a backbone other than Inception.

    fid, sfid: Frechet distance of pool and spatial features (Heusel et al. 2017; Nash et al. 2021)
    inception_score: exp of the mean KL, of splits of 5,000 images in order (Salimans et al. 2016)
    precision, recall: 3 neighbours in pool features (Kynkaanniemi et al. 2019)
    kid: polynomial kernel of degree 3, mean and deviation of 100 subsets (Binkowski et al. 2018)
    """
    scores = {}
    for metric, kind in (("fid", "pool"), ("sfid", "spatial")):
        if metric in metrics:
            scores[metric] = frechet_distance(generated, reference, kind)
    if "inception_score" in metrics:
        logits = generated.features["logits"]
        splits = max(1, len(logits) // INCEPTION_SPLIT)
        values = isc_features_to_metric(logits, splits=splits, shuffle=False)
        scores["inception_score"] = values["inception_score_mean"]
    if "precision_recall" in metrics:
        values = prc_features_to_metric(
            generated.features["pool"],
            reference.features["pool"],
            prc_neighborhood=3,
            save_cpu_ram=True,
            verbose=False,
        )
        scores["precision"], scores["recall"] = values["precision"], values["recall"]
    if "kid" in metrics:
        values = kid_features_to_metric(
            generated.features["pool"],
            reference.features["pool"],
            kid_subset_size=kid_subset_size,
            verbose=False,
        )
        scores["kid"] = values["kernel_inception_distance_mean"]
        scores["kid_std"] = values["kernel_inception_distance_std"]
    return {f"{name}{suffix}": value for name, value in scores.items()}


def frechet_distance(first: Statistics, second: Statistics, kind: str) -> float:
    """The Frechet distance of two Gaussians with the moments of a kind of feature."""
    moments = [{"mu": s.mean[kind], "sigma": s.covariance[kind]} for s in (first, second)]
    return fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID]
