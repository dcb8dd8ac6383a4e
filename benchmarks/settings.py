"""The flags that the benchmarks of whole models share, and the model that they ask for.

To be imported after `report`, which puts the repository on the path.
"""

import argparse

from checkpoints.checkpoint import config_of
from models import DiT_models, DiTConfig
from moe import EXPERT_BACKENDS
from runtime import options


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    count = options.positive_int
    parser.add_argument("--model", choices=list(DiT_models), default="DiT-S/2")
    parser.add_argument("--num_experts", type=options.count, default=8, help="0: dense")
    parser.add_argument("--num_experts_per_tok", type=count, default=2)
    parser.add_argument("--image-size", type=options.image_size, default=256, help="pixels a side")
    parser.add_argument(
        "--precisions", nargs="+", choices=list(options.DTYPES), default=["fp32", "bf16"]
    )
    parser.add_argument(
        "--backends", nargs="+", choices=list(EXPERT_BACKENDS), default=["loop", "grouped"]
    )
    options.add_bool(parser, "--compile", help="compile each block with torch.compile")


def model_config(args: argparse.Namespace, backend: str) -> DiTConfig:
    """The model of the flags, for latents of an eighth of the image size."""
    return config_of(
        args.model, input_size=args.image_size // 8, num_experts=args.num_experts,
        num_experts_per_tok=args.num_experts_per_tok, expert_backend=backend,
    )  # fmt: skip
