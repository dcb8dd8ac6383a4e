"""Tables and a figure from the rows that `experiments.samples` writes."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from pandas import DataFrame, Series

from experiments.comparisons import tested_table, with_error
from experiments.rows import DEFAULTS, frame_of
from runtime.errors import UserError, pluralize, reported_as
from runtime.files import read_json
from tools.benchmarks.common import markdown

MODEL_SETTINGS = ("quantize", "experts_per_token", "min_weight", "reuse")  # of rows of samples


def read_samples(rows: list[dict]) -> DataFrame:
    """Returns the rows of samples as a frame.

    The column "arm" is the name of the run without the seed, and the settings of the model that
    differ between rows: ARM,NAME=VALUE. "passes" is the number of forward passes per image.
    """
    frame = frame_of([DEFAULTS | row for row in rows])
    frame["interval"] = frame["interval"].map("{0[0]:g} to {0[1]:g}".format)
    frame.loc[frame["scale"] == 1, "interval"] = "0 to 1"  # nothing is guided
    frame = frame.assign(chosen=frame["choosing"].str[0], kid=frame["reporting"].str[0])
    frame["passes"] = frame["passes"].round().astype(int)
    for name in MODEL_SETTINGS:
        if name in frame and frame[name].nunique() > 1:
            values = frame[name].map(f",{name}={{}}".format)
            frame["arm"] += values.where(~frame[name].isin(["none", 0.0]), "")
    return frame


def sample_tables(
    rows: list[dict], *, output: Path, times: Path | None = None, reference: str | None = None
) -> str:
    """Returns the tables; of several numbers of steps, also draws samples.png in `output`."""
    frame = read_samples(rows)
    if reference not in (None, *frame["arm"]):
        expected = ", ".join(sorted(set(frame["arm"])))
        raise UserError(f"--reference: got {reference}, expected some of {expected}")
    tables = [kid_table(frame)]
    if frame["reuse"].any():
        message = f"--times: got {times}, expected a .json of bench_sample.py"
        with reported_as(message, OSError, ValueError, LookupError):
            tables.append(reuse_table(frame, read_json(times)["rows"] if times else []))
    elif times:
        raise UserError("--times: has no effect with samples without reuse")
    if frame["interval"].nunique() > 1:
        tables.append(guidance_table(frame))
    if reference:
        tables.append(comparisons_table(frame, reference))
        if frame["scale"].nunique() > 1:
            tables.append(settings_table(frame, reference))
    if frame["steps"].nunique() > 1:
        draw(frame, output / "samples.png")
    return "\n".join(tables)


def strongest(frame: DataFrame, *by: str) -> DataFrame:
    """Returns the row of each run, by these columns, with the smallest KID on choosing images."""
    return frame.loc[frame.groupby(["arm", "seed", *by], sort=False)["chosen"].idxmin()]


def kids_of(rows: DataFrame) -> Series:
    """Returns the KIDs of runs; for one run, of its groups of samples."""
    return rows["kid"] if len(rows) > 1 else Series(rows["groups"].iloc[0])


def with_noise(rows: DataFrame) -> str:
    """Formats the mean KID ± its standard error over runs or, for one run, over groups."""
    return with_error(kids_of(rows), digits=3)


def kid_table(frame: DataFrame) -> str:
    """Returns a Markdown table of KID, at the guidance scale that is best on the choosing images.

    With one sampler and number of steps, there is a line per run; else a line per arm and sampler,
    and a column per number of passes; a cell of fewer runs than its line has their number in
    brackets. The last line is the noise of sampling: the standard deviation between groups of
    samples of a run, pooled over the runs of a column.
    """
    is_varied = len(frame[["sampler", "steps"]].drop_duplicates()) > 1
    best = strongest(frame, *(("sampler", "passes") if is_varied else ()))
    if len(best) == best["run"].nunique():
        lines = [["run", "guidance scale", "KID, choosing images", "KID, reporting images"]]
        for row in best.to_dict("records"):
            kids = (f"{mean:.3f} ± {std:.3f}" for mean, std in (row["choosing"], row["reporting"]))
            lines.append([row["run"], guidance_of(row, frame), *kids])
        return markdown(lines)
    passes = sorted(best["passes"].unique().tolist())
    lines = [["arm", "sampler", "runs", *(pluralize(n, "pass") for n in passes)]]
    for (arm, sampler), group in best.groupby(["arm", "sampler"], sort=False):
        runs = group["run"].nunique()
        cells = {
            n: with_noise(found) + (f" ({len(found)})" if len(found) < runs else "")
            for n, found in group.groupby("passes")
        }
        lines.append([arm, sampler, str(runs), *(cells.get(n, "") for n in passes)])
    noise = (best["reporting"].str[1] ** 2).groupby(best["passes"]).mean() ** 0.5
    lines.append(["deviation between groups", "", "", *map("{:.3f}".format, noise[passes])])
    return markdown(lines)


def guidance_of(row: dict, frame: DataFrame) -> str:
    """Names the scale and, if the rows of the frame differ in it, the interval of guidance."""
    interval = f" in {row['interval']}" if frame["interval"].nunique() > 1 else ""
    return f"{row['scale']:g}{interval if row['scale'] != 1 else ''}"


def guidance_table(frame: DataFrame) -> str:
    """Returns a Markdown table with a line for each scale and interval of guidance of each run."""
    lines = [["run", "sampler", "guidance", "passes", "KID, choosing images",
              "KID, reporting images", "border contrast"]]  # fmt: skip
    for row in frame.to_dict("records"):
        kid = with_error(Series(row["groups"]), digits=2)
        lines.append([
            row["run"], f"{row['sampler']} {row['steps']}", guidance_of(row, frame),
            str(row["passes"]), f"{row['chosen']:.2f}", kid, f"{row['border_contrast']:.2f}",
        ])  # fmt: skip
    return markdown(lines)


def comparisons_table(frame: DataFrame, reference: str) -> str:
    """Returns a Markdown table that compares the KID of arms with the reference at equal passes.

    Each run gets the sampler, steps and scale that are best on the choosing images, among those of
    at most this number of passes. Arms whose samplers the reference has too are compared by
    sampler.
    """
    ours, found = frame[frame["arm"] == reference], []
    for _, theirs in frame[frame["arm"] != reference].groupby("arm", sort=False):
        if {*theirs["sampler"]} <= {*ours["sampler"]}:
            for sampler, both in theirs.groupby("sampler", sort=False):
                found += rivals(both, ours[ours["sampler"] == sampler])
        else:
            found += rivals(theirs, ours)
    head = ["arm", "at most passes", "KID", f"KID of {reference}", "from", "from"]
    lines = []
    for limit, *rows in found:
        cells = [
            rows[0]["arm"].iloc[0],
            str(limit),
            *map(with_noise, rows),
            *map(settings_of, rows),
        ]
        lines.append((cells, paired(*rows)))
    return with_tests(head, lines)


def with_tests(head: list[str], lines: list[tuple[list[str], Series]]) -> str:
    """Returns a Markdown table of lines, each with its differences of KID and their test."""
    counted = [([*cells, f"{len(pairs)} {pairs.name}"], pairs) for cells, pairs in lines]
    return tested_table([*head, "pairs"], counted, digits=3)


def settings_table(frame: DataFrame, reference: str) -> str:
    """Returns a Markdown table that compares the KID of arms with the reference, sampled with the
    same sampler, steps and guidance."""
    by = ["sampler", "steps", "scale", "interval"]
    ours, lines = frame[frame["arm"] == reference].groupby(by), []
    for (arm, *setting), theirs in frame[frame["arm"] != reference].groupby(["arm", *by]):
        if tuple(setting) in ours.groups:
            same = ours.get_group(tuple(setting))
            cells = [arm, settings_of(theirs), with_noise(theirs), with_noise(same)]
            lines.append((cells, paired(theirs, same)))
    return with_tests(["arm", "sampled by", "KID", f"KID of {reference}"], lines)


def reuse_table(frame: DataFrame, times: list[dict]) -> str:
    """Returns a Markdown table that compares sampling with reused outputs of experts with sampling
    without, by the same sampler in as many passes or fewer.

    times: rows of `bench_sample.py`, or none
    """
    ratios = {(t["sampler"], t["steps"], t["reuse"]): Series(t["ratios"]) for t in times}

    def cells_of(runs: DataFrame) -> list[str]:
        sampler, steps, reuse, passes = runs.iloc[0][["sampler", "steps", "reuse", "passes"]]
        ratio = ratios.get((sampler, steps, reuse))
        time = "" if ratio is None else with_error(ratio, digits=2)
        return [f"{sampler} {steps}", str(passes), time, with_noise(runs)]

    lines = []
    reused = frame[frame["reuse"] > 0]
    for (sampler, limit), ours in reused.groupby(["sampler", "passes"], sort=False):
        without = (frame["reuse"] == 0) & (frame["sampler"] == sampler) & (frame["passes"] <= limit)
        for _, theirs in frame[without].groupby("passes"):
            lines.append(([*cells_of(ours), *cells_of(theirs)], paired(ours, theirs)))
    names = ["passes", "time", "KID"]
    return with_tests(["with reuse", *names, "without", *names], lines)


def rivals(theirs: DataFrame, ours: DataFrame) -> Iterator[tuple[int, DataFrame, DataFrame]]:
    """Yields the numbers of passes of two arms, and the strongest rows of each within this number.

    A number at which no stronger row is added would repeat a comparison, and is left out.
    """
    before: list[list[int]] = []
    for limit in sorted({*theirs["passes"], *ours["passes"]}):
        found = [strongest(rows[rows["passes"] <= limit]) for rows in (theirs, ours)]
        chosen = [sorted(rows.index) for rows in found]
        if all(chosen) and chosen != before:
            yield limit, *found
        before = chosen


def paired(left: DataFrame, right: DataFrame) -> Series:
    """Returns the differences of KID between runs with the same seed or, for one, its groups."""
    left, right = left.set_index("seed"), right.set_index("seed")
    seeds = left.index.intersection(right.index)
    groups = [Series(rows.loc[seeds[0], "groups"]) for rows in (left, right) if len(seeds) == 1]
    if groups:
        return (groups[0] - groups[1]).rename("groups")
    return (left.loc[seeds, "kid"] - right.loc[seeds, "kid"]).rename("runs")


def settings_of(rows: DataFrame) -> str:
    """Names the samplers, steps and guidance of rows: "heun 4, unipc 8 at 1.5 in 0.1 to 1"."""
    names = []
    for row in rows.itertuples():
        interval = f" in {row.interval}" if row.interval != "0 to 1" else ""
        guidance = f" at {row.scale:g}{interval}" if row.scale != 1 else ""
        names.append(f"{row.sampler} {row.steps}{guidance}")
    return ", ".join(dict.fromkeys(names))


def draw(frame: DataFrame, path: Path) -> None:
    """Draws the KID of each arm and sampler by passes, as `kid_table` computes it."""
    figure = Figure(figsize=(6, 3.6), layout="tight")
    axes = figure.subplots()
    best = strongest(frame, "sampler", "passes")
    for names, group in best.groupby(["arm", "sampler"], sort=False):
        kids = {n: kids_of(rows) for n, rows in group.groupby("passes")}
        means, errors = ([f(each) for each in kids.values()] for f in (Series.mean, Series.sem))
        axes.errorbar([*kids], means, errors, fmt="o-", label=", ".join(names), capsize=3)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="forward passes per image", ylabel="KID, reporting images")
    passes = sorted(best["passes"].unique())
    # Labels must not overlap.
    ticks = [n for n in passes if not any(n < other < 1.1 * n for other in passes)]
    axes.set_xticks(ticks, ticks)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
