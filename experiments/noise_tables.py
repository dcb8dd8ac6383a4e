r"""Tables of question 23, by the rule of docs/experiments.md: at which noise do experts help?

    python -m experiments.noise_tables --rows experiments/rows/head_start_aligned.jsonl \
        experiments/rows/times.jsonl
"""

from dataclasses import dataclass
from pathlib import Path

from pandas import DataFrame, Series

from experiments.comparisons import differences_table, with_error
from experiments.equivalence import equivalence_table, leads_of, read_frame
from experiments.head_start import RANGES, margin_of
from experiments.rows import read_rows
from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config
from tools.benchmarks.common import markdown

ARMS = ("dense", "topk", "low", "middle", "high", "two")


@dataclass(frozen=True, kw_only=True)
class NoiseTablesConfig:
    rows: tuple[Path, ...] = option(help=".jsonl of runs of questions 21 and 23")
    pairs: int = option(8, ge=3, help="seeds of each arm, without which nothing is tested")
    output: Path = option(Path("results/tables"), help="folder of tables.md")


def range_tables(rows: DataFrame, pairs: int) -> str:
    """Returns Markdown tables of the arms minus `dense`: tests of the arms with experts in one
    range, each in its range, and all arms in all ranges."""
    bins = rows["val_bins"].apply(Series)
    ranges = DataFrame({name: bins.iloc[:, part].mean(axis=1) for name, part in RANGES.items()})
    leads = leads_of(rows, ranges, "dense")
    own = {
        (arm, part): leads[arm][part] for arm, part in zip(ARMS[2:5], RANGES, strict=True)
        if arm in leads
    }  # fmt: skip
    tested = ""
    if len(own) == len(RANGES) and min(map(len, own.values())) >= pairs:
        tested = differences_table(["arm minus dense", "in"], own, digits=4).lstrip("\n") + "\n"
    lines = [["minus dense", *RANGES]]
    for name, minus in leads.items():
        lines.append([name, *(with_error(minus[part], "+") for part in RANGES)])
    return tested + markdown(lines)


def parse_args() -> NoiseTablesConfig:
    return parse_config(NoiseTablesConfig, __doc__)


def main(config: NoiseTablesConfig) -> None:
    prepare_output("--output", config.output / "tables.md")
    rows = read_frame(read_rows(config.rows))
    rows = rows[rows["name"].isin(ARMS)]
    if missing := {*ARMS[:2]} - {*rows["name"]}:
        raise UserError(f"--rows: got no rows of {min(missing)}, expected question 21")
    margin = margin_of(rows, "topk", "dense", config.pairs)
    text = equivalence_table(rows, "topk", "dense", margin, least=config.pairs, together=True)
    text = f"{text}\n{range_tables(rows, config.pairs)}"
    write_durably(config.output / "tables.md", text)
    print(text, end="")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
