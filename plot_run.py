r"""Plots the logs of runs in one figure: losses, gradient norm, speed and load of the experts.

python plot_run.py results/RUN
python plot_run.py results/A results/B --output samples/runs.png
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.counts import run_names
from analysis.figures import save_figure
from options.parts import option
from runtime.errors import UserError, print_safely, reported_as, run_main
from runtime.files import prepare_output, read_yaml
from runtime.flags import parse_config

CONFIG_FILE = "config.yaml"
PANELS = {
    "loss": "training loss (held-out: dots)",
    "grad_norm": "gradient norm",
    "images_per_sec": "images per second",
    "busiest": "busiest expert over mean",
    "dead_experts": "experts without tokens",
}
LAST = ("loss", "val_loss", "grad_norm", "images_per_sec", "dead_experts")  # printed
FIRST_STEPS = 0.25  # fraction of the steps that do not set the range of the loss


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    runs: tuple[str, ...] = option(positional=True, help="run folders")
    output: Path | None = option(
        None, suffixes=(".png",),
        help="the figure (default: run.png in the run folder or, for several runs, runs.png in the "
        "folder that contains all run folders)",
    )  # fmt: skip


def read_rows(run: Path) -> list[dict]:
    """Reads the log.jsonl of a run."""
    path, rows = run / "log.jsonl", []
    with reported_as(f"got {path}, expected the log of a run", OSError), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            message = f"{path}, line {number}: expected a JSON object with a step"
            with reported_as(message, ValueError, TypeError, KeyError):
                rows.append(row := json.loads(line))
                if not isinstance(row["step"], int):
                    raise ValueError(f"got step {row['step']!r:.80}")
                if "expert_load" in row:
                    row["busiest"] = max(row["expert_load"])
    if not rows:
        raise UserError(f"got an empty {path}, expected a run that has logged a step")
    return rows


def series(rows: list[dict], name: str) -> tuple[list[int], list]:
    """Returns the steps at which a value was logged, and the values, except nan and infinity."""
    known = [(row["step"], row[name]) for row in rows if type(row.get(name)) in (int, float, list)]
    return [step for step, _ in known], [value for _, value in known]


def block_numbers(run: Path, layers: int) -> list[str]:
    """Returns the numbers of the blocks with experts, from config.yaml; without it, 0, 1, ..."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        numbers = read_yaml(run / CONFIG_FILE)[1]["sparse_blocks"]
        if len(numbers) == layers:
            return numbers
    return [str(number) for number in range(layers)]


def falling_loss(rows: list[dict]) -> str:
    """Returns the name of the loss that falls in training: "mse" for a mean flow, whose loss stays
    near 1, because each image's loss is divided by its own size.
    """
    (_, loss), (_, mse) = series(rows, "loss"), series(rows, "mse")
    return "mse" if mse and np.ptp(loss) < 0.01 * max(loss) else "loss"


def loss_range(runs: dict[str, list[dict]]) -> tuple[float, float] | None:
    """Returns the range of the losses after the first steps, where runs differ; None if there are
    too few."""
    first = FIRST_STEPS * max(row["step"] for rows in runs.values() for row in rows)
    shown = []
    for rows in runs.values():
        for name in (falling_loss(rows), "val_loss"):
            pairs = zip(*series(rows, name), strict=True)
            shown += [value for step, value in pairs if step > first]
    if len(shown) < 10:
        return None
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def last_values(rows: list[dict]) -> str:
    """Returns the last value of each metric that was logged, such as "step 400  loss 0.31"."""
    last = {name: values[-1] for name in LAST if (values := series(rows, name)[1])}
    return "  ".join([f"step {rows[-1]['step']}", *(f"{n} {v:.4g}" for n, v in last.items())])


def draw(runs: dict[Path, list[dict]]) -> Figure:
    """Draws one panel per metric with all runs, and below a panel per run with the load by layer.

    runs: log rows by run folder; a run is named by the part of the path that differs between runs,
        without a common suffix "-SEED"
    """
    shared = os.path.commonpath([folder.parent for folder in runs])
    names = run_names([str(folder.relative_to(shared)) for folder in runs])
    folders = dict(zip(names, runs, strict=True))
    runs = dict(zip(names, runs.values(), strict=True))
    loads = {run: series(rows, "expert_load") for run, rows in runs.items()}
    loads = {
        f"busiest expert over mean: {run}": (folders[run], *load)
        for run, load in loads.items()
        if load[0]
    }
    panels = [name for name in PANELS if name != "busiest" or loads]
    if not any(any(series(rows, "dead_experts")[1]) for rows in runs.values()):
        panels.remove("dead_experts")
    mosaic = [panels, *([title] * len(panels) for title in loads)]
    figure = Figure((4 * len(panels), 3.6 + 1.5 * len(loads)), layout="constrained")
    axes = figure.subplot_mosaic(mosaic, height_ratios=[2, *[1] * len(loads)], sharex=True)
    for name in panels:
        for run, rows in runs.items():
            shown = falling_loss(rows) if name == "loss" else name
            label = f"{run} (mse)" if shown == "mse" else run
            (line,) = axes[name].plot(*series(rows, shown), label=label, linewidth=1.2)
            if name == "loss":
                axes[name].plot(*series(rows, "val_loss"), "o", ms=3, color=line.get_color())
        axes[name].set(title=PANELS[name], xlabel="step")
        axes[name].tick_params(labelbottom=True)
        axes[name].grid(alpha=0.3)
        axes[name].ticklabel_format(axis="y", useOffset=False)
    if "dead_experts" in panels:
        axes["dead_experts"].yaxis.set_major_locator(MaxNLocator(integer=True))
    if limits := loss_range(runs):
        axes["loss"].set_ylim(*limits)
    figure.legend(*axes["loss"].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    most = max((np.quantile(values, 0.98) for *_, values in loads.values()), default=1)
    style = {"shading": "nearest", "vmin": 1, "vmax": max(most, 1.1)}  # one scale for all runs
    for title, (folder, steps, values) in loads.items():
        cells = np.transpose(values)  # (layers, steps)
        colours = axes[title].pcolormesh(steps, range(len(cells)), cells, **style)
        axes[title].set_title(title, loc="left")
        axes[title].set(ylabel="layer", ylim=(len(cells) - 0.5, -0.5))
        numbers = block_numbers(folder, len(cells))
        axes[title].yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[title].yaxis.set_major_formatter(
            lambda i, _, numbers=numbers: numbers[int(i)] if 0 <= i < len(numbers) else ""
        )
    if loads:
        axes[title].set_xlabel("step")
        below = {"ax": [axes[title] for title in loads], "location": "bottom"}
        figure.colorbar(colours, **below, shrink=0.3, aspect=40, extend="max")
    steps = [row["step"] for rows in runs.values() for row in rows]
    if len(set(steps)) > 1:
        axes[name].set_xlim(min(steps), max(steps))
    return figure


def parse_args() -> PlotConfig:
    return parse_config(PlotConfig, __doc__)


def main(config: PlotConfig) -> None:
    runs = {Path(os.path.abspath(run)): read_rows(Path(run)) for run in config.runs}
    name = "runs.png" if len(runs) > 1 else "run.png"
    output = config.output or Path(os.path.commonpath(runs), name)
    prepare_output("--output", output)
    save_figure(draw(runs), output, dpi=120)
    for run, rows in runs.items():
        print_safely(f"{run.name}: {last_values(rows)}")
    print_safely(f"figure: {output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
