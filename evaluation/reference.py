"""What generated images are compared with: statistics, or real images to take them of."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from evaluation.features import EfficientNetLite0Features, InceptionFeatures
from evaluation.images import ImageSet, open_images, shape_of
from evaluation.metrics import METRICS, Statistics, check_counts, collect, load_statistics
from runtime.errors import UserError
from runtime.files import file_digest

NAMES = {"inception": InceptionFeatures.name, "efficientnet-lite0": EfficientNetLite0Features.name}


@dataclass
class Reference:
    """Stored statistics, or images, or (as ADM's reference batches have it) both."""

    path: Path
    stored: Statistics | None
    images: ImageSet | None

    @property
    def count(self) -> int:
        """Images behind the statistics; 0 where the file does not say."""
        return self.stored.count if self.stored else self.images.count

    @property
    def num_features(self) -> int:
        """Images whose own features precision, recall and KID can compare with."""
        if self.stored and "pool" in self.stored.features:
            return len(self.stored.features["pool"])
        return self.images.count if self.images else 0

    def statistics(self, extractor, batch_size: int) -> Statistics:
        """Returns the stored statistics, with those of the images where the file has none."""
        if self.images is None:
            return self.stored
        computed = collect(self.images.batches(batch_size), extractor)
        if self.stored:
            computed.mean.update(self.stored.mean)
            computed.covariance.update(self.stored.covariance)
        return computed

    def describe(self) -> dict:
        digest = file_digest(self.path) if self.path.is_file() else self.images.digest()
        info = self.stored.info if self.stored else {}
        return {"from": str(self.path), "sha256": digest, "num_images": self.count or None, **info}


def open_reference(
    path: Path | None, args: argparse.Namespace, image_size: tuple[int, int]
) -> Reference | None:
    """Opens --reference; UserError when it belongs to another backbone or another image size."""
    if path is None:
        return None
    stored = load_statistics(path) if path.suffix == ".npz" and path.is_file() else None
    if stored is None:
        images = open_images(path, args.resize)
    else:
        backbone = stored.info.get("backbone", InceptionFeatures.name)
        if backbone != NAMES[args.backbone]:
            raise UserError(
                f"--reference {path}: got statistics of {backbone}, expected {NAMES[args.backbone]}"
            )
        images = images_beside_statistics(path) if "pool" not in stored.features else None
    size = images.size if images else tuple(stored.info.get("image_size", image_size))
    if size != tuple(image_size):
        raise UserError(
            f"--reference {path}: got images of {shape_of(size)} pixels, expected "
            f"{shape_of(image_size)} (--resize crops and scales a folder)"
        )
    return Reference(path, stored, images)


def images_beside_statistics(path: Path) -> ImageSet | None:
    """The images of a file that has statistics, if there are any."""
    try:
        return open_images(path)
    except UserError:
        return None


def choose_metrics(
    args: argparse.Namespace, reference: Reference | None, num_images: int
) -> list[str]:
    """Returns --metrics, or all that backbone and reference allow; UserError for an impossible one.

    Of another backbone than Inception: kid and precision_recall, for FID, sFID and the Inception
    score are defined by that network.
    """
    missing = {}
    if args.backbone != "inception":
        missing = dict.fromkeys(
            ("fid", "sfid", "inception_score"), f"--backbone {args.backbone} does not define it"
        )
    if reference is None:
        for metric in ("fid", "sfid", "precision_recall", "kid"):
            missing.setdefault(metric, "there is no --reference")
    else:
        if reference.num_features == 0:
            for metric in ("precision_recall", "kid"):
                missing.setdefault(metric, f"{reference.path} holds no features and no images")
        if reference.images is None and "spatial" not in reference.stored.mean:
            missing.setdefault("sfid", f"{reference.path} holds no spatial statistics")
    for metric in args.metrics or []:
        if metric in missing:
            raise UserError(f"--metrics {metric}: {missing[metric]}")
    metrics = args.metrics or [metric for metric in METRICS if metric not in missing]
    if reference is not None:
        check_counts(
            metrics, num_images, reference.count, reference.num_features, args.kid_subset_size
        )
    return metrics
