"""Draws the number of experts per token at each sampling step and patch position, by layer.

    python heatmap_spending.py --data results/RUN

Routers such as race, batch_pool and expert_choice give some tokens more experts than others. With
topk there is nothing to draw. The script also prints the experts per token of each layer (the mean,
and the minimum and maximum over steps and positions) and writes them to a CSV next to the figure.
"""

from analysis.heatmap import HeatmapConfig, experts_per_token_map, write_heatmap
from runtime.errors import run_main
from runtime.flags import parse_config


def parse_args() -> HeatmapConfig:
    return parse_config(HeatmapConfig, __doc__)


def main(config: HeatmapConfig) -> None:
    write_heatmap(config, "spending", experts_per_token_map)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
