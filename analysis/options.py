"""What the heat-map scripts share: their flags, and the way from a count table to a figure."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from analysis.counts import RoutingCounts
from analysis.statistics import layer_statistics, spending_statistics
from runtime.errors import UserError
from runtime.files import prepare_output
from runtime.flags import flag, natural


@dataclass(frozen=True, kw_only=True)
class HeatmapConfig:
    data: Path = flag(
        Path("results/expert_data.npz"), group="heat map", help="what expert_data.py wrote"
    )
    output: Path | None = flag(
        None, help="the figure, .png or .pdf; default: heatmap_....png beside the data"
    )
    layers: tuple[int, ...] = flag(
        (), type=natural, nargs="+", help="layers, from 0; default: first, middle and last"
    )


def some_layers(num_layers: int) -> list[int]:
    """The first, a middle and the last layer."""
    return sorted({0, num_layers // 2, num_layers - 1})


def write_heatmap(config: HeatmapConfig, row: str, draw: Callable) -> None:
    """Writes a figure of a count table, and prints and writes a CSV of its layers' statistics.

    row: what the rows of the table are, "class", "step" or "position"; or "spending"
    draw: makes the figure of (counts, layers)

    UserError for a file that is no count table, a layer that is not there, or an output that cannot
    be written.
    """
    counts = RoutingCounts.load(config.data)
    layers = config.layers or some_layers(counts.num_layers)
    if max(layers) >= counts.num_layers:
        raise UserError(
            f"--layers: got {max(layers)}, expected 0 to {counts.num_layers - 1}, the layers with "
            f"experts in {config.data}"
        )
    output = config.output or config.data.with_name(f"heatmap_{row}.png")
    prepare_output("--output", output)
    from analysis.heatmap import save_figure  # matplotlib comes after mistakes are answered

    save_figure(draw(counts, layers), output)
    if row == "spending":
        statistics = spending_statistics(counts.experts_per_token, layers)
    else:
        statistics = layer_statistics(getattr(counts, f"by_{row}"), row, layers)
    output.with_suffix(".csv").write_text(statistics)
    print(f"{statistics}{output}, {output.with_suffix('.csv')}")
