r"""Finds the training images that are nearest to samples, to see what a model copies.

    python -m tools.nearest_images --ckpt results/RUN/checkpoints/[0-9]* --cfg-scale 2.5 \
        --train assets/emoji/train.tar --held-out assets/emoji/held-out.tar --output results/nearest

Each checkpoint samples one image of the class of each held-out image. The distance of two images is
the cosine distance of their features. Held-out images give the scale, because the model was not
trained on them: samples that are nearer to the training images than held-out images are copies or
simple shapes. The script prints one row per checkpoint, with the fraction of the samples whose
distance is below the 5% quantile of the held-out images; 5% is the value without copies.

nearest.json has the quantiles of all distances. nearest.webp shows images of the last checkpoint
and held-out images, each with the nearest training images. Both are sorted by distance, so that a
row compares a sample with a held-out image of the same rank.

Shape legend: N samples, as many held-out images, T training images, D features, K neighbours
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from checkpoints.checkpoint import fetch, find_weights
from evaluation.image_sets import ImageSet
from evaluation.metrics import collect
from latents.features import load_features
from latents.image_grid import captioned_rows, enlarge, write_picture
from latents.loading import evenly_spaced
from latents.sources import open_images
from options.parts import Size, convert, option
from runtime.errors import UserError, print_safely, reported_as, run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config
from sampling.generate import parse_labels
from sampling.pipeline import SamplingPipeline, batches, open_pipeline
from sampling.sampling_config import SamplingConfig
from tools.benchmarks.common import markdown

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)
CLOSE = 0.05  # quantile of the held-out distances below which a sample counts as close
NEIGHBOURS = 2  # training images that the picture shows next to each image
COLUMNS = ("images", "training steps", "smallest distance", "5% quantile", "median", "close")


@dataclass(frozen=True, kw_only=True)
class NearestConfig(SamplingConfig):
    ckpt: tuple[str, ...] = option(
        group="checkpoint", metavar="CKPT", help="checkpoints, as for sample.py"
    )
    train: str = option(
        group="images", help="images that the model was trained on, as for train.py --data-path"
    )
    held_out: str = option(help="images that no model was trained on, with classes of the model")
    num_images: int = option(1000, ge=2, help="largest number of held-out images, evenly spaced")
    rows: int = option(20, ge=1, help="rows of the picture")
    backbone: str = option(
        "efficientnet-lite0", help="feature network: efficientnet-lite0 or timm:MODEL[@PIXELS]"
    )
    output: Path = option(help="folder for nearest.webp and nearest.json")


class Neighbours:
    """Images (N), their distances to the training images and the nearest training images (N, K)."""

    def __init__(self, images: ImageSet, features: Tensor, train: ImageSet, train_features: Tensor):
        similarity, self.index = (features @ train_features.T).topk(NEIGHBOURS, dim=1)
        self.images, self.train = images, train
        self.distance = (1 - similarity[:, 0]).clamp_min(0)  # (N,); rounding may give -1e-7

    def quantiles(self) -> dict[str, float]:
        values = self.distance.quantile(torch.tensor(QUANTILES)).tolist()
        return {f"{100 * q:g}%": round(v, 4) for q, v in zip(QUANTILES, values, strict=True)}

    def shown(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns pictures (rows, 1 + K, 3, H, W) of the images at evenly spaced ranks of the
        distance, and these distances (rows,)."""
        chosen = self.distance.argsort()[evenly_spaced(self.images.count, rows)].tolist()
        cells = [
            torch.cat([self.images.read(i, i + 1), *(self.train.read(k, k + 1) for k in nearest)])
            for i, nearest in zip(chosen, self.index[chosen].tolist(), strict=True)
        ]
        return torch.stack(cells), self.distance[chosen]


def open_set(path: str, name: str, size: tuple[int, int], most: int | None = None) -> tuple:
    """Opens up to `most` images of a path; returns the set and the class name of each image."""
    source = open_images(path, convert(size, Size), name)
    chosen = evenly_spaced(len(source), most or len(source))

    def read(start: int, stop: int) -> Tensor:
        return torch.stack([source[i, False][0]["image"] for i in chosen[start:stop]])

    names = [source.classes[label] for label in source.labels[chosen]]
    return ImageSet(len(chosen), size, read), names


def sample_set(pipeline: SamplingPipeline, names: Sequence[str], config: NearestConfig) -> ImageSet:
    """Samples an image of each class name; the seed of image i is --seed + i."""
    labels = parse_labels(names, pipeline.class_names, "--held-out")
    requests = batches(labels, 1, config.seed, config.batch_size)
    images = torch.cat([pipeline.images(labels, seeds) for labels, seeds in requests])
    return ImageSet(len(images), pipeline.image_size, lambda start, stop: images[start:stop])


def open_checkpoint(config: NearestConfig, path: str) -> SamplingPipeline:
    flags = {field.name: getattr(config, field.name) for field in fields(SamplingConfig)}
    return open_pipeline(SamplingConfig(**{**flags, "ckpt": path}))


def parse_args() -> NearestConfig:
    return parse_config(NearestConfig, __doc__)


def main(config: NearestConfig) -> None:
    prepare_output("--output", config.output / "nearest.webp")
    for path in config.ckpt:
        with reported_as(f"--ckpt {path}", UserError):
            find_weights(fetch(path)[0])
    pipeline = open_checkpoint(config, config.ckpt[0])
    size, device = pipeline.image_size, pipeline.vae.device
    train, _ = open_set(config.train, "--train", size)
    held_out, names = open_set(config.held_out, "--held-out", size, config.num_images)
    if train.count < NEIGHBOURS:
        raise UserError(f"--train: got {train.count} images, expected at least {NEIGHBOURS}")
    network = load_features(config.backbone, device, "--backbone")

    def features(images: ImageSet) -> Tensor:  # (N, D), each of length 1
        return F.normalize(collect(images, network, config.batch_size).features["pool"], dim=1)

    train_features = features(train)
    reference = Neighbours(held_out, features(held_out), train, train_features)
    close = reference.distance.quantile(CLOSE)
    result = {"backbone": network.name, "train": train.count, "images": held_out.count}
    result["held_out"], result["checkpoints"] = reference.quantiles(), []
    for path in config.ckpt:
        pipeline = pipeline if path == config.ckpt[0] else open_checkpoint(config, path)
        if pipeline.image_size != size:
            raise UserError(f"--ckpt {path}: got images of {pipeline.image_size}, expected {size}")
        print_safely(f"{path}: sampling {held_out.count} images: {pipeline.describe()}")
        images = sample_set(pipeline, names, config)
        samples = Neighbours(images, features(images), train, train_features)
        fraction = (samples.distance < close).float().mean().item()
        step = pipeline.checkpoint.record.step
        row = {"path": path, "step": step, "close": round(fraction, 4), **samples.quantiles()}
        result["checkpoints"].append(row)
        write_durably(config.output / "nearest.json", json.dumps(result, indent=1) + "\n")
    shown = to_pil_image(picture(samples, reference, config.rows))
    write_picture(config.output / "nearest.webp", shown)
    for line in table(result).splitlines():
        print_safely(line)
    print_safely(f"written: {config.output}")


def picture(samples: Neighbours, held_out: Neighbours, rows: int) -> Tensor:
    """Returns a picture (3, H, W) of samples and held-out images with their neighbours."""
    (ours, distances), (theirs, scale) = samples.shown(rows), held_out.shown(rows)
    captions = [f"{d:.3f} | {s:.3f}" for d, s in zip(distances, scale, strict=True)]
    headings = ["sample", *["nearest"] * NEIGHBOURS, "held-out", *["nearest"] * NEIGHBOURS]
    return captioned_rows(
        enlarge(torch.cat([ours, theirs], dim=1).flatten(0, 1)), captions, headings
    )


def table(result: dict) -> str:
    """Formats a result as a Markdown table."""
    rows = [("held-out images", "", CLOSE, result["held_out"])]
    rows += [(row["path"], row["step"], row["close"], row) for row in result["checkpoints"]]
    lines = [COLUMNS]
    for name, step, close, row in rows:
        numbers = (f"{row[quantile]:.3f}" for quantile in ("0%", "5%", "50%"))
        lines.append([name, str(step), *numbers, f"{close:.1%}"])
    return markdown(lines)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
