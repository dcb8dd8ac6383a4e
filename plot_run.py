r"""Draws runs side by side from their log.jsonl: losses, gradient norm, speed, load of the experts.

python plot_run.py results/RUN
python plot_run.py results/A results/B --output samples/runs.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError, reported_as, run_main
from runtime.files import prepare_output
from runtime.flags import flag, parse_config

PANELS = {
    "loss": "training loss (line), held-out loss (dots)",
    "grad_norm": "gradient norm",
    "images_per_sec": "images per second",
    "max_violation": "busiest expert over mean, minus 1",
}


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    runs: tuple[str, ...] = flag(positional=True, help="run folders")
    output: Path | None = flag(
        None, suffixes=(".png",), help="the picture (default: run.png in the first run folder)"
    )


def read_rows(run: Path) -> list[dict]:
    """Reads the rows of a run's log.jsonl; UserError when there are none."""
    path = run / "log.jsonl"
    with reported_as(f"got {path}, expected the log of a run", OSError, ValueError):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows:
        raise UserError(f"got an empty {path}, expected a run that has logged a step")
    return rows


def series(rows: list[dict], name: str) -> tuple[list[int], list]:
    """The steps at which a value was logged, and the values; nan and infinity are left out."""
    known = [(row["step"], row[name]) for row in rows if type(row.get(name)) in (int, float, list)]
    return [step for step, _ in known], [value for _, value in known]


def draw(runs: dict[str, list[dict]], output: Path) -> None:
    """Draws a panel for each measure with all runs, and one of each run's load by layer."""
    import numpy as np
    from matplotlib.figure import Figure

    loaded = {name: rows for name, rows in runs.items() if "expert_load" in rows[-1]}
    columns = max(len(PANELS), len(loaded))
    figure = Figure((4.2 * columns, 6.4 if loaded else 3.4), layout="tight")
    axes = figure.subplots(2 if loaded else 1, columns, squeeze=False)
    for axis, (name, title) in zip(axes[0], PANELS.items(), strict=False):
        for run, rows in runs.items():
            if name == "max_violation":
                steps, loads = series(rows, "expert_load")
                values = [max(load) - 1 for load in loads]
            else:
                steps, values = series(rows, name)
            (line,) = axis.plot(steps, values, label=run, linewidth=1.2)
            if name == "loss":
                axis.plot(*series(rows, "val_loss"), "o", markersize=3, color=line.get_color())
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    for axis in [*axes[0][len(PANELS) :], *(axes[1] if loaded else [])]:
        axis.axis("off")
    for axis, (run, rows) in zip(axes[1] if loaded else [], loaded.items(), strict=False):
        steps, loads = series(rows, "expert_load")
        layers = range(len(loads[0]))
        image = axis.pcolormesh(steps, layers, np.array(loads).T, shading="nearest", vmin=1)
        axis.invert_yaxis()
        axis.axis("on")
        axis.set(title=f"busiest expert over mean: {run}", xlabel="step", ylabel="sparse layer")
        figure.colorbar(image, ax=axis)
    figure.savefig(output, dpi=120)


def parse_args() -> PlotConfig:
    return parse_config(PlotConfig, __doc__)


def main(config: PlotConfig) -> None:
    folders = [Path(run) for run in config.runs]
    runs = {folder.resolve().name: read_rows(folder) for folder in folders}
    output = config.output or folders[0] / "run.png"
    prepare_output("--output", output)
    draw(runs, output)
    print(f"drawn: {output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
