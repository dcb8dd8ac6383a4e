"""Tables and pictures of the rows that `experiments.routers` leaves."""

import csv
import math
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from experiments.arms import QUESTIONS, TIME_TO_QUALITY, Question
from runtime.files import read_json, write_durably

COLUMNS = (
    "arm", "seeds", "held-out loss", "difference", "at equal time", "MaxVio", "dead",
    "experts a token", "parameters", "active", "MMACs an image", "ms a step",
)  # fmt: skip


def standard_error(values: list[float]) -> float:
    """The standard error of the mean of independent values; nan for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def losses_of(rows: list[dict], arm: str) -> dict[int, float]:
    """By seed, the loss on what chose nothing, or without that on the held-out images."""
    return {r["seed"]: r.get("report_loss", r["val_loss"]) for r in rows if r["arm"] == arm}


def differences(rows: list[dict], arm: str, reference: str) -> list[float]:
    """Held-out loss minus the reference's with the same seed, by seed."""
    ours, theirs = losses_of(rows, arm), losses_of(rows, reference)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def smallest_visible(rows: list[dict], question: Question) -> float:
    """The difference that the runs find with power 80% at a two-sided level of 5%, nan if unknown.

    Of n pairs, t(0.975) + t(0.8) standard errors, each at n - 1 degrees of freedom; the spread
    between seeds is pooled over the arms.
    """
    others = [arm for arm in question.arms if arm != question.reference]
    found = [differences(rows, arm, question.reference) for arm in others]
    found = [values for values in found if len(values) > 1]
    if not found:
        return math.nan
    squares = sum((len(values) - 1) * stdev(values) ** 2 for values in found)
    spread = math.sqrt(squares / sum(len(values) - 1 for values in found))
    pairs = min(len(values) for values in found)
    return (t_quantile(0.975, pairs - 1) + t_quantile(0.8, pairs - 1)) * spread / math.sqrt(pairs)


def t_quantile(share: float, freedom: int) -> float:
    """A quantile of Student's t; for t = sqrt(freedom) tan(a) has the density cos(a)^(freedom - 1)
    in a."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    below = np.cumsum(np.cos(angle) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(share, below / below[-1], angle))


def steps_to_quality(rows: list[dict], question: Question, times: dict[str, float]) -> list[str]:
    """Of each recipe in runs of its own length, the least steps at which it is as good as the
    reference, on a line between the lengths that were run; lines of Markdown."""
    recipes: dict[str, list[tuple[int, str]]] = {}
    for arm in question.arms:
        if losses_of(rows, arm):
            name, _, steps = arm.rpartition("-")
            recipes.setdefault(name, []).append((int(steps), arm))
    last = int(question.reference.rpartition("-")[2])
    goal = mean(losses_of(rows, question.reference).values())
    names = ("recipe and rate", "steps run", "when choosing", "loss at the end",
             "steps to the goal", "of its", "seconds")  # fmt: skip
    lines = [f"| {' | '.join(names)} |\n", "| --- |" + " ---: |" * 6 + "\n"]
    for name, runs in recipes.items():
        steps, arms = zip(*sorted(runs), strict=True)
        losses = [mean(losses_of(rows, arm).values()) for arm in arms]
        choosing = [mean(row["val_loss"] for row in rows if row["arm"] == arm) for arm in arms]
        reached = math.nan
        if losses[0] <= goal:
            reached = steps[0]  # or fewer: no shorter run is there
        elif min(losses) <= goal:
            reached = float(np.interp(-goal, [-loss for loss in losses], steps))
        ends = (", ".join(f"{loss:.4f}" for loss in values) for values in (choosing, losses))
        cells = [name, ", ".join(map(str, steps)), *ends, "", "", ""]
        if not math.isnan(reached):
            bound = "at most " if losses[0] <= goal else ""
            cells[4:6] = [f"{bound}{reached:.0f}", f"{reached / last:.0%}"]
            if arms[0] in times:
                cells[6] = f"{reached * times[arms[0]] / 1000:.0f}"
        lines.append(f"| {' | '.join(cells)} |\n")
    return [f"The goal is {goal:.4f}, of `{question.reference}`.\n\n", *lines, "\n"]


def loss_at(curve: list[list[float]], step: float) -> float:
    """The held-out loss at a step, on a line between the two measured ones beside it."""
    for (before, left), (after, right) in zip(curve, curve[1:], strict=False):
        if before <= step <= after:
            return left + (right - left) * (step - before) / (after - before)
    return math.nan


def at_equal_time(rows: list[dict], times: dict[str, float], question: Question) -> dict:
    """Mean held-out loss of each arm when the fastest one has taken its last step."""
    known = [arm for arm in question.arms if arm in times and losses_of(rows, arm)]
    ends = {row["curve"][-1][0] for row in rows if row["arm"] in known}
    if len(ends) != 1:  # no runs, or of several lengths
        return {}
    (last,) = ends
    budget = last * min(times[arm] for arm in known)
    steps = {arm: min(last, budget / times[arm]) for arm in known}
    return {
        arm: mean(loss_at(r["curve"], steps[arm]) for r in rows if r["arm"] == arm) for arm in known
    }


def table(rows: list[dict], question: Question, times: dict[str, float]) -> list[dict[str, str]]:
    """One line for each arm that has rows, cells as text."""
    equal_time, lines = at_equal_time(rows, times, question), []
    for arm in question.arms:
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        losses = list(losses_of(rows, arm).values())
        found = differences(rows, arm, question.reference)
        cells = [arm, str(len(own)), f"{mean(losses):.4f} ± {standard_error(losses):.4f}"]
        is_reference = arm == question.reference or not found
        cells.append("" if is_reference else f"{mean(found):+.4f} ± {standard_error(found):.4f}")
        equal = equal_time.get(arm, math.nan)
        cells.append("" if math.isnan(equal) else f"{equal:.4f}")
        if "max_violation" in own[0]:
            names = ("max_violation", "dead_experts", "experts_per_token")
            cells += [f"{mean(row[name] for row in own):.2f}" for name in names]
        else:
            cells += [""] * 3
        cells += [f"{own[0][n] / 1e6:.2f}M" for n in ("total_parameters", "active_parameters")]
        cells.append(f"{own[0]['macs'] / 1e6:.1f}")
        cells.append(f"{times[arm]:.0f}" if arm in times else "")
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    return lines


def markdown(lines: list[dict[str, str]]) -> str:
    rows = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    rows += [list(line.values()) for line in lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def write_csv(path: Path, lines: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def write_report(output: Path, rows: list[dict]) -> None:
    """Writes tables.md, and a table and a picture of each question that has rows of two arms."""
    times = read_json(output / "times.json") if (output / "times.json").exists() else {}
    text = []
    for number, question in QUESTIONS.items():
        lines = table(rows, question, times.get(str(number), {}))
        if len(lines) < 2 or not losses_of(rows, question.reference):
            continue
        visible = smallest_visible(rows, question)
        text += [
            f"## {number}. {question.title}\n\n",
            f"Differences are to `{question.reference}`, paired by seed, ± one standard error. "
            f"Smallest difference that can be seen: {visible:.4f}.\n\n",
            markdown(lines), "\n",
        ]  # fmt: skip
        if number == TIME_TO_QUALITY:
            text += steps_to_quality(rows, question, times.get(str(number), {}))
        write_csv(output / f"question-{number}.csv", lines)
        draw(rows, question, output / f"question-{number}.png")
    write_durably(output / "tables.md", "".join(text))


def draw(rows: list[dict], question: Question, path: Path) -> None:
    """Draws the paired differences of held-out losses: means by step, and each at the end.

    The left panel's scale is that of the second half of the steps: the first are far apart.
    """
    arms = [arm for arm in question.arms if losses_of(rows, arm)]
    figure = Figure(figsize=(11, 3.6), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    references = {row["seed"]: row["curve"] for row in rows if row["arm"] == question.reference}
    late = [0.0]
    for place, arm in enumerate(arms):
        pairs = [(row["curve"], references[row["seed"]]) for row in rows
                 if row["arm"] == arm and row["seed"] in references]  # fmt: skip
        gaps: dict[float, list[float]] = {}
        for curve, reference in pairs:
            for step, loss in curve:
                gaps.setdefault(step, []).append(loss - loss_at(reference, step))
        means = {step: mean(values) for step, values in gaps.items()}
        left.plot(means.keys(), means.values(), ".-", label=arm, color=f"C{place}")
        late += [gap for step, gap in means.items() if step >= max(means) / 2]
        found = differences(rows, arm, question.reference)
        if not found:
            continue
        error = 0 if arm == question.reference else standard_error(found)
        right.plot(found, [place] * len(found), "|", color=f"C{place}", alpha=0.5)
        right.errorbar(mean(found), place, xerr=error, fmt="o", color=f"C{place}", capsize=3)
    margin = 0.1 * (np.nanmax(late) - np.nanmin(late)) or None
    left.set_ylim(margin and np.nanmin(late) - margin, margin and np.nanmax(late) + margin)
    left.set(xlabel="step", ylabel=f"held-out loss, less that\nof {question.reference}")
    left.legend(fontsize=8)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_yticks(range(len(arms)), arms)
    right.invert_yaxis()
    right.set(xlabel=f"difference to {question.reference},\npaired (bar: one standard error)")
    figure.savefig(path, dpi=120)
