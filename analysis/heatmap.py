"""Heat maps of expert use for a paper: the width of its text, any number of layers and experts.

    figure = draw_steps(RoutingCounts.load("expert_data.npz"), layers=[0, 5])
    save_figure(figure, Path("heatmap_timestep.pdf"))

They all show shares of assignments on one diverging colour scale, logarithmic, whose white is the
uniform share 1/E: half of that and twice that are equally far from white.

Shape legend:
    C classes, S sampling steps, T patch positions, L layers, E experts, P layers shown
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from analysis.counts import RoutingCounts
from analysis.statistics import mutual_information, shares
from runtime.errors import UserError

WIDTH, HEIGHT = 7.0, 9.0  # inches: the text of a page
TICK_PITCH = 0.12  # inches from one line of tick labels to the next, at least
MAX_NAME = 24  # characters of a class name
COLOURS = "RdBu_r"  # from blue through white to red: told apart with any colour vision
STYLE = {
    "font.size": 7, "axes.titlesize": 7, "axes.titlepad": 2.5, "axes.linewidth": 0.5,
    "figure.titlesize": 7.5, "xtick.major.size": 2, "ytick.major.size": 2,
    "pdf.fonttype": 42,  # text stays text
}  # fmt: skip


@matplotlib.rc_context(STYLE)
def draw_classes(counts: RoutingCounts, layers: Sequence[int], rows: np.ndarray) -> Figure:
    """A panel for each layer in `layers`, with experts across and down the classes in `rows`.

    rows: which of the C rows of by_class to show, in order
    """
    share = shares(counts.by_class[rows][:, layers]).transpose(1, 0, 2)  # (P, rows, E)
    names = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
             for name in counts.class_names[rows]]  # fmt: skip
    figure, axes = make_panels(len(layers), columns=8, wanted=TICK_PITCH * len(rows))
    if len(rows) * TICK_PITCH > 4:  # no room for names
        names = [str(label) for label in counts.labels[rows]]
    draw_panels(axes, share, down=names, across=[str(i) for i in range(share.shape[2])])
    finish(figure, axes, counts, share, "class")
    title_panels(axes, layers, counts.by_class)
    label_outer(axes, x="expert")
    return figure


@matplotlib.rc_context(STYLE)
def draw_steps(counts: RoutingCounts, layers: Sequence[int]) -> Figure:
    """A panel for each layer in `layers`, with sampling steps across and experts down."""
    share = shares(counts.by_step[:, layers]).transpose(1, 2, 0)  # (P, E, S)
    figure, axes = make_panels(len(layers), columns=3, wanted=1.2 * TICK_PITCH * share.shape[1])
    times = [f"{t:.3g}" for t in counts.times]
    draw_panels(axes, share, down=[str(i) for i in range(share.shape[1])], across=times)
    finish(figure, axes, counts, share, "step")
    title_panels(axes, layers, counts.by_step)
    label_outer(axes, x="t (noise → image)", y="expert")
    return figure


@matplotlib.rc_context(STYLE)
def draw_positions(counts: RoutingCounts, layers: Sequence[int]) -> Figure:
    """A small map of the image for each layer (down) and expert (across): who works where."""
    share = shares(counts.by_position[:, layers]).transpose(1, 2, 0)  # (P, E, T)
    num_layers, num_experts, _ = share.shape
    side = counts.settings.grid_size
    size = min(0.6, (WIDTH - 1.1) / num_experts, (HEIGHT - 1) / num_layers)  # inches of a map
    figure = Figure(
        (max(num_experts * size + 1.1, 3.8), num_layers * size + 1), layout="compressed"
    )
    ax = figure.subplots()
    norm = share_norm(share)
    maps = np.maximum(share, norm.vmin).reshape(num_layers, num_experts, side, side)
    zoom = math.ceil(32 / side)  # so that a gap can be thinner than a patch
    maps = maps.repeat(zoom, 2).repeat(zoom, 3)
    maps = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    pitch = side * zoom + 2
    ax.set_facecolor("0.6")  # of the gaps
    mosaic = maps.transpose(0, 2, 1, 3).reshape(num_layers * pitch, num_experts * pitch)
    ax.imshow(mosaic, cmap=COLOURS, norm=norm, interpolation_stage="rgba")
    set_ticks(ax.xaxis, [str(i) for i in range(num_experts)], num_experts * size, pitch)
    set_ticks(ax.yaxis, [str(layer) for layer in layers], num_layers * size, pitch)
    ax.set(xlabel="expert", ylabel="layer")
    right = ax.secondary_yaxis("right")
    bits = mutual_information(counts.by_position)
    set_ticks(right.yaxis, [f"{bits[layer]:.3f}" for layer in layers], num_layers * size, pitch)
    right.set_ylabel("bits")
    for part in (ax, right):
        part.tick_params(length=0)
        part.spines[:].set_visible(False)
    finish(figure, [ax], counts, share, "position")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes PNG or PDF, as the suffix says; UserError when it cannot be written."""
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(path, dpi=300)
    except OSError as error:
        raise UserError(f"--output: cannot write {path} ({error.strerror})") from None


def make_panels(num_panels: int, columns: int, wanted: float) -> tuple[Figure, list[Axes]]:
    """Makes a figure of panels `wanted` inches high, as far as they fit on a page."""
    rows = math.ceil(num_panels / columns)
    columns = math.ceil(num_panels / rows)  # so that the last row is as full as can be
    width = min((WIDTH - 0.8) / columns, 2.4)
    height = max(min(max(wanted, 0.6), 4.0, (HEIGHT - 1) / rows - 0.2), 0.35)
    size = (max(columns * width + 0.8, 3.8), rows * (height + 0.2) + 1)
    figure = Figure(size, layout="compressed")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[num_panels:]:
        ax.remove()
    return figure, axes[:num_panels]


def draw_panels(axes: list[Axes], share: np.ndarray, down: list[str], across: list[str]) -> None:
    """Draws shares (P, rows, columns), a panel each, with names of the rows and columns."""
    rows, columns = axes[0].get_gridspec().nrows, axes[0].get_gridspec().ncols
    width, height = axes[0].get_figure().get_size_inches()
    norm = share_norm(share)
    for number, (ax, panel) in enumerate(zip(axes, share, strict=True)):
        ax.imshow(np.maximum(panel, norm.vmin), cmap=COLOURS, norm=norm, aspect="auto")
        set_ticks(ax.yaxis, down if number % columns == 0 else [], (height - 1) / rows - 0.2)
        is_last = number + columns >= len(axes)
        set_ticks(ax.xaxis, across if is_last else [], (width - 0.8) / columns)


def title_panels(axes: list[Axes], layers: Sequence[int], table: np.ndarray) -> None:
    bits = mutual_information(table)
    for ax, layer in zip(axes, layers, strict=True):
        ax.set_title(f"layer {layer}: {bits[layer]:.3f} bits")


def label_outer(axes: list[Axes], x: str = "", y: str = "") -> None:
    columns = axes[0].get_gridspec().ncols
    for number, ax in enumerate(axes):
        ax.set(
            xlabel=x if number + columns >= len(axes) else "", ylabel="" if number % columns else y
        )


def set_ticks(axis: Axis, names: list[str], room: float, pitch: int = 1) -> None:
    """Names as many cells, `pitch` units long, as have room (in inches): each, each second..."""
    longest = max(map(len, names), default=0)
    need = TICK_PITCH if axis.axis_name == "y" else 0.06 + 0.06 * longest
    stride = 1
    while len(names) / stride * need > room:
        stride *= 2
    cells = range(0, len(names), stride)
    places = [(cell + 0.5) * pitch - 0.5 for cell in cells]
    axis.set_ticks(places, labels=[names[cell] for cell in cells], parse_math=False)


def share_norm(share: np.ndarray) -> LogNorm:
    """The colour scale: from 1/E divided to 1/E multiplied by a factor that covers most shares."""
    uniform = share.sum() / share.size if share.any() else 1.0
    distance = np.exp(np.abs(np.log(np.maximum(share / uniform, 1e-9))))
    factor = min(np.quantile(distance, 0.99), max(share.max() / uniform, 2))
    factor = max(factor, 1.1)
    return LogNorm(uniform / factor, uniform * factor)


def finish(
    figure: Figure, axes: list[Axes], counts: RoutingCounts, share: np.ndarray, row: str
) -> None:
    """Adds the title and the colour scale of `share`, a row's shares of its assignments."""
    norm, num_experts = share_norm(share), counts.settings.num_experts
    bar = figure.colorbar(
        ScalarMappable(norm, COLOURS), ax=axes, location="bottom", extend="both", aspect=35,
        shrink=min(3.6 / figure.get_figwidth(), 0.9), pad=0.06 / figure.get_figheight(),
    )  # fmt: skip
    places = np.geomspace(norm.vmin, norm.vmax, 5)
    bar.set_ticks(places, labels=[f"{100 * place:.3g}%" for place in places])
    bar.minorticks_off()
    bar.set_label(f"share of a {row}'s assignments (log scale; white: uniform, 1/{num_experts})")
    figure.suptitle(
        f"Experts chosen by {row} (bits: mutual information)\n{counts.settings}", parse_math=False
    )
