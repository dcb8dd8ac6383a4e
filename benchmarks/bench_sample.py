"""Images per second of sampling, autoencoder not counted, by precision and back end.

    python benchmarks/bench_sample.py
    python benchmarks/bench_sample.py --model DiT-XL/2 --batch-size 32 --num-sampling-steps 250 \
        --precisions fp16 bf16

Each row samples one batch with the sampler of sample.py from a model with random weights, with
guidance in one batched pass (the model sees twice the images). Time a step is what a sampler's
number of steps multiplies, so few steps suffice to compare.
"""

import argparse

import torch
from report import print_table, write_json
from timing import best_times

from models import DiT, DiT_models
from moe import EXPERT_BACKENDS
from training import options
from training.checkpoint import config_of
from training.distributed import keep_freed_memory
from training.errors import exit_on_user_error
from training.generate import generate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = options.positive_int
    parser.add_argument("--model", choices=list(DiT_models), default="DiT-S/2")
    parser.add_argument("--num_experts", type=options.count, default=8, help="0: dense")
    parser.add_argument("--num_experts_per_tok", type=count, default=2)
    parser.add_argument("--image-size", type=options.image_size, default=256, help="pixels a side")
    parser.add_argument("--batch-size", type=count, default=2, help="images at a time")
    parser.add_argument("--num-sampling-steps", type=count, default=4)
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="1: no guidance")
    parser.add_argument(
        "--precisions", nargs="+", choices=list(options.DTYPES), default=["fp32", "bf16"]
    )
    parser.add_argument(
        "--backends", nargs="+", choices=list(EXPERT_BACKENDS), default=["loop", "grouped"]
    )
    options.add_bool(parser, "--compile", help="compile each block with torch.compile")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured for each row")
    parser.add_argument("--output", default="results/bench_sample.json", help="where the JSON goes")
    return parser.parse_args()


def measure(args: argparse.Namespace, precision: str, device: torch.device) -> list[dict]:
    functions = {}
    for backend in args.backends:
        config = config_of(
            args.model, input_size=args.image_size // 8, num_experts=args.num_experts,
            num_experts_per_tok=args.num_experts_per_tok, expert_backend=backend,
        )  # fmt: skip
        torch.manual_seed(0)
        model = DiT(**vars(config)).to(device, options.DTYPES[precision]).eval()
        if args.compile:
            model.compile_blocks()
        labels = [i % config.num_classes for i in range(args.batch_size)]
        functions[backend] = lambda model=model, labels=labels: generate(
            model, labels, range(len(labels)), objective="gaussian",
            num_steps=args.num_sampling_steps, cfg_scale=args.cfg_scale, guided_channels=3,
        )  # fmt: skip
    times = best_times(functions, seconds=args.seconds, device=device)
    return [
        {
            "model": args.model,
            "precision": precision,
            "experts": backend,
            "images": args.batch_size,
            "steps": args.num_sampling_steps,
            "ms_per_step": time / args.num_sampling_steps * 1e3,
            "images_per_sec": args.batch_size / time,
            "images_per_sec_at_250": args.batch_size / time * args.num_sampling_steps / 250,
        }
        for backend, time in times.items()
    ]


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    rows = [row for name in args.precisions for row in measure(args, name, device)]
    print_table(rows)
    write_json(args.output, rows, settings=vars(args), device=device)


if __name__ == "__main__":
    main(parse_args())
