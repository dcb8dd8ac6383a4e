"""What a run says: a progress bar on a terminal, log.txt, log.jsonl and TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from runtime.errors import say
from runtime.files import flush_to_disk


class RunLog:
    """Writes on the main process and is silent on the others.

    Lines of log.jsonl past `start_step` belong to steps that a resumed run does again: they are
    dropped when it starts, so that each step stands there once. A full disk stops nothing: lines
    wait for room, TensorBoard lacks what came meanwhile.
    """

    def __init__(self, folder: Path, *, is_main: bool, start_step: int, total_steps: int):
        self.is_main = is_main
        if not is_main:
            return
        self.text_file = LineFile(folder / "log.txt")
        self.rows_path = folder / "log.jsonl"
        keep_rows(self.rows_path, start_step)
        self.rows_file = LineFile(self.rows_path)
        self.board_folder = folder / "tensorboard"
        self.board = SummaryWriter(self.board_folder, purge_step=start_step + 1)
        self.bar = tqdm(
            total=total_steps, initial=start_step, disable=not sys.stderr.isatty(), unit="step"
        )

    def text(self, message: str) -> None:
        """Says a line, with the time, on standard output and in log.txt."""
        if not self.is_main:
            return
        line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {message}"
        self.bar.write(line) if not self.bar.disable else say(line)
        self.text_file.write(line)

    def advance(self) -> None:
        if self.is_main:
            self.bar.update()

    def metrics(self, step: int, values: dict) -> None:
        """Says one line about a step; `values` are numbers, or a list with a number per layer."""
        if not self.is_main:
            return
        json_values = {k: v if not_broken(v) else str(v) for k, v in values.items()}
        self.rows_file.write(json.dumps({"step": step, **json_values}))
        self.show(lambda board: add_scalars(board, step, values))
        self.text(f"step {step:07d}  " + "  ".join(describe(k, v) for k, v in values.items()))

    def samples(self, step: int, grid: torch.Tensor, path: Path) -> None:
        """Shows an image (3, H, W) uint8 in TensorBoard and writes it to a PNG file."""
        if not self.is_main:
            return
        self.show(lambda board: board.add_image("samples", grid, step))
        self.flush()
        temporary = path.with_suffix(".tmp")
        try:
            save_image(grid / 255, temporary, format="png")
            temporary.rename(path)
        except OSError as error:
            self.text(f"WARNING: the samples of step {step} were not written ({error})")

    def show(self, add: Callable[[SummaryWriter], None]) -> None:
        """Gives TensorBoard something; after a full disk, which ends its writer, by a new one."""
        try:
            add(self.board)
        except OSError as error:
            self.text(f"WARNING: TensorBoard's file could not be written ({error})")
            with suppress(OSError):
                self.board = SummaryWriter(self.board_folder)

    def flush(self) -> None:
        """Brings all that was said to the disk: a checkpoint may then speak of these steps."""
        if self.is_main:
            self.show(lambda board: board.flush())
            self.rows_file.flush()
            self.text_file.flush()

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            with suppress(OSError):
                self.board.close()
            self.rows_file.close()
            self.text_file.close()


class LineFile:
    """A file that lines are added to; those that a full disk refuses wait for the next."""

    def __init__(self, path: Path):
        self.path, self.file, self.waiting = path, path.open("ab", buffering=0), b""

    def write(self, line: str) -> None:
        self.waiting += line.encode(errors="replace") + b"\n"
        self.write_waiting()

    def write_waiting(self) -> None:
        with suppress(OSError):
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]

    def flush(self) -> None:
        with suppress(OSError):
            os.fsync(self.fileno())

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.write_waiting()
        if self.waiting:
            say(f"WARNING: {self.path}: the disk is full, the end is lost", file=sys.stderr)
        self.file.close()


def add_scalars(board: SummaryWriter, step: int, values: dict) -> None:
    for name, value in values.items():
        if isinstance(value, list):
            for layer, number in enumerate(value):
                board.add_scalar(f"{name}/layer_{layer:02d}", number, step)
            value = max(value)
        board.add_scalar(name, value, step)


def keep_rows(path: Path, last_step: int) -> None:
    """Drops the rows of a log.jsonl after `last_step`, and a last line that was cut off."""
    if not path.exists():
        return
    whole = path.read_bytes()
    kept = b"".join(line + b"\n" for line in whole.split(b"\n") if is_row(line, last_step))
    if kept != whole:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(kept)
        flush_to_disk(temporary)
        temporary.replace(path)


def is_row(line: bytes, last_step: int) -> bool:
    try:
        return json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def not_broken(value: float | list[float]) -> bool:
    """Whether a value is one that JSON can write: inf and nan are not."""
    return all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]))


def describe(name: str, value: float | list[float]) -> str:
    if isinstance(value, list):
        return f"{name} {max(value):.2f}"
    return f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}"
