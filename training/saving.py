"""Writes the checkpoints of a run, atomically and in the background, and deletes old checkpoints.

    saver = Saver(folder, engine)
    saver.start(step, record)                            # copies the state and returns
    saver.wait()                                         # raises the error of a failed write

A folder is filled under a temporary name, with the manifest last, and then renamed. Folders named
*.tmp, which a crash left half written or half deleted, are ignored.

Each process first copies its part of the tensors to host memory. A thread then writes the copy,
while training goes on. The threads communicate over a gloo group of their own, so a checkpoint is
completed even if the training steps of a process have failed.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from checkpoints import Record, ema_file, step_folders
from checkpoints.meta import meta_model
from runtime.errors import print_safely
from runtime.files import flush_to_disk
from runtime.tensor_file import Box, TensorFile
from training.engine import Engine
from training.manifest import write_manifest
from training.run_folder import is_step_folder

REPLACEABLE_FILE = "replaceable"  # marks a checkpoint that the next checkpoint replaces


@dataclass
class Write:
    """The part of a file that this process writes."""

    file: TensorFile
    boxes: dict[str, Box]
    with_header: bool


class Saver:
    """Writes one checkpoint at a time. All processes call `start` together, after `wait`."""

    def __init__(self, run: Path, engine: Engine):
        self.run, self.engine, self.dist = run, engine, engine.dist
        tensors = meta_model(engine.config.model).state_dict().items()
        self.kinds = {name: (value.dtype, value.shape) for name, value in tensors}
        if self.dist.world_size > 1:
            hosts = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=1))
            self.dist = replace(self.dist, hosts=hosts)
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future | None = None  # the checkpoint in progress

    def start(self, step: int, record: Record, *, replaceable: bool = False) -> None:
        """Copies the state after a step and starts to write the checkpoint.

        replaceable: whether the next checkpoint replaces this one
        Raises OSError or ProcessError on all processes if the folder cannot be created or host
        memory is full.
        """
        self.step, self.folder = step, self.run / "checkpoints" / f"{step:07d}"
        temporary = self.folder.with_name(f"writing-{self.folder.name}.tmp")
        with self.removed_after_failure(temporary):
            self.dist.on_main(lambda: begin(temporary, replaceable))
            writes = self.parts(temporary, record)
            self.dist.run_on_all(lambda: copy_to_host(writes, self.dist.device))
        self.writing = self.writer.submit(self.write, temporary, writes)

    def parts(self, temporary: Path, record: Record) -> list[Write]:
        """Returns this process's parts of the files: the state and the EMAs."""
        name, tensors, metadata = self.engine.state()
        kinds = {title: (tensor.dtype, tensor.shape) for title, tensor in tensors.items()}
        boxes = {title: Box.of_all(tensor) for title, tensor in tensors.items()}
        writes = [Write(TensorFile(temporary / name, kinds, metadata), boxes, with_header=True)]
        for number, ema in enumerate(self.engine.emas):
            path = temporary / ema_file(ema.name, is_first=not number)
            of_ema = replace(record, ema=ema.name, ema_start_share=ema.start_share)
            file = TensorFile(path, self.kinds, of_ema.to_metadata())
            writes.append(Write(file, self.engine.average(number), self.dist.is_main))
        return writes

    @contextmanager
    def removed_after_failure(self, temporary: Path) -> Iterator[None]:
        """Deletes the folder if the block, which all processes enter together, raises."""
        try:
            yield
        except BaseException:
            if self.dist.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def write(self, temporary: Path, writes: list[Write]) -> OSError | None:
        """Writes the files and, on the main process, completes the checkpoint; runs in a thread."""
        with self.removed_after_failure(temporary):
            written = self.dist.run_on_all(lambda: write_all(temporary, writes))
            every = self.dist.gather_on_main(written)
            return self.dist.on_main(lambda: self.complete(temporary, every))

    def complete(self, temporary: Path, written: list[dict[str, int]]) -> OSError | None:
        """Gives the filled folder its final name, which makes it the newest checkpoint; returns
        the error if older checkpoints could not be deleted.

        written: numbers of bytes by file, of each process
        """
        sizes = Counter()
        for one in written:
            sizes.update(one)
        for name, size in sizes.items():
            with open(temporary / name, "rb") as file:  # NFS asks the server when a file is opened
                is_whole = size == os.fstat(file.fileno()).st_size
            assert is_whole, f"{name}: a byte is written twice, or never"
        write_manifest(temporary, sizes)
        for path in (temporary, *temporary.rglob("*/")):  # the files were flushed by their writers
            flush_to_disk(path)
        # A damaged checkpoint of this step may exist, if the run resumed from an earlier one.
        to_delete = rename_for_deletion(self.folder) if self.folder.exists() else None
        temporary.rename(self.folder)
        flush_to_disk(self.folder.parent)
        try:
            if to_delete:
                shutil.rmtree(to_delete)
            prune(self.folder, self.engine.config.run.keep_last)
        except OSError as error:
            return error
        return None

    @property
    def is_done(self) -> bool:
        """Whether a checkpoint was written, or failed, since the last call of `wait`."""
        return self.writing is not None and self.writing.done()

    def wait(self) -> OSError | None:
        """Waits for the checkpoint in progress, and raises the error of a failed write.

        Returns the error if the checkpoint was written, but older ones could not be deleted.
        """
        writing, self.writing = self.writing, None
        return writing.result()


def begin(temporary: Path, replaceable: bool) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if replaceable:
        (temporary / REPLACEABLE_FILE).touch()


def copy_to_host(writes: list[Write], device: torch.device) -> None:
    for write in writes:
        write.boxes = {n: replace(b, values=on_host(b.values)) for n, b in write.boxes.items()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_host(tensor: Tensor) -> Tensor:
    """Copies a tensor into host memory, asynchronously from a GPU.

    PyTorch caches freed pinned memory for the next checkpoint.
    """
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=True)


def write_all(folder: Path, writes: list[Write]) -> dict[str, int]:
    written = {}
    for write in writes:
        path = write.file.path
        path.parent.mkdir(exist_ok=True)
        name = path.relative_to(folder).as_posix()
        written[name] = write.file.write(write.boxes, with_header=write.with_header)
        write.boxes = {}  # free the memory of the copy
    return written


def prune(newest: Path, keep_last: int | None) -> None:
    """Deletes old checkpoints after `newest` was written.

    `newest` is kept, and so are checkpoints without a REPLACEABLE_FILE, or the `keep_last` newest
    of these. Checkpoints of higher steps are renamed: they are damaged, because the run resumed
    from an earlier one.
    """
    older = []
    for folder in step_folders(newest.parent.parent):
        if not is_step_folder(folder):
            continue
        if int(folder.name) > int(newest.name):
            damaged = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
            print_safely(f"{folder} is damaged and was renamed to {damaged.name}")
        elif folder != newest:
            older.append(folder)
    kept = [folder for folder in older if not (folder / REPLACEABLE_FILE).exists()]
    if keep_last is not None:
        kept = kept[: max(0, keep_last - (not (newest / REPLACEABLE_FILE).exists()))]
    for folder in older:
        if folder not in kept:
            shutil.rmtree(rename_for_deletion(folder))


def rename_for_deletion(folder: Path) -> Path:
    """Renames a step folder before its deletion, so that no half-deleted folder looks complete."""
    to_delete = folder.with_name(f"deleting-{folder.name}.tmp")
    shutil.rmtree(to_delete, ignore_errors=True)
    folder.rename(to_delete)
    flush_to_disk(folder.parent)
    return to_delete
