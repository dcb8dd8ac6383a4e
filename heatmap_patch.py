"""Draws which experts the tokens at each patch position chose, layer by layer.

    python heatmap_patch.py --data results/RUN

It also prints each layer's load entropy, the load of its busiest expert and what the position tells
of the expert, in bits, and writes these numbers to a CSV beside the figure.
"""

from analysis.heatmap import HeatmapConfig, position_map, write_heatmap
from runtime.errors import run_main
from runtime.flags import parse_config


def parse_args() -> HeatmapConfig:
    return parse_config(HeatmapConfig, __doc__)


def main(config: HeatmapConfig) -> None:
    write_heatmap(config, "patch", position_map)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
