r"""Samples images from a DiT-MoE checkpoint, as a grid and, optionally, as one file per image.

    python sample.py --ckpt results/RUN
    python sample.py --ckpt results/RUN --class-labels cat dog --experts
    python sample.py --ckpt results/RUN --prompt "a large red circle" "a small blue square"
    python sample.py --model DiT-XL/2 --ckpt published.pt --vae-path VAE --image-size 256 \
        --cfg-scale 1.5

The checkpoint stores the model config, and flags choose the sampler. An image depends only on its
seed and conditions, not on the rest of the batch, except with --router batch_pool:inference=count.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from options.parts import option
from presets import PRESETS
from runtime.errors import UserError, pluralize, print_safely, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from sampling.sampling_config import CKPT_HELP, SamplingConfig

IMAGENET_LABELS = (207, 360, 387, 974, 88, 979, 417, 279)
MOST_IN_ROW = 400  # images; PNG files are at most a million pixels wide


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    ckpt: str | None = option(None, group="checkpoint", help=CKPT_HELP)
    class_labels: tuple[str, ...] = option(
        (), group="images", metavar="LABEL",
        help="class numbers or names (default: the first 16 classes, or eight of ImageNet)",
    )  # fmt: skip
    images_per_class: int = option(1, ge=1, help="number of images per class, or per prompt")
    output: Path = option(
        Path("samples/sample.png"), suffixes=(".png",),
        help="PNG file of the grid, with at most 400 images per class",
    )  # fmt: skip
    output_dir: Path | None = option(
        None, help="also write each image to this folder, as SEED-class-LABEL.png"
    )
    trajectory: Path | None = option(
        None, suffixes=(".png", ".gif", ".webp"), const=Path("samples/trajectory.png"),
        help="also show how the images of the first batch form, as predicted at each step: a .png "
        "with one row per image, or an animation (.gif or .webp)",
    )  # fmt: skip
    dry_run: bool = option(
        False,
        help="print the memory that the weights need on GPU and host (unquantised, int8 and int4, "
        "with and without --offload) and stop; accepts --model without --ckpt",
    )
    experts: Path | None = option(
        None, suffixes=(".png", ".gif", ".webp"), const=Path("samples/experts.gif"),
        help="also show the expert of each patch while the images form, in the first, middle and "
        "last layer: an animation (.gif or .webp) of up to four images, or a .png of the first one",
    )  # fmt: skip


def parse_args() -> SampleConfig:
    return parse_config(SampleConfig, __doc__)


def print_plan(config: SampleConfig) -> None:
    """Prints the memory that the model of --ckpt, or the preset of --model, needs (--dry-run)."""
    import torch

    from checkpoints import config_of
    from runtime.devices import DTYPES
    from sampling.memory_table import print_memory
    from sampling.pipeline import choose_precision, open_checkpoint
    from sampling.sampling_config import MODEL_FLAGS

    if config.ckpt:
        model = open_checkpoint(config).config
    elif config.model in PRESETS:
        flags = {name: getattr(config, name) for name in MODEL_FLAGS}
        model = config_of(config.model, **{n: v for n, v in flags.items() if v is not None})
    else:
        raise UserError(f"--model: got {config.model}, expected one of {', '.join(PRESETS)}")
    dtype = DTYPES[choose_precision(config.precision, model.hidden_size, torch.device("cuda"))]
    print_memory(model, dtype, config.batch_size * (1 if config.cfg_scale == 1 else 2))


def main(config: SampleConfig) -> None:
    if config.dry_run:
        print_plan(config)
        return
    if not config.ckpt:
        raise UserError("--ckpt: is required, except with --dry-run and --model")
    for name in ("output", "trajectory", "experts"):
        if path := getattr(config, name):
            prepare_output(f"--{name}", path)
    if config.output_dir:
        prepare_output("--output-dir", config.output_dir / "image.png")
    elif config.images_per_class > MOST_IN_ROW:
        got = f"--images-per-class: got {config.images_per_class}"
        raise UserError(f"{got}, expected at most {MOST_IN_ROW} without --output-dir")
    print_safely(f"loading {config.ckpt}")
    # Imported here, so that --help and errors appear at once.
    import torch

    from latents.image_grid import class_captions, file_name, image_grid, write_png
    from runtime.progress import progress
    from sampling.pipeline import batches, open_pipeline

    pipeline = open_pipeline(config)
    names = pipeline.class_names
    classes = pipeline.labels_of(config.class_labels)
    if prompts := pipeline.prompts:  # a row for each
        repeated = [prompt for prompt in prompts for _ in range(config.images_per_class)]
        pipeline = pipeline.prompted(repeated, config.negative_prompt)
        if len(classes) not in (0, 1, len(prompts)):
            got = f"--class-labels: got {len(classes)}"
            raise UserError(f"{got}, expected one, or one for each of {len(prompts)} prompts")
        classes = (classes or [None]) * (len(prompts) if len(classes) < 2 else 1)
    classes = classes or (IMAGENET_LABELS if len(names) == 1000 else range(min(len(names), 16)))
    num_images = len(classes) * config.images_per_class
    print_safely(f"sampling {pluralize(num_images, 'image')}: {pipeline.describe()}")

    pictures = {}  # recorders of the first batch, by output file
    if config.trajectory or config.experts:
        from analysis.pictures import ExpertPicture, Trajectory  # imports matplotlib: a second
    if config.trajectory:
        pictures[config.trajectory] = Trajectory(pipeline.settings.num_steps)
    if config.experts:
        pictures[config.experts] = ExpertPicture(pipeline.model, pipeline.settings.num_steps)

    def watch(state: dict) -> None:
        bar.update()
        for picture in () if images else pictures.values():
            picture(state)

    def name_of(seed: int, label: int | None) -> str:
        return file_name(seed, label or 0, "prompt" if label is None else names[label])

    start, images, captions = time.perf_counter(), [], []
    requests = batches(classes, config.images_per_class, config.seed, config.batch_size)
    if config.output_dir:
        earlier = {path.name for path in config.output_dir.glob("*-class-*.png")}
        pairs = [pair for request in requests for pair in zip(*request, strict=True)]
        replaced = earlier & {name_of(seed, label) for label, seed in pairs}
        if earlier:
            found = f"{config.output_dir} has {pluralize(len(earlier), 'image')} of earlier calls"
            print(f"note: {found}; this call replaces {len(replaced)} of them", flush=True)
    with progress(total=len(requests) * pipeline.settings.num_steps, unit="step") as bar:
        for labels, seeds in requests:
            batch = pipeline.images(labels, seeds, watch)
            images += batch  # each (3, H, W) uint8
            shown = repeated[len(captions) : len(captions) + len(labels)] if prompts else None
            captions += shown or class_captions(pipeline.model, names, labels)
            if config.output_dir:
                for image, label, seed in zip(batch, labels, seeds, strict=True):
                    write_png(image, config.output_dir / name_of(seed, label))
    for path, picture in pictures.items():
        picture.save(path, pipeline, captions)
        if len(picture.shown) < num_images:
            print(f"{path} shows {len(picture.shown)} of {pluralize(num_images, 'image')}")
    in_row = min(config.images_per_class, MOST_IN_ROW)
    shown = [i for i in range(num_images) if i % config.images_per_class < in_row]
    grid = image_grid(torch.stack([images[i] for i in shown]), [captions[i] for i in shown], in_row)
    write_png(grid, config.output)
    paths = ", ".join(map(str, filter(None, (config.output, config.output_dir, *pictures))))
    print(f"{pluralize(num_images, 'image')} in {time.perf_counter() - start:.1f} s: {paths}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
