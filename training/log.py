"""What a run says: a progress bar on a terminal, log.txt, log.jsonl and TensorBoard."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class RunLog:
    """Writes on the main process and is silent on the others.

    Lines of log.jsonl past `start_step` belong to steps that a resumed run does again: they are
    dropped when it starts, so that each step stands there once.
    """

    def __init__(self, folder: Path, *, is_main: bool, start_step: int, total_steps: int):
        self.is_main = is_main
        if not is_main:
            return
        self.text_file = (folder / "log.txt").open("a")
        self.rows_path = folder / "log.jsonl"
        keep_rows(self.rows_path, start_step)
        self.rows_file = self.rows_path.open("a")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)
        self.bar = tqdm(
            total=total_steps, initial=start_step, disable=not sys.stderr.isatty(), unit="step"
        )

    def text(self, message: str) -> None:
        """Says a line, with the time, on standard output and in log.txt."""
        if not self.is_main:
            return
        line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {message}"
        self.bar.write(line) if not self.bar.disable else print(line, flush=True)
        self.text_file.write(line + "\n")
        self.text_file.flush()

    def advance(self) -> None:
        if self.is_main:
            self.bar.update()

    def metrics(self, step: int, values: dict) -> None:
        """Says one line about a step; `values` are numbers, or a list with a number per layer."""
        if not self.is_main:
            return
        json_values = {k: v if not_broken(v) else str(v) for k, v in values.items()}
        self.rows_file.write(json.dumps({"step": step, **json_values}) + "\n")
        self.rows_file.flush()
        for name, value in values.items():
            if isinstance(value, list):
                for layer, number in enumerate(value):
                    self.board.add_scalar(f"{name}/layer_{layer:02d}", number, step)
                value = max(value)
            self.board.add_scalar(name, value, step)
        self.text(f"step {step:07d}  " + "  ".join(describe(k, v) for k, v in values.items()))

    def images(self, step: int, grid: torch.Tensor) -> None:
        """Shows an image (3, H, W) uint8 in TensorBoard."""
        if self.is_main:
            self.board.add_image("samples", grid, step)

    def flush(self) -> None:
        """Brings all that was said to the disk: a checkpoint may then speak of these steps."""
        if self.is_main:
            self.board.flush()
            for file in (self.rows_file, self.text_file):
                os.fsync(file.fileno())

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            self.board.close()
            self.rows_file.close()
            self.text_file.close()


def keep_rows(path: Path, last_step: int) -> None:
    """Drops the rows of a log.jsonl after `last_step`, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if step <= last_step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def not_broken(value: float | list[float]) -> bool:
    """Whether a value is one that JSON can write: inf and nan are not."""
    return all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]))


def describe(name: str, value: float | list[float]) -> str:
    if isinstance(value, list):
        return f"{name} {max(value):.2f}"
    return f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}"
