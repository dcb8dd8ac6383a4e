"""Files of rows: one JSON object per line, with the settings and the results of a measurement."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from pandas import DataFrame, concat, read_csv

from runtime.errors import UserError, check_same, reported_as

# Settings that rows of older versions do not name.
DEFAULTS = {"silenced": False, "min_weight": 0.0, "interval": [0.0, 1.0], "reuse": 0}


def read_rows(paths: tuple[Path, ...]) -> list[dict]:
    """Reads all rows of the files of --rows, .jsonl or .csv."""
    names = " ".join(map(str, paths))
    message = f"--rows: got {names}, expected rows of experiments"
    with reported_as(message, OSError, ValueError):
        if paths[0].suffix == ".csv":
            rows = concat(map(read_csv, paths), ignore_index=True).to_dict("records")
        else:
            rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    if not rows:
        raise UserError(message)
    return rows


def read_lines(path: Path) -> list[dict]:
    """Reads the objects of a .jsonl; returns [] if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_log(run: Path) -> list[dict]:
    """Reads the rows of the log of a run or of a step folder's run; refuses a run that went on with
    other settings."""
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    rows = read_lines(run / "log.jsonl")
    if changed := [line for row in rows for line in row.get("changed", ())]:
        raise UserError(
            f"{run}: got a run that went on with changes: {'; '.join(changed)}; expected the same "
            "settings in all steps (to train it again, move its folder away)"
        )
    return rows


def add_row(path: Path, row: dict) -> None:
    """Appends a row durably; other commands may append to the same file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def measure_missing(
    output: Path, settings: Iterable[dict], measure: Callable[[dict], dict],
    facts: dict | None = None,
) -> list[dict]:  # fmt: skip
    """Appends a row to a file for each of the settings that has none; returns all its rows.

    measure: returns the results for settings
    facts: what the results depend on besides; UserError for a known row with other facts
    """
    rows, facts = [DEFAULTS | row for row in read_lines(output)], facts or {}
    for one in settings:
        if known := [row for row in rows if one.items() <= row.items()]:
            was = {name: known[0].get(name, value) for name, value in facts.items()}
            check_same(f"--output: {output} has a row measured otherwise ({one})", facts, was)
            continue
        row = one | measure(one) | facts
        add_row(output, row)
        print(json.dumps(row), flush=True)
        rows.append(DEFAULTS | row)
    return rows


def frame_of(rows: list[dict]) -> DataFrame:
    """Returns the rows of runs as a frame; splits the name of a run into "arm" and "seed"."""
    frame = DataFrame(rows)
    names = frame["run"].str.extract(r"^(?P<arm>.*?)(?:-(?P<seed>\d+))?$").fillna("")
    return frame.assign(**names)
