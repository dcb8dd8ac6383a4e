"""What the stages of check_gpu.py share: their flags, checks with thresholds, and the report.

A stage is a process of its own with a time limit. It writes each check to a file as it is made, so
the report has what a stage found before it failed or ran out of time.
"""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from runtime.errors import UserError, printable, say
from runtime.flags import flag

ROOT = Path(__file__).resolve().parents[1]
# Seconds a stage may take, and with --quick: 15 and 8 minutes in all.
LIMITS = {
    "environment": (50, 30), "kernels": (180, 90), "speed": (180, 90), "memory": (80, 50),
    "runs": (410, 220),
}  # fmt: skip
PACKAGES = ("torch", "triton", "deepspeed", "flash-attn", "diffusers", "numpy")
NO_GPU = "needs a GPU"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    output: Path = flag(help="folder for report.md, report.json and what the stages say")
    device: str = flag(
        "cuda", choices=("cuda", "cpu"), help="cpu: small sizes; what needs a GPU is skipped"
    )
    gpus: int | None = flag(
        None, least=1, help="how many of this machine's GPUs to train on (default: all)"
    )
    quick: bool = flag(False, help="fewer sizes and shorter runs: 8 minutes at most instead of 15")
    stages: tuple[str, ...] = flag(
        tuple(LIMITS), choices=tuple(LIMITS), help="which ones (default: all)"
    )

    @property
    def is_small(self) -> bool:
        return self.device == "cpu"

    @property
    def processes(self) -> int:
        """Of a parallel run: one a GPU, two on a CPU."""
        return 2 if self.is_small else self.gpus or torch.cuda.device_count()


@dataclass(frozen=True)
class Checks:
    """The checks of a stage, a JSON line each: name, result, value, threshold, reason."""

    path: Path

    def add(
        self, name: str, result: str, value: object = None, threshold: str = "", reason: str = ""
    ) -> None:
        """Writes one; `result` is pass, fail, skipped or info."""
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        row = dict(name=name, result=result, value=value, threshold=threshold, reason=reason)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def holds(self, name: str, is_right: bool, value: object, expected: str = "") -> None:
        self.add(name, "pass" if is_right else "fail", value, expected)

    def at_most(self, name: str, value: float, limit: float) -> None:
        self.holds(name, value <= limit, value, f"<= {limit:g}")

    def at_least(self, name: str, value: float, limit: float) -> None:
        self.holds(name, value >= limit, value, f">= {limit:g}")

    def inform(self, name: str, value: object) -> None:
        self.add(name, "info", value)

    def skip(self, name: str, reason: str) -> None:
        self.add(name, "skipped", reason=reason)

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """What raises has failed, and the next checks are made."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(name, "fail", reason=printable(f"{type(error).__name__}: {error}")[:300])


def run_stage(stage: str, config: CheckConfig) -> dict:
    """Runs a stage in a process of its own; returns what the report says of it."""
    limit, output = LIMITS[stage][config.quick], config.output.resolve()
    checks, log = Checks(output / f"{stage}.jsonl"), output / f"{stage}.log"
    checks.path.write_text("")
    command = [
        sys.executable, "-m", "checks", "--stages", stage, "--device", config.device, "--output",
        str(output), "--quick", str(config.quick), "--gpus", str(config.processes),
    ]  # fmt: skip
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if config.is_small else {}
    start = time.monotonic()
    with log.open("w") as said, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **hidden, "TMPDIR": scratch},
            stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            if code := process.wait(limit):
                last = log.read_text(errors="replace").strip().rpartition("\n")[-1]
                reason = printable(f"exit code {code}: {last}")[:300]
                checks.add("comes to its end", "fail", reason=reason)
        except subprocess.TimeoutExpired:
            checks.add("comes to its end", "fail", threshold=f"<= {limit:g} s", reason="time limit")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = [json.loads(line) for line in checks.path.read_text().splitlines()]
    checks.path.unlink()
    return {"stage": stage, "seconds": round(time.monotonic() - start, 1), "checks": rows}


def run_checks(config: CheckConfig) -> int:
    """Runs the stages, one after another whatever comes of them, and writes the report.

    Returns the exit code: 0 if every check that was made passed, else 1. UserError without the GPUs
    that are asked for.
    """
    wanted, count = config.gpus or 1, torch.cuda.device_count()
    if not config.is_small and wanted > count:
        raise UserError(
            f"got {count} GPUs here, expected at least {wanted} (--gpus), or --device cpu for what "
            "a CPU can check"
        )
    config.output.mkdir(parents=True, exist_ok=True)
    machine, stages = describe_machine(config), []
    for stage in config.stages:
        say(f"{stage}: at most {LIMITS[stage][config.quick]:g} s")
        stages.append(run_stage(stage, config))
        for row in stages[-1]["checks"]:
            if row["result"] == "fail":
                say(f"    FAIL {', '.join(filter(None, cells(row)))}")
        say(f"    {summary(stages[-1])}")
        write_report(config, machine, stages)
    passed = all(row["result"] != "fail" for stage in stages for row in stage["checks"])
    say(f"{'passed' if passed else 'FAILED'}: {config.output / 'report.md'}")
    return 0 if passed else 1


def describe_machine(config: CheckConfig) -> dict:
    """Commit, versions and GPUs."""
    commit = answer("git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    query = "--query-gpu=name,memory.total,driver_version"
    gpus = "" if config.is_small else answer("nvidia-smi", query, "--format=csv,noheader")
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": commit or "unknown",
        "gpus": gpus.splitlines() or ["none, on a CPU" if config.is_small else "unknown"],
        "versions": versions,
        "settings": {"device": config.device, "quick": config.quick, "processes": config.processes},
    }  # fmt: skip


def answer(*command: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def write_report(config: CheckConfig, machine: dict, stages: list[dict]) -> None:
    """Writes report.json, and the same as tables: report.md."""
    content = {**machine, "stages": stages}
    (config.output / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    listed = [f"- {name}: {in_words(value)}" for name, value in machine.items()]
    lines = ["# Report of check_gpu.py", "", *listed]
    for stage in stages:
        lines += ["", f"## {stage['stage']}", "", summary(stage), ""]
        lines += ["| check | result | value | threshold or reason |", "| --- | --- | --- | --- |"]
        for row in stage["checks"]:
            name, *others = (cell.replace("|", "\\|") for cell in cells(row))
            text = " | ".join((name, row["result"].replace("fail", "**FAIL**"), *others))
            lines.append(f"| {text} |")
    (config.output / "report.md").write_text("\n".join(lines) + "\n")


def summary(stage: dict) -> str:
    counts = Counter(row["result"] for row in stage["checks"])
    found = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    return f"{found or 'no checks'}, in {stage['seconds']:g} s"


def cells(row: dict) -> list[str]:
    """A check in words: its name, value, and threshold or reason."""
    value = "" if row["value"] is None else in_words(row["value"])
    why = " ".join(filter(None, (row["threshold"], row["reason"])))
    return [row["name"], value, why]


def in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
