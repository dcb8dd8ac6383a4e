"""Counts which experts the tokens of sampled images chose, by class, step and patch position.

    python expert_data.py --ckpt results/RUN --output expert_data.npz
    python heatmap_class.py --data expert_data.npz

Samples --images-per-class images of each class, the same that sample.py draws with the same flags,
and counts the conditional half of every guided batch. Memory does not grow with the images.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from analysis.counts import RoutingCounts, Settings
from analysis.recorder import RoutingRecorder
from diffusion import function_evaluations
from runtime import options
from runtime.errors import UserError, exit_on_user_error
from runtime.files import prepare_output
from sampling.pipeline import SamplingPipeline, batches, open_pipeline, parse_labels


def parse_args() -> argparse.Namespace:
    parser = options.make_parser(__doc__)
    options.add_sampling_flags(parser)
    group = parser.add_argument_group("counts")
    options.add_label_flag(group, default="all")
    options.add_images_per_class_flag(group, default=50)
    group.add_argument(
        "--output", type=Path, default=Path("expert_data.npz"), help="the count tables, an .npz"
    )
    return parser.parse_args()


def count_routing(
    pipeline: SamplingPipeline, requests: list[tuple[int, int]], batch_size: int
) -> RoutingRecorder:
    """Samples every (label, seed) and returns the recorder that counted their choices."""
    recorder = RoutingRecorder(pipeline.model, pipeline.num_steps)
    num_batches = math.ceil(len(requests) / batch_size)
    with recorder:
        for batch in tqdm(
            batches(requests, batch_size), total=num_batches, unit="batch",
            disable=not sys.stderr.isatty(),
        ):  # fmt: skip
            labels, seeds = zip(*batch, strict=True)
            recorder.start_batch(labels)
            latents = pipeline.latents(labels, seeds, callback=recorder.end_step)
            if not latents.isfinite().all():
                raise UserError(
                    "the model's output is not finite, so its routing means nothing: "
                    "try --precision bf16 or fp32"
                )
    return recorder


def settings_of(args: argparse.Namespace, pipeline: SamplingPipeline) -> Settings:
    config = pipeline.model.config
    shape = f"DiT-{config.depth}x{config.hidden_size}/{config.patch_size}"
    name = args.model or pipeline.checkpoint.record.model or shape
    return Settings(
        model=f"{name}-{config.num_experts}E{config.num_experts_per_tok}A",
        objective=pipeline.objective,
        sampler=pipeline.sampler,
        num_steps=pipeline.num_steps,
        cfg_scale=pipeline.cfg_scale,
        seed=args.seed,
        images_per_class=args.images_per_class,
        grid_size=config.input_size // config.patch_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
    )


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    prepare_output("--output", args.output)
    pipeline = open_pipeline(args)
    if not pipeline.model.config.num_experts:
        raise UserError(f"--ckpt: got {args.ckpt}, a dense model, expected one with experts")
    if function_evaluations(pipeline.sampler, pipeline.num_steps) != pipeline.num_steps:
        raise UserError(
            f"--sampler: got {pipeline.sampler}, which calls the model more than once a step, "
            "expected a sampler whose steps are single calls"
        )
    names = pipeline.class_names
    labels = list(range(len(names)))
    if args.class_labels:
        labels = list(dict.fromkeys(parse_labels(args.class_labels, names)))
    repeated = [label for label in labels for _ in range(args.images_per_class)]
    requests = [(label, args.seed + i) for i, label in enumerate(repeated)]

    start = time.perf_counter()
    recorder = count_routing(pipeline, requests, args.batch_size)
    counts = RoutingCounts(
        by_class=recorder.by_class[:, labels].transpose(0, 1).cpu().numpy(),
        by_step=recorder.by_step.transpose(0, 1).cpu().numpy(),
        by_position=recorder.by_position.transpose(0, 1).cpu().numpy(),
        labels=np.array(labels, dtype=np.int64),
        class_names=np.array([names[label] for label in labels]),
        times=recorder.times.cpu().numpy(),
        settings=settings_of(args, pipeline),
    )
    counts.save(args.output)
    s, layers = counts.settings, counts.num_layers
    print(
        f"{counts.total:,} assignments = {len(requests):,} images x {s.num_steps} steps x "
        f"{s.grid_size**2} tokens x {s.num_experts_per_tok} experts x {layers} layers, "
        f"{time.perf_counter() - start:.1f} s: {args.output}"
    )


if __name__ == "__main__":
    main(parse_args())
