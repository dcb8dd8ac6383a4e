r"""Checks that a machine with GPUs computes, trains and is as fast as it should be.

    python check_gpu.py --output gpu_report
    python check_gpu.py --quick --stages tests speed --output gpu_report
    python check_gpu.py --device cpu --quick --output gpu_report    # what a CPU can check, small

It takes 15 minutes at most. Each stage is a process with a time limit, and one that fails does not
stop the next. report.md and report.json say the commit, the versions, the GPUs and, of every check,
the measured value, its threshold and whether it passed. The exit code is 0 if all passed, 1 if one
did not, and 2 for a mistake in the command.
"""

import runtime  # noqa: F401  # first: Ctrl-C is one line from here on

# isort: split

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.common import describe_machine
from checks.report import Rows, in_cells, summary, write_report
from runtime.errors import UserError, run_main, say
from runtime.flags import flag, parse_config

# Seconds a stage may take, and with --quick: 15 and 8 minutes in all.
LIMITS = {"environment": (60, 60), "tests": (560, 240), "speed": (190, 110), "memory": (80, 60)}


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    output: Path = flag(help="folder for report.md, report.json and what the stages print")
    device: str = flag(
        "cuda", choices=("cuda", "cpu"), help="cpu: small sizes; what needs a GPU is skipped"
    )
    quick: bool = flag(False, help="fewer sizes and no DeepSpeed: 8 minutes at most instead of 15")
    stages: tuple[str, ...] = flag(
        tuple(LIMITS), choices=tuple(LIMITS), help="which ones (default: all)"
    )


def parse_args() -> CheckConfig:
    return parse_config(CheckConfig, __doc__)


def main(config: CheckConfig) -> int:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("got no GPU, expected one, or --device cpu for what a CPU can check")
    folder, machine, stages = config.output.resolve(), describe_machine(config.device), []
    folder.mkdir(parents=True, exist_ok=True)
    for name in config.stages:
        limit, start = LIMITS[name][config.quick], time.monotonic()
        say(f"{name}: at most {limit} s")
        rows = run_stage(name, config, folder, limit)
        seconds = round(time.monotonic() - start, 1)
        stages.append({"stage": name, "seconds": seconds, "checks": rows})
        for row in rows:
            if row["result"] == "fail":
                say(f"    FAIL {', '.join(filter(None, in_cells(row)))}")
        say(f"    {summary(stages[-1])}")
        write_report(folder, machine, stages)
    failed = any(row["result"] == "fail" for stage in stages for row in stage["checks"])
    say(f"{'FAILED' if failed else 'passed'}: {config.output / 'report.md'}")
    return int(failed)


def run_stage(name: str, config: CheckConfig, folder: Path, limit: float) -> list[dict]:
    """Runs a stage in a process of its own, and ends all that it started; returns its rows."""
    rows, log = Rows(folder / f"{name}.jsonl"), folder / f"{name}.log"
    rows.path.write_text("")
    process = get_context("spawn").Process(target=stage, args=(name, config, rows, log))
    process.start()
    try:
        process.join(limit)
        if process.exitcode is None:
            rows.add("comes to its end", "fail", reason=f"time limit of {limit:g} s")
        elif process.exitcode:
            reason = f"exit code {process.exitcode}, see {log.name}"
            rows.add("comes to its end", "fail", reason=reason)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    found = [json.loads(line) for line in rows.path.read_text().splitlines()]
    rows.path.unlink()
    return found


def stage(name: str, config: CheckConfig, rows: Rows, log: Path) -> None:
    """What the process of a stage does; it prints to a log."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(Path(__file__).parent)
    if config.device == "cpu":  # before torch looks for GPUs, and Triton for how to run
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    from checks import stages

    getattr(stages, f"check_{name}")(rows, torch.device(config.device), config.quick)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
