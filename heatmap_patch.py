"""Draws which experts the tokens at each patch position chose, layer by layer.

    python heatmap_patch.py --data expert_data.npz --output heatmap_patch.png

--data is what expert_data.py wrote. Also prints, and writes as CSV beside the figure, each layer's
load entropy, load of the busiest expert, and what the position tells of the expert, in bits.
"""

import argparse

from analysis.heatmap import draw_positions, save_figure
from analysis.options import add_heatmap_flags, open_heatmap
from analysis.statistics import format_table, layer_statistics, write_csv
from training.errors import exit_on_user_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_heatmap_flags(parser, output="heatmap_patch.png")
    return parser.parse_args()


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    counts, layers = open_heatmap(args)
    figure = draw_positions(counts, layers)
    save_figure(figure, args.output)
    statistics = layer_statistics(counts.by_position, "position", layers)
    write_csv(args.csv, statistics)
    print(format_table(statistics))
    print(f"{args.output}, {args.csv}")


if __name__ == "__main__":
    main(parse_args())
