"""Draws which experts the tokens of each class chose, layer by layer.

    python heatmap_class.py --data expert_data.npz --output heatmap_class.png

--data is what expert_data.py wrote. Also prints, and writes as CSV beside the figure, each layer's
load entropy, load of the busiest expert, and what the class tells of the expert, in bits.
"""

import argparse

import numpy as np

from analysis.heatmap import draw_classes
from analysis.options import add_heatmap_flags, open_heatmap, write_heatmap
from analysis.statistics import layer_statistics, row_information, similarity_order
from runtime.errors import exit_on_user_error
from runtime.options import make_parser, positive_int


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_heatmap_flags(parser, output="heatmap_class.png")
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--top-classes", type=positive_int, metavar="N",
        help="show only the N classes whose experts differ most from the average; default: all",
    )  # fmt: skip
    group.add_argument(
        "--order", choices=("label", "similarity"), default="label",
        help="order of the rows: by class number, or like next to like",
    )  # fmt: skip
    return parser.parse_args()


def choose_classes(table: np.ndarray, top: int | None, order: str) -> np.ndarray:
    """Returns which rows of counts (C, P, E) to show, and in which order."""
    chosen = np.arange(len(table))
    if top is not None:
        information = row_information(table).sum(1)  # (C,)
        chosen = np.sort(np.argsort(-information, kind="stable")[:top])
    if order == "similarity":
        chosen = chosen[similarity_order(table[chosen])]
    return chosen


@exit_on_user_error
def main(args: argparse.Namespace) -> None:
    counts, layers = open_heatmap(args)
    rows = choose_classes(counts.by_class[:, layers], args.top_classes, args.order)
    statistics = layer_statistics(counts.by_class, "class", layers)
    write_heatmap(args, draw_classes(counts, layers, rows), statistics)


if __name__ == "__main__":
    main(parse_args())
