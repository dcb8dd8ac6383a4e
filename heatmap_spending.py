"""Draws how many experts the tokens have at each sampling step and patch position, layer by layer.

    python heatmap_spending.py --data results/RUN

Routers such as race, batch_pool and expert_choice give some tokens more experts than others. With
topk there is nothing to draw. It also prints the mean of each layer's experts per token, and the
least and the most of a step and of a position, and writes these numbers to a CSV beside the figure.
"""

from analysis.heatmap import HeatmapConfig, spending_map, write_heatmap
from runtime.errors import run_main
from runtime.flags import parse_config


def parse_args() -> HeatmapConfig:
    return parse_config(HeatmapConfig, __doc__)


def main(config: HeatmapConfig) -> None:
    write_heatmap(config, "spending", spending_map)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
