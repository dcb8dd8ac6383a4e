r"""Tables of a question whose rule was fixed before its results: which arms equal one of them.

    python -m experiments.equivalence --rows experiments/rows/learned_router.jsonl

The name of an arm is NAME-RATE-STEPS. The rate of each NAME is the one with the lowest loss on the
choosing images, with the choosing seeds. The other seeds give the paired differences from the
reference, on the reporting images:
    equivalent   the 90% interval lies within the margin: two one-sided t-tests at 5%
    detected     not equivalent, and p below 5% in a t-test, after Holm's correction for all arms
    share        (baseline - arm) / (baseline - reference), how much of the advantage of the
                 reference the arm has, with its 95% interval
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame, Series
from scipy import stats
from scipy.optimize import curve_fit

from experiments.comparisons import (
    equivalence_interval,
    fieller_interval,
    paired_tests,
    test_cells,
    with_error,
)
from experiments.rows import read_rows
from options.parts import option
from runtime.errors import UserError, reported_as, run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config
from tools.benchmarks.common import markdown


@dataclass(frozen=True, kw_only=True)
class EquivalenceConfig:
    rows: tuple[Path, ...] = option(help=".jsonl of runs")
    reference: str = option("topk", help="name of the arm to which the others may be equivalent")
    baseline: str = option(
        "dense", help="name of the arm over which the reference has an advantage"
    )
    margin: float = option(0.0012, gt=0, help="largest difference of equivalent arms")
    choosing_seeds: tuple[int, ...] = option((16, 17), help="seeds that only choose the rates")
    steps: tuple[int, ...] = option((), help="steps of the table of leads (default: four)")
    decaying: tuple[str, ...] = option((), help="arms whose lead is fitted by an exponential")
    decays_from: int = option(120, ge=0, help="first step of the fits")
    output: Path = option(Path("results/tables"), help="folder of tables.md and the figure")


def read_frame(rows: list[dict]) -> DataFrame:
    """Returns the rows of runs with the columns name and rate."""
    frame = DataFrame(rows)
    if "report_loss" not in frame:  # without other images, those of the curve
        frame["report_loss"] = frame["val_loss"]
    frame = frame[["arm", "seed", "val_loss", "report_loss", "max_violation", "curve", "val_bins"]]
    return frame.join(frame["arm"].str.extract(r"^(?P<name>.*)-(?P<rate>\d[\d.]*e-\d)-\d+$"))


def rates_table(choosing: DataFrame) -> str:
    """Returns a Markdown table of the losses on choosing images, by name and rate."""
    losses = choosing.pivot_table("val_loss", "name", "rate", sort=False)
    losses = losses[sorted(losses, key=float)]
    seeds = choosing.pivot_table("val_loss", "name", "rate", aggfunc="count", fill_value=0)
    lines = [["arm", "seeds", *losses, "chosen"]]
    for name, values in losses.iterrows():
        counts = ", ".join(f"{seeds.loc[name, rate]:.0f}" for rate in losses)
        cells = ("" if isnan(value) else f"{value:.4f}" for value in values)
        lines.append([name, counts, *cells, "" if values.isna().any() else values.idxmin()])
    return markdown(lines)


def chosen_rows(choosing: DataFrame, reporting: DataFrame) -> DataFrame:
    """Returns the reporting rows of each name at its chosen rate."""
    losses = choosing.pivot_table("val_loss", "name", "rate", sort=False)
    chosen = losses.idxmin(axis=1)
    return reporting[reporting["rate"] == reporting["name"].map(chosen)]


def verdict(interval: tuple[float, float], margin: float, pairs: Series, holm: float) -> str:
    if -margin < interval[0] and interval[1] < margin:
        return "equivalent"
    if holm < 0.05:
        return "worse" if pairs.mean() > 0 else "better"
    return "not decided"


def equivalence_table(
    rows: DataFrame,
    reference: str,
    baseline: str,
    margin: float,
    least: int = 3,
    *,
    together: bool = False,
) -> str:
    """Returns a Markdown table with a line for each name, tested if it has `least` pairs, or, if
    they are tested `together`, if all have."""
    losses = rows.pivot_table("report_loss", "seed", "name", sort=False)
    violations = rows.groupby("name")["max_violation"]
    others = [name for name in losses if name not in (reference, baseline)]
    found = {name: (losses[name] - losses[reference]).dropna() for name in others}
    tested = {name: pairs for name, pairs in found.items() if len(pairs) >= least}
    found = {} if together and len(tested) < len(found) else tested
    tests = paired_tests(DataFrame(found))
    advantage = (losses[baseline] - losses[reference]).dropna()
    own = paired_tests(DataFrame({baseline: advantage if len(advantage) >= least else []}))
    lines = [[
        "arm", "seeds", "held-out loss", f"minus {reference}", "90% interval", "margin",
        "p (Holm)", "detectable", "result", "share of the advantage", "MaxVio",
    ]]  # fmt: skip
    for name in losses:
        pairs = (losses[name] - losses[reference]).dropna()
        cells = [name, str(losses[name].count()), with_error(losses[name].dropna())]
        cells.append("" if name == reference else with_error(pairs, "+"))
        if name == baseline:  # a test of its own
            cells += ["", "", *test_cells(own, name, digits=4), ""]
        else:
            cells += tested_cells(name, found, tests, margin)
        complete = losses[[baseline, reference, name]].dropna() if name in found else DataFrame()
        cells.append(share_cell(complete, reference, baseline, name) if len(complete) > 2 else "")
        values = violations.get_group(name).dropna()
        cells.append(with_error(values, digits=2) if len(values) else "")
        lines.append(cells)
    return markdown(lines)


def tested_cells(name: str, found: dict[str, Series], tests: DataFrame, margin: float) -> list[str]:
    """Returns the cells from the interval to the result, empty for an arm that is not tested."""
    if name not in found:
        return [""] * 5
    low, high = equivalence_interval(found[name])
    result = verdict((low, high), margin, found[name], tests.loc[name, "holm"])
    p, detectable = test_cells(tests, name, digits=4)
    return [f"{low:+.4f} to {high:+.4f}", f"{margin:.4f}", p, detectable, result]


def share_cell(losses: DataFrame, reference: str, baseline: str, name: str) -> str:
    """Returns the share of the reference's advantage over the baseline, with its interval."""
    gains = losses[baseline] - losses[name], losses[baseline] - losses[reference]
    interval = fieller_interval(*gains)
    limits = f"{interval[0]:.0%} to {interval[1]:.0%}" if interval else "no limits"
    return f"{gains[0].mean() / gains[1].mean():.0%} ({limits})"


def leads_of(rows: DataFrame, losses: DataFrame, reference: str) -> dict[str, DataFrame]:
    """Returns the losses of each name minus those of the reference, one line per pair of seeds.

    losses: of the rows, in columns of any kind
    """
    of_arm = losses.set_index([rows["name"], rows["seed"]])
    names = [name for name in rows["name"].unique() if name != reference]
    return {name: (of_arm.loc[name] - of_arm.loc[reference]).dropna() for name in names}


def curves_of(rows: DataFrame) -> DataFrame:
    """Returns the losses on the choosing images, in a column for each step."""
    return rows["curve"].map(dict).apply(Series)


def lead_tables(rows: DataFrame, reference: str, steps: Sequence[float] = ()) -> str:
    """Returns two Markdown tables of each arm minus the reference on the choosing images: at
    `steps` of the training (default: four) and its end, and by the bin of the times."""
    curves = curves_of(rows)
    steps = [*steps] or [*curves.columns[[len(curves.columns) * k // 10 for k in (2, 4, 6, 8)]]]
    bins = rows["val_bins"].apply(Series)
    width = 1 / len(bins.columns)
    bins.columns = [f"t {k * width:.1f} to {(k + 1) * width:.1f}" for k in bins]
    tables = []
    for losses in (curves[steps].assign(end=rows["val_loss"]), bins):
        lines = [["arm", *map(str, losses)]]
        for name, minus in leads_of(rows, losses, reference).items():
            lines.append([name, *(with_error(minus[key], "+") for key in minus)])
        tables.append(markdown(lines))
    return "\n".join(tables)


def fit_decay(lead: Series) -> np.ndarray:
    """Fits a + b exp(-(step - first) / length) to a lead by step; returns a, b and length."""
    steps = lead.index.to_numpy(float) - lead.index[0]
    start = lead.iloc[-1], lead.iloc[0] - lead.iloc[-1], steps[-1] / 3
    bounds = [-np.inf, -np.inf, 1], np.inf
    with reported_as("the lead has no exponential fit", RuntimeError):
        return curve_fit(
            lambda x, a, b, length: a + b * np.exp(-x / length), steps, lead, start, bounds=bounds
        )[0]


def decay_table(rows: DataFrame, reference: str, names: Sequence[str], first: float) -> str:
    """Returns a Markdown table of exponential fits to the mean leads from the step `first` on.

    The interval of the asymptote is by the jackknife over the pairs.
    """
    lines = [["arm", "asymptote", "95% interval", "steps to halve the rest"]]
    for name, leads in leads_of(rows, curves_of(rows), reference).items():
        if name not in names or len(leads) < 3:
            continue
        leads, pairs = leads[[step for step in leads if step >= first]], len(leads)
        asymptote, _, length = fit_decay(leads.mean())
        without = [fit_decay(leads.drop(seed).mean())[0] for seed in leads.index]
        error = np.std(without) * (pairs - 1) ** 0.5
        reach = stats.t.isf(0.025, pairs - 1) * error
        interval = f"{asymptote - reach:+.4f} to {asymptote + reach:+.4f}"
        lines.append([name, f"{asymptote:+.4f}", interval, f"{length * np.log(2):.0f}"])
    return markdown(lines)


def draw_leads(rows: DataFrame, reference: str, path: Path) -> None:
    """Draws each arm minus the reference on the choosing images, mean and standard error: by step
    on the left, and by time at the end on the right."""
    figure = Figure(figsize=(10, 3.4), layout="tight")
    left, right = figure.subplots(1, 2)
    bins = rows["val_bins"].apply(Series)
    bins.columns = (np.arange(len(bins.columns)) + 0.5) / len(bins.columns)
    for axes, losses in ((left, curves_of(rows)), (right, bins)):
        for number, (name, minus) in enumerate(leads_of(rows, losses, reference).items()):
            mean, error = minus.mean(), minus.sem()
            axes.plot(mean.index, mean, ".-", label=name, color=f"C{number}")
            axes.fill_between(
                mean.index, mean - error, mean + error, color=f"C{number}", alpha=0.2, linewidth=0
            )
        axes.axhline(0, color="grey", linewidth=0.8)
    left.set(xlabel="step", ylabel=f"loss on choosing images\nminus the loss of {reference}")
    right.set(xlabel="time at the end (1: noise)")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def parse_args() -> EquivalenceConfig:
    return parse_config(EquivalenceConfig, __doc__)


def main(config: EquivalenceConfig) -> None:
    prepare_output("--output", config.output / "tables.md")
    names = " ".join(map(str, config.rows))
    message = f"--rows: got {names}, expected rows of runs named NAME-RATE-STEPS"
    rows = read_rows(config.rows)
    with reported_as(message, LookupError):
        frame = read_frame(rows)
    is_choosing = frame["seed"].isin(config.choosing_seeds)
    for flag, name in (("--reference", config.reference), ("--baseline", config.baseline)):
        if name not in set(frame["name"]):
            expected = ", ".join(frame["name"].dropna().unique())
            raise UserError(f"{flag}: got {name}, expected one of {expected}")
    text = rates_table(frame[is_choosing])
    rows = chosen_rows(frame[is_choosing], frame[~is_choosing])
    if {config.reference, config.baseline} <= set(rows["name"]):
        table = equivalence_table(rows, config.reference, config.baseline, config.margin)
        leads = lead_tables(rows, config.reference, config.steps)
        text = f"{text}\n{table}\n{leads}"
        if config.decaying:
            decay = decay_table(rows, config.reference, config.decaying, config.decays_from)
            text = f"{text}\n{decay}"
        draw_leads(rows, config.reference, config.output / f"{config.rows[0].stem}.png")
    write_durably(config.output / "tables.md", text)
    print(text, end="")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
