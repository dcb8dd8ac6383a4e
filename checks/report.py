"""The report of check_gpu.py: rows as a stage makes them, report.json, and the same as tables."""

import json
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import printable


@dataclass(frozen=True)
class Rows:
    """The checks of a stage, a JSON line each: name, result, value, threshold, reason.

    A row is in the file as soon as it is made, so a stage that crashes has reported what it found.
    """

    path: Path

    def add(
        self, name: str, result: str, value: object = None, threshold: str = "", reason: str = ""
    ) -> None:
        """Writes one; `result` is pass, fail, skipped or info."""
        reason = printable(reason)[:300]
        row = dict(name=name, result=result, value=value, threshold=threshold, reason=reason)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def holds(self, name: str, is_right: bool, value: object, expected: str) -> None:
        self.add(name, "pass" if is_right else "fail", value, expected)

    def at_most(self, name: str, value: float, limit: float) -> None:
        self.holds(name, value <= limit, value, f"<= {limit:g}")

    def at_least(self, name: str, value: float, limit: float) -> None:
        self.holds(name, value >= limit, value, f">= {limit:g}")

    def inform(self, name: str, values: dict, names: str) -> None:
        self.add(name, "info", {key: values[key] for key in names.split()})

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """What raises has failed, and the next checks are made."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(name, "fail", reason=f"{type(error).__name__}: {error}")


def write_report(folder: Path, machine: dict, stages: list[dict]) -> None:
    """Writes report.json, and the same as tables: report.md."""
    (folder / "report.json").write_text(json.dumps({**machine, "stages": stages}, indent=1))
    lines = ["# Report of check_gpu.py", ""]
    lines += [f"- {name}: {in_words(value)}" for name, value in machine.items()]
    for stage in stages:
        lines += ["", f"## {stage['stage']}", "", summary(stage), ""]
        lines += ["| check | result | value | threshold or reason |", "| --- | --- | --- | --- |"]
        for row in stage["checks"]:
            cells = in_cells(row)
            cells[1] = cells[1].replace("fail", "**FAIL**")
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def summary(stage: dict) -> str:
    counts = Counter(row["result"] for row in stage["checks"])
    found = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    return f"{found or 'no checks'}, in {stage['seconds']:g} s"


def in_cells(row: dict) -> list[str]:
    """A check in words: its name, result, value, and threshold or reason."""
    value = "" if row["value"] is None else in_words(row["value"])
    why = " ".join(filter(None, (row["threshold"], row["reason"])))
    return [row["name"], row["result"], value, why]


def in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
