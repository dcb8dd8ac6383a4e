"""Draws which experts the tokens at each patch position chose, layer by layer.

    python heatmap_patch.py --data expert_data.npz --output heatmap_patch.png

--data is what expert_data.py wrote. Also prints, and writes as CSV beside the figure, each layer's
load entropy, load of the busiest expert, and what the position tells of the expert, in bits.
"""

import argparse

from analysis.heatmap import draw_positions
from analysis.options import add_heatmap_flags, open_heatmap, write_heatmap
from analysis.statistics import layer_statistics
from runtime.errors import exit_on_user_error
from runtime.options import make_parser


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_heatmap_flags(parser, output="heatmap_patch.png")
    return parser.parse_args()


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    counts, layers = open_heatmap(args)
    statistics = layer_statistics(counts.by_position, "position", layers)
    write_heatmap(args, draw_positions(counts, layers), statistics)


if __name__ == "__main__":
    main(parse_args())
