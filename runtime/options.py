"""Command-line flags: those of training, and all that several scripts share."""

import argparse
import math

from diffusion import SAMPLERS
from diffusion.guidance import GUIDANCE_SHAPES
from latents.autoencoder import DEFAULT_VAE
from models import DiT_models
from runtime.devices import DTYPES


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and says the defaults that the help does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default is None or action.default is False or action.default == []
        if says_nothing or action.default == argparse.SUPPRESS or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the script's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)


def parse_training_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses a training command; `defaults` beside the flags has their values when left out."""
    args = parser.parse_args()
    args.defaults = vars(parser.parse_args([]))
    return args


def parse_bool(text: str) -> bool:
    """`--flag True` and `--flag False`, as the published commands write them."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return values[text.lower()]


def add_bool(group, name: str, help: str, default: bool = False) -> None:
    """Adds a flag that is true when bare and takes True or False."""
    group.add_argument(name, type=parse_bool, nargs="?", const=True, default=default, help=help)


def positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def image_size(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected one number of pixels: images are square"
        )
    return int(text)


def count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 0")
    return int(text)


# What a flag that is left out means, unless --finetune's weights or --latents-path's cache says.
MODEL_DEFAULTS = {
    "model": "DiT-XL/2", "num_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "qk_norm": False,
}  # fmt: skip
DATA_DEFAULTS = {"vae_path": DEFAULT_VAE, "image_size": 256}


def fill_flags(args: argparse.Namespace, values: dict) -> None:
    """Gives the flags that the command left out their values, in place."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """What train.py and train_deepspeed.py share: all but the batch size."""
    add_model_flags(parser)
    add_data_flags(parser)
    add_optimization_flags(parser)
    add_run_flags(parser)
    add_saving_flags(parser)
    add_freezing_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add_size_flags(group, MODEL_DEFAULTS)
    group.add_argument(
        "--n-shared-experts", type=count,
        help="width of the shared expert, in units of the model's width"
        + default_of("n_shared_experts", MODEL_DEFAULTS),
    )  # fmt: skip
    group.add_argument(
        "--mlp-type", choices=("swiglu", "gelu"),
        help="experts, or the layers of a dense model; gelu has a bias and is DiT's (default: "
        "swiglu, but gelu for a dense model)",
    )  # fmt: skip
    group.add_argument(
        "--aux-loss-alpha", type=float, default=0.01, help="weight of the balance loss"
    )
    add_bool(
        group, "--qk-norm", help="normalise queries and keys (the published XL and G do)",
        default=None,
    )  # fmt: skip
    group.add_argument(
        "--expert-backend", choices=("grouped", "loop"), default="grouped",
        help="how experts are computed; the result is the same",
    )  # fmt: skip
    group.add_argument(
        "--pretraining_tp", type=int, default=1, help="accepted for published commands; no effect"
    )


def add_size_flags(group, defaults: dict) -> None:
    """What names a model. defaults: what the help says of flags left out, by name."""
    group.add_argument(
        "--model", choices=list(DiT_models),
        help="size and patch size" + default_of("model", defaults),
    )  # fmt: skip
    group.add_argument(
        "--num_experts", type=count,
        help="routed experts of each block, 0 for a dense model"
        + default_of("num_experts", defaults),
    )  # fmt: skip
    group.add_argument(
        "--num_experts_per_tok", type=positive_int,
        help="experts chosen for each token" + default_of("num_experts_per_tok", defaults),
    )  # fmt: skip


def default_of(name: str, defaults: dict) -> str:
    return f" (default: {defaults[name]})" if name in defaults else ""


def add_autoencoder_flags(group, defaults: dict) -> None:
    """What turns images into latents; defaults as in `add_size_flags`."""
    group.add_argument(
        "--vae-path",
        help="AutoencoderKL: a folder in diffusers' format, or a hub id"
        + default_of("vae_path", defaults),
    )
    group.add_argument(
        "--image-size", type=image_size,
        help="pixels a side: a square" + default_of("image_size", defaults),
    )  # fmt: skip


def add_image_flags(
    parser: argparse.ArgumentParser, data_required: bool = False
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path", required=data_required,
        help="folder with one sub-folder of images for each class, or with images and no classes; "
        "datasets:ID[:SPLIT] (a hub id or a folder); or WebDataset shards, DATA-{000..099}.tar",
    )  # fmt: skip
    add_autoencoder_flags(group, DATA_DEFAULTS)
    group.add_argument(
        "--num-workers", type=count, default=4, help="data-loading processes of each rank"
    )
    return group


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = add_image_flags(parser)
    group.add_argument(
        "--latents-path",
        help="folder that cache_latents.py wrote, in place of --data-path: it says --image-size "
        "and --vae-path, and the autoencoder is loaded for sample grids only",
    )
    group.add_argument(
        "--num-classes", type=positive_int,
        help="number of classes (default: as many as the data has)",
    )  # fmt: skip


def add_optimization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    add_bool(group, "--rf", help="rectified flow instead of Gaussian diffusion")
    group.add_argument(
        "--accum_iter", type=positive_int, default=1, help="micro-batches of each optimizer step"
    )
    group.add_argument("--lr", type=float, default=1e-4, help="AdamW learning rate, constant")
    group.add_argument(
        "--warmup-steps", type=count, default=0, help="steps over which --lr is reached linearly"
    )
    group.add_argument("--weight-decay", type=float, default=0.0, help="AdamW weight decay")
    group.add_argument(
        "--grad-clip", type=float, default=0.0, help="largest gradient norm; 0 for no clipping"
    )
    group.add_argument("--ema-decay", type=float, default=0.9999, help="decay of the weights' EMA")
    group.add_argument(
        "--precision", choices=list(DTYPES), default="bf16",
        help="of matrix products; master weights are fp32, fp16 scales the loss",
    )  # fmt: skip
    add_compile_flag(group)
    add_bool(
        group, "--gradient-checkpointing",
        help="recompute each block in the backward pass instead of keeping its activations",
    )  # fmt: skip


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--results-dir", default="results", help="where run folders go")
    group.add_argument(
        "--run-name", help="run folder; default: named by the model and a digest of the settings"
    )
    group.add_argument(
        "--resume",
        help="run folder to go on with, or step folder or weights (published too) to start from; "
        "not needed to go on after an interruption: run the same command again",
    )
    group.add_argument(
        "--finetune", metavar="WEIGHTS",
        help="weights to start from (ours, published, diffusers' DiT; a path or a hub id), which "
        "say what the model is; classes, image size and number of experts may differ",
    )  # fmt: skip
    group.add_argument("--epochs", type=positive_int, default=1400, help="passes over the images")
    group.add_argument("--max-steps", type=positive_int, help="stop there; overrides --epochs")
    group.add_argument("--global-seed", type=count, default=0, help="seed of everything drawn")
    group.add_argument(
        "--max-skipped-steps", type=positive_int, default=10,
        help="stop after so many steps in a row whose loss or gradient was infinite or nan; one "
        "such step is skipped and counted",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=positive_float, default=30.0, metavar="MINUTES",
        help="stop if a process gives no sign of life or stays in one step for so long",
    )  # fmt: skip
    add_bool(
        group, "--deterministic",
        help="use deterministic algorithms alone, slower on a GPU: there the same software on the "
        "same number of the same GPUs then gives the same bits; an operation that has no such "
        "algorithm is an error. On a CPU runs are bit for bit the same without it",
    )  # fmt: skip
    add_bool(group, "--dry-run", help="print model, parameters, memory and steps, and stop")


def add_saving_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logs, checkpoints and samples")
    group.add_argument(
        "--log-every", type=positive_int, default=100, help="steps from one log line to the next"
    )
    group.add_argument(
        "--ckpt-every", type=positive_int, default=50_000,
        help="steps from one checkpoint to the next; the last step is always saved",
    )  # fmt: skip
    group.add_argument(
        "--keep-last", type=positive_int, metavar="N",
        help="delete all but the N newest checkpoints, once a newer one is complete (default: "
        "keep all)",
    )  # fmt: skip
    group.add_argument(
        "--keep-every",
        type=positive_int,
        metavar="M",
        help="with --keep-last: keep those of steps that are multiples of M as well",
    )
    group.add_argument(
        "--num-sample", type=count, default=16, help="images in the sample grids; 0 for none"
    )
    group.add_argument(
        "--sample-every", type=positive_int, default=10_000, help="steps between sample grids"
    )
    group.add_argument(
        "--sample-cfg-scale", type=float, default=4.0, help="guidance scale of the sample grids"
    )


def add_freezing_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--freeze", nargs="+", default=[], metavar="PATTERN",
        help="parameters that stay as they are, such as 'blocks.*.attn.*' x_embedder",
    )  # fmt: skip
    add_bool(group, "--train-router-only", help="train the gates and nothing else")


def channels_to_guide(text: str) -> int | None:
    return None if text == "all" else positive_int(text)


def add_checkpoint_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    group = parser.add_argument_group("model (the checkpoint says; needed for published weights)")
    group.add_argument(
        "--ckpt", required=required,
        help="run folder, step folder, .safetensors, a published .pt file, diffusers' DiT folder, "
        "or a hub id, OWNER/NAME[@REVISION][:FILE]",
    )  # fmt: skip
    add_size_flags(group, {})
    group.add_argument("--num-classes", type=positive_int, help="number of classes")
    add_autoencoder_flags(group, {})
    add_bool(group, "--rf", help="the model was trained with rectified flow", default=None)


def add_sampling_flags(parser: argparse.ArgumentParser, ckpt_required: bool = True) -> None:
    add_checkpoint_flags(parser, required=ckpt_required)
    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--sampler", choices=sorted({name for named in SAMPLERS.values() for name in named}),
        help="for Gaussian diffusion ddpm (default), ddim, dpm-solver++ or unipc; for rectified "
        "flow euler (default), heun, sde, dpm-solver++ or unipc",
    )  # fmt: skip
    group.add_argument(
        "--num-sampling-steps", type=positive_int,
        help="default: ddpm and sde 250, ddim and euler 50, heun, dpm-solver++ and unipc 25; each "
        "step calls the model once, with heun twice",
    )  # fmt: skip
    group.add_argument(
        "--cfg-scale", type=float,
        help="guidance scale; 1 for none, the default of a model without classes (else 1.5)",
    )  # fmt: skip
    group.add_argument(
        "--guided-channels", type=channels_to_guide,
        help="latent channels that guidance acts on, a number or 'all'; default: as published, 3 "
        "for Gaussian diffusion and all for flow",
        default=argparse.SUPPRESS,
    )  # fmt: skip
    group.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 1.0),
        help="times between which guidance acts, 0 for data to 1 for noise; outside it the "
        "unconditional pass is not computed (default: 0 1)",
    )  # fmt: skip
    group.add_argument(
        "--guidance-schedule", choices=list(GUIDANCE_SHAPES), default="constant",
        help="scale - 1 over time: constant, or growing from 0 at noise to twice its value at data",
    )  # fmt: skip
    group.add_argument(
        "--precision", choices=list(DTYPES),
        help="of the model; default: fp32, but fp16 (on a CPU bf16) for XL and G",
    )  # fmt: skip
    add_compile_flag(group)
    group.add_argument("--seed", type=count, default=0, help="image i is drawn from seed + i")
    add_batch_size_flag(group)


def add_compile_flag(group) -> None:
    add_bool(group, "--compile", help="compile each block with torch.compile")


def add_batch_size_flag(group) -> None:
    group.add_argument("--batch-size", type=positive_int, default=32, help="images at a time")


def add_label_flag(group, default: str) -> None:
    group.add_argument(
        "--class-labels", nargs="+", metavar="LABEL",
        help=f"class numbers or names (default: {default})",
    )  # fmt: skip


def add_images_per_class_flag(group, default: int) -> None:
    group.add_argument(
        "--images-per-class", type=positive_int, default=default, help="images of each class"
    )
