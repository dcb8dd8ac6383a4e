"""Prints every table of the experiments: all numbers of docs/experiments.md and docs/claims.md.

    python -m experiments.every_table

Runs the commands of docs/tables.md. The last table counts the detected differences of all tables
together, with three corrections.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pandas import DataFrame, concat
from scipy import stats

from experiments import equivalence, head_start, noise_tables, replaced_tables, report
from experiments.comparisons import computed_tests, holm
from options.parts import option
from runtime.errors import run_main
from runtime.flags import parse_config
from tools.benchmarks.common import markdown

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "report": (report, report.ReportConfig),
    "equivalence": (equivalence, equivalence.EquivalenceConfig),
    "head_start": (head_start, head_start.HeadStartConfig),
    "replaced_tables": (replaced_tables, replaced_tables.ReplacedTablesConfig),
    "noise_tables": (noise_tables, noise_tables.NoiseTablesConfig),
}


@dataclass(frozen=True, kw_only=True)
class EveryTableConfig:
    output: Path = option(Path("results/tables"), help="folder for tables and figures")


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Yields the section, the script and the flags of each command of docs/tables.md."""
    command = rf"^python -m experiments\.({'|'.join(SCRIPTS)}) (.*)$"
    text = (ROOT / "docs" / "tables.md").read_text().replace("\\\n", "")
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    for title, section in zip(parts[1::2], parts[2::2], strict=True):
        for script, flags in re.findall(command, section, re.M):
            rows = flags.replace("experiments/rows/", f"{ROOT}/experiments/rows/")
            yield title, script, rows.split()


def multiplicity_table(tests: list[DataFrame]) -> str:
    """Returns a Markdown table of the number of detected differences, by correction.

    tests: results of `paired_tests`, one for each table
    """
    every = concat(tests)
    together = stats.false_discovery_control(every["p"])
    corrected = {
        "Holm, for each table": every["holm"],
        "Holm, for all tables together": holm(every["p"].reset_index(drop=True)),
        "Benjamini-Hochberg, for all tables together": together,
    }
    lines = [["correction", "tests", "detected"]]
    lines += [[name, str(len(p)), str((p < 0.05).sum())] for name, p in corrected.items()]
    return markdown(lines)


def parse_args() -> EveryTableConfig:
    return parse_config(EveryTableConfig, __doc__)


def main(config: EveryTableConfig) -> None:
    computed_tests.clear()
    for title, script, flags in commands():
        print(f"\n# {title}\n")
        flags = [*flags, "--output", str(config.output)]
        module, config_class = SCRIPTS[script]
        module.main(parse_config(config_class, module.__doc__, flags))
    print(f"\n# Multiplicity\n\n{multiplicity_table(computed_tests)}", end="")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
