r"""Measures a checkpoint, or images: FID, sFID, Inception score, precision and recall, KID.

    torchrun --nproc_per_node=8 evaluate.py --ckpt results/RUN --num-images 50000 \
        --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --images samples.npz --reference path/to/real/images
    python evaluate.py --precompute-reference real.npz --images path/to/real/images
    python evaluate.py --ckpt results/RUN --loss --data-path path/to/imagenet/val --num-images 1000

Images are those that sample.py draws with the same flags and seeds. Stopped, it goes on where it
was when run again. What decides the numbers stands beside them in results.json.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffusion import RectifiedFlow, create_diffusion
from evaluation import generation
from evaluation.features import BACKBONES, load_extractor
from evaluation.heldout import held_out_loss, latent_batches
from evaluation.images import ImageSet, open_images, reconstructed
from evaluation.metrics import KEPT_FEATURES, METRICS, collect, save_statistics, score
from evaluation.reference import choose_metrics, open_reference
from latents.autoencoder import (
    DEFAULT_VAE,
    downsampling_of,
    load_autoencoder,
    weights_digest,
)
from latents.cache import CachedLatents
from latents.sources import open_images as open_sources
from runtime.errors import UserError, exit_on_user_error
from runtime.files import file_digest, prepare_output, write_durably
from runtime.flags import flag, parse_config, positive_int
from runtime.processes import Distributed, close_distributed, run_process, setup_distributed
from sampling.config import SamplingConfig
from sampling.pipeline import SamplingPipeline, open_pipeline, parse_labels


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingConfig):
    ckpt: str | None = flag(None, group="model", help="as for sample.py")
    num_images: int = flag(50_000, group="images", type=positive_int, help="how many to draw")
    labels: str = flag(
        "balanced", choices=("balanced", "uniform"), help="classes by turns, or drawn at random"
    )
    class_labels: tuple[str, ...] = flag((), nargs="+", help="class numbers or names; default: all")
    images: Path | None = flag(None, help="score this folder or .npz (arr_0, uint8 NHWC) instead")
    reconstruct: bool = flag(
        False, help="score what the autoencoder (--vae-path) makes of --images: a model's limit"
    )
    output: Path | None = flag(
        None, help="folder of images and results.json; default: results/evaluation-DIGEST"
    )
    reference: Path | None = flag(
        None, group="metrics", help="statistics (.npz, ours or ADM's), or images (folder, .npz)"
    )
    metrics: tuple[str, ...] = flag(
        (), nargs="+", choices=METRICS, help="default: all that can be computed"
    )
    backbone: str = flag("inception", choices=tuple(BACKBONES), help="network of the features")
    inception_weights: Path | None = flag(None, help="torch-fidelity's file; default: downloaded")
    kid_subset_size: int = flag(1000, type=positive_int, help="images of a KID subset")
    resize: int | None = flag(
        None, type=positive_int, help="pixels a side that folders' images get, as in training"
    )
    precompute_reference: Path | None = flag(
        None, metavar="NPZ", help="write the statistics of --images there, and stop"
    )
    loss: bool = flag(
        False, group="held-out loss", help="of the training objective, on held-out images"
    )
    data_path: str | None = flag(None, help="held-out images, as train.py takes them")
    latents_path: str | None = flag(None, help="or their latents, from cache_latents.py")


def drawing_settings(pipeline: SamplingPipeline, config: EvaluateConfig) -> dict:
    """What decides the images: two evaluations with these settings draw the same ones."""
    return {
        "checkpoint_sha256": file_digest(pipeline.checkpoint.path),
        "step": pipeline.checkpoint.record.step,
        "vae_sha256": weights_digest(pipeline.vae),
        **asdict(pipeline.settings),
        "precision": str(next(pipeline.model.parameters()).dtype).removeprefix("torch."),
        "seed": config.seed,
        "labels": config.labels,
        "class_labels": parse_labels(config.class_labels, pipeline.class_names),
    }


def results_folder(config: EvaluateConfig, settings: dict) -> Path:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return config.output or Path("results") / f"evaluation-{digest}"


def write_results(folder: Path, metrics: dict, **decides: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "results.json", json.dumps({"metrics": metrics, **decides}, indent=1))
    for name, value in metrics.items():
        print(f"{name:40} {value}")
    print(f"and what decides them: {folder / 'results.json'}")


def prepare(config: EvaluateConfig, size: tuple, num_images: int, device: torch.device) -> Callable:
    """Checks what the metrics need; returns images -> (metrics, what decides them)."""
    extractor = load_extractor(config.backbone, config.inception_weights, device)
    reference = config.reference and open_reference(
        config.reference, extractor, size, config.resize, config.batch_size
    )
    metrics = choose_metrics(
        config.metrics, extractor.name, reference, num_images, config.kid_subset_size
    )
    suffix = "" if config.backbone == "inception" else f"_{extractor.name}"

    def measure(images: ImageSet) -> tuple[dict[str, float], dict]:
        got = collect(images, extractor, config.batch_size)
        scores = score(got, reference, metrics, config.kid_subset_size)
        return {f"{name}{suffix}": value for name, value in scores.items()}, {
            "num_images": got.count,
            "images": got.info,
            "reference": reference and {"num_images": reference.count, **reference.info},
            "kid_subset_size": config.kid_subset_size,
        }

    return measure


def evaluate_checkpoint(config: EvaluateConfig, dist: Distributed) -> None:
    """Draws the images of --ckpt on all processes; the main one scores them."""
    pipeline = open_pipeline(config)
    settings = drawing_settings(pipeline, config)
    folder = results_folder(config, settings)
    num_classes, size = pipeline.model.config.num_classes, image_size_of(pipeline)
    if dist.is_main:  # what can go wrong with the metrics does so before hours of drawing
        measure = prepare(config, (size, size), config.num_images, dist.device)
    generation.open_folder(folder, settings, dist)
    classes = settings["class_labels"] or list(range(num_classes))
    labels = generation.labels_of(config.num_images, classes, config.labels, config.seed)
    paths = generation.image_paths(folder, labels)
    generation.generate_images(
        pipeline, paths, labels, seed=config.seed, batch_size=config.batch_size, dist=dist
    )
    close_distributed()  # all processes at once: NCCL fails where some leave long before others
    if dist.is_main:
        columns = min(len(classes), 10)
        images = generation.gather_images(folder, paths, config.batch_size, columns)
        scores, decides = measure(images)
        write_results(folder, scores, drawn=settings, measured=decides)


def evaluate_images(config: EvaluateConfig, device: torch.device) -> None:
    """Scores --images, or writes their statistics."""
    images, drawn = open_images(config.images, config.resize), {}
    if path := config.precompute_reference:
        prepare_output("--precompute-reference", path)
        extractor = load_extractor(config.backbone, config.inception_weights, device)
        save_statistics(path, collect(images, extractor, config.batch_size, keep=KEPT_FEATURES))
        print(f"statistics of {images.count:,} images: {path}")
        return
    measure = prepare(config, images.size, images.count, device)
    if config.reconstruct:
        vae = load_autoencoder(config.vae_path or DEFAULT_VAE, device, torch.float32)
        images, drawn = reconstructed(images, vae), {"vae_sha256": weights_digest(vae)}
    scores, decides = measure(images)
    write_results(results_folder(config, decides | drawn), scores, drawn=drawn, measured=decides)


def evaluate_loss(config: EvaluateConfig) -> None:
    """Computes the held-out loss of --ckpt."""
    if (config.data_path is None) == (config.latents_path is None):
        raise UserError("--loss: got no images or two, expected --data-path or --latents-path")
    pipeline = open_pipeline(config)
    if config.latents_path:
        images, vae = CachedLatents(config.latents_path), None
    else:
        images, vae = open_sources(config.data_path, image_size_of(pipeline)), pipeline.vae
    batches = latent_batches(
        images, vae, pipeline.class_names, num_images=config.num_images,
        batch_size=config.batch_size,
    )  # fmt: skip
    is_flow, model = pipeline.settings.objective == "rectified_flow", pipeline.model
    learn_sigma = model.config.learn_sigma
    objective = RectifiedFlow() if is_flow else create_diffusion(learn_sigma=learn_sigma)
    loss = held_out_loss(model, objective, batches, config.seed)
    settings = drawing_settings(pipeline, config)
    decides = {name: settings[name] for name in ("checkpoint_sha256", "step", "precision", "seed")}
    decides |= {"images": config.data_path or config.latents_path}
    write_results(results_folder(config, decides), asdict(loss), decides=decides)


def image_size_of(pipeline: SamplingPipeline) -> int:
    return pipeline.model.config.input_size * downsampling_of(pipeline.vae.config)


def parse_args() -> EvaluateConfig:
    return parse_config(EvaluateConfig, __doc__)


@exit_on_user_error
def main(config: EvaluateConfig) -> None:
    if (config.ckpt is None) == (config.images is None):
        given = "neither" if config.ckpt is None else "both"
        raise UserError(f"got {given} of --ckpt and --images, expected one of them")
    if (config.reconstruct or config.precompute_reference) and config.images is None:
        raise UserError("--reconstruct and --precompute-reference: got no --images")
    dist = setup_distributed()
    try:
        if config.ckpt and not config.loss:
            evaluate_checkpoint(config, dist)
        elif dist.is_main:
            evaluate_loss(config) if config.loss else evaluate_images(config, dist.device)
    finally:
        close_distributed()


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
