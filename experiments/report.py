"""Prints tables, and draws figures, of the rows that the tools of this folder write.

    python -m experiments.report --rows experiments/rows/quality.jsonl --output results/tables

docs/tables.md has the commands that make the tables of the documentation.
`comparisons.paired_tests` defines which differences are detected.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.expert_tables import (
    copies_tables,
    dropping_tables,
    information_tables,
    persistence_tables,
)
from experiments.rows import read_rows
from experiments.sample_tables import sample_tables
from experiments.training_tables import training_tables
from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import prepare_output, write_durably
from runtime.flags import parse_config, refuse_idle

# A key of the rows of a file, what makes the tables, and the flags that this uses.
TABLES = (
    ("dropped", dropping_tables, ()),
    ("change_cosine", copies_tables, ("pairs",)),
    ("ends", persistence_tables, ()),
    ("position", information_tables, ("arms", "reference")),
    ("scale", sample_tables, ("times", "reference", "output")),
    ("val_loss", training_tables, ("times", "reference", "pairs", "steps", "output")),
)


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
    steps: tuple[int, ...] = option(
        (), help="also compare the losses on choosing images at these steps, without tests"
    )
    output: Path = option(Path("results/tables"), help="folder for tables and figures")


def parse_args() -> ReportConfig:
    return parse_config(ReportConfig, __doc__)


def main(config: ReportConfig) -> None:
    prepare_output("--output", config.output / "tables.md")
    rows, names = read_rows(config.rows), " ".join(map(str, config.rows))
    kinds = [(make, flags) for key, make, flags in TABLES if key in rows[0]]
    if not kinds:
        raise UserError(f"--rows: got {names}, expected rows of experiments")
    make, flags = kinds[0]
    idle = [name for name in ("arms", "times", "reference", "pairs", "steps") if name not in flags]
    refuse_idle(config, idle, f"with {names}")
    text = make(rows, **{name: getattr(config, name) for name in flags})
    if not text:
        raise UserError("--rows: got no question with rows of its reference and of another arm")
    write_durably(config.output / "tables.md", text)
    print(text, end="")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
