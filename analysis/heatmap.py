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
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.counts import RoutingCounts
from analysis.statistics import mutual_information, shares
from runtime.errors import UserError

WIDTH, HEIGHT = 7.0, 9.0  # inches: the text of a page
MARGIN = 1.0  # inches of height for title, axis labels and colour bar
TICK_PITCH = 0.11  # inches from one line of tick labels to the next, at least
MAX_NAME = 24  # characters of a class name
DPI = 300
ROUND = [1, 2, 2.5, 5, 10]  # leading digits of tick labels
COLOURS = "RdBu_r"  # from blue through white to red: told apart with any colour vision
FACTORS = (1.1, 1.2, 1.5, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256)
STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "axes.titlepad": 2.5,
    "axes.linewidth": 0.5,
    "figure.titlesize": 7.5,
    "pdf.fonttype": 42,  # text stays text
    **{f"{axis}tick.labelsize": 6.5 for axis in "xy"},
    **{f"{axis}tick.major.width": 0.5 for axis in "xy"},
    **{f"{axis}tick.major.size": 2 for axis in "xy"},
    **{f"{axis}tick.major.pad": 2 for axis in "xy"},
}


@dataclass
class Ticks:
    """The label of an axis, and which of its cells, counted from 0, bear which name."""

    label: str
    cells: Sequence[float]
    names: Sequence[str]


@matplotlib.rc_context(STYLE)
def draw_classes(counts: RoutingCounts, layers: Sequence[int], rows: np.ndarray) -> Figure:
    """A panel for each layer in `layers`, with experts across and down the classes in `rows`.

    rows: which of the C rows of by_class to show, in order
    """
    share = shares(counts.by_class[rows][:, layers])  # (rows, P, E)
    columns = balanced_columns(len(layers), most=8)
    width = min((WIDTH - 0.8) / columns, 1.6)
    height = panel_height(math.ceil(len(layers) / columns), wanted=1.2 * TICK_PITCH * len(rows))
    figure, axes = make_panels(len(layers), columns, width, height)
    norm = share_norm(share)
    draw_panels(
        axes,
        share.transpose(1, 0, 2),
        norm,
        size=(height, width),
        across=number_ticks("expert", range(share.shape[2]), width, across=True),
        down=class_ticks(counts.labels[rows], counts.class_names[rows], room=height),
    )
    title_panels(axes, layers, mutual_information(counts.by_class))
    add_colour_bar(figure, axes, norm, share, "a class's assignments")
    title_figure(figure, counts, "class (over each layer: mutual information in bits)")
    return figure


@matplotlib.rc_context(STYLE)
def draw_steps(counts: RoutingCounts, layers: Sequence[int]) -> Figure:
    """A panel for each layer in `layers`, with sampling steps across and experts down."""
    share = shares(counts.by_step[:, layers])  # (S, P, E)
    columns = balanced_columns(len(layers), most=4)
    width = min((WIDTH - 0.8) / columns, 3.0)
    wanted = 1.2 * TICK_PITCH * share.shape[2]
    height = panel_height(math.ceil(len(layers) / columns), wanted)
    figure, axes = make_panels(len(layers), columns, width, height)
    norm = share_norm(share)
    draw_panels(
        axes,
        share.transpose(1, 2, 0),
        norm,
        size=(height, width),
        across=time_ticks(counts.times, room=width),
        down=number_ticks("expert", range(share.shape[2]), room=height),
    )
    title_panels(axes, layers, mutual_information(counts.by_step))
    add_colour_bar(figure, axes, norm, share, "a step's assignments")
    title_figure(figure, counts, "sampling step (over each layer: mutual information in bits)")
    return figure


@matplotlib.rc_context(STYLE)
def draw_positions(counts: RoutingCounts, layers: Sequence[int]) -> Figure:
    """A small map of the image for each layer (down) and expert (across): who works where."""
    share = shares(counts.by_position[:, layers])  # (T, P, E)
    num_layers, num_experts = share.shape[1:]
    size = min(0.6, (WIDTH - 1.1) / num_experts, (HEIGHT - MARGIN) / num_layers)  # of a map
    figure, (ax,) = make_panels(1, 1, num_experts * size, num_layers * size)
    norm = share_norm(share)
    side = counts.settings.grid_size
    maps = share.transpose(1, 2, 0).reshape(num_layers, num_experts, side, side)
    mosaic, pitch = lay_out(np.clip(maps, norm.vmin, norm.vmax))
    ax.set_facecolor("0.6")  # of the gaps
    ax.imshow(mosaic, cmap=COLOURS, norm=norm, interpolation_stage="rgba")

    down = number_ticks("layer", layers, room=num_layers * size)
    across = number_ticks("expert", range(num_experts), num_experts * size, across=True)
    set_ticks(ax.yaxis, down, pitch)
    set_ticks(ax.xaxis, across, pitch)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    right = ax.secondary_yaxis("right")
    bits = mutual_information(counts.by_position)
    values = [f"{bits[layers[row]]:.3f}" for row in down.cells]
    set_ticks(right.yaxis, Ticks("bits", down.cells, values), pitch)
    for part in (ax, right):
        part.tick_params(length=0)
        part.spines[:].set_visible(False)
    add_colour_bar(figure, [ax], norm, share, "a position's assignments")
    title_figure(figure, counts, "patch position (right: mutual information in bits)")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes PNG or PDF, as the suffix says; UserError when it cannot be written."""
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"--output: cannot write {path} ({error.strerror})") from None


def balanced_columns(num_panels: int, most: int) -> int:
    """How many panels go side by side so that the last row is as full as can be."""
    return math.ceil(num_panels / math.ceil(num_panels / most))


def panel_height(num_rows: int, wanted: float) -> float:
    """Inches of a panel: as wanted, but no taller than fits the page, and never a mere line."""
    room = (HEIGHT - MARGIN) / num_rows - 0.2
    return max(min(max(wanted, 0.6), 4.0, room), 0.35)


def make_panels(
    num_panels: int, columns: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """Makes a figure with panels of a size in inches, `columns` of them side by side."""
    rows = math.ceil(num_panels / columns)
    size = (max(columns * width + 0.8, 3.8), rows * (height + 0.2) + MARGIN)
    figure = Figure(size, layout="compressed")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.03, hspace=0.02)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[num_panels:]:
        ax.remove()
    return figure, axes[:num_panels]


def draw_panels(
    axes: list[Axes],
    panels: np.ndarray,
    norm: LogNorm,
    *,
    size: tuple[float, float],
    across: Ticks,
    down: Ticks,
) -> None:
    """Draws shares (P, rows, columns), a panel for each; only outer panels name their cells.

    size: height and width of a panel, in inches
    """
    columns = axes[0].get_gridspec().ncols
    for number, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        rows, cells = panel.shape
        ax.imshow(
            np.clip(fit_pixels(panel, size), norm.vmin, norm.vmax),
            cmap=COLOURS,
            norm=norm,
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, cells - 0.5, rows - 0.5, -0.5),
        )
        set_ticks(ax.xaxis, across, is_outer=number + columns >= len(axes))
        set_ticks(ax.yaxis, down, is_outer=number % columns == 0)


def fit_pixels(panel: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Averages neighbouring cells of a panel (rows, columns) that are smaller than a pixel."""
    for axis in (0, 1):
        number = panel.shape[axis]
        together = math.ceil(number / (size[axis] * 0.9 * DPI))
        starts = np.arange(0, number, together)
        lengths = np.diff(starts, append=number)
        panel = np.add.reduceat(panel, starts, axis) / (lengths[:, None] if axis == 0 else lengths)
    return panel


def title_figure(figure: Figure, counts: RoutingCounts, what: str) -> None:
    figure.suptitle(f"Experts chosen by {what}\n{counts.settings}", parse_math=False)


def title_panels(axes: list[Axes], layers: Sequence[int], bits: np.ndarray) -> None:
    for ax, layer in zip(axes, layers, strict=True):
        ax.set_title(f"layer {layer}: {bits[layer]:.3f}")


def lay_out(maps: np.ndarray) -> tuple[np.ndarray, int]:
    """Lays maps (P, E, h, w) out side by side with gaps of NaN; returns also a map's pitch.

    The image starts with half a gap, so map i covers (i * pitch, (i + 1) * pitch).
    """
    zoom = math.ceil(32 / maps.shape[-1])  # so that a gap can be thinner than a patch
    maps = maps.repeat(zoom, axis=2).repeat(zoom, axis=3)
    gap = maps.shape[-1] // 32
    maps = np.pad(maps, ((0, 0), (0, 0), (gap, gap), (gap, gap)), constant_values=np.nan)
    num_layers, num_experts, pitch, _ = maps.shape
    return maps.transpose(0, 2, 1, 3).reshape(num_layers * pitch, num_experts * pitch), pitch


def share_norm(share: np.ndarray) -> LogNorm:
    """The colour scale of shares (..., E): logarithmic, 1/E divided and multiplied by a factor.

    The factor covers 99 of 100 shares, but what is hardly used does not stretch it: at most it is
    what the most used one needs, or 2.
    """
    num_experts = share.shape[-1]
    ratio = share * num_experts
    distance = np.exp(np.abs(np.log(np.maximum(ratio, 1e-9))))
    reach = min(np.quantile(distance, 0.99), max(ratio.max(), 2))
    factor = next((factor for factor in FACTORS if factor >= reach), FACTORS[-1])
    return LogNorm(1 / num_experts / factor, factor / num_experts)


def add_colour_bar(
    figure: Figure, axes: list[Axes], norm: LogNorm, share: np.ndarray, whole: str
) -> None:
    """Adds the colour scale of shares (..., E) of `whole`, pointed where shares go beyond it."""
    num_experts = share.shape[-1]
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    extend = ends.get((bool(share.min() < norm.vmin), bool(share.max() > norm.vmax)), "both")
    bar = figure.colorbar(
        ScalarMappable(norm, COLOURS),
        ax=axes,
        location="bottom",
        extend=extend,
        aspect=35,
        shrink=min(3.6 / figure.get_figwidth(), 0.9),
        pad=0.06 / figure.get_figheight(),
    )
    doublings = math.floor(math.log2(norm.vmax * num_experts) + 1e-6)
    if doublings:
        stride = math.ceil(doublings / 3)
        factors = 2.0 ** (stride * np.arange(-(doublings // stride), doublings // stride + 1))
    else:
        factors = np.geomspace(norm.vmin, norm.vmax, 3) * num_experts
    places = factors / num_experts
    bar.set_ticks(places, labels=[f"{100 * place:.3g}%" for place in places])
    bar.minorticks_off()
    bar.set_label(f"share of {whole} (log scale; white: uniform, 1/{num_experts})")


def set_ticks(axis: Axis, ticks: Ticks, pitch: float = 1, is_outer: bool = True) -> None:
    """Names cells of an axis, each `pitch` units long, the first one centred (pitch - 1) / 2."""
    places = [(cell + 0.5) * pitch - 0.5 for cell in ticks.cells]
    names = ticks.names if is_outer else [""] * len(places)
    axis.set_ticks(places, labels=names, parse_math=False)
    if is_outer:
        axis.set_label_text(ticks.label)


def number_ticks(label: str, numbers: Sequence[int], room: float, across: bool = False) -> Ticks:
    """Names as many cells by their number as fit `room` inches: each, each second, fourth..."""
    pitch = 0.05 + 0.06 * len(str(max(numbers))) if across else TICK_PITCH
    stride = 1
    while len(numbers) / stride * pitch > room:
        stride *= 2
    cells = range(0, len(numbers), stride)
    return Ticks(label, cells, [str(numbers[cell]) for cell in cells])


def class_ticks(labels: np.ndarray, names: Sequence[str], room: float) -> Ticks:
    """Names the classes if that fits `room` inches, else numbers a few of them.

    Without order in the labels a few numbers would say nothing: then there are none.
    """
    if len(names) * TICK_PITCH <= room:
        short = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in names]
        return Ticks("", range(len(names)), short)
    if (np.diff(labels) <= 0).any():
        return Ticks("class", [], [])
    wanted = MaxNLocator(8, steps=ROUND, integer=True).tick_values(labels[0], labels[-1])
    cells = [int(cell) for cell in np.flatnonzero(np.isin(labels, wanted))]
    return Ticks("class", cells, [str(labels[cell]) for cell in cells])


def time_ticks(times: np.ndarray, room: float) -> Ticks:
    """Marks round values of t at the steps, or between the steps, where the sampler is at them."""
    label = "t (noise → image)"
    if len(times) == 1:
        return Ticks(label, [0], [f"{times[0]:g}"])
    bins = max(int(room / 0.4), 1)
    values = MaxNLocator(bins, steps=ROUND).tick_values(times.min(), times.max())
    margin = np.ptp(times) / (len(times) - 1) / 2  # a step's cell reaches half-way to the next
    values = values[(values >= times.min() - margin) & (values <= times.max() + margin)]
    order = np.argsort(times)
    return Ticks(label, np.interp(values, times[order], order), [f"{value:g}" for value in values])
