"""Draws how many experts the tokens at each sampling step and patch position got, layer by layer.

    python heatmap_spending.py --data results/expert_data.npz --output results/heatmap_spending.png

--data is what expert_data.py wrote. Routers such as race, batch_pool and expert_choice spend more
on some tokens than on others; with topk the map is all white. Also prints, and writes as CSV beside
the figure, each layer's experts per token: the mean, and the least and the most of a step and of a
position.
"""

from analysis.heatmap import HeatmapConfig, draw_spending, write_heatmap
from runtime.errors import run_main
from runtime.flags import parse_config


def parse_args() -> HeatmapConfig:
    return parse_config(HeatmapConfig, __doc__)


def main(config: HeatmapConfig) -> None:
    write_heatmap(config, "spending", draw_spending)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
