"""Heat maps of expert use, sized for a page of a paper, for any number of layers and experts.

    write_heatmap(parse_config(HeatmapConfig, __doc__), "timestep", step_map)  # as the scripts do
    figure = step_map(RoutingCounts.load("results/expert_data.npz"), layers=[0, 5]).draw()

The colour scale is logarithmic: half and twice the value shown as white are equally far from white.
White marks an equal share of the assignments, 1/E, or in `experts_per_token_map` the mean.

Shape legend:
    T patch positions, S steps, E experts, P layers shown, R rows and Q columns of a panel
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from analysis.counts import (
    COUNTS_FILE,
    RoutingCounts,
    choose_rows,
    counts_file,
    experts_per_token_statistics,
    layer_statistics,
    shares,
    to_csv,
)
from analysis.figures import STYLE, save_figure
from latents.fonts import font_families
from options.parts import option
from runtime.errors import UserError, print_safely
from runtime.files import prepare_output, write_durably

WIDTH, HEIGHT = 7.0, 9.0  # inches, text area of a page
TITLE = 100  # characters in a line of the title
LINE = 0.12  # inches, height of a line of tick labels
MAP = 0.6  # inches, largest side of a map of the image
MOST_STEPS = 10  # largest number of maps in a row
COLOURS = "RdBu_r"  # blue, white, red: distinguishable with any colour vision
TIME = "t, noise → image"


@dataclass(frozen=True, kw_only=True)
class HeatmapConfig:
    """Flags of a script that draws a heat map."""

    data: Path = option(
        Path("results", COUNTS_FILE), group="heat map",
        help="file of expert_data.py, or its folder",
    )  # fmt: skip
    output: Path | None = option(
        None, suffixes=(".png", ".pdf"), help="figure (default: heatmap_*.png near --data)"
    )
    layers: tuple[int, ...] = option(
        (), ge=0, help="numbers of blocks with experts, from 0 (default: first, middle and last)"
    )


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """Panels of cells with one colour scale, and statistics of each layer for a CSV file."""

    title: str
    panels: np.ndarray  # (P, R, Q), at least 0; NaN is an empty cell
    center: float  # value at the centre of the colour scale, shown as white
    unit: str
    down: tuple[str, Sequence]  # axis label, and names (text or numbers) of a panel's rows or maps
    across: tuple[str, Sequence]  # the same for columns
    panel_titles: Sequence[str] = ("",)
    statistics: dict[str, np.ndarray] = field(default_factory=dict)  # each (L,)

    @matplotlib.rc_context(STYLE)
    def draw(self) -> Figure:
        """Draws the panels, up to four per row, above the colour scale."""
        import seaborn  # imported here: takes half a second

        ratio = np.log2(np.maximum(self.panels / self.center, 1e-9))
        most = max(0.14, min(np.nanquantile(abs(ratio), 0.99), max(np.nanmax(ratio), 1)))
        rows = math.ceil(len(ratio) / 4)
        columns = math.ceil(len(ratio) / rows)
        down, across = len(self.down[1]), len(self.across[1])
        # Numbers of cells of a map of the image, down and across; 1 if the panel is no map.
        tall, wide, width = ratio.shape[1] // down, ratio.shape[2] // across, (WIDTH - 1) / columns
        is_map = max(tall, wide) > 1
        height = max(0.4, min(1.4 * LINE * down, 4, (HEIGHT - 1) / rows - 0.2))
        if is_map:  # keep the shape of the image
            size = min(MAP, (WIDTH - 1) / across, (HEIGHT - 1.2) / down) / max(tall, wide)
            width, height = size * wide * across, size * tall * down
        # Lines end after a comma: textwrap does not break non-breaking spaces.
        whole = self.title.replace(" ", "\u00a0").replace(",\u00a0", ", ")
        title = [line for part in whole.splitlines() for line in textwrap.wrap(part, TITLE)]
        around = 0.76 + LINE * len(title)  # title, labels and colour scale
        figure = Figure((WIDTH, rows * (height + 0.2) + around), layout="compressed")
        for i, panel in enumerate(ratio):
            ax = figure.add_subplot(rows, columns, i + 1)
            seaborn.heatmap(
                panel, ax=ax, vmin=-most, vmax=most, cmap=COLOURS, cbar=False, square=is_map,
                xticklabels=False, yticklabels=False, rasterized=True,
            )  # fmt: skip
            ax.set_title(self.panel_titles[i])
            ax.spines[:].set_visible(True)
            if i % columns == 0:
                name_cells(ax.yaxis, *self.down, tall, height)
            if i + columns >= len(ratio):
                name_cells(ax.xaxis, *self.across, wide, width)
        figure.suptitle("\n".join(title))
        figure.colorbar(
            ax.collections[0], ax=figure.axes, label=self.unit, location="bottom", extend="both",
            ticks=np.linspace(-most, most, 5 if columns * width > 2 else 3), aspect=35,
            format=lambda x, _: f"{self.center * 2**x:.3g}", pad=0.12 / figure.get_figheight(),
            fraction=max(0.15, 0.12 / (rows * height)),  # relative to the height of the panels
            shrink=min(1, 3.6 / columns / width),
        )  # fmt: skip
        return figure


def name_cells(axis: Axis, label: str, names: Sequence, side: int, room: float) -> None:
    """Labels every `side` cells along an axis of `room` inches, with as many labels as fit."""
    texts = [name if isinstance(name, str) else f"{name:g}" for name in names]
    need = LINE if axis.axis_name == "y" else 0.06 + 0.06 * max(map(len, texts))
    positions = [(i + 0.5) * side for i in range(len(texts))]
    axis.set_major_locator(FixedLocator(positions, nbins=max(1, int(room / need))))
    axis.set_major_formatter(lambda position, _: texts[int(position / side)])
    axis.set_label_text(label)
    axis.set_tick_params(labelfontfamily=font_families(texts))
    if side > 1:  # lines between the maps
        axis.set_ticks([i * side for i in range(1, len(texts))], minor=True)
        axis.set_tick_params(which="minor", length=0)
        axis.grid(which="minor", color="0.6")


def write_heatmap(
    config: HeatmapConfig, name: str, map_of: Callable[[RoutingCounts, Sequence[int]], Heatmap]
) -> None:
    """Draws a heat map of a count file.

    Also prints the statistics of the layers and writes them to a CSV file next to the figure. A map
    whose cells are all equal is not drawn.
    """
    data = counts_file(config.data)
    counts = RoutingCounts.load(data)
    numbers, layers = counts.layer_numbers, some_layers(counts.num_layers)
    if unknown := set(config.layers).difference(numbers):
        expected = f"some of {', '.join(map(str, numbers))}, the blocks with experts in {data}"
        raise UserError(f"--layers: got {max(unknown)}, expected {expected}")
    layers = [numbers.index(number) for number in config.layers] or layers
    output = config.output or data.with_name(f"heatmap_{name}.png")
    prepare_output("--output", output)
    heatmap = map_of(counts, layers)
    if np.ptp(heatmap.panels) == 0:
        title = heatmap.title.splitlines()[0]
        print_safely(
            f"{title}: {heatmap.panels.flat[0]:.3g} everywhere, so there is nothing to draw"
        )
        return
    save_figure(heatmap.draw(), output)
    shown = [i for i in layers if all(i < len(x) for x in heatmap.statistics.values())]
    statistics = to_csv(heatmap.statistics, shown, numbers)
    write_durably(output.with_suffix(".csv"), statistics)
    print(f"{statistics}{output}, {output.with_suffix('.csv')}")


def some_layers(num_layers: int) -> list[int]:
    """Returns the first, a middle and the last layer."""
    return sorted({0, num_layers // 2, num_layers - 1})


def named_layers(counts: RoutingCounts, layers: Sequence[int]) -> tuple[str, list[int]]:
    return "layer", [counts.layer_numbers[layer] for layer in layers]


def class_map(
    counts: RoutingCounts, layers: Sequence[int], top: int | None = None, order: str = "label"
) -> Heatmap:
    """Plots one panel per layer, with experts across and classes down.

    top, order: selection and order of the classes, see `choose_rows`; top None shows all
    """
    from latents.image_grid import class_caption  # imports torch

    rows = choose_rows(counts.by_class[:, layers], top, order)
    names = [class_caption(counts.class_names[row], counts.labels[row]) for row in rows]
    down = ("class", names if len(rows) <= 32 else counts.labels[rows])  # names if they fit
    panels = shares(counts.by_class[rows][:, layers]).transpose(1, 0, 2)  # (P, R, E)
    titles = [f"layer {counts.layer_numbers[layer]}" for layer in layers]
    return share_map(counts, "class", panels, down=down, panel_titles=titles)


def step_map(counts: RoutingCounts, layers: Sequence[int]) -> Heatmap:
    """Plots one panel per layer, with sampling steps across and experts down."""
    panels = shares(counts.by_step[:, layers]).transpose(1, 2, 0)  # (P, E, S)
    across = (TIME, counts.times.round(3))
    titles = [f"layer {counts.layer_numbers[layer]}" for layer in layers]
    return share_map(counts, "step", panels, across=across, panel_titles=titles)


def position_map(counts: RoutingCounts, layers: Sequence[int]) -> Heatmap:
    """Plots one small map of the image for each layer (down) and expert (across)."""
    maps = shares(counts.by_position[:, layers]).transpose(1, 2, 0)  # (P, E, T)
    return share_map(
        counts, "position", tiled(maps, counts.grid), down=named_layers(counts, layers)
    )


def share_map(counts: RoutingCounts, row: str, panels: np.ndarray, **names) -> Heatmap:
    """Makes a heat map of shares (P, R, Q) of the assignments in `counts.by_{row}`."""
    experts = ("expert", range(counts.num_experts))
    return Heatmap(
        title=f"Use of experts by {row}\n{counts}",
        panels=100 * panels,
        center=100 / counts.num_experts,
        unit="share of assignments in percent (log scale, white: uniform)",
        statistics=layer_statistics(getattr(counts, f"by_{row}"), row),
        **{"down": experts, "across": experts, **names},
    )


def experts_per_token_map(counts: RoutingCounts, layers: Sequence[int]) -> Heatmap:
    """Plots one small map of experts per token for each layer (down) and step (across)."""
    from latents.loading import evenly_spaced  # imports torch

    values = counts.experts_per_token[:, :, layers]  # (S, T, P)
    steps = evenly_spaced(len(values), MOST_STEPS)
    return Heatmap(
        title=f"Experts per token by step and position\n{counts}",
        down=named_layers(counts, layers),
        **experts_per_token_cells(
            values[steps].transpose(2, 0, 1), counts.grid, counts.times[steps], values.mean()
        ),
        statistics=experts_per_token_statistics(counts.experts_per_token),
    )


def experts_per_token_cells(
    maps: np.ndarray, grid: tuple[int, int], times: Sequence[float], mean: float
) -> dict:
    """Returns fields of a `Heatmap` of experts per token.

    maps: (P, Q, T), with Q times across
    mean: value shown as white
    """
    unit = "experts per token (log scale, white: mean)"
    return dict(panels=tiled(maps, grid), center=mean, unit=unit, across=(TIME, np.round(times, 3)))


def persistence_map(counts: RoutingCounts, layers: Sequence[int]) -> Heatmap:
    """Plots the share of a patch's experts that it keeps at the next step: layers down."""
    if len(counts.times) == 1:
        raise UserError("--only persistence: got counts of a single step, expected a next one")
    kept = counts.persistence(1)  # (S - 1, L), NaN for a step without assignments
    if np.isnan(kept).all(0).any():
        raise UserError("--only persistence: got a layer without assignments, expected some")
    return Heatmap(
        title=f"Experts kept at the next step\n{counts}",
        panels=kept.T[None, layers],
        center=np.nanmean(kept),
        unit="share of a patch's experts (log scale, white: mean)",
        down=named_layers(counts, layers),
        across=(TIME, counts.times[:-1].round(3)),
        statistics={"persistence": np.nanmean(kept, 0)},
    )


def flow_map(counts: RoutingCounts, layers: Sequence[int]) -> Heatmap:
    """Plots one panel per layer and its next: how often pairs of their experts share a patch."""
    layers = [layer for layer in layers if layer < len(counts.together)]
    if not layers:
        raise UserError("--only flow: got a single layer, expected a layer and its next one")
    pairs = counts.together[layers]  # (P, E, E)
    rows, columns, whole = pairs.sum(2), pairs.sum(1), pairs.sum((1, 2))
    chance = rows[:, :, None] * columns[:, None] / np.maximum(whole, 1)[:, None, None]
    experts = range(counts.num_experts)
    return Heatmap(
        title=f"Pairs of experts in neighbouring layers\n{counts}",
        panels=np.divide(pairs, chance, out=np.ones_like(chance), where=chance > 0),
        center=1,
        unit="pairs on a patch, relative to chance (log scale, white: 1)",
        down=("expert", experts),
        across=("expert of the next layer", experts),
        panel_titles=[
            f"layers {counts.layer_numbers[layer]}, {counts.layer_numbers[layer + 1]}"
            for layer in layers
        ],
        statistics={"pairs": counts.together.sum((1, 2))},
    )


def tiled(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Arranges maps (P, Q, T) of the image in one panel, P down and Q across."""
    rows, columns, _ = maps.shape
    tiles = maps.reshape(rows, columns, *grid).transpose(0, 2, 1, 3)
    return tiles.reshape(1, rows * grid[0], columns * grid[1])


# The views of expert_report.py --only.
VIEWS = {
    "patch": position_map,
    "spending": experts_per_token_map,
    "persistence": persistence_map,
    "flow": flow_map,
}
