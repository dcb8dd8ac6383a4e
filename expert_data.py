r"""Counts the experts of the tokens of sampled images, by class, step and patch position.

    python expert_data.py --ckpt results/RUN
    python expert_report.py --data results/RUN
    python expert_data.py --pipeline HiDream-ai/HiDream-I1-Full --prompts prompts.txt \
        --text-encoder meta-llama/Llama-3.1-8B-Instruct --offload

The script samples --images-per-class images of each class, the same images as sample.py with the
same flags. In a guided batch, only the conditional half is counted. The memory does not depend on
the number of images. With --pipeline, a text-to-image pipeline of diffusers generates an image for
each prompt, by its own scheduler and guidance.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.counts import COUNTS_FILE, RoutingCounts
from analysis.expert_config import (
    BATCH_SIZE,
    ExpertConfig,
    check_source,
    default_file,
)
from options.parts import option
from runtime.errors import print_safely, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config

IMAGES_PER_CLASS = 50  # default with --ckpt


@dataclass(frozen=True, kw_only=True)
class ExpertDataConfig(ExpertConfig):
    class_labels: tuple[str, ...] = option(
        (), group="counts", metavar="LABEL", help="class numbers or names (default: all)"
    )
    images_per_class: int | None = option(
        None, ge=1, help=f"images per class (default: {IMAGES_PER_CLASS}) or prompt (default: 1)"
    )
    output: Path | None = option(
        None, suffixes=(".npz",),
        help=f".npz file of the counts (default: {COUNTS_FILE}, in --ckpt if that is a run folder, "
        "otherwise in results)",
    )  # fmt: skip


def parse_args() -> ExpertDataConfig:
    return parse_config(ExpertDataConfig, __doc__)


def count_checkpoint(config: ExpertDataConfig) -> RoutingCounts:
    from analysis.recorder import count_routing
    from sampling.pipeline import open_pipeline

    pipeline = open_pipeline(config)
    # Names may not be unique.
    labels = pipeline.labels_of(config.class_labels) or range(len(pipeline.class_names))
    images, batch_size = config.images_per_class or IMAGES_PER_CLASS, config.batch_size
    print_safely(f"sampling {images} images per class: {pipeline.describe()}")
    return count_routing(
        pipeline, labels, images, seed=config.seed, batch_size=batch_size or BATCH_SIZE
    )


def count_pipeline(config: ExpertDataConfig) -> RoutingCounts:
    from extras.prompts import count_prompts, describe_prompts, open_prompts

    pipeline, prompts, settings = open_prompts(config, config.images_per_class or 1)
    print_safely(f"sampling {describe_prompts(pipeline, prompts)}")
    counts = count_prompts(pipeline, prompts, settings)
    return replace(counts, settings=counts.settings | {"pipeline": config.pipeline})


def main(config: ExpertDataConfig) -> None:
    check_source(config, of_checkpoints=("class_labels",))
    output = config.output or default_file(config.ckpt, COUNTS_FILE)
    prepare_output("--output", output)
    start = time.perf_counter()
    print_safely(f"loading {config.ckpt or config.pipeline}")
    counts = count_checkpoint(config) if config.ckpt else count_pipeline(config)
    counts.save(output)
    seconds = time.perf_counter() - start
    print(f"{counts.by_class.sum():,} assignments, {seconds:.1f} s: {output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
