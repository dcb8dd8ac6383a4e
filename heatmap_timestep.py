"""Draws which experts the tokens at each sampling step chose, layer by layer.

    python heatmap_timestep.py --data results/expert_data.npz --output results/heatmap_timestep.png

--data is what expert_data.py wrote. Also prints, and writes as CSV beside the figure, each layer's
load entropy, load of the busiest expert, and what the step tells of the expert, in bits.
"""

from functools import partial

from analysis.heatmap import HeatmapConfig, draw_steps, write_heatmap
from runtime.errors import run_main
from runtime.flags import parse_config

parse_args = partial(parse_config, HeatmapConfig, __doc__)
main = partial(write_heatmap, row="step", draw=draw_steps)

if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
