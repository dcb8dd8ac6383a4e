"""Counts the experts of the tokens of sampled images, by class, step and patch position.

    python expert_data.py --ckpt results/RUN
    python heatmap_class.py --data results/RUN

The script samples --images-per-class images of each class, the same images as sample.py with the
same flags. In a guided batch, only the conditional half is counted. The memory does not depend on
the number of images.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from analysis.counts import COUNTS_FILE
from runtime.errors import run_main
from runtime.files import prepare_output
from runtime.flags import flag, parse_config
from sampling.config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class ExpertDataConfig(SamplingConfig):
    class_labels: tuple[str, ...] = flag(
        (), group="counts", metavar="LABEL", help="class numbers or names (default: all)"
    )
    images_per_class: int = flag(50, ge=1, help="number of images per class")
    output: Path | None = flag(
        None, suffixes=(".npz",),
        help=f"file of the counts, an .npz; default: {COUNTS_FILE} in --ckpt, if that is a run "
        "folder, or otherwise in results",
    )  # fmt: skip


def parse_args() -> ExpertDataConfig:
    return parse_config(ExpertDataConfig, __doc__)


def main(config: ExpertDataConfig) -> None:
    is_run = Path(config.ckpt, "checkpoints").is_dir()
    output = config.output or Path(config.ckpt if is_run else "results", COUNTS_FILE)
    prepare_output("--output", output)
    from analysis.recorder import count_routing
    from sampling.pipeline import open_pipeline

    pipeline, start = open_pipeline(config), time.perf_counter()
    labels = config.class_labels or range(len(pipeline.class_names))  # names may not be unique
    print(f"sampling {config.images_per_class} images per class: {pipeline.describe()}", flush=True)
    counts = count_routing(
        pipeline, labels, config.images_per_class, seed=config.seed, batch_size=config.batch_size
    )
    counts.save(output)
    seconds = time.perf_counter() - start
    print(f"{counts.by_class.sum():,} assignments, {seconds:.1f} s: {output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
