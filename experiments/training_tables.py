"""Tables and figures of the rows that `routers` writes: final losses of arms, and their use of
experts."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from experiments.arms import QUESTIONS, Question
from experiments.comparisons import paired_tests, pairs_table, test_cells, with_error
from runtime.errors import UserError, reported_as
from runtime.files import read_json
from tools.benchmarks.common import markdown


def training_tables(
    rows: list[dict], *, output: Path, times: Path | None = None, reference: str | None = None,
    pairs: tuple[str, ...] = (), steps: tuple[int, ...] = (),
) -> str:  # fmt: skip
    """Returns a Markdown table for each question with rows of its reference and of another arm, and
    writes it to a .csv and a figure in the folder `output`.

    times: a .json with milliseconds per step, by question and arm
    reference: arm to compare with, in place of the reference of the question; questions without
        this arm are skipped
    pairs: ARM:REFERENCE; these are tested, in one table, in place of the arms of each question
    steps: of a further table of each question, with the differences on the choosing images
    """
    text, known = [], {row["arm"] for row in rows}
    if reference not in (None, *known):
        expected = f"some of {', '.join(sorted(known))}"
        raise UserError(f"--reference: got {reference}, expected {expected}")
    with reported_as(f"--times: got {times}, expected a .json file", OSError, ValueError):
        measured = read_json(times) if times else {}
    for number, question in QUESTIONS.items():
        question = replace(question, reference=reference or question.reference)
        arms = known & question.arms.keys()
        if question.reference not in arms or len(arms) < 2:
            continue
        step_times = measured.get(str(number), {})
        lines = table(rows, question, step_times, tested=not pairs)
        text += [
            f"## {number}. {question.title}\n\n",
            f"Differences are relative to `{question.reference}`, paired by seed, ± one standard "
            "error.\n\n",
            without_empty_columns(lines), "\n",
        ]  # fmt: skip
        if question.has_own_lengths:
            text.append(steps_to_quality(rows, question, step_times))
        if steps:
            text += [leads_table(rows, question, steps), "\n"]
        DataFrame(lines).to_csv(output / f"question-{number}.csv", index=False)
        draw(rows, question, output / f"question-{number}.png")
    return "".join([*text, pairs_table(losses_of(rows), pairs)])


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
    every, choosing = losses_of(rows), DataFrame(rows).groupby("arm")["val_loss"].mean()
    losses, seeds = every.mean(), every.count()
    goal, last = losses[question.reference], int(question.reference.rpartition("-")[2])
    lengths: dict[str, dict[int, str]] = {}  # arms by recipe and steps
    for arm in filter(losses.__contains__, question.arms):
        name, _, number = arm.rpartition("-")
        lengths.setdefault(name, {})[int(number)] = arm
    lines = []
    for name, by_steps in lengths.items():
        steps, arms = map(list, zip(*sorted(by_steps.items()), strict=True))
        at_end, reached, bound = losses[arms], math.nan, ""
        if at_end.min() <= goal:  # "at most", if even the shortest run reaches the goal
            bound = "at most " if at_end.iloc[0] <= goal else ""
            reached = steps[0] if bound else float(np.interp(-goal, -at_end, steps))
        seconds = reached * times.get(arms[0], math.nan) / 1000
        lines.append({
            "recipe and rate": name,
            "steps run": ", ".join(map(str, steps)),
            "seeds": ", ".join(map(str, seeds[arms])),
            "loss, choosing images": ", ".join(map("{:.4f}".format, choosing[arms])),
            "loss, reporting images": ", ".join(map("{:.4f}".format, at_end)),
            "steps to the goal": bound + text_of(reached, ".0f"),
            "of the reference": bound + text_of(reached / last, ".0%"),
            "seconds": text_of(seconds, ".0f"),
        })  # fmt: skip
    text = without_empty_columns(lines)
    return f"The goal is {goal:.4f}, the loss of `{question.reference}`.\n\n{text}\n"


def text_of(value: float, form: str) -> str:
    """Formats a number; "" for nan."""
    return "" if math.isnan(value) else format(value, form)


def without_empty_columns(lines: list[dict[str, str]]) -> str:
    """Returns a Markdown table of lines, each with its cells by column."""
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    return markdown([columns, *([line[name] for name in columns] for line in lines)])


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
        has_pairs = arm != question.reference and len(gaps) > 0
        p, detectable = test_cells(tests, arm, digits=4)
        at_equal = ""
        if has_pairs and {arm, question.reference} <= {*equal_time}:
            at_equal = with_error(equal_time[arm] - equal_time[question.reference], "+")
        line = {
            "arm": arm,
            "seeds": str(len(of_arm)),
            "held-out loss": with_error(losses[arm].dropna()),
            "difference": with_error(gaps, "+") if has_pairs and tested else "",
            "p (Holm)": p,
            "detectable": detectable,
            "at equal time": at_equal,
        }
        for title, name in (("MaxVio", "max_violation"), ("dead", "dead_experts")):
            line[title] = with_error(of_arm[name], digits=2) if name in of_arm else ""
        experts = of_arm.get("experts_per_token")
        lines.append(line | {
            "experts per token": "" if experts is None else f"{experts.mean():.2f}",
            "parameters": f"{first['total_parameters'] / 1e6:.2f}M",
            "active": f"{first['active_parameters'] / 1e6:.2f}M",
            "MMACs per image": f"{first['macs'] / 1e6:.1f}",
            "ms per step": f"{times[arm]:.0f}" if arm in times else "",
        })  # fmt: skip
    return lines


def leads_table(rows: list[dict], question: Question, steps: tuple[int, ...]) -> str:
    """Returns a Markdown table of the differences on the choosing images, by arm and step."""
    curves = {(row["arm"], row["seed"]): Series(dict(map(tuple, row["curve"]))) for row in rows}
    lines = [["arm", *map(str, steps)]]
    for arm in question.arms:
        gaps = DataFrame([
            curve - curves[question.reference, seed] for (name, seed), curve in curves.items()
            if name == arm and (question.reference, seed) in curves
        ])  # fmt: skip
        if arm != question.reference and len(gaps):
            lines.append([arm, *(with_error(gaps[step], "+") for step in steps)])
    return markdown(lines)


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
