"""The checkpoints of a run: written whole or not at all, checked, and deleted.

    folder = save_checkpoint(run, step, engine, dist, record=record)
    fault = find_fault(folder, dist)                                  # None: as it was written
    prune(folder, keep_last, engine.emas)

A folder is filled under a temporary name, its manifest last, and then renamed. Names that end in
.tmp are of what a crash left half written or half deleted; nothing reads them. The manifest has the
size and the CRC-32 of each file, to notice damage by.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from checkpoints import Record, ema_file, save_model, step_folders
from runtime.errors import say
from runtime.files import flush_to_disk, open_foreign, read_json, write_durably
from runtime.processes import Distributed
from training.ema import EMA
from training.engine import Engine
from training.run_folder import is_step_folder

MANIFEST_FILE = "manifest.json"
SNAPSHOTS = "snapshots"  # beside the step folders
REPLACEABLE_FILE = "replaceable"  # in a checkpoint that the next one takes the place of


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


def write_manifest(folder: Path) -> None:
    """Writes the facts of a folder's files; OSError when that fails."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = facts_of(folder, [path.relative_to(folder).as_posix() for path in files])
    write_durably(folder / MANIFEST_FILE, json.dumps(facts, indent=1) + "\n")


def facts_of(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """The size and the CRC-32 of files, several read at a time; OSError if one cannot be."""

    def read(name: str) -> dict:
        checksum = 0
        with open_foreign(folder / name) as file:
            while block := file.read(2**20):
                checksum = zlib.crc32(block, checksum)
            return {"bytes": file.tell(), "crc32": f"{checksum:08x}"}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def find_fault(folder: Path, dist: Distributed) -> str | None:
    """Says which file of a checkpoint is missing or damaged, or None; all processes call it."""
    return dist.broadcast(fault_of(folder) if dist.is_main else None)


def fault_of(folder: Path) -> str | None:
    try:
        expected = read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE} is missing or damaged ({error})"
    try:
        found = facts_of(folder, expected)
    except OSError as error:
        return f"a file is missing or cannot be read ({error})"
    for name, facts in expected.items():
        if found[name] != facts:
            return f"{name} is damaged: got {found[name]}, expected {facts!s:.100}"
    return None


def prune(newest: Path, keep_last: int | None, emas: Sequence[EMA]) -> None:
    """Deletes the checkpoints that are not to be kept, after `newest` was written.

    That one stays, and those without a REPLACEABLE_FILE, or the `keep_last` newest of these. Higher
    steps are damaged, from before the run went back behind them: they get a name that does not
    count. Folders that are not checkpoints are somebody else's.

    emas: the run's; some of those that `keep_last` deletes go to `checkpoints/snapshots`
    """
    older = []
    for folder in step_folders(newest.parent.parent):
        if not (is_step_folder(folder) or (folder / MANIFEST_FILE).exists()):
            continue
        if int(folder.name) > int(newest.name):
            damaged = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
            say(f"{folder}, which is damaged, is {damaged.name} now")
        elif folder != newest:
            older.append(folder)
    kept = [folder for folder in older if not (folder / REPLACEABLE_FILE).exists()]
    if keep_last is not None:
        kept = kept[: max(0, keep_last - (not (newest / REPLACEABLE_FILE).exists()))]
    for folder in older:
        if folder not in kept:
            if not (folder / REPLACEABLE_FILE).exists():
                keep_snapshots(folder, emas)
            shutil.rmtree(set_aside(folder))


def keep_snapshots(folder: Path, emas: Sequence[EMA]) -> None:
    """Moves those averages of a step folder that is to be deleted which others are rebuilt from."""
    for number, ema in enumerate(emas):
        file = folder / ema_file(ema.name, is_first=not number)
        if ema.is_rebuilt_from and file.exists():  # a crash may have left the rest
            kept = folder.parent / SNAPSHOTS / f"{folder.name}-{ema.name}.safetensors"
            kept.parent.mkdir(exist_ok=True)
            file.rename(kept)
            flush_to_disk(kept.parent)


def set_aside(folder: Path) -> Path:
    """Renames a step folder that is to be deleted: half deleted, it has no name that counts."""
    doomed = folder.with_name(f"deleting-{folder.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    flush_to_disk(folder.parent)
    return doomed
