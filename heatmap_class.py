"""Draws which experts the tokens of each class chose, layer by layer.

    python heatmap_class.py --data results/expert_data.npz --output results/heatmap_class.png

--data is what expert_data.py wrote. Also prints, and writes as CSV beside the figure, each layer's
load entropy, load of the busiest expert, and what the class tells of the expert, in bits.
"""

from dataclasses import dataclass
from functools import partial

from analysis.heatmap import HeatmapConfig, draw_classes, write_heatmap
from runtime.errors import run_main
from runtime.flags import flag, parse_config


@dataclass(frozen=True, kw_only=True)
class ClassConfig(HeatmapConfig):
    top_classes: int | None = flag(
        None, group="classes", least=1, metavar="N",
        help="show only the N classes whose experts differ most from the average; default: all",
    )  # fmt: skip
    order: str = flag(
        "label", choices=("label", "similarity"), help="rows by number, or like next to like"
    )


def parse_args() -> ClassConfig:
    return parse_config(ClassConfig, __doc__)


def main(config: ClassConfig) -> None:
    draw = partial(draw_classes, top=config.top_classes, order=config.order)
    write_heatmap(config, "class", draw)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
