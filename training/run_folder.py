"""Run folders: their names, their lock and config.yaml.

    results/007-DiT-S-2-8E2A-rectified_flow/
        config.yaml                            all settings that have an effect
        run.lock                               locked during training
        checkpoints/0050000/
        log.txt, log.jsonl, tensorboard/
        images.png                             some images as training reads them, without a cache
        samples-0050000.png                    images of the first EMA

Only one run trains in a folder at a time. The run never writes its files through links, but
`checkpoints` may be a link, for example to a larger disk.
"""

import fcntl
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from checkpoints import MODEL_FILE, Record, step_folders
from runtime.errors import UserError, print_safely, reported_as
from runtime.files import open_unbuffered, wait_for_file, write_durably
from training.config import OF_DATA, TrainConfig
from training.manifest import MANIFEST_FILE
from training.sections import CommandFlags

CONFIG_FILE, LOCK_FILE = "config.yaml", "run.lock"


def branch_of(command: CommandFlags) -> Path | None:
    """Returns the checkpoint with which a new run begins: what --resume names, unless a run."""
    path = Path(command.resume or "")  # an empty variable of a shell names nothing
    return path if command.resume and not step_folders(path) else None


def is_step_folder(path: Path) -> bool:
    """Returns whether a run saved this folder. Exported weights have no manifest, nor has a damaged
    step folder, which has a number as its name."""
    has_weights = os.path.isfile(path / MODEL_FILE)
    return os.path.isfile(path / MANIFEST_FILE) or has_weights and path.name.isdecimal()


def parent_folder(command: CommandFlags) -> Path:
    """Returns the folder of the run's folder: that of the run whose checkpoint --resume names, or
    --results-dir."""
    if not command.results_dir and (step := branch_of(command)):
        return Path(os.path.normpath(step / "../../.."))
    return Path(command.results_dir or "results")


def named_folder(command: CommandFlags) -> Path:
    name = command.run_name
    if not re.fullmatch(r"(?!\.\.?$)[^/\x00-\x1f]+", name) or len(os.fsencode(name)) > 150:
        expected = "a plain folder name of at most 150 bytes"
        raise UserError(f"--run-name: got {name[:200]!r}, expected {expected}")
    return parent_folder(command) / name


def new_folder(command: CommandFlags, config: TrainConfig) -> Path:
    """Creates the folder of a new run, named by --run-name, or by the next number, the model and
    the objective."""
    parent, objective = parent_folder(command), config.step.objective.name
    ending = "" if objective == "gaussian" else f"-{objective}"
    ending = re.sub(r"[^\w.+-]", "-", config.name + ending)
    with reported_as(f"--results-dir: cannot write to {parent}", OSError):
        parent.mkdir(parents=True, exist_ok=True)
        if command.run_name:  # it may exist, without a checkpoint
            (folder := named_folder(command)).mkdir(exist_ok=True)
            return folder
        form = re.compile(r"(\d{3,6})-\S+-(\d+E\d+A|dense)(-\w+)?")
        found = map(form.fullmatch, os.listdir(parent))
        number = 1 + max((int(match[1]) for match in found if match), default=-1)
        while True:
            with suppress(FileExistsError):
                (folder := parent / f"{number:03d}-{ending}").mkdir()
                return folder
            number += 1  # another command was faster


def enter_run_folder(run: Path) -> BinaryIO:
    """Creates and locks a run folder; returns the lock, see `lock_folder`."""
    with reported_as(f"--results-dir: cannot write to {run}", OSError):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = lock_folder(run)
        for path in (run / "checkpoints").glob("*.tmp"):  # unfinished when a run crashed
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    return lock


def wait_for_folder(run: Path, rank: int) -> None:
    """Waits until a process on any node sees the run folder that the first process has entered."""
    if not wait_for_file(run / LOCK_FILE):
        expected = "a folder that all nodes share"
        raise UserError(f"--results-dir: {run} does not exist on rank {rank}, expected {expected}")


class ConfigDumper(yaml.SafeDumper):
    """Writes each list in one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


def write_config(run: Path, config: TrainConfig, record: Record) -> None:
    """Writes config.yaml: the settings, which are a recipe, and, after ---, what the data set."""
    script = config.engine.script
    text = (
        f"# To resume the run: {script} --resume FOLDER, where FOLDER is the folder of this file.\n"
        f"# To start a new run with the same settings: {script} --config FILE, with this file\n"
        "# (and --finetune, if the run began from weights).\n"
    )
    sections = config.sections()
    of_data = {name: sections["model"].pop(name) for name in OF_DATA}
    of_data["sparse_blocks"] = [*config.model.sparse_blocks]
    known = {**record.facts, "images": record.images, "vae_sha256": record.vae_sha256}
    documents = [sections, {**known, **of_data}]
    text += yaml.dump_all(documents, Dumper=ConfigDumper, sort_keys=False, width=10_000)
    with reported_as(f"--results-dir: cannot write to {run}", OSError):
        write_durably(run / CONFIG_FILE, text)


def lock_folder(run: Path) -> BinaryIO:
    """Excludes other runs from a run folder until the returned file is closed or this process ends.

    A POSIX record lock (fcntl): it ends with the process, data-loading processes do not inherit it,
    and NFS enforces it on all nodes. Do not open the file a second time: closing the second
    descriptor releases the lock. Without locks in the file system, prints a warning.
    """
    file = open_unbuffered(run / LOCK_FILE)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(300).decode(errors="replace").strip() or "another process"
        raise UserError(
            f"{run} is in use by {holder}; wait for it, stop it, or use --run-name"
        ) from None
    except OSError as error:
        print_safely(
            f"WARNING: {run} cannot be locked ({error.strerror}): do not start a second run in "
            "this folder"
        )
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
    with suppress(OSError):  # on a full disk the lock works without the text
        file.truncate(0)
        file.write(holder.encode())
    return file
