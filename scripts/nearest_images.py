"""Finds the training images that are nearest to samples, to see what a model copies.

    mkdir -p data/train data/held-out
    tar -xf assets/emoji/train.tar -C data/train
    tar -xf assets/emoji/held-out.tar -C data/held-out
    python sample.py --ckpt assets/demo-emoji --class-labels person face-smiling \
        --images-per-class 50 --cfg-scale 2.5 --output-dir samples/emoji
    python scripts/nearest_images.py --images samples/emoji --train data/train \
        --held-out data/held-out --output results/nearest

The distance of two images is the cosine distance of their features. Held-out images give the
scale, because the model was not trained on them: samples that are nearer to the training images
than held-out images are copies or simple shapes. nearest.png has one row per sample, with the
nearest training images and the smallest distance. nearest.json has the quantiles of all distances,
and the fraction of the samples whose distance is below the 5% quantile of held-out images.

Shape legend: N samples, T training images, D features, K neighbours
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its folder

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.images import ImageSet, open_images
from evaluation.metrics import collect
from latents.features import FeatureNetwork, load_features
from latents.loading import evenly_spaced
from runtime.errors import UserError, print_safely, run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import flag, parse_config
from sampling.grid import captioned_rows, enlarge, write_png

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)
CLOSE = 0.05  # quantile of the held-out distances below which a sample counts as close
NEIGHBOURS = 4  # columns of the picture after the sample


@dataclass(frozen=True, kw_only=True)
class NearestConfig:
    images: Path = flag(help="samples: a folder of images, or an .npz as evaluate.py writes it")
    train: Path = flag(help="folder of the images that the model was trained on")
    held_out: Path = flag(help="folder of images that no model was trained on")
    resize: int | None = flag(
        None,
        ge=1,
        help="scale and crop the images of --train and --held-out to this many pixels per side",
    )
    rows: int = flag(20, ge=1, help="samples in the picture, evenly spaced")
    backbone: str = flag(
        "efficientnet-lite0", help="feature network: efficientnet-lite0 or timm:MODEL[@PIXELS]"
    )
    batch_size: int = flag(100, ge=1, help="images per pass of the feature network")
    output: Path = flag(help="folder for nearest.png and nearest.json")


def unit_features(images: ImageSet, network: FeatureNetwork, batch_size: int) -> Tensor:
    """Returns the features of images, (N, D), each of length 1."""
    return F.normalize(collect(images, network, batch_size).features["pool"], dim=1)


def nearest(features: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the `count` = K smallest cosine distances (N, K) from features (N, D) to others
    (T, D), and the indices of the nearest others (N, K)."""
    similarity, index = (features @ others.T).topk(count, dim=1)
    return 1 - similarity, index


def read_chosen(images: ImageSet, indices: Tensor) -> Tensor:
    """Reads the images at indices (K,) of a set: uint8 (K, 3, H, W)."""
    return torch.cat([images.read(index, index + 1) for index in indices.tolist()])


def quantiles(distances: Tensor) -> dict[str, float]:
    values = torch.quantile(distances, torch.tensor(QUANTILES))
    return {
        f"{100 * q:g}%": round(value, 4)
        for q, value in zip(QUANTILES, values.tolist(), strict=True)
    }


def parse_args() -> NearestConfig:
    return parse_config(NearestConfig, __doc__)


def main(config: NearestConfig) -> None:
    samples, train, held_out = (
        open_images(config.images),
        open_images(config.train, config.resize),
        open_images(config.held_out, config.resize),
    )
    for name, images in (("--train", train), ("--held-out", held_out)):
        if images.size != samples.size:
            raise UserError(
                f"{name}: got images of {images.size} pixels, expected {samples.size}, the size of "
                "--images; see --resize"
            )
    if train.count < NEIGHBOURS:
        raise UserError(f"--train: got {train.count} images, expected at least {NEIGHBOURS}")
    prepare_output("--output", config.output / "nearest.png")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_features(config.backbone, device, "--backbone")
    sample_features, train_features, held_out_features = (
        unit_features(images, network, config.batch_size) for images in (samples, train, held_out)
    )
    distances, index = nearest(sample_features, train_features, NEIGHBOURS)
    reference = nearest(held_out_features, train_features, 1)[0][:, 0]
    close = (distances[:, 0] < reference.quantile(CLOSE)).float().mean().item()
    result = {
        "backbone": network.name, "samples": samples.count, "train": train.count,
        "held_out": held_out.count, "distance_of_samples": quantiles(distances[:, 0]),
        "distance_of_held_out": quantiles(reference),
        "samples_nearer_than_5%_of_held_out": round(close, 4),
    }  # fmt: skip
    write_durably(config.output / "nearest.json", json.dumps(result, indent=1) + "\n")
    rows = torch.tensor(evenly_spaced(samples.count, config.rows))
    neighbours = read_chosen(train, index[rows].flatten())
    shown = torch.cat([
        read_chosen(samples, rows)[:, None],
        neighbours.unflatten(0, (len(rows), NEIGHBOURS)),
    ], dim=1)  # (rows, 1 + NEIGHBOURS, 3, H, W)  # fmt: skip
    captions = [f"{distance:.3f}" for distance in distances[rows, 0].tolist()]
    headings = ["sample", *(f"nearest {i + 1}" for i in range(NEIGHBOURS))]
    write_png(captioned_rows(enlarge(shown.flatten(0, 1)), captions, headings),
              config.output / "nearest.png")  # fmt: skip
    print_safely(json.dumps(result, indent=1))
    print_safely(f"written: {config.output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
