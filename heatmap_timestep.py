"""Draws which experts the tokens at each sampling step chose, layer by layer.

    python heatmap_timestep.py --data results/expert_data.npz --output results/heatmap_timestep.png

--data is what expert_data.py wrote. Also prints, and writes as CSV beside the figure, each layer's
load entropy, load of the busiest expert, and what the step tells of the expert, in bits.
"""

from analysis.heatmap import HeatmapConfig, draw_steps, write_heatmap
from runtime.errors import run_main
from runtime.flags import parse_config


def parse_args() -> HeatmapConfig:
    return parse_config(HeatmapConfig, __doc__)


def main(config: HeatmapConfig) -> None:
    write_heatmap(config, "step", draw_steps)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
