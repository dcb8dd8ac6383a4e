"""Heat maps of expert use for a paper: the width of its text, any number of layers and experts.

    write_heatmap(parse_config(HeatmapConfig, __doc__), "step", draw_steps)    # as the scripts do
    figure = draw_steps(RoutingCounts.load("results/expert_data.npz"), layers=[0, 5])

All but `draw_spending` show shares of assignments on one diverging colour scale, logarithmic, whose
white is the uniform share 1/E: half of that and twice that are equally far from white.

Shape legend:
    T patch positions, S steps, E experts, P layers shown, R rows and Q columns of a panel
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from analysis.counts import RoutingCounts
from analysis.statistics import (
    choose_rows,
    layer_statistics,
    mutual_information,
    shares,
    spending_statistics,
)
from runtime.errors import UserError, reported_as
from runtime.files import prepare_output
from runtime.flags import flag
from sampling.trajectory import evenly

WIDTH, HEIGHT = 7.0, 9.0  # inches: the text of a page
LINE = 0.12  # inches of a line of tick labels
MAX_NAME = 24  # characters of a class name
MOST_STEPS = 10  # in a row of maps
COLOURS = "RdBu_r"  # from blue through white to red: told apart with any colour vision
STYLE = {"font.size": 7, "axes.titlesize": 7, "figure.titlesize": 7.5, "axes.linewidth": 0.5,
         "pdf.fonttype": 42}  # fmt: skip  # text of a PDF stays text


@dataclass(frozen=True, kw_only=True)
class HeatmapConfig:
    """The flags of a script that draws a count table."""

    data: Path = flag(
        Path("results/expert_data.npz"), group="heat map", help="what expert_data.py wrote"
    )
    output: Path | None = flag(
        None, help="the figure, .png or .pdf; default: heatmap_....png beside the data"
    )
    layers: tuple[int, ...] = flag(
        (), least=0, help="layers, from 0; default: first, middle and last"
    )


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
    save_figure(draw(counts, layers), output)
    if row == "spending":
        statistics = spending_statistics(counts.experts_per_token, layers)
    else:
        statistics = layer_statistics(getattr(counts, f"by_{row}"), row, layers)
    output.with_suffix(".csv").write_text(statistics)
    print(f"{statistics}{output}, {output.with_suffix('.csv')}")


def some_layers(num_layers: int) -> list[int]:
    """The first, a middle and the last layer."""
    return sorted({0, num_layers // 2, num_layers - 1})


def draw_classes(
    counts: RoutingCounts, layers: Sequence[int], top: int | None = None, order: str = "label"
) -> Figure:
    """A panel for each layer in `layers`, with experts across and classes down.

    top, order: which classes, see `choose_rows`; None for all
    """
    rows = choose_rows(counts.by_class[:, layers], top, order)
    panels = shares(counts.by_class[rows][:, layers]).transpose(1, 0, 2)  # (P, R, E)
    names = counts.class_names if len(rows) * LINE <= 4 else counts.labels  # if there is no room
    down = ("class", [str(name)[:MAX_NAME] for name in names[rows]])
    titles = panel_titles(counts.by_class, layers)
    across = ("expert", expert_names(counts))
    return draw_panels(counts, panels, titles, down, across)


def draw_steps(counts: RoutingCounts, layers: Sequence[int]) -> Figure:
    """A panel for each layer in `layers`, with sampling steps across and experts down."""
    panels = shares(counts.by_step[:, layers]).transpose(1, 2, 0)  # (P, E, S)
    across = ("t, noise → image", [f"{t:.3g}" for t in counts.times])
    titles = panel_titles(counts.by_step, layers)
    return draw_panels(counts, panels, titles, ("expert", expert_names(counts)), across)


@matplotlib.rc_context(STYLE)
def draw_positions(counts: RoutingCounts, layers: Sequence[int]) -> Figure:
    """A small map of the image for each layer (down) and expert (across): who works where."""
    share = shares(counts.by_position[:, layers]).transpose(1, 2, 0)  # (P, E, T)
    norm = share_norm(share, counts.num_experts)
    titles = panel_titles(counts.by_position, layers)
    across = ("expert", expert_names(counts))
    figure = draw_maps(np.maximum(share, norm.vmin), norm, titles, across)
    add_share_scale(figure, norm, counts)
    return figure


@matplotlib.rc_context(STYLE)
def draw_spending(counts: RoutingCounts, layers: Sequence[int]) -> Figure:
    """A small map of the image for each layer (down) and step (across): experts per token."""
    spent = counts.experts_per_token[:, :, layers]  # (S, T, P)
    steps = evenly(len(spent), MOST_STEPS)
    titles = [
        f"layer {layer}: {number:.2f} a token"
        for layer, number in zip(layers, spent.mean((0, 1)), strict=True)
    ]
    maps = spent[steps].transpose(2, 0, 1)
    figure = draw_experts_per_token(maps, titles, counts.times[steps], spent.mean())
    figure.suptitle(f"Experts that a token gets\n{counts}", parse_math=False)
    return figure


@matplotlib.rc_context(STYLE)
def draw_experts_per_token(
    maps: np.ndarray, titles: list[str], times: Sequence[float], mean: float
) -> Figure:
    """Draws maps (P, Q, T) of experts per token, with Q times across; white is `mean`."""
    mean = max(mean, 1e-9)
    norm = TwoSlopeNorm(mean, vmin=0, vmax=max(maps.max(), 2 * mean))
    across = ("t, noise → image", [f"{t:.3g}" for t in times])
    figure = draw_maps(maps, norm, titles, across)
    places = (0, mean / 2, mean, (mean + norm.vmax) / 2, norm.vmax)
    ticks = {place: f"{place:.3g}" for place in places}
    add_scale(figure, norm, ticks, "experts per token (white: the mean)")
    return figure


def draw_maps(
    maps: np.ndarray, norm: Normalize, titles: list[str], across: tuple[str, list[str]]
) -> Figure:
    """Draws maps (P, Q, T) of the image side by side; titles name the rows, across the columns."""
    rows, columns, num_positions = maps.shape
    side = math.isqrt(num_positions)
    mosaic = maps.reshape(rows, columns, side, side).transpose(0, 2, 1, 3)
    size = min(0.6, (WIDTH - 1.4) / columns, (HEIGHT - 1) / rows)  # inches of a map
    width, height = columns * size, rows * size
    figure = Figure((max(width + 1.4, 3.8), height + 1), layout="compressed")
    ax = figure.subplots()
    mosaic = mosaic.reshape(rows * side, columns * side)
    ax.imshow(mosaic, cmap=COLOURS, norm=norm, interpolation_stage="rgba")
    for draw_edge, number in ((ax.axvline, columns), (ax.axhline, rows)):
        for edge in range(1, number):
            draw_edge(edge * side - 0.5, color="0.6", linewidth=1)
    set_ticks(ax.xaxis, *across, width, side)
    set_ticks(ax.yaxis, "", titles, height, side)
    return figure


def expert_names(counts: RoutingCounts) -> list[str]:
    return [str(expert) for expert in range(counts.num_experts)]


@matplotlib.rc_context(STYLE)
def save_figure(figure: Figure, path: Path) -> None:
    """Writes PNG, PDF or what else matplotlib can, as the suffix says; UserError if it cannot."""
    with reported_as(f"--output: got {path}, expected .png or .pdf", ValueError):
        figure.savefig(path, dpi=300)


def panel_titles(table: np.ndarray, layers: Sequence[int]) -> list[str]:
    """Each layer's number, and what its rows tell of the expert."""
    bits = mutual_information(table)
    return [f"layer {layer}: {bits[layer]:.3f} bits" for layer in layers]


@matplotlib.rc_context(STYLE)
def draw_panels(
    counts: RoutingCounts,
    panels: np.ndarray,
    titles: list[str],
    down: tuple[str, list[str]],
    across: tuple[str, list[str]],
) -> Figure:
    """Draws shares (P, R, Q), a panel each; down and across are (label, names of the cells)."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = min((WIDTH - 0.8) / columns, 2.4)
    height = max(0.35, min(max(1.2 * LINE * len(down[1]), 0.6), 4, (HEIGHT - 1) / rows - 0.2))
    size = (max(columns * width + 0.8, 3.8), rows * (height + 0.2) + 1)
    figure = Figure(size, layout="compressed")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    norm = share_norm(panels, counts.num_experts)
    for ax, panel, name in zip(axes, panels, titles, strict=False):
        ax.imshow(np.maximum(panel, norm.vmin), cmap=COLOURS, norm=norm, aspect="auto")
        ax.set_title(name)
    for ax in axes[len(panels) :]:
        ax.remove()
    set_ticks(axes[0].yaxis, down[0], down[1], height)
    set_ticks(axes[len(panels) - 1].xaxis, across[0], across[1], width)
    add_share_scale(figure, norm, counts)
    return figure


def set_ticks(axis: Axis, label: str, names: list[str], room: float, pitch: int = 1) -> None:
    """Names as many cells, `pitch` units long, as have room (in inches): each, each second..."""
    need = LINE if axis.axis_name == "y" else 0.06 + 0.06 * max(map(len, names))
    stride = 2 ** max(0, math.ceil(math.log2(len(names) * need / room)))
    places = [(cell + 0.5) * pitch - 0.5 for cell in range(0, len(names), stride)]
    axis.set_ticks(places, labels=names[::stride], parse_math=False)
    axis.set_label_text(label)


def share_norm(share: np.ndarray, num_experts: int) -> LogNorm:
    """The colour scale: 1/E divided and multiplied by a factor that covers most shares."""
    distance = np.exp(np.abs(np.log(np.maximum(share * num_experts, 1e-9))))
    factor = max(1.1, min(np.quantile(distance, 0.99), max(share.max() * num_experts, 2)))
    return LogNorm(1 / num_experts / factor, factor / num_experts)


def add_share_scale(figure: Figure, norm: LogNorm, counts: RoutingCounts) -> None:
    """Adds the colour scale of shares and the title."""
    ticks = {place: f"{100 * place:.3g}%" for place in np.geomspace(norm.vmin, norm.vmax, 5)}
    add_scale(figure, norm, ticks, "share of assignments (log scale; white: uniform)", "both")
    figure.suptitle(f"Experts chosen (bits: mutual information)\n{counts}", parse_math=False)


def add_scale(
    figure: Figure, norm: Normalize, ticks: dict[float, str], label: str, extend: str = "neither"
) -> None:
    """Adds the colour scale of all panels; extend: which ends stand for what lies beyond them."""
    bar = figure.colorbar(
        ScalarMappable(norm, COLOURS), ax=figure.axes, location="bottom", extend=extend, aspect=35,
        shrink=min(3.6 / figure.get_figwidth(), 0.9), pad=0.06 / figure.get_figheight(),
    )  # fmt: skip
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.minorticks_off()
    bar.set_label(label)
