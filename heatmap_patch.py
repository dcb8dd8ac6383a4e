"""Draws heat maps of the experts that the tokens at each patch position chose, by layer.

    python heatmap_patch.py --data results/RUN

The script also prints, for each layer, the load entropy, the load of the busiest expert and the
mutual information between position and expert in bits, and writes them to a CSV next to the figure.
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
