"""What a run says: a progress bar on a terminal, log.txt, log.jsonl, TensorBoard and W&B."""

import errno
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor
from tqdm import tqdm

from latents.loading import BatchStream
from runtime import __version__
from runtime.errors import UserError, reported_as, say
from runtime.files import open_own, write_durably

GROUPS = {  # of TensorBoard's tags, and what names have in them; what is in no other is a loss
    "router": "expert|^router_",
    "time": "epoch|_per_sec|memory|tflops|^mfu|data_wait",
    "optimizer": "lr$|grad_|skipped",
}


class RunLog:
    """Writes on the main process and is silent on the others.

    What a full disk does not take is lost with a warning, and the training goes on. TensorBoard's
    writer takes nothing more until the next start then.

    Rows of log.jsonl past the stream's first step are of steps that a resumed run does again: they
    are dropped when it starts, so that each step stands there once.

    settings: of the run, for TensorBoard's table of runs
    wandb: project of Weights & Biases, which gets what TensorBoard gets; None for none
    """

    def __init__(
        self, folder: Path, stream: BatchStream, settings: dict, wandb: str | None, *, is_main: bool
    ):
        self.is_main, start_step, total_steps = is_main, stream.start_step, stream.end_step
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second
        from torch.utils.tensorboard.summary import hparams

        rows, board = folder / "log.jsonl", folder / "tensorboard"
        for path in (board, folder / "wandb"):
            if path.is_symlink():
                raise UserError(f"{path}: got a link, expected a folder of the run's own")
        self.wandb = None if wandb is None else begin_wandb(wandb, folder, settings)
        keep_rows(rows, start_step)
        self.total_steps = total_steps
        self.text_file = open_own(folder / "log.txt")
        self.rows_file = open_own(rows)
        self.board = SummaryWriter(board, purge_step=start_step + 1)
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()}
        for summary in hparams(
            plain | {"version": __version__}, dict.fromkeys(("loss/loss", "loss/val_loss"))
        ):
            self.board.file_writer.add_summary(summary)
        self.bar = tqdm(
            total=total_steps, initial=start_step, disable=not sys.stderr.isatty(), unit="step"
        )

    def text(self, message: str) -> None:
        """Says a line, with the time, on standard output and in log.txt."""
        if not self.is_main:
            return
        line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {message}"
        self.bar.write(line) if not self.bar.disable else say(line)
        self.write(self.text_file, line)

    def write(self, file: BinaryIO, line: str) -> None:
        """Adds a whole line to a file, or nothing."""
        content, end = line.encode(errors="replace") + b"\n", file.seek(0, os.SEEK_END)
        with warns_if_lost(file.name):
            if file.write(content) < len(content):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def advance(self) -> None:
        if self.is_main:
            self.bar.update()

    def metrics(self, step: int, values: dict, steps_per_second: float) -> None:
        """Says one line about a step; `values` are numbers, or a list with a number per layer."""
        if not self.is_main:
            return
        row = {"step": step, "time": round(time.time())}  # in seconds since 1970
        row |= {name: as_json(value) for name, value in values.items()}
        self.write(self.rows_file, json.dumps(row))
        with warns_if_lost(self.board.log_dir):
            for name, value in values.items():
                groups = (group for group, part in GROUPS.items() if re.search(part, name))
                tag = f"{next(groups, 'loss')}/{name}"
                if isinstance(value, list):
                    for layer, number in enumerate(value):
                        self.board.add_scalar(f"{tag}/{layer:02d}", number, step)
                    value = max(value)
                self.board.add_scalar(tag, value, step)
        parts = [f"step {step:07d}", *(describe(name, value) for name, value in values.items())]
        if step < self.total_steps:
            end = datetime.now() + timedelta(seconds=(self.total_steps - step) / steps_per_second)
            parts.append(f"ends {end:%a %d %b %H:%M}")
        self.text("  ".join(parts))

    def samples(self, step: int, grid: Tensor, path: Path) -> None:
        """Writes an image (3, H, W) uint8 to a PNG file and shows it in TensorBoard."""
        from sampling.grid import write_png

        with warns_if_lost(self.board.log_dir):
            self.board.add_image("samples", grid, step)
        with warns_if_lost(path):
            write_png(grid, path)
            self.text(f"sample grid: {path}")

    def flush(self) -> None:
        """Brings all that was said to the disk: a checkpoint may then speak of these steps."""
        if self.is_main:
            with warns_if_lost(self.board.log_dir):
                self.board.flush()
            for file in (self.rows_file, self.text_file):
                with warns_if_lost(file.name):
                    os.fsync(file.fileno())

    def close(self, exit_code: int = 0) -> None:
        if self.is_main:
            self.bar.close()
            with warns_if_lost(self.board.log_dir):
                self.board.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code)
            self.rows_file.close()
            self.text_file.close()


def begin_wandb(project: str, folder: Path, settings: dict) -> Any:
    """Begins a run of Weights & Biases, or goes on with it, which takes what TensorBoard is given.

    The run folder keeps its id. Steps that are taken again stand there twice. UserError without the
    package, or where the service refuses.
    """
    try:
        import wandb
    except ImportError:
        expected = "the package wandb (pip install wandb)"
        raise UserError(f"--wandb: got {project}, expected {expected}") from None
    with open_own(folder / "wandb-id") as file:
        file.seek(0)
        number = file.read(64).decode() or secrets.token_hex(4)
        file.truncate(0)
        file.write(number.encode())
    with reported_as("--wandb: cannot begin a run", wandb.Error):
        return wandb.init(
            project=project, id=number, name=folder.name, resume="allow", dir=folder,
            config=settings, sync_tensorboard=True,
        )  # fmt: skip


@contextmanager
def warns_if_lost(name: str | Path) -> Iterator[None]:
    """Makes a warning of what a file or folder cannot take."""
    try:
        yield
    except OSError as error:
        say(f"WARNING: {name} cannot be written ({error.strerror or error})", file=sys.stderr)


def keep_rows(path: Path, last_step: int) -> None:
    """Drops the rows of a log.jsonl after `last_step`, and a last line that was cut off."""
    with open_own(path) as file:
        file.seek(0)
        whole = file.read()
    rows = []
    for line in whole.split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):  # not a row
            if json.loads(line)["step"] <= last_step:
                rows.append(line + b"\n")
    if (kept := b"".join(rows)) != whole:
        write_durably(path, kept)


def as_json(value: float | list[float]) -> float | list[float] | str:
    """The seven digits that fp32 has, 0.01 and not 0.009999999776; text where one is not finite."""
    numbers = value if isinstance(value, list) else [value]
    if not all(map(math.isfinite, numbers)):
        return str(value)
    rounded = [n if isinstance(n, int) else float(f"{n:.7g}") for n in numbers]
    return rounded if isinstance(value, list) else rounded[0]


def describe(name: str, value: float | list[float]) -> str:
    if isinstance(value, list):
        return f"{name} {max(value):.2f}"
    return f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}"
