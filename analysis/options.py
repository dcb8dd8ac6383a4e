"""What the heat-map scripts share: their flags, what they read and what they write."""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from analysis.counts import RoutingCounts
from analysis.heatmap import save_figure
from analysis.statistics import format_table, write_csv
from runtime.errors import UserError
from runtime.files import prepare_output
from runtime.options import count

SUFFIXES = (".png", ".pdf")


def add_heatmap_flags(parser: argparse.ArgumentParser, output: str) -> None:
    group = parser.add_argument_group("heat map")
    group.add_argument(
        "--data", type=Path, default=Path("expert_data.npz"), help="what expert_data.py wrote"
    )
    group.add_argument("--output", type=Path, default=Path(output), help="the figure, .png or .pdf")
    group.add_argument(
        "--csv", type=Path, help="the statistics of each layer; default: beside the figure"
    )
    group.add_argument(
        "--layers", type=count, nargs="+", metavar="LAYER", help="layers, from 0; default: all"
    )


def open_heatmap(args: argparse.Namespace) -> tuple[RoutingCounts, list[int]]:
    """Loads the counts and returns them with the layers to show; fills in --csv.

    UserError for a file that is no count table, a layer that is not there, or an output that cannot
    be written.
    """
    if args.output.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output: got {args.output}, expected a name ending in .png or .pdf")
    args.csv = args.csv or args.output.with_suffix(".csv")
    counts = RoutingCounts.load(args.data)
    layers = args.layers or list(range(counts.num_layers))
    if max(layers) >= counts.num_layers:
        raise UserError(
            f"--layers: got {max(layers)}, expected 0 to {counts.num_layers - 1} for {args.data}"
        )
    prepare_output("--output", args.output)
    prepare_output("--csv", args.csv)
    return counts, layers


def write_heatmap(args: argparse.Namespace, figure: Figure, statistics: list[dict]) -> None:
    """Writes --output and --csv, and prints the statistics."""
    save_figure(figure, args.output)
    write_csv(args.csv, statistics)
    print(format_table(statistics))
    print(f"{args.output}, {args.csv}")
