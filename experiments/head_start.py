r"""Tables of question 21, by the rule of docs/experiments.md: does a head start last?

    python -m experiments.head_start --rows experiments/rows/head_start_aligned.jsonl

Steps saved: the step at which the reference has a loss, minus the step at which an arm first has
it. An arm without all pairs of seeds is shown without tests.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pandas import DataFrame, Series

from experiments.comparisons import differences_table, paired_tests, with_error
from experiments.equivalence import (
    curves_of,
    decay_table,
    draw_leads,
    equivalence_table,
    lead_tables,
    leads_of,
    read_frame,
)
from experiments.rows import read_rows
from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config
from tools.benchmarks.common import markdown

RANGES = {"t < 0.3": slice(0, 3), "t 0.3 to 0.8": slice(3, 8), "t > 0.8": slice(8, 10)}  # of bins


@dataclass(frozen=True, kw_only=True)
class HeadStartConfig:
    rows: tuple[Path, ...] = option(help=".jsonl of runs of question 21 on one set of images")
    pairs: int = option(8, ge=3, help="seeds of each arm, without which nothing is tested")
    steps: tuple[int, ...] = option((160, 400, 800, 1200), help="steps of the table of leads")
    goals: tuple[int, ...] = option((400, 1200), help="steps whose losses other arms reach")
    tables: tuple[str, ...] = option(("class", "trained"), help="arms with the lead")
    controls: tuple[str, ...] = option(
        ("unbalanced", "embedded", "biased", "unmodulated"),
        help="arms that may explain the lead, at the first of the steps",
    )
    output: Path = option(Path("results/tables"), help="folder of tables.md and the figure")


def margin_of(rows: DataFrame, reference: str, baseline: str, pairs: int) -> float:
    """Returns a third of the advantage of the reference over the baseline, or 0 if it is not
    detected, so that nothing is equivalent."""
    losses = rows.pivot_table("report_loss", "seed", "name")
    if not {reference, baseline} <= set(losses):
        return 0.0
    gains = (losses[baseline] - losses[reference]).dropna()
    if len(gains) < pairs:
        return 0.0
    is_detected = paired_tests(DataFrame({baseline: gains}), listed=False).loc[baseline, "p"] < 0.05
    return gains.mean() / 3 if is_detected and gains.mean() > 0 else 0.0


def first_step(curve: Series, loss: float) -> float:
    """Returns the step at which a curve first has a loss, interpolated; the last step if never."""
    below = np.flatnonzero(curve.to_numpy() <= loss)
    if not len(below):
        return float(curve.index[-1])
    at = below[0]
    if at == 0:
        return float(curve.index[0])
    (before, after), steps = curve.iloc[at - 1 : at + 1], curve.index
    return steps[at - 1] + (steps[at] - steps[at - 1]) * (before - loss) / (before - after)


def saved_table(rows: DataFrame, reference: str, goals: tuple[int, ...]) -> str:
    """Returns a Markdown table of the steps saved to the losses that the reference with the same
    seed has at the goals, and of the differences at the end, by range of the times."""
    curves = curves_of(rows).set_index([rows["name"], rows["seed"]])
    bins = rows["val_bins"].apply(Series)
    ranges = DataFrame({name: bins.iloc[:, part].mean(axis=1) for name, part in RANGES.items()})
    lines = [["arm", *(f"steps saved to the loss at {goal}" for goal in goals), *RANGES]]
    for name, minus in leads_of(rows, ranges, reference).items():
        cells = []
        for goal in goals:
            saved = [
                goal - first_step(curves.loc[name, seed], curves.loc[(reference, seed), goal])
                for seed in minus.index
            ]
            cells.append(with_error(Series(saved), "+", digits=0))
        lines.append([name, *cells, *(with_error(minus[part], "+") for part in RANGES)])
    return markdown(lines)


def early_table(rows: DataFrame, step: float, config: HeadStartConfig) -> str:
    """Returns a Markdown table of the tables minus the controls at a step, choosing images."""
    losses = curves_of(rows)[step].set_axis([rows["seed"], rows["name"]]).unstack()
    found = {
        (name, control): (losses[name] - losses[control]).dropna()
        for name in config.tables for control in config.controls
        if {name, control} <= set(losses)
    }  # fmt: skip
    head = [f"at step {step}", "minus"]
    if found and min(map(len, found.values())) >= config.pairs:
        return differences_table(head, found, digits=4).lstrip("\n")
    lines = [[*names, str(len(one)), with_error(one, "+")] for names, one in found.items()]
    return markdown([[*head, "pairs", "difference"], *lines])


def parse_args() -> HeadStartConfig:
    return parse_config(HeadStartConfig, __doc__)


def main(config: HeadStartConfig) -> None:
    prepare_output("--output", config.output / "tables.md")
    reference, baseline = "topk", "dense"
    rows = read_frame(read_rows(config.rows))
    names = {*config.tables, *config.controls, reference, baseline}
    rows = rows[rows["name"].isin(names) | rows["name"].str.startswith("warm", na=False)]
    if not {reference, baseline} <= set(rows["name"]):
        raise UserError(f"--rows: got no rows of {reference} and {baseline}, expected question 21")
    margin = margin_of(rows, reference, baseline, config.pairs)
    tables = [
        equivalence_table(rows, reference, baseline, margin, least=config.pairs, together=True),
        lead_tables(rows, reference, config.steps),
        saved_table(rows, reference, config.goals),
        early_table(rows, config.steps[0], config),
    ]
    if rows.groupby("name").size().min() >= config.pairs:
        tables.append(decay_table(rows, reference, config.tables, config.steps[0]))
    text = "\n".join(tables)
    write_durably(config.output / "tables.md", text)
    draw_leads(rows, reference, config.output / f"{config.rows[0].stem}.png")
    print(text, end="")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
