"""Writing checkpoints: whole or not at all, pruned only when a newer one is whole.

    saved = save_checkpoint(run, step, engine, dist, record=record)  # OSError on all if on one
    prune(run, step, keep_last=3, keep_every=50_000)             # on one process

A folder is filled under a temporary name, its manifest last, and then renamed. Names that end in
.tmp are of what a crash left half written or half deleted; nothing reads them.
"""

import shutil
from pathlib import Path

import torch

from checkpoints.checkpoint import MODEL_FILE, save_model, step_folders
from checkpoints.manifest import write_manifest
from checkpoints.record import Record
from runtime.files import flush_to_disk, write_durably
from runtime.processes import Distributed


def checkpoint_folder(run: Path, step: int, temporary: bool = False) -> Path:
    """Names a step's folder, or the one that it is written to before it is complete."""
    name = f"{step:07d}"
    return run / "checkpoints" / (f"writing-{name}.tmp" if temporary else name)


def save_checkpoint(
    run: Path,
    step: int,
    engine,
    dist: Distributed,
    *,
    record: Record,
    texts: dict[str, str] | None = None,
) -> Path:
    """Writes the checkpoint of a step; all processes call it together.

    record: what the checkpoint says of itself
    texts: contents of small files, by name, that stand in the folder as well
    Raises OSError, on all of them, when one could not write its part; what was written of this
    checkpoint is removed then, and those before it stay.
    """
    temporary = checkpoint_folder(run, step, temporary=True)

    def on_main(action):
        return dist.together(lambda: action() if dist.is_main else None)

    try:
        on_main(lambda: begin_checkpoint(temporary))
        dist.together(lambda: engine.save_state(temporary))
        state_dict = engine.ema_state_dict()
        path = temporary / MODEL_FILE
        on_main(lambda: save_model(path, state_dict, record))
        for name, text in (texts or {}).items():
            on_main(lambda name=name, text=text: write_durably(temporary / name, text))
        write_manifest(temporary, dist)
        on_main(lambda: finish_checkpoint(temporary, run, step))
    except OSError:
        if dist.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()
        raise
    return checkpoint_folder(run, step)


def save_tensors(state: dict, path: Path) -> None:
    """torch.save, flushed to disk; OSError when that fails, which torch hides in a RuntimeError."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            cause = error.__context__
            raise (
                cause if isinstance(cause, OSError) else OSError(f"{path.name}: {error}")
            ) from None
    flush_to_disk(path)


def begin_checkpoint(temporary: Path) -> None:
    """Makes the empty folder that a checkpoint is written to; call on one process."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def finish_checkpoint(temporary: Path, run: Path, step: int) -> Path:
    """Gives a filled folder its final name: from here on it is the newest checkpoint."""
    folder = checkpoint_folder(run, step)
    for path in (temporary, *temporary.rglob("*/")):  # the files were flushed by their writers
        flush_to_disk(path)
    # There may be a damaged one, from before the run went back behind it.
    doomed = set_aside(folder) if folder.exists() else None
    temporary.rename(folder)
    flush_to_disk(folder.parent)
    if doomed:
        shutil.rmtree(doomed, ignore_errors=True)
    return folder


def set_aside(folder: Path) -> Path:
    """Renames a step folder that is to be deleted: half deleted, it has no name that counts."""
    doomed = folder.with_name(f"deleting-{folder.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    flush_to_disk(folder.parent)
    return doomed


def prune(run: Path, step: int, *, keep_last: int | None, keep_every: int | None) -> None:
    """Deletes checkpoints older than the whole one of `step`, but for the last ones and every M-th.

    keep_last: how many stay, that of `step` among them; None: all
    keep_every: those whose step is a multiple of it stay as well
    """
    if keep_last is None:
        return
    older = [folder for folder in step_folders(run) if int(folder.name) < step]
    for folder in older[keep_last - 1 :]:
        if keep_every is None or int(folder.name) % keep_every:
            shutil.rmtree(set_aside(folder))


def remove_leftovers(run: Path) -> None:
    """Deletes what a crash left half written or half deleted; call while the run is locked."""
    for path in (run / "checkpoints").glob("*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
