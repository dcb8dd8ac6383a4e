r"""Measures a checkpoint, or images: FID, sFID, Inception score, precision and recall, KID.

    torchrun --nproc_per_node=8 evaluate.py --ckpt results/RUN --num-images 50000 \
        --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --images samples.npz --reference path/to/real/images
    python evaluate.py --precompute-reference real.npz --images path/to/real/images
    python evaluate.py --ckpt results/RUN --bpd --data-path path/to/imagenet/val --num-images 1000

Images are those that sample.py draws with the same flags and seeds. Stopped, it goes on where it
was when run again. Everything that decides the numbers goes to results.json beside them.
"""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from diffusion import function_evaluations
from evaluation import generation, protocol
from evaluation.features import BACKBONES, load_extractor
from evaluation.images import ImageSet, open_images, reconstructed, write_npz
from evaluation.likelihood import bits_per_dimension
from evaluation.metrics import KEPT_FEATURES, METRICS, collect, save_statistics, score
from evaluation.reference import Reference, choose_metrics, open_reference
from latents.autoencoder import DEFAULT_VAE, downsampling_of, load_autoencoder
from runtime import options
from runtime.digest import weights_digest
from runtime.errors import UserError, exit_on_user_error
from runtime.files import file_digest
from runtime.processes import Distributed, close_distributed, run_process, setup_distributed
from sampling.pipeline import SamplingPipeline, open_pipeline, parse_labels


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--num-images", type=options.positive_int, default=50_000, help="how many to draw"
    )
    group.add_argument(
        "--labels", choices=("balanced", "uniform"), default="balanced",
        help="classes by turns, or drawn at random",
    )  # fmt: skip
    options.add_label_flag(group, default="all")
    group.add_argument(
        "--images", type=Path, help="score this folder or .npz (arr_0, uint8 NHWC) instead"
    )
    options.add_bool(
        group, "--reconstruct",
        help="score what the autoencoder (--vae-path) makes of --images: the best that a model of "
        "its latents can reach",
    )  # fmt: skip
    group.add_argument(
        "--output", type=Path,
        help="folder of images, samples.npz, sheet.png and results.json; default: "
        "results/evaluation-DIGEST, the digest of the settings",
    )  # fmt: skip


def add_metric_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--reference", type=Path,
        help="statistics (.npz, from --precompute-reference or ADM's), or real images (folder, "
        ".npz)",
    )  # fmt: skip
    group.add_argument(
        "--metrics", nargs="+", choices=METRICS, help="default: all that can be computed"
    )
    group.add_argument(
        "--backbone", choices=BACKBONES, default="inception",
        help="network of the features; numbers of another one than Inception are named by it",
    )  # fmt: skip
    group.add_argument(
        "--inception-weights", type=Path, help="torch-fidelity's file; default: its download"
    )
    group.add_argument(
        "--kid-subset-size", type=options.positive_int, default=1000, help="images of a KID subset"
    )
    group.add_argument(
        "--resize", type=options.positive_int, metavar="PIXELS",
        help="crop and scale the images of folders to this size, as training does",
    )  # fmt: skip
    group.add_argument(
        "--precompute-reference", type=Path, metavar="NPZ",
        help="write the statistics of --images there, and stop",
    )  # fmt: skip
    group = parser.add_argument_group("likelihood")
    options.add_bool(group, "--bpd", help="bits per dimension of a Gaussian-diffusion model")
    group.add_argument("--data-path", help="held-out images in class folders, for --bpd")


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    options.add_sampling_flags(parser, ckpt_required=False)
    add_image_flags(parser)
    add_metric_flags(parser)
    return parser.parse_args()


def sampling_settings(pipeline: SamplingPipeline, args: argparse.Namespace) -> dict:
    """What decides the images: two evaluations with these settings draw the same ones."""
    record = pipeline.checkpoint.record
    return {
        "checkpoint_sha256": file_digest(pipeline.checkpoint.path),
        "step": record.step,
        "model": asdict(pipeline.model.config),
        "objective": pipeline.objective,
        "sampler": pipeline.sampler,
        "num_sampling_steps": pipeline.num_steps,
        "function_evaluations": function_evaluations(pipeline.sampler, pipeline.num_steps),
        "cfg_scale": pipeline.cfg_scale,
        "guided_channels": pipeline.guided_channels or "all",
        "guidance_interval": list(pipeline.guidance_interval),
        "guidance_schedule": pipeline.guidance_schedule,
        "precision": str(next(pipeline.model.parameters()).dtype).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "vae": args.vae_path or record.vae_path,
        "vae_sha256": weights_digest(pipeline.vae),
        "vae_precision": str(pipeline.vae.dtype).removeprefix("torch."),
        "seed": args.seed,
        "labels": args.labels,
        "class_labels": parse_labels(args.class_labels, pipeline.class_names)
        if args.class_labels
        else "all",
    }


def digest_of(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def image_size_of(pipeline: SamplingPipeline) -> tuple[int, int]:
    return (pipeline.model.config.input_size * downsampling_of(pipeline.vae.config),) * 2


def draw_images(
    pipeline: SamplingPipeline, folder: Path, settings: dict, args: argparse.Namespace,
    dist: Distributed,
) -> ImageSet | None:  # fmt: skip
    """Draws the images of a checkpoint on all processes; the main one alone goes on from there.

    It writes the .npz and the sheet, and returns the images.
    """
    num_classes = pipeline.model.config.num_classes
    chosen = settings["class_labels"]
    classes = list(range(num_classes)) if chosen == "all" else chosen
    labels = generation.labels_of(args.num_images, classes, args.labels, args.seed)
    drawn = generation.generate_images(
        pipeline, folder, labels, seed=args.seed, batch_size=args.batch_size, dist=dist
    )
    drawn = int(dist.sum(torch.tensor(drawn, device=dist.device)))
    if dist.is_main:
        print(f"{drawn:,} images drawn, {len(labels) - drawn:,} were there: {folder}")
        if args.labels == "balanced" and len(labels) % len(classes):
            print(f"labels are not quite balanced: {len(labels)} images of {len(classes)} classes")
        batches = lambda: generation.generated_batches(folder, labels, args.batch_size)  # noqa: E731
        write_npz(folder / "samples.npz", len(labels), image_size_of(pipeline), batches())
        generation.write_sheet(folder / "sheet.png", batches(), columns=min(len(classes), 10))
    return open_images(folder / "samples.npz") if dist.is_main else None


def measure(
    images: ImageSet, reference: Reference | None, metrics: list[str], extractor,
    args: argparse.Namespace,
) -> dict[str, float]:  # fmt: skip
    """Computes the metrics of images against a reference."""
    statistics = collect(images.batches(args.batch_size), extractor)
    suffix = "" if args.backbone == "inception" else f"_{extractor.name}"
    compared = reference.statistics(extractor, args.batch_size) if reference else None
    return score(statistics, compared, metrics, suffix=suffix, kid_subset_size=args.kid_subset_size)


def metric_settings(
    images: ImageSet, reference: Reference | None, extractor, args: argparse.Namespace
) -> dict:
    """What decides the numbers, given the images."""
    return {
        "images": {"from": images.name, "sha256": images.digest(), "size": list(images.size)},
        "num_images": images.count,
        "reference": reference.describe() if reference else None,
        "resize": f"center crop to {args.resize}" if args.resize else None,
        "backbone": {
            "name": extractor.name,
            "sha256": extractor.weights_digest,
            "input": f"bilinear to {extractor.image_size} x {extractor.image_size}",
        },
        "kid_subsets": {"number": 100, "size": args.kid_subset_size},
        "precision_recall_neighbours": 3,
    }


def write_results(folder: Path, results: dict) -> None:
    """Writes results.json, whole or not at all, and prints the numbers."""
    results = {**results, "versions": protocol.library_versions(), "commit": protocol.commit()}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "results.json.tmp"
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(folder / "results.json")
    for name, value in results["metrics"].items():
        print(f"{name:40} {value:.6g}")
    print(f"all of it: {folder / 'results.json'}")


def evaluate_images(args: argparse.Namespace, device: torch.device) -> None:
    """--images: scores given images."""
    images, autoencoder = open_images(args.images, args.resize), {}
    if args.reconstruct:
        path = args.vae_path or DEFAULT_VAE
        vae = load_autoencoder(path, device, torch.float32)
        images = reconstructed(images, vae)
        weights = weights_digest(vae)
        autoencoder = {"reconstructed_by": {"vae": path, "vae_sha256": weights}}
    reference = open_reference(args.reference, args, images.size)
    metrics = choose_metrics(args, reference, images.count)
    extractor = load_extractor(args.backbone, args.inception_weights, device)
    settings = {**metric_settings(images, reference, extractor, args), **autoencoder}
    folder = args.output or Path("results") / f"evaluation-{digest_of(settings)}"
    values = measure(images, reference, metrics, extractor, args)
    write_results(folder, {"metrics": values, "measurement": settings})


def precompute(args: argparse.Namespace, device: torch.device) -> None:
    """--precompute-reference: writes what `open_reference` reads of --images."""
    images = open_images(args.images, args.resize)
    extractor = load_extractor(args.backbone, args.inception_weights, device)
    statistics = collect(images.batches(args.batch_size), extractor, keep=KEPT_FEATURES)
    statistics.info = {
        "backbone": extractor.name,
        "backbone_sha256": extractor.weights_digest,
        "image_size": list(images.size),
        "resize": args.resize,
        "images_sha256": images.digest(),
    }
    try:
        args.precompute_reference.parent.mkdir(parents=True, exist_ok=True)
        save_statistics(args.precompute_reference, statistics)
    except OSError as error:
        raise UserError(f"--precompute-reference: cannot write ({error})") from None
    print(f"statistics of {statistics.count:,} images: {args.precompute_reference}")


def evaluate_checkpoint(args: argparse.Namespace, dist: Distributed) -> None:
    """--ckpt: draws images and scores them."""
    pipeline = open_pipeline(args)
    settings, reference, metrics, extractor = None, None, [], None
    if dist.is_main:  # whatever can go wrong with the metrics does so before hours of drawing
        settings = sampling_settings(pipeline, args)
        reference = open_reference(args.reference, args, image_size_of(pipeline))
        metrics = choose_metrics(args, reference, args.num_images)
        if metrics:
            extractor = load_extractor(args.backbone, args.inception_weights, dist.device)
    settings = dist.broadcast(settings)
    folder = args.output or Path("results") / f"evaluation-{digest_of(settings)}"
    generation.open_folder(folder, settings, dist)
    images = draw_images(pipeline, folder, settings, args, dist)
    if not dist.is_main:
        return
    results = {"metrics": {}, "images": {**settings, "num_images": args.num_images}}
    results["images"]["batch_size"] = args.batch_size
    results["images"]["processes"] = dist.world_size
    results["images"]["device"] = protocol.device_name(dist.device)
    if metrics:
        results["measurement"] = metric_settings(images, reference, extractor, args)
        results["metrics"] = measure(images, reference, metrics, extractor, args)
    write_results(folder, results)


def evaluate_likelihood(args: argparse.Namespace, dist: Distributed) -> None:
    """--bpd: bounds the likelihood of held-out images."""
    if dist.world_size > 1:
        raise UserError(f"--bpd: got {dist.world_size} processes, expected 1")
    pipeline = open_pipeline(args)
    values = bits_per_dimension(pipeline, args)
    settings = {"checkpoint_sha256": file_digest(pipeline.checkpoint.path), **values}
    folder = args.output or Path("results") / f"likelihood-{digest_of(settings)}"
    numbers = {name: values[name] for name in ("bits_per_dimension", "decoder", "prior")}
    write_results(folder, {"metrics": numbers, "measurement": settings})


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    if (args.ckpt is None) == (args.images is None):
        given = "neither" if args.ckpt is None else "both"
        raise UserError(f"got {given} of --ckpt and --images, expected one of them")
    if args.reconstruct and (args.images is None or args.precompute_reference):
        raise UserError("--reconstruct: expected it with --images to score, and with nothing else")
    if args.precompute_reference and args.images is None:
        raise UserError("--precompute-reference: got no --images, expected a folder or .npz")
    dist = setup_distributed()
    try:
        if args.images:
            if dist.is_main:
                (precompute if args.precompute_reference else evaluate_images)(args, dist.device)
        elif args.bpd:
            evaluate_likelihood(args, dist)
        else:
            evaluate_checkpoint(args, dist)
    finally:
        close_distributed()


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
