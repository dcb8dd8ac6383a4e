r"""Evaluates a checkpoint, or images: FID, sFID, Inception score, precision and recall, KID.

    torchrun --nproc_per_node=8 evaluate.py --ckpt results/RUN --num-images 50000 \
        --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --images samples.npz --reference path/to/real/images
    python evaluate.py --precompute-reference real.npz --images path/to/real/images
    python evaluate.py --ckpt results/RUN --loss --data-path path/to/imagenet/val --num-images 1000

With the same flags and seeds, evaluate.py and sample.py generate the same images. After an
interruption, run the same command again to resume. results.json holds the metrics and the settings
that determine them.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from checkpoints import step_folders
from checkpoints.checkpoint import find_weights
from evaluation.extractors import load_extractor
from evaluation.heldout import held_out_loss, latent_batches, open_held_out
from evaluation.image_sets import ImageSet, image_files, open_image_set, reconstructed, write_npz
from evaluation.metrics import (
    KEPT_FEATURES,
    Statistics,
    check_reference,
    choose_metrics,
    collect,
    open_reference,
    save_statistics,
    score,
)
from evaluation.sampled_images import generate_images, open_folder, sample_labels
from latents.autoencoder import DEFAULT_VAE, load_autoencoder
from options.parts import Size, option
from runtime.errors import UserError, print_safely
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config, refuse_idle
from runtime.processes import Distributed, close_distributed, run_process, setup_distributed
from sampling.generate import objective_of
from sampling.pipeline import SamplingPipeline, open_pipeline
from sampling.sampling_config import CKPT_HELP, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingConfig):
    ckpt: str | None = option(None, group="checkpoint", help=CKPT_HELP)
    num_images: int = option(50_000, group="images", ge=1, help="number of images to generate")
    label_sampling: str = option(
        "equal", choices=("equal", "random"),
        help="labels of the images: equal numbers of images per class, or random labels; on "
        "ImageNet, equal gives an FID that is lower by about 0.1",
    )  # fmt: skip
    images: Path | None = option(
        None, help="in place of --ckpt: images to evaluate, a folder or .npz (arr_0, uint8 NHWC)"
    )
    reconstruct: bool = option(
        False, help="evaluate the reconstructions of --images by the autoencoder of --vae-path"
    )
    output: Path | None = option(
        None, help="folder of results.json and the images (default: results/evaluation-RUN-DIGEST)"
    )
    reference: Path | None = option(
        None,
        group="metrics",
        help="real images to compare with: a folder, an .npz of images, or an .npz of statistics "
        "(ours or ADM's)",
    )
    backbone: str = option(
        "inception", metavar="NETWORK",
        help="feature network: inception, efficientnet-lite0 or timm:MODEL[@PIXELS]; for FD-DINOv2 "
        "timm:vit_large_patch14_dinov2.lvd142m@224",
    )  # fmt: skip
    inception_weights: Path | None = option(
        None, help="torch-fidelity's weights of Inception (default: download them)"
    )
    kid_subset_size: int = option(1000, ge=1, help="images per KID subset")
    resize: Size | None = option(
        None, ge=1, help="scale and crop images in folders: pixels per side of a square, or height "
        "and width",
    )  # fmt: skip
    precompute_reference: Path | None = option(
        None,
        metavar="NPZ",
        suffixes=(".npz",),
        help="write the statistics of --images to this file, and stop",
    )
    loss: bool = option(
        False, group="held-out loss", help="compute the training objective on held-out images"
    )
    data_path: str | None = option(
        None, help="held-out images, as for train.py (default: the run's --val-share)"
    )
    latents_path: str | None = option(None, help="cached latents in place of --data-path")


def settings_of(pipeline: SamplingPipeline, config: EvaluateConfig) -> dict:
    """Returns the settings that determine the metrics of a checkpoint."""
    model, record = pipeline.model, pipeline.checkpoint.record
    return {
        **({"batch_size": config.batch_size} if model.depends_on_batch else {}),
        "model": record.to_dict()["config"],
        "training": record.settings,
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "seed": config.seed,
        **pipeline.digests,
    }


def results_folder(config: EvaluateConfig, settings: dict) -> Path:
    """Returns --output, or a folder named after the evaluated path and a digest of all settings."""
    names = ("reference", "num_images", "kid_subset_size", "backbone", "resize")
    flags = [str(getattr(config, name)) for name in names]
    digest = hashlib.sha256(json.dumps([settings, flags], sort_keys=True).encode()).hexdigest()[:8]
    path = str(config.ckpt or config.images).rstrip("/")
    name = re.sub(r"/checkpoints(/\d+(/[^/]*)?)?$", "", path).rpartition("/")[2]
    name = re.sub(r"[^\w.+-]", "-", name)[:100]
    return config.output or Path("results") / f"evaluation-{name}-{digest}"


def write_results(folder: Path, metrics: dict, settings: dict) -> None:
    for name in ("images", "reference"):
        info = settings.get(name)
        if isinstance(info, dict) and info.get("resized"):
            height, width = info["image_size"]
            print(f"--{name}: scaled and cropped to {height} x {width} pixels")
    print(*(f"{name:40} {value}" for name, value in metrics.items()), sep="\n")
    path, results = folder / "results.json", {"metrics": metrics, "settings": settings}
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(results, indent=1))
    print(path)


class Scorer:
    """Feature network and reference statistics, opened on all processes."""

    def __init__(
        self, config: EvaluateConfig, size: tuple[int, int], num_images: int, dist: Distributed
    ):
        self.config, self.dist, self.reference = config, dist, None
        if path := config.reference:  # check the reference before downloading a network
            dist.run_on_all(lambda: check_reference(path, config.resize))
        self.extractor = dist.run_on_all(lambda: open_extractor(config, dist))
        if path:
            self.reference = open_reference(
                path, self.extractor, size, config.resize, config.batch_size, dist
            )
        self.metrics = []
        if dist.is_main:
            self.metrics = choose_metrics(
                self.extractor.name, self.reference, num_images, config.kid_subset_size
            )

    def collect(self, images: ImageSet) -> Statistics:
        """Returns the statistics of images; all processes call it."""
        return collect(images, self.extractor, self.config.batch_size, dist=self.dist)

    def score(self, images: Statistics) -> tuple[dict, dict]:
        """Returns the metrics, and the settings that determine them; called by the main process."""
        reference, subset = self.reference, self.config.kid_subset_size
        scores = score(images, reference, self.metrics, subset)
        if self.config.backbone != "inception":
            scores = {f"{name}_{self.extractor.name}": value for name, value in scores.items()}
        info = {"reference": reference.info} if reference else {}
        return scores, {"images": images.info, **info, "kid_subset_size": subset}


def open_extractor(config: EvaluateConfig, dist: Distributed) -> torch.nn.Module:
    return load_extractor(config.backbone, config.inception_weights, dist.device)


def at_newest_steps(config: EvaluateConfig) -> EvaluateConfig:
    """Names the newest step folders of runs, which may save while they are read; prints the one of
    --ckpt."""
    found = {}
    for name in ("ckpt", "guide_ckpt"):
        path = getattr(config, name)
        if path and step_folders(Path(path)):
            found[name] = str(find_weights(Path(path)).parent)
    if "ckpt" in found:
        print_safely(f"{config.ckpt}: evaluating step {int(Path(found['ckpt']).name):,}")
    return replace(config, **found)


def evaluate_checkpoint(config: EvaluateConfig, dist: Distributed) -> None:
    """Generates the images of --ckpt and collects their statistics, on all processes.

    The main process computes the metrics.
    """
    config = dist.from_main(partial(at_newest_steps, config))
    pipeline = open_pipeline(config)
    sampling = {name: v for name, v in asdict(pipeline.settings).items() if v is not None}
    settings = settings_of(pipeline, config) | sampling
    settings["label_sampling"] = config.label_sampling
    classes = pipeline.model.config.num_classes
    labels = sample_labels(config.label_sampling, config.num_images, classes, config.seed)
    if dist.is_main and config.label_sampling == "equal" and config.num_images % classes:
        print_safely(
            f"note: {config.num_images} images are not equally many of each of the {classes} "
            "classes (--label-sampling random draws the classes)"
        )
    folder, size = results_folder(config, settings), pipeline.image_size
    # Open the scorer first, so that problems with the metrics appear before hours of sampling.
    scorer = Scorer(config, size, config.num_images, dist)
    open_folder(folder, settings, dist)
    paths = generate_images(
        pipeline, folder, labels, seed=config.seed, batch_size=config.batch_size, dist=dist,
    )  # fmt: skip
    images = image_files(folder, paths)
    statistics = scorer.collect(images)
    close_distributed()  # now, because NCCL fails if processes leave at very different times
    if dist.is_main:
        write_npz(folder / "samples.npz", images, config.batch_size)
        metrics, measured = scorer.score(statistics)
        write_results(folder, metrics, settings | measured)


def evaluate_images(config: EvaluateConfig, dist: Distributed) -> None:
    """Evaluates --images or their reconstructions, or writes their statistics."""
    images, settings = dist.run_on_all(lambda: open_image_set(config.images, config.resize)), {}
    if config.reconstruct:
        vae = load_autoencoder(config.vae_path or DEFAULT_VAE, dist.device, torch.float32)
        images, settings = reconstructed(images, vae), {"vae_sha256": vae.weights_sha256}
    if path := config.precompute_reference:
        prepare_output("--precompute-reference", path)
        extractor = dist.run_on_all(lambda: open_extractor(config, dist))
        statistics = collect(images, extractor, config.batch_size, KEPT_FEATURES, dist)
        close_distributed()
        if dist.is_main:
            save_statistics(path, statistics)
            print(f"{path}: statistics of {images.count:,} images")
        return
    scorer = Scorer(config, images.size, images.count, dist)
    statistics = scorer.collect(images)
    close_distributed()
    if dist.is_main:
        metrics, measured = scorer.score(statistics)
        settings |= measured
        write_results(results_folder(config, settings), metrics, settings)


def evaluate_loss(config: EvaluateConfig) -> None:
    """Computes the held-out loss of --ckpt."""
    config = at_newest_steps(config)
    pipeline = open_pipeline(config)
    images, indices, facts = open_held_out(
        pipeline, config.data_path, config.latents_path, config.num_images
    )
    batches = latent_batches(
        images, indices, pipeline.vae, pipeline.class_names, batch_size=config.batch_size
    )
    loss = held_out_loss(pipeline.model, objective_of(pipeline.settings), batches, config.seed)
    facts["objective"] = pipeline.settings.objective
    settings = settings_of(pipeline, config) | facts
    write_results(results_folder(config, settings), asdict(loss), settings)


def check_flags(config: EvaluateConfig) -> None:
    """Refuses contradictory flags and flags without effect."""
    of_samples = (
        "sampler", "num_sampling_steps", "time_shift", "cfg_scale", "guide_ckpt", "guided_channels",
        "guidance_interval", "conditions", "label_sampling",
    )  # fmt: skip
    if (config.ckpt is None) == (config.images is None):
        which = "neither" if config.ckpt is None else "both"
        raise UserError(f"got {which} of --ckpt and --images, expected one of them")
    if config.reference and not config.reference.exists():  # before anything is downloaded
        raise UserError(f"--reference: {config.reference} does not exist")
    if config.loss and config.reference:
        raise UserError("--loss: cannot be combined with --reference")
    if config.images:
        of_model = ("num_images", "loss", "image_size", "ema", "precision", "quantize")
        refuse_idle(config, of_model + of_samples, "without --ckpt")
    else:
        refuse_idle(config, ("reconstruct", "precompute_reference"), "without --images")
    if config.loss:
        of_features = ("backbone", "inception_weights", "kid_subset_size", "resize")
        refuse_idle(config, of_samples + of_features, "with --loss")
    else:
        refuse_idle(config, ("data_path", "latents_path"), "without --loss")
    if config.precompute_reference:
        of_metrics = ("reference", "kid_subset_size", "output")
        refuse_idle(config, of_metrics, "with --precompute-reference")
    if config.images and not config.reconstruct:
        refuse_idle(config, ("vae_path",), "on --images without --reconstruct")


def parse_args() -> EvaluateConfig:
    return parse_config(EvaluateConfig, __doc__)


def main(config: EvaluateConfig) -> None:
    check_flags(config)
    if config.output and (config.images or config.loss):  # samples need a folder of their own
        prepare_output("--output", config.output / "results.json")
    dist = setup_distributed(patience=timedelta(days=7))  # a GPU may be slower than the others
    if dist.is_main:
        print_safely(f"loading {config.ckpt or config.images}")
    if config.images:
        evaluate_images(config, dist)
    elif not config.loss:
        evaluate_checkpoint(config, dist)
    else:
        close_distributed()  # one process is enough for the loss of a thousand images
        if dist.is_main:
            evaluate_loss(config)


if __name__ == "__main__":
    run_process(lambda: main(parse_args()), "interrupted; with --ckpt, the same command goes on")
