r"""Checks that a machine with GPUs computes, trains and is as fast as it should be.

    python check_gpu.py --output gpu_report
    python check_gpu.py --quick --stages tests speed --output gpu_report
    python check_gpu.py --device cpu --quick --output gpu_report    # what a CPU can check, small
    python check_gpu.py --device fake --output gpu_report           # steps on fake CUDA tensors

The checks take 30 minutes at most, and 40 with --device fake. Each stage is a run of `pytest --gpu`
with a time limit. A stage that fails does not stop the following stages. report.md and report.json
contain the commit, the versions, the GPUs and, for every test, the measured values, their
thresholds and the result. The exit code is 0 if all tests passed, 1 if a test failed, and 2 for a
mistake in the command.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from options.parts import option
from runtime.errors import UserError, print_safely, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from tools.benchmarks.common import describe_machine, markdown

FAKE_LIMITS = (2400, 300)  # seconds of the only stage of --device fake, and with --quick
# Seconds a stage may take, and with --quick: 30 and 12 minutes in all, some of them for compiling.
LIMITS = {
    "environment": (60, 60), "tests": (900, 300), "speed": (190, 110), "memory": (80, 60),
    "cluster": (570, 190),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    output: Path = option(help="folder for report.md, report.json and what the stages print")
    device: str = option(
        "cuda", choices=("cuda", "cpu", "fake"),
        help="cpu: skip what needs a GPU; fake: training steps and compiled blocks on fake CUDA "
        "tensors, which need no GPU, on all cores",
    )  # fmt: skip
    quick: bool = option(
        False, help="fewer sizes and no DeepSpeed: 12 minutes at most instead of 30"
    )
    stages: tuple[str, ...] = option(
        tuple(LIMITS), choices=tuple(LIMITS), help="stages to run, not with fake (default: all)"
    )


def parse_args() -> CheckConfig:
    return parse_config(CheckConfig, __doc__)


def main(config: CheckConfig) -> int:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("got no GPU, expected one, or --device cpu for what a CPU can check")
    if config.device == "fake" and config.stages != tuple(LIMITS):
        raise UserError("--stages: cannot be combined with --device fake, which has one stage")
    folder, machine, stages = config.output.resolve(), describe_machine(config.device), []
    prepare_output("--output", folder / "report.md")
    for name in ("fake",) if config.device == "fake" else config.stages:
        limit = (FAKE_LIMITS if name == "fake" else LIMITS[name])[config.quick]
        start = time.monotonic()
        print_safely(f"{name}: at most {limit} s")
        rows = run_stage(name, config, folder, limit)
        seconds = round(time.monotonic() - start, 1)
        stages.append({"stage": name, "seconds": seconds, "checks": rows})
        for row in rows:
            if row["result"] == "fail":
                print_safely(f"    {', '.join(filter(None, in_cells(row)))}")
        print_safely(f"    {summary(stages[-1])}")
        write_report(folder, machine, stages)
    failed = any(row["result"] == "fail" for stage in stages for row in stage["checks"])
    print_safely(f"{'FAILED' if failed else 'passed'}: {config.output / 'report.md'}")
    return int(failed)


def run_stage(name: str, config: CheckConfig, folder: Path, limit: float) -> list[dict]:
    """Runs the tests of a stage, and ends all that they started; returns a row of each test."""
    rows = folder / f"{name}.jsonl"
    rows.write_text("")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--report={rows}"]
    if name == "fake":
        command += ["tests/training/test_fake_cuda.py", "-n", "logical", "--maxprocesses", "16"]
        command += [] if config.quick else ["--fake"]
    else:
        command += ["--gpu"] if config.device == "cuda" else ["-m", "gpu or needs_gpu"]
    if name == "tests":
        command += ["--ignore=tests/test_machine.py"]
        command += ["--ignore=tests/training/test_deepspeed.py"] if config.quick else []
    elif name != "fake":
        command += ["tests/test_machine.py", "-k", name + (" and not B/2" if config.quick else "")]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parent, stdout=log, stderr=log, start_new_session=True
        )
    fault = None
    try:
        if process.wait(limit) not in (0, 1):  # a signal is below 0
            fault = f"exit code {process.returncode}, see {log.name}"
    except subprocess.TimeoutExpired:
        fault = f"time limit of {limit:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.unlink()
    if fault:
        row = {"name": "completes", "result": "fail", "value": None, "threshold": ""}
        found.append({**row, "reason": fault})
    return found


def write_report(folder: Path, machine: dict, stages: list[dict]) -> None:
    """Writes report.json, and the same as tables: report.md."""
    (folder / "report.json").write_text(json.dumps({**machine, "stages": stages}, indent=1))
    lines = ["# Report of check_gpu.py", ""]
    lines += [f"- {name}: {in_words(value)}" for name, value in machine.items()]
    for stage in stages:
        lines += ["", f"## {stage['stage']}", "", summary(stage), ""]
        rows = [in_cells(row) for row in stage["checks"]]
        lines.append(markdown([("check", "result", "value", "threshold or reason"), *rows]))
    (folder / "report.md").write_text("\n".join(lines))


def summary(stage: dict) -> str:
    counts = Counter(row["result"] for row in stage["checks"])
    found = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    return f"{found or 'no checks'}, in {stage['seconds']:g} s"


def in_cells(row: dict) -> list[str]:
    """Returns the table cells of a check: name, result, value, and threshold or reason."""
    value = "" if row["value"] is None else in_words(row["value"])
    why = " ".join(filter(None, (row["threshold"], row["reason"])))
    cells = row["name"], row["result"].replace("fail", "FAIL"), value, why
    return [cell.replace("|", "/") for cell in cells]


def in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
