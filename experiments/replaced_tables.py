r"""Tables of question 22, by the rule of docs/experiments.md: a gate's choice, or its weights?

    python -m experiments.replaced_tables --rows experiments/rows/replaced_aligned.jsonl \
        --trained experiments/rows/head_start_aligned.jsonl
"""

from dataclasses import dataclass
from pathlib import Path

from pandas import DataFrame, Series

from experiments.comparisons import equivalence_interval, paired_tests, test_cells, with_error
from experiments.equivalence import read_frame, verdict
from experiments.head_start import margin_of
from experiments.rows import read_rows
from options.parts import option
from runtime.errors import run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config
from tools.benchmarks.common import markdown

NAMES = {
    ("gate", "gate"): "gate", ("table", "gate"): "choice", ("gate", "table"): "weights",
    ("table", "table"): "both", ("position", "gate"): "choice by position",
    ("random", "gate"): "random choice",
}  # fmt: skip
TESTED = (("choice", "gate"), ("weights", "gate"), ("both", "gate"), ("choice", "weights"))


@dataclass(frozen=True, kw_only=True)
class ReplacedTablesConfig:
    rows: tuple[Path, ...] = option(help=".jsonl of replaced_gates.py")
    trained: tuple[Path, ...] = option(help=".jsonl of question 21 on the same images: the margin")
    pairs: int = option(8, ge=3, help="seeds of each arm, without which nothing is tested")
    output: Path = option(Path("results/tables"), help="folder of tables.md")


def losses_table(losses: DataFrame) -> str:
    """Returns a Markdown table of losses, (seeds, (arm, steps)), and of the differences to the gate
    that was fine-tuned as long."""
    steps = sorted({step for _, step in losses})
    lines = [
        [
            "arm",
            "seeds",
            *(f"{step} steps{more}" for step in steps for more in ("", ", minus gate")),
        ]
    ]
    for arm in NAMES.values():
        if (arm, steps[0]) not in losses:
            continue
        line = [arm, str(losses[arm, steps[0]].count())]
        for step in steps:
            known = (arm, step) in losses
            one = losses[arm, step].dropna() if known else Series(dtype=float)
            minus = (one - losses["gate", step]).dropna() if known else one
            line += [
                with_error(one) if known else "",
                with_error(minus, "+") if known and arm != "gate" else "",
            ]
        lines.append(line)
    return markdown(lines)


def tests_table(losses: DataFrame, margin: float, pairs: int) -> str:
    """Returns a Markdown table of the tests, with one correction; "" without all seeds."""
    found = {
        (*names, step): (losses[names[0], step] - losses[names[1], step]).dropna()
        for names in TESTED for step in sorted({step for _, step in losses})
        if {(name, step) for name in names} <= {*losses}
    }  # fmt: skip
    if not found or min(map(len, found.values())) < pairs:
        return ""
    tests = paired_tests(DataFrame(dict(enumerate(found.values()))))
    lines = [["arm", "minus", "steps", "pairs", "difference", "90% interval", "margin", "p (Holm)",
              "detectable", "result"]]  # fmt: skip
    for place, ((arm, other, step), one) in enumerate(found.items()):
        low, high = equivalence_interval(one)
        result = verdict((low, high), margin, one, tests.loc[place, "holm"])
        lines.append([
            arm, other, str(step), str(len(one)), with_error(one, "+"),
            f"{low:+.4f} to {high:+.4f}", f"{margin:.4f}", *test_cells(tests, place, digits=4),
            result,
        ])  # fmt: skip
    return "\n" + markdown(lines)


def parse_args() -> ReplacedTablesConfig:
    return parse_config(ReplacedTablesConfig, __doc__)


def main(config: ReplacedTablesConfig) -> None:
    prepare_output("--output", config.output / "tables.md")
    rows = DataFrame(read_rows(config.rows))
    arms = [NAMES[pair] for pair in zip(rows["choice"], rows["weights"], strict=True)]
    losses = rows.assign(arm=arms).pivot_table("replaced_loss", "seed", ["arm", "steps"])
    margin = margin_of(read_frame(read_rows(config.trained)), "topk", "dense", config.pairs)
    text = losses_table(losses) + tests_table(losses, margin, config.pairs)
    write_durably(config.output / "tables.md", text)
    print(text, end="")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
