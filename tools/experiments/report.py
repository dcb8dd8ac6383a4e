"""Tables and figures from the rows that the tools of this folder write.

    python -m tools.experiments.report --rows docs/experiments_quality.jsonl --output results/tables

docs/tables.md has the commands that make the tables of the documentation.
`comparisons.paired_tests` defines which differences are detected.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame, concat, read_csv

from options.parts import option
from runtime.errors import UserError, reported_as, run_main
from runtime.files import prepare_output, read_json, write_durably
from runtime.flags import parse_config, refuse_idle
from tools.benchmarks.common import markdown
from tools.experiments.arms import QUESTIONS, Question
from tools.experiments.comparisons import (
    information_table,
    paired_tests,
    pairs_table,
    test_cells,
    with_error,
)
from tools.experiments.expert_tables import EXPERT_TABLES
from tools.experiments.sample_tables import (
    draw_samples,
    guidance_table,
    read_samples,
    reuse_table,
    sample_comparisons,
    sample_tables,
    setting_comparisons,
)

COLUMNS = (
    "arm", "seeds", "held-out loss", "difference", "p (Holm)", "detectable", "at equal time",
    "MaxVio", "dead", "experts per token", "parameters", "active", "MMACs per image",
    "ms per step",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    rows: tuple[Path, ...] = option(help=".jsonl of runs or of samples, or .csv of specialisation")
    times: Path | None = option(
        None, help="a .json with milliseconds per step, by question and arm, or of bench_sample.py"
    )
    arms: tuple[str, ...] = option(
        (), help="arms in the tables of specialisation (default: all with rows)"
    )
    reference: str | None = option(
        None, help="arm to compare with (default: the reference of the question)"
    )
    pairs: tuple[str, ...] = option(
        (), help="compare only these arms, as ARM:REFERENCE, in one table with one correction"
    )
    output: Path = option(Path("results/tables"), help="folder for tables and figures")


def read_lines(path: Path) -> list[dict]:
    """Reads the objects of a .jsonl; returns [] if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_log(run: Path) -> list[dict]:
    """Reads the rows of a run's log; refuses a run that went on with other settings."""
    rows = read_lines(run / "log.jsonl")
    if changed := [line for row in rows for line in row.get("changed", ())]:
        raise UserError(
            f"{run}: got a run that went on with changes: {'; '.join(changed)}; expected the same "
            "settings in all steps; delete its folder to train it again"
        )
    return rows


def add_row(path: Path, row: dict) -> None:
    """Appends a row durably; other commands may append to the same file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def losses_of(rows: list[dict]) -> DataFrame:
    """Returns the final losses, (seeds, arms).

    A loss is the test loss (--report-path), on images that no choice was based on. Rows without a
    test loss have the loss on the held-out images.
    """
    frame = DataFrame(rows, columns=["arm", "seed", "report_loss", "val_loss"])
    frame["loss"] = frame["report_loss"].astype(float).fillna(frame["val_loss"])
    return frame.pivot_table("loss", "seed", "arm", aggfunc="last")


def differences(rows: list[dict], question: Question) -> DataFrame:
    """Returns losses minus the reference's loss with the same seed, (seeds, arms).

    A value is nan if the reference has no run with that seed.
    """
    losses = losses_of(rows)
    return losses.sub(losses[question.reference], axis=0)


def steps_to_quality(rows: list[dict], question: Question, times: dict[str, float]) -> str:
    """Returns a Markdown table of the steps after which each recipe reaches the reference's loss.

    The number of steps is interpolated between runs of different lengths. A loss is the mean over
    seeds.
    """
    losses, choosing = losses_of(rows).mean(), DataFrame(rows).groupby("arm")["val_loss"].mean()
    goal, last = losses[question.reference], int(question.reference.rpartition("-")[2])
    lengths: dict[str, list[int]] = {}
    for arm in question.arms:
        if arm in losses:
            name, _, steps = arm.rpartition("-")
            lengths.setdefault(name, []).append(int(steps))
    seeds = losses_of(rows).count()
    head = [
        "recipe and rate", "steps run", "seeds", "loss, choosing images", "loss, reporting images",
        "steps to the goal", "of the reference", "seconds",
    ]  # fmt: skip
    lines = [head if times else head[:-1]]
    for name, steps in lengths.items():
        steps = sorted(steps)
        arms = [f"{name}-{number}" for number in steps]
        at_end, first = losses[arms], losses[arms[0]]
        ends = (", ".join(f"{loss:.4f}" for loss in values) for values in (choosing[arms], at_end))
        counts = ", ".join(map(str, seeds[arms]))
        cells = [name, ", ".join(map(str, steps)), counts, *ends, "", "", ""]
        if at_end.min() <= goal:
            bound = "at most " if first <= goal else ""  # even the shortest run reaches the goal
            reached = steps[0] if bound else float(np.interp(-goal, -at_end, steps))
            cells[5:7] = [f"{bound}{reached:.0f}", f"{bound}{reached / last:.0%}"]
            if arms[0] in times:
                cells[7] = f"{reached * times[arms[0]] / 1000:.0f}"
        lines.append(cells if times else cells[:-1])
    return f"The goal is {goal:.4f}, the loss of `{question.reference}`.\n\n{markdown(lines)}\n"


def loss_at(curve: list[list[float]], step: float) -> float:
    """Interpolates the held-out loss at a step linearly between the neighbouring measurements."""
    return np.interp(step, *zip(*curve, strict=True), left=math.nan, right=math.nan)


def at_equal_time(rows: list[dict], times: dict[str, float], question: Question) -> DataFrame:
    """Returns the held-out losses, (seeds, arms), at the time when the fastest arm finishes."""
    known = [row for row in rows if row["arm"] in question.arms and row["arm"] in times]
    ends = {row["curve"][-1][0] for row in known}
    if len(ends) != 1:  # no runs, or runs of several lengths
        return DataFrame()
    (last,) = ends
    budget = last * min(times[row["arm"]] for row in known)
    losses = [loss_at(row["curve"], min(last, budget / times[row["arm"]])) for row in known]
    return DataFrame(known).assign(loss=losses).pivot(index="seed", columns="arm", values="loss")


def table(
    rows: list[dict], question: Question, times: dict[str, float], *, tested: bool = True
) -> list[dict[str, str]]:
    """Returns one table line, with cells as text, for each arm that has rows.

    tested: whether to compare the losses at the end with those of the reference
    """
    losses, found = losses_of(rows), differences(rows, question)
    compared = [arm for arm in question.arms if arm in found and arm != question.reference]
    tests = paired_tests(found[compared]) if tested else DataFrame()
    equal_time, lines = at_equal_time(rows, times, question), []
    for arm in filter(losses.__contains__, question.arms):
        of_arm = DataFrame([row for row in rows if row["arm"] == arm])
        gaps, first = found[arm].dropna(), of_arm.iloc[0]
        is_reference = arm == question.reference or gaps.empty
        cells = [arm, str(len(of_arm)), with_error(losses[arm].dropna())]
        cells.append("" if is_reference or not tested else with_error(gaps, sign="+"))
        cells += test_cells(tests, arm, digits=4)
        has_time = arm in equal_time and not is_reference
        cells.append(
            with_error(equal_time[arm] - equal_time[question.reference], "+") if has_time else ""
        )
        for name in ("max_violation", "dead_experts"):
            cells.append(with_error(of_arm[name], digits=2) if name in of_arm else "")
        experts = of_arm.get("experts_per_token")
        cells.append("" if experts is None else f"{experts.mean():.2f}")
        cells += [f"{first[n] / 1e6:.2f}M" for n in ("total_parameters", "active_parameters")]
        cells.append(f"{first['macs'] / 1e6:.1f}")
        cells.append(f"{times[arm]:.0f}" if arm in times else "")
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    return lines


def write_report(
    output: Path,
    rows: list[dict],
    times: dict,
    reference: str | None = None,
    pairs: tuple[str, ...] = (),
) -> str:
    """Writes a table and a figure for each question with rows of at least two arms; returns the
    text of tables.md.

    reference: arm to compare with, in place of the reference of the question; questions without
        this arm are skipped
    pairs: ARM:REFERENCE; these are tested, in one table, in place of the arms of each question
    """
    text, known = [], {row["arm"] for row in rows}
    for number, question in QUESTIONS.items():
        if reference is not None:
            question = replace(question, reference=reference)
        if question.reference not in question.arms:
            continue
        if question.reference not in known or len(known & question.arms.keys()) < 2:
            continue
        step_times = times.get(str(number), {})
        lines = table(rows, question, step_times, tested=not pairs)
        columns = [name for name in COLUMNS if any(line[name] for line in lines)]
        text += [
            f"## {number}. {question.title}\n\n",
            f"Differences are relative to `{question.reference}`, paired by seed, ± one standard "
            "error.\n\n",
            markdown([columns, *([line[name] for name in columns] for line in lines)]), "\n",
        ]  # fmt: skip
        if question.has_own_lengths:
            text.append(steps_to_quality(rows, question, step_times))
        DataFrame(lines).to_csv(output / f"question-{number}.csv", index=False)
        draw(rows, question, output / f"question-{number}.png")
    return "".join([*text, pairs_table(losses_of(rows), pairs)])


def draw(rows: list[dict], question: Question, path: Path) -> None:
    """Draws paired differences of losses: means by step on the left, and final values on the right.

    The scale of the left panel fits the second half of the steps, as early differences are large.
    """
    found = differences(rows, question)
    arms = [arm for arm in question.arms if arm in found]
    figure = Figure(figsize=(11, 3.6), layout="tight")
    reports = any("report_loss" in row for row in rows)
    curve, end = ("choosing images", "reporting images") if reports else ("held-out images",) * 2
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    references = {row["seed"]: row["curve"] for row in rows if row["arm"] == question.reference}
    late = [0.0]
    for position, arm in enumerate(arms):
        gaps = DataFrame(
            [step, loss - loss_at(references[row["seed"]], step)]
            for row in rows if row["arm"] == arm and row["seed"] in references
            for step, loss in row["curve"]
        )  # fmt: skip
        if gaps.empty:
            continue
        means = gaps.groupby(0)[1].mean()  # by step
        left.plot(means.index, means, ".-", label=arm, color=f"C{position}")
        late += means[means.index >= means.index.max() / 2].tolist()
        ends = found[arm].dropna()
        error = 0 if arm == question.reference else ends.sem()
        right.plot(ends, [position] * len(ends), "|", color=f"C{position}", alpha=0.5)
        right.errorbar(ends.mean(), position, xerr=error, fmt="o", color=f"C{position}", capsize=3)
    margin = 0.1 * (np.nanmax(late) - np.nanmin(late)) or None
    left.set_ylim(margin and np.nanmin(late) - margin, margin and np.nanmax(late) + margin)
    left.set(xlabel="step", ylabel=f"loss on {curve}\nminus the loss of {question.reference}")
    left.legend(fontsize=8)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_yticks(range(len(arms)), arms)
    right.invert_yaxis()
    right.locator_params(axis="x", nbins=6)
    right.set(
        xlabel=f"loss on {end} minus the loss of {question.reference}\n"
        "with the same seed (bar: one standard error)"
    )
    figure.savefig(path, dpi=120)


def parse_args() -> ReportConfig:
    return parse_config(ReportConfig, __doc__)


def report_samples(config: ReportConfig, rows: list[dict]) -> str:
    """Returns the tables; of several numbers of steps, also draws samples.png."""
    frame = read_samples(rows)
    arms = set(frame["arm"])
    if config.reference and config.reference not in arms:
        expected = ", ".join(sorted(arms))
        raise UserError(f"--reference: got {config.reference}, expected some of {expected}")
    text = sample_tables(rows)
    if frame["reuse"].any():
        message = f"--times: got {config.times}, expected a .json of bench_sample.py"
        with reported_as(message, OSError, ValueError, LookupError):
            times = read_json(config.times)["rows"] if config.times else []
            text += "\n" + reuse_table(rows, times)
    else:
        refuse_idle(config, ("times",), "with samples without reuse")
    if frame["interval"].nunique() > 1:
        text += "\n" + guidance_table(rows)
    if config.reference:
        text += "\n" + sample_comparisons(rows, config.reference)
        if frame["scale"].nunique() > 1:
            text += "\n" + setting_comparisons(rows, config.reference)
    if len({row["steps"] for row in rows}) > 1:
        draw_samples(rows, config.output / "samples.png")
    return text


def report_training(config: ReportConfig, rows: list[dict]) -> str:
    """Returns the tables of the questions that these rows answer, and draws their figures."""
    known = {row["arm"] for row in rows}
    if config.reference not in (None, *known):
        expected = f"some of {', '.join(sorted(known))}"
        raise UserError(f"--reference: got {config.reference}, expected {expected}")
    with reported_as(f"--times: got {config.times}, expected a .json file", OSError, ValueError):
        times = read_json(config.times) if config.times else {}
    return write_report(config.output, rows, times, config.reference, config.pairs)


def main(config: ReportConfig) -> None:
    prepare_output("--output", config.output / "tables.md")
    names, is_csv = " ".join(map(str, config.rows)), config.rows[0].suffix == ".csv"
    with reported_as(
        f"--rows: got {names}, expected the rows of experiments", OSError, ValueError, LookupError
    ):
        if is_csv:
            frame = concat(map(read_csv, config.rows), ignore_index=True)
        else:
            lines = "".join(path.read_text() for path in config.rows).splitlines()
            rows = [json.loads(line) for line in lines]
            of_experts = [table for key, table in EXPERT_TABLES.items() if key in rows[0]]
    if is_csv:
        refuse_idle(config, ("times", "pairs"), "with specialisation")
        with reported_as(f"--arms, --reference: expected arms of {names}", LookupError):
            text = information_table(frame, config.arms, config.reference)
    elif of_experts:
        refuse_idle(config, ("arms", "times", "reference"), f"with {names}")
        text = of_experts[0](rows, config.pairs)
    elif "scale" in rows[0]:
        refuse_idle(config, ("arms", "pairs"), "with samples")
        text = report_samples(config, rows)
    else:
        refuse_idle(config, ("arms",), "with runs of training")
        text = report_training(config, rows)
    if not text:
        raise UserError("--rows: got no question with rows of its reference and of another arm")
    write_durably(config.output / "tables.md", text)
    print(text, end="")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
