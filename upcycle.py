r"""Makes a DiT-MoE of a dense DiT: at step 0 the same function, and experts to train from there.

    python upcycle.py --ckpt results/dense --output results/upcycled --num_experts 8
    python upcycle.py --ckpt DiT-XL-2-256x256.pt --model DiT-XL/2 --output upcycled-xl \
        --num_experts 16 --num_experts_per_tok 4 --split 2 --layers deep-half
    python train.py --finetune results/upcycled --data-path data/fashion-mnist --rf ...

The dense model is ours, the official DiT or diffusers' DiTTransformer2DModel; a path or a hub id.
"""

import argparse
from pathlib import Path

import torch

from checkpoints.checkpoint import (
    MODEL_FILE,
    Checkpoint,
    build_model,
    config_of,
    read_checkpoint,
    save_model,
)
from checkpoints.record import Record
from checkpoints.upcycling import SELECTIONS, select_layers, upcycle
from models import DiT_models, count_parameters
from runtime import options
from runtime.errors import UserError, exit_on_user_error
from runtime.files import check_new_folder
from training.finetune import name_of, origin_of


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    parser.add_argument(
        "--ckpt", required=True, help="the dense model: run, file, diffusers' folder or hub id"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the sparse model")
    parser.add_argument(
        "--model", choices=list(DiT_models), help="size, for weights whose width no preset has"
    )
    parser.add_argument(
        "--num_experts", type=options.positive_int, default=8, help="routed experts of each layer"
    )
    parser.add_argument(
        "--num_experts_per_tok", type=options.positive_int, default=2,
        help="experts chosen for each token",
    )  # fmt: skip
    parser.add_argument(
        "--n-shared-experts", type=options.count, default=2,
        help="width of the shared expert, silent at first, in units of the model's width",
    )  # fmt: skip
    parser.add_argument(
        "--layers", default="all",
        help=f"layers that become sparse: {', '.join(SELECTIONS)}, or numbers such as 6,8,10",
    )  # fmt: skip
    parser.add_argument(
        "--split", type=options.positive_int, default=1,
        help="cut each dense layer into so many parts, an expert each",
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=float, default=0.0,
        help="noise on each copy's matrices, over their standard deviation; 0 keeps the function",
    )  # fmt: skip
    options.add_bool(
        parser, "--renormalize", default=True,
        help="a token's weights sum to 1, which keeps the function; False: the published top-k",
    )  # fmt: skip
    parser.add_argument("--seed", type=options.count, default=0, help="seed of routers and noise")
    return parser.parse_args()


@torch.inference_mode()
def difference(before: Checkpoint, after: Checkpoint) -> float:
    """The relative difference of two models' predictions on a batch of noise."""
    config = before.config
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.in_channels, config.input_size, config.input_size)
    x, t = torch.randn(shape, generator=generator), torch.tensor([0.3, 0.8])
    if before.record.objective != "rectified_flow":
        t = t * 999
    y = torch.tensor([0, config.num_classes - 1])
    want, got = (build_model(checkpoint)(x, t, y)[0] for checkpoint in (before, after))
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def make_sparse(args: argparse.Namespace, dense: Checkpoint) -> Checkpoint:
    """The sparse model that the flags ask for, with what is known of the dense one."""
    try:
        state_dict, config = upcycle(
            dense.state_dict,
            dense.config,
            num_experts=args.num_experts,
            num_experts_per_tok=args.num_experts_per_tok,
            n_shared_experts=args.n_shared_experts,
            layers=select_layers(args.layers, dense.config.depth),
            split=args.split,
            noise=args.noise,
            renormalize=args.renormalize,
            seed=args.seed,
        )
    except ValueError as error:
        raise UserError(f"{args.ckpt}: {error}") from None
    record = Record(
        config=config,
        step=0,
        model=name_of(dense),
        objective=dense.record.objective,
        image_size=dense.record.image_size,
        vae_path=dense.record.vae_path,
        class_names=dense.record.class_names,
        initialized_from=origin_of(None, dense),
    )
    return Checkpoint(args.output / MODEL_FILE, state_dict, record)


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    hints = {"num_heads": config_of(args.model).num_heads} if args.model else {}
    dense = read_checkpoint(args.ckpt, hints)
    check_new_folder("--output", args.output)
    if not args.noise >= 0:
        raise UserError(f"--noise: got {args.noise}, expected 0 or more")
    sparse = make_sparse(args, dense)
    error = difference(dense, sparse)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        save_model(sparse.path, sparse.state_dict, sparse.record)
    except OSError as reason:
        raise UserError(f"--output: cannot write to {args.output} ({reason.strerror})") from None
    total, active = count_parameters(sparse.config)
    before, _ = count_parameters(dense.config)
    print(
        f"{args.output}: {total / 1e6:.1f}M parameters ({active / 1e6:.1f}M active) from "
        f"{before / 1e6:.1f}M, experts in layers {', '.join(map(str, sparse.config.sparse_layers))}"
    )
    kept = "the dense model's function" if error < 1e-5 else "another function than the dense model"
    print(f"{kept}: predictions differ by {error:.1e} of their norm")


if __name__ == "__main__":
    main(parse_args())
