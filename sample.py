r"""Samples images from a DiT-MoE checkpoint: a grid, and if asked one file for each image.

    python sample.py --ckpt results/RUN
    python sample.py --model DiT-XL/2 --ckpt published.pt --vae-path VAE --image-size 256 \
        --cfg-scale 1.5

The checkpoint says what the model is; flags choose the sampler. An image depends on its seed and
label alone, not on the batch it is drawn in.
"""

import argparse
import time
from pathlib import Path

import torch
from torchvision.io import write_png
from torchvision.utils import make_grid

from runtime import options
from runtime.errors import UserError, exit_on_user_error
from runtime.files import prepare_output
from sampling.grid import captioned_grid, captioned_rows
from sampling.pipeline import batches, open_pipeline, parse_labels
from sampling.trajectory import Trajectory, trajectory_path

IMAGENET_LABELS = (207, 360, 387, 974, 88, 979, 417, 279)


def default_labels(num_classes: int) -> list[int]:
    """All classes if they are few, well-known ones of ImageNet, else the first ones."""
    if num_classes == 1000:
        return list(IMAGENET_LABELS)
    return list(range(min(num_classes, 16)))


def draw_grid(args: argparse.Namespace, images: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Lays images (N, 3, H, W) out: a row for each label, or with one image of each four a row."""
    if args.images_per_class > 1:
        if args.captions:
            return captioned_rows(images, names[:: args.images_per_class])
        return make_grid(images, nrow=args.images_per_class)
    columns = min(len(images), 4)
    return captioned_grid(images, names, columns) if args.captions else make_grid(images, columns)


def prepare_outputs(args: argparse.Namespace) -> None:
    """Makes the folders of all outputs; UserError before anything is drawn if one is no use."""
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output: got {args.output}, expected a name that ends in .png")
    prepare_output("--output", args.output)
    if args.trajectory:
        prepare_output("--trajectory", args.trajectory)
    if args.output_dir:
        prepare_output("--output-dir", args.output_dir / "image.png")


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    options.add_sampling_flags(parser)
    group = parser.add_argument_group("images")
    options.add_label_flag(group, default="all of at most 16, or eight of ImageNet")
    options.add_images_per_class_flag(group, default=1)
    group.add_argument("--output", type=Path, default=Path("sample.png"), help="the grid, a PNG")
    options.add_bool(group, "--captions", default=True, help="write the classes into the grid")
    group.add_argument(
        "--output-dir", type=Path, help="also write each image there: SEED-class-LABEL.png"
    )
    group.add_argument(
        "--trajectory", type=trajectory_path, nargs="?", const=Path("trajectory.png"),
        help="also show how the first batch was denoised, as predictions of the image: a .png, a "
        "row for each image, or a .gif",
    )  # fmt: skip
    return parser.parse_args()


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    pipeline = open_pipeline(args)
    labels = default_labels(pipeline.model.config.num_classes)
    if args.class_labels:
        labels = parse_labels(args.class_labels, pipeline.class_names)
    prepare_outputs(args)
    labels = [label for label in labels for _ in range(args.images_per_class)]
    requests = [(label, args.seed + i) for i, label in enumerate(labels)]

    trajectory = Trajectory(pipeline.num_steps) if args.trajectory else None
    start, images = time.perf_counter(), []
    for batch in batches(requests, args.batch_size):
        callback = trajectory if trajectory and not images else None
        images.append(pipeline.images(*zip(*batch, strict=True), callback))  # (N, 3, H, W) uint8
        if args.output_dir:
            for image, (label, seed) in zip(images[-1], batch, strict=True):
                write_png(image, str(args.output_dir / f"{seed:06d}-class-{label:04d}.png"))
    if trajectory:
        trajectory.save(args.trajectory, pipeline.vae)
    seconds = time.perf_counter() - start
    grid = draw_grid(args, torch.cat(images), [pipeline.class_names[label] for label in labels])
    write_png(grid, str(args.output))
    where = " and ".join(map(str, filter(None, (args.output, args.output_dir, args.trajectory))))
    print(
        f"{len(labels)} images, {pipeline.sampler} {pipeline.num_steps} steps, guidance "
        f"{pipeline.cfg_scale:g}, {seconds:.1f} s: {where}"
    )


if __name__ == "__main__":
    main(parse_args())
