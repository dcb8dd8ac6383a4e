"""Writing a step's checkpoint: whole or not at all.

    folder = save_checkpoint(run, step, engine, dist, record=record)

A folder is filled under a temporary name, its list of files last, and then renamed. Names that end
in .tmp are of what a crash left half written or half deleted; nothing reads them.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from checkpoints import Record, ema_file, save_model
from checkpoints.manifest import write_manifest
from runtime.files import flush_to_disk
from runtime.processes import Distributed
from training.ema import EMA
from training.engine import Engine
from training.run_folder import REPLACEABLE_FILE, set_aside


def save_checkpoint(
    run: Path, step: int, engine: Engine, dist: Distributed, *, record: Record,
    replaceable: bool = False,
) -> Path:  # fmt: skip
    """Writes the checkpoint of a step; all processes call it together. Returns its folder.

    replaceable: the next checkpoint takes its place
    Raises OSError, on all of them, when one could not write its part; what was written of this
    checkpoint is removed then, and those before it stay.
    """
    folder = run / "checkpoints" / f"{step:07d}"
    temporary = folder.with_name(f"writing-{folder.name}.tmp")
    try:
        dist.on_main(lambda: begin(temporary, replaceable))
        dist.together(lambda: engine.save_state(temporary))
        for number, ema in enumerate(engine.emas):
            path = temporary / ema_file(ema.name, is_first=not number)
            state_dict = engine.ema_state_dict(number)
            own = replace(record, ema=ema.name, ema_start_share=ema.start_share(step))
            dist.on_main(partial(save_model, path, state_dict, own))
        dist.on_main(lambda: finish(temporary, folder))
    except OSError:
        if dist.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()
        raise
    return folder


def snapshots(emas: Sequence[EMA]) -> dict[str, str]:
    """The files of a checkpoint that other averages are rebuilt from, and whose they are."""
    return {
        ema_file(ema.name, is_first=not number): ema.name
        for number, ema in enumerate(emas)
        if ema.is_rebuilt_from
    }


def begin(temporary: Path, replaceable: bool) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if replaceable:
        (temporary / REPLACEABLE_FILE).touch()


def finish(temporary: Path, folder: Path) -> None:
    """Gives a filled folder its final name: from here on it is the newest checkpoint."""
    write_manifest(temporary)
    for path in (temporary, *temporary.rglob("*/")):  # the files were flushed by their writers
        flush_to_disk(path)
    # There may be a damaged one of that step, from before the run went back behind it.
    doomed = set_aside(folder) if folder.exists() else None
    temporary.rename(folder)
    flush_to_disk(folder.parent)
    if doomed:
        shutil.rmtree(doomed, ignore_errors=True)
