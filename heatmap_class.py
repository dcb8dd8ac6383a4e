"""Draws a heat map of the experts that the tokens of each class chose, one panel per layer.

    python heatmap_class.py --data results/RUN

The script also prints, for each layer, the load entropy, the load of the busiest expert and the
mutual information between class and expert in bits, and writes them to a CSV next to the figure.
"""

from dataclasses import dataclass
from functools import partial

from analysis.heatmap import HeatmapConfig, class_map, write_heatmap
from options.parts import option
from runtime.errors import run_main
from runtime.flags import parse_config


@dataclass(frozen=True, kw_only=True)
class ClassConfig(HeatmapConfig):
    top_classes: int | None = option(
        None, group="classes", ge=1, metavar="N",
        help="show only the N classes whose experts differ most from the mean (default: all)",
    )  # fmt: skip
    order: str = option(
        "label", choices=("label", "similarity"),
        help="order of the classes: by number, or similar classes next to each other",
    )  # fmt: skip


def parse_args() -> ClassConfig:
    return parse_config(ClassConfig, __doc__)


def main(config: ClassConfig) -> None:
    write_heatmap(config, "class", partial(class_map, top=config.top_classes, order=config.order))


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
