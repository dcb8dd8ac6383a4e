"""Draws a heat map of the experts that the tokens chose at each sampling step, one panel per layer.

    python heatmap_timestep.py --data results/RUN

The script also prints, for each layer, the load entropy, the load of the busiest expert and the
mutual information between step and expert in bits, and writes them to a CSV next to the figure.
"""

from analysis.heatmap import HeatmapConfig, step_map, write_heatmap
from runtime.errors import run_main
from runtime.flags import parse_config


def parse_args() -> HeatmapConfig:
    return parse_config(HeatmapConfig, __doc__)


def main(config: HeatmapConfig) -> None:
    write_heatmap(config, "timestep", step_map)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
