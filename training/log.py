"""Logs of a run: progress bar, log.txt, log.jsonl, TensorBoard and Weights & Biases."""

import errno
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from latents.loading import BatchStream
from runtime import __version__
from runtime.errors import UserError, print_safely, printable, reported_as
from runtime.files import open_unbuffered, write_durably
from runtime.progress import note_saved

GROUPS = {  # TensorBoard group: pattern of metric names; all other metrics are in the group "loss"
    "router": "expert|^router_",
    "time": "epoch|_per_sec|memory|tflops|^mfu|data_wait",
    "optimizer": "lr$|grad_|skipped",
}
# The metrics of the line on the screen; log.jsonl and TensorBoard have all.
SHOWN = (
    "loss", "val_loss", "lr", "images_per_sec", "dead_experts", "skipped_images", "skipped_steps",
)  # fmt: skip
STEP = "global_step"  # the axis of the curves in Weights & Biases


class RunLog(AbstractContextManager):
    """Writes the logs of a run on the main process, and nothing on other processes.

    On a full disk, log lines are lost with a warning, and training continues. TensorBoard's writer
    then stays closed until the next start.

    A run deletes what an earlier attempt logged after its first step: rows of log.jsonl, so that
    the file has one row per logged step, and sample grids.

    settings: settings of the run, for TensorBoard's table of runs
    wandb: Weights & Biases project that receives the same values as TensorBoard, or None
    """

    def __init__(
        self, folder: Path, stream: BatchStream, settings: dict, wandb: str | None, *, is_main: bool
    ):
        self.is_main, self.start_step, total_steps = is_main, stream.start_step, stream.end_step
        if not is_main:
            return
        rows, board = folder / "log.jsonl", folder / "tensorboard"
        self.wandb = None if wandb is None else begin_wandb(wandb, folder, settings)
        keep_rows(rows, self.start_step)
        for path in folder.glob("samples-*.png"):
            step = path.stem.removeprefix("samples-")
            if step.isdecimal() and int(step) > self.start_step:
                path.unlink()
        self.total_steps = total_steps
        self.text_file = open_unbuffered(folder / "log.txt")
        self.rows_file = open_unbuffered(rows)
        self.board = SummaryWriter(board, purge_step=self.start_step + 1)
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()}
        for summary in hparams(
            plain | {"version": __version__}, dict.fromkeys(("loss/loss", "loss/val_loss"))
        ):
            self.board.file_writer.add_summary(summary)
        self.bar = tqdm(
            total=total_steps, initial=self.start_step, disable=not sys.stderr.isatty(), unit="step"
        )

    def text(self, message: str) -> None:
        """Writes a line, with the time, to standard output and log.txt."""
        if not self.is_main:
            return
        line = printable(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {message}")
        with self.bar.external_write_mode():  # the bar is hidden meanwhile
            print_safely(line)  # the terminal may be closed
        self.write(self.text_file, line)

    def saved(self, folder: Path) -> None:
        """Logs a checkpoint, and tells scripts/slurm.sh that the run has made progress."""
        self.text(f"saved {folder}")
        if self.is_main:
            note_saved(folder)

    def write(self, file: BinaryIO, line: str) -> None:
        """Appends a complete line to a file, or nothing if the disk is full."""
        content, end = line.encode(errors="replace") + b"\n", file.seek(0, os.SEEK_END)
        with warns_if_lost(file.name):
            if file.write(content) < len(content):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def changes(self, step: int, changed: list[str]) -> None:
        """Logs the settings that a resumed run changes after a step, "--lr: was 1, is 2"."""
        if self.is_main and changed and step < self.total_steps:  # otherwise they have no effect
            self.write(self.rows_file, json.dumps({"step": step, "changed": changed}))
            for line in changed:
                self.text(f"changed: {line}")

    def advance(self) -> None:
        if self.is_main:
            self.bar.update()

    def metrics(self, step: int, values: dict, steps_per_second: float) -> None:
        """Logs the metrics of a step; a value is a number, or a list with one number per layer."""
        if not self.is_main:
            return
        row = {"step": step, "time": round(time.time())}  # Unix time
        row |= {name: as_json(value) for name, value in values.items()}
        self.write(self.rows_file, json.dumps(row))
        self.show(step, curves=curves_of(values), images={})
        parts = [
            f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}"
            for name, value in values.items() if name in SHOWN
        ]  # fmt: skip
        if step < self.total_steps:
            with suppress(OverflowError):  # a run without an end, whose first step is slow
                left = timedelta(seconds=round((self.total_steps - step) / steps_per_second))
                end = f"{datetime.now() + left:%a %d %b %H:%M}"
                if step == self.start_step + 1:  # includes what happens only once
                    parts.append(f"at most {left} left, ends by {end}")
                else:
                    parts.append(f"{left} left, ends {end}")
        parts.insert(0, f"step {step:07d}")
        self.text("  ".join(parts))

    def samples(self, step: int, grid: Tensor, path: Path) -> None:
        """Writes an image (3, H, W) uint8 to a PNG file, and shows it."""
        from latents.image_grid import write_png

        with warns_if_lost(path):
            write_png(grid, path)
            self.text(f"sample grid: {path}")
        self.show(step, curves={}, images={"samples": grid})

    def show(self, step: int, curves: dict[str, float], images: dict[str, Tensor]) -> None:
        """Shows numbers and images (3, H, W) uint8 in TensorBoard and Weights & Biases, by tag."""
        with warns_if_lost(self.board.log_dir):
            for tag, value in curves.items():
                self.board.add_scalar(tag, value, step)
            for tag, image in images.items():
                self.board.add_image(tag, image, step)
        if self.wandb is not None:
            from wandb import Image

            with warns_if_lost("the run of Weights & Biases"):  # an image is first written to disk
                pictures = {tag: Image(i.permute(1, 2, 0).numpy()) for tag, i in images.items()}
                self.wandb.log({**curves, **pictures, STEP: step})

    def flush(self) -> None:
        """Writes all buffered log lines to the disk."""
        if self.is_main:
            with warns_if_lost(self.board.log_dir):
                self.board.flush()
            for file in (self.rows_file, self.text_file):
                with warns_if_lost(file.name):
                    os.fsync(file.fileno())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_main:
            self.bar.close()
            with warns_if_lost(self.board.log_dir):
                self.board.close()
            if self.wandb is not None:
                with warns_if_lost("the run of Weights & Biases"):
                    self.wandb.finish(exit_code=int(kind is not None))
            self.rows_file.close()
            self.text_file.close()


def curves_of(values: dict) -> dict[str, float]:
    """Numbers by tag, "group/name"; a list gives a number per layer, and its maximum."""
    curves = {}
    for name, value in values.items():
        groups = (group for group, part in GROUPS.items() if re.search(part, name))
        tag = f"{next(groups, 'loss')}/{name}"
        if isinstance(value, list):
            curves |= {f"{tag}/{layer:02d}": number for layer, number in enumerate(value)}
            value = max(value)
        curves[tag] = value
    return curves


def import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError:
        expected = "the package wandb; run: pip install wandb"
        raise UserError(f"--wandb: requires {expected}") from None
    return wandb


def begin_wandb(project: str, folder: Path, settings: dict) -> Any:
    """Starts or resumes a Weights & Biases run that receives the values of TensorBoard.

    The run folder stores the id of the run. Steps that are repeated after resuming appear twice.
    """
    wandb = import_wandb()
    with open_unbuffered(folder / "wandb-id") as file:
        file.seek(0)
        number = file.read(64).decode() or secrets.token_hex(4)
        file.truncate(0)
        file.write(number.encode())
    with reported_as("--wandb: cannot start a run", wandb.Error):
        run = wandb.init(
            project=project, id=number, name=folder.name, resume="allow", dir=folder,
            config=settings,
        )  # fmt: skip
    # W&B's own step cannot go back when a run resumes. `sync_tensorboard` would wait ten seconds
    # at the end of a run.
    run.define_metric("*", step_metric=STEP)
    return run


@contextmanager
def warns_if_lost(name: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an OSError, or one of `kinds`, on writing to a file or folder into a warning."""
    try:
        yield
    except (OSError, *kinds) as error:
        reason = getattr(error, "strerror", None) or error
        print_safely(
            f"WARNING: {name} cannot be written ({printable(str(reason))})", file=sys.stderr
        )


def keep_rows(path: Path, last_step: int) -> None:
    """Deletes the rows of a log.jsonl after `last_step`, and incomplete lines.

    Changes after `last_step` itself are in no checkpoint, so the run goes on without them.
    """
    with open_unbuffered(path) as file:
        file.seek(0)
        whole = file.read()
    rows = []
    for line in whole.split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):  # not a row
            row = json.loads(line)
            if row["step"] + ("changed" in row) <= last_step:
                rows.append(line + b"\n")
    if (kept := b"".join(rows)) != whole:
        write_durably(path, kept)


def as_json(value: float | list[float]) -> float | list[float] | str:
    """Rounds numbers to the seven digits of fp32: 0.01, not 0.009999999776.

    Returns text if a number is not finite, which JSON cannot represent.
    """
    numbers = value if isinstance(value, list) else [value]
    if not all(map(math.isfinite, numbers)):
        return str(value)
    rounded = [n if isinstance(n, int) else float(f"{n:.7g}") for n in numbers]
    return rounded if isinstance(value, list) else rounded[0]
