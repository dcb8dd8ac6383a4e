r"""Checks that a machine with GPUs computes, trains and is as fast as it should be.

    python check_gpu.py --output gpu_report
    python check_gpu.py --device cpu --quick --output gpu_report    # what a CPU can check, small

Runs `pytest --gpu`, for about 30 minutes. report.md and report.json contain the commit, the
versions, the GPUs and, for every test, the measured values, their thresholds and the result. The
exit code is 0 if all tests passed, 1 if a test failed, and 2 for a mistake in the command.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from options.parts import option
from runtime.errors import UserError, print_safely, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from tools.benchmarks.common import describe_machine, markdown


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    output: Path = option(help="folder for report.md and report.json")
    device: str = option("cuda", choices=("cuda", "cpu"), help="cpu: skip what needs a GPU")
    quick: bool = option(False, help="fewer sizes and no DeepSpeed: about 12 minutes")


def parse_args() -> CheckConfig:
    return parse_config(CheckConfig, __doc__)


def main(config: CheckConfig) -> int:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("got no GPU, expected one, or --device cpu for what a CPU can check")
    folder = config.output.resolve()
    prepare_output("--output", folder / "report.md")
    checks = run_tests(config, folder / "checks.jsonl")
    failed = any(row["result"] == "fail" for row in checks)
    write_report(folder, describe_machine(config.device), checks)
    print_safely(f"{'FAILED' if failed else 'passed'}: {config.output / 'report.md'}")
    return int(failed)


def run_tests(config: CheckConfig, path: Path) -> list[dict]:
    """Returns a row of each test, and one more if the tests did not end by themselves."""
    path.write_text("")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--report={path}"]
    command += ["--gpu"] if config.device == "cuda" else ["-m", "gpu or needs_gpu"]
    if config.quick:
        command += ["--ignore=tests/training/test_deepspeed.py", "-k", "not B/2"]
    code = subprocess.run(command, cwd=Path(__file__).parent).returncode
    checks = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    if code not in (0, 1):  # a signal is below 0
        row = {"name": "pytest completes", "result": "fail", "value": None, "threshold": ""}
        checks.append({**row, "reason": f"exit code {code}"})
    return checks


def write_report(folder: Path, machine: dict, checks: list[dict]) -> None:
    """Writes report.json, and the same as a table: report.md."""
    (folder / "report.json").write_text(json.dumps({**machine, "checks": checks}, indent=1))
    counts = Counter(row["result"] for row in checks)
    lines = ["# Report of check_gpu.py", ""]
    lines += [f"- {name}: {in_words(value)}" for name, value in machine.items()]
    lines += ["", ", ".join(f"{count} {result}" for result, count in sorted(counts.items())), ""]
    head = "check", "result", "value", "threshold or reason"
    lines.append(markdown([head, *map(cells, checks)]))
    (folder / "report.md").write_text("\n".join(lines))


def cells(row: dict) -> list[str]:
    """Returns the table cells of a check: name, result, value, and threshold or reason."""
    value = "" if row["value"] is None else in_words(row["value"])
    why = " ".join(filter(None, (row["threshold"], row["reason"])))
    found = row["name"], row["result"].replace("fail", "FAIL"), value, why
    return [cell.replace("|", "/") for cell in found]


def in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
