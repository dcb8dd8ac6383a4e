r"""Images per second of sampling, autoencoder not counted, by precision and back end.

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
from settings import add_model_flags, model_config
from timing import best_times

from models import DiT
from runtime import options
from runtime.devices import keep_freed_memory
from runtime.errors import exit_on_user_error
from sampling.generate import generate


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--batch-size", type=options.positive_int, default=2, help="images at a time"
    )
    parser.add_argument("--num-sampling-steps", type=options.positive_int, default=4)
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="1: no guidance")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured for each row")
    parser.add_argument("--output", default="results/bench_sample.json", help="where the JSON goes")
    return parser.parse_args()


def measure(args: argparse.Namespace, precision: str, device: torch.device) -> list[dict]:
    functions = {}
    for backend in args.backends:
        config = model_config(args, backend)
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
    for backend in args.backends:
        options.check_expert_backend("--backends", backend, device)
    rows = [row for name in args.precisions for row in measure(args, name, device)]
    print_table(rows)
    write_json(args.output, rows, settings=vars(args), device=device)


if __name__ == "__main__":
    main(parse_args())
