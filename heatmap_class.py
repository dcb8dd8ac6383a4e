"""Draws which experts the tokens of each class chose, layer by layer.

    python heatmap_class.py --data results/RUN

It also prints each layer's load entropy, the load of its busiest expert and what the class tells of
the expert, in bits, and writes these numbers to a CSV beside the figure.
"""

from dataclasses import dataclass
from functools import partial

from analysis.heatmap import HeatmapConfig, class_map, write_heatmap
from runtime.errors import run_main
from runtime.flags import flag, parse_config


@dataclass(frozen=True, kw_only=True)
class ClassConfig(HeatmapConfig):
    top_classes: int | None = flag(
        None, group="classes", least=1, metavar="N",
        help="show only the N classes whose experts differ most from the average; default: all",
    )  # fmt: skip
    order: str = flag("label", choices=("label", "similarity"), help="by number, or like with like")


def parse_args() -> ClassConfig:
    return parse_config(ClassConfig, __doc__)


def main(config: ClassConfig) -> None:
    write_heatmap(config, "class", partial(class_map, top=config.top_classes, order=config.order))


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
