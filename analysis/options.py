"""What the heat-map scripts share: their flags, what they read and what they write."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.counts import RoutingCounts
from analysis.statistics import format_table, layer_statistics, write_csv
from runtime.errors import UserError
from runtime.files import prepare_output
from runtime.flags import flag, natural


def figure_file(text: str) -> Path:
    if not text.lower().endswith((".png", ".pdf")):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name that ends in .png or .pdf")
    return Path(text)


@dataclass(frozen=True, kw_only=True)
class HeatmapConfig:
    data: Path = flag(
        Path("results/expert_data.npz"), group="heat map", help="what expert_data.py wrote"
    )
    output: Path | None = flag(
        None, type=figure_file, help="the figure, .png or .pdf; default: results/heatmap_....png"
    )
    csv: Path | None = flag(None, help="statistics of each layer; default: beside the figure")
    layers: tuple[int, ...] = flag(
        (), type=natural, nargs="+", help="layers, from 0; default: first, middle and last"
    )


def some_layers(num_layers: int) -> list[int]:
    """The first, a middle and the last layer."""
    return sorted({0, num_layers // 2, num_layers - 1})


def open_heatmap(config: HeatmapConfig, kind: str) -> tuple[HeatmapConfig, RoutingCounts]:
    """Loads the counts; returns them with the config in which no value is None.

    UserError for a file that is no count table, a layer that is not there, or an output that cannot
    be written.
    """
    counts = RoutingCounts.load(config.data)
    layers = config.layers or tuple(some_layers(counts.num_layers))
    if max(layers) >= counts.num_layers:
        raise UserError(
            f"--layers: got {max(layers)}, expected 0 to {counts.num_layers - 1}, the layers with "
            f"experts in {config.data}"
        )
    output = config.output or Path(f"results/heatmap_{kind}.png")
    config = replace(
        config, output=output, csv=config.csv or output.with_suffix(".csv"), layers=layers
    )
    prepare_output("--output", config.output)
    prepare_output("--csv", config.csv)
    return config, counts


def write_heatmap(config: HeatmapConfig, figure, table, row: str) -> None:
    """Writes the figure and the statistics of its table (R, L, E), and prints those."""
    from analysis.heatmap import save_figure

    statistics = layer_statistics(table, row, config.layers)
    save_figure(figure, config.output)
    write_csv(config.csv, statistics)
    print(format_table(statistics))
    print(f"{config.output}, {config.csv}")
