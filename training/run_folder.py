"""Run folders: named by the settings, so that the same command finds its run again.

    results/DiT-S-2-8E2A-1a2b3c4d/
        config.yaml     all settings           run.lock      held while it trains
        checkpoints/0050000/                   log.txt, log.jsonl, tensorboard/

A folder is for one run at a time. Its files are never followed as links; `checkpoints` itself may
be a link, to a larger disk.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from checkpoints import MODEL_FILE, Record, read_record, step_folders
from checkpoints.record import settings_of
from models import DiTConfig
from parts import options_of
from runtime import __version__
from runtime.errors import UserError, print_safely, reported_as
from runtime.files import open_run_file, open_untrusted, write_durably
from runtime.flags import Flags, Given, layered, read_values, spelling
from runtime.processes import Distributed
from training.config import (
    DATA_FACTS,
    END_OF_RECIPE,
    RunConfig,
    TrainConfig,
    parse_yaml,
    training_flags,
)

CONFIG_FILE, LOCK_FILE, EARLIER_FILE = "config.yaml", "run.lock", "settings.json"
NAMES = {  # of facts
    "vae_sha256": "--vae-path: weights",
    "features_sha256": "--latents-path: the network of the features",
    "start": "the start",
    "script": "the script",
}


def named_run(given: Given, flags: Flags) -> tuple[Given, Path | None, Given]:
    """The flags, the folder of the run that --resume or --run-name names, and `read_run` of it.

    For --resume RUN the flags are those of the run under those of the command.
    """
    name, run = given.get("run_name"), Path(given.get("resume") or "")
    is_plain = name is None or re.fullmatch(r"(?!\.\.?$)[^/\x00-\x1f]+", name)
    if not is_plain or len(os.fsencode(name or "")) > 150:
        expected = "a plain folder name of at most 150 bytes"
        raise UserError(f"--run-name: got {name[:200]!r}, expected {expected}")
    if not given.get("resume") or not is_run_folder(run):
        run = name and Path(given.get("results_dir", RunConfig.results_dir), name)
        return given, run, read_run(run, flags) if name else {}
    named = Path(given.get("results_dir", run.parent), name or run.resolve().name)
    if named.resolve() != run.resolve():
        other = f"--resume {run}/checkpoints/STEP --run-name NEW"
        raise UserError(f"--resume {run}: got {named}, expected that run (another one: {other})")
    was, now = read_run(run, flags), {k: v for k, v in given.items() if k != "resume"}
    own = {k: v for k, v in was.items() if k in flags and k not in DATA_FACTS}
    return layered(own, now, flags), run, was


def default_folder(config: TrainConfig, given: Given, facts: dict[str, Any]) -> Path:
    """Names a run by its model and a digest of the flags and facts that it is bound to."""
    flags = training_flags(type(config.engine))
    special = {
        name: value for name, value in sorted(given.items())
        if flags[name].binds in (None, "resume", "branch") and value != flags[name].default
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps([special, facts], sort_keys=True).encode()).hexdigest()[:8]
    objective = "" if config.step.objective == "gaussian" else f"-{config.step.objective}"
    name = re.sub(r"[^\w.+-]", "-", f"{config.name}{objective}-{digest}")
    return Path(config.run.results_dir, name)


def is_run_folder(path: Path) -> bool:  # also false for a name that is too long
    return any(os.path.isfile(path / name) for name in (CONFIG_FILE, EARLIER_FILE))


def is_step_folder(path: Path) -> bool:
    return os.path.isfile(path / MODEL_FILE)


def read_run(run: Path, flags: Flags) -> Given:
    """The settings and facts of the run in a folder; nothing where there is none.

    Where config.yaml is gone, they are those of the newest checkpoint. Settings that there are no
    longer are left out. UserError for a damaged file or one of an earlier version.
    """
    path, known = run / CONFIG_FILE, options_of(DiTConfig) | flags
    if os.path.isfile(path):
        message = f"{path}: damaged; remove the file to have this command write it anew"
        kinds = (OSError, ValueError, TypeError, yaml.YAMLError, UserError)
        with reported_as(message, *kinds):
            with open_untrusted(path) as file:
                text, _, rest = file.read().decode().partition(END_OF_RECIPE)
            settings = {k: v for k, v in parse_yaml(text).items() if k in known}
            return read_values(settings, known) | yaml.safe_load(rest)
    if os.path.isfile(run / EARLIER_FILE):
        raise UserError(
            f"{run} was begun by an earlier version, whose {EARLIER_FILE} this one does not read: "
            f"start another run from its weights by --finetune {run} --run-name NEW"
        )
    record = newest_record(run)
    return stored_values(record, flags) if record else {}


def newest_record(run: Path) -> Record | None:
    """The record of the newest checkpoint of a run that opens, if there is one."""
    for folder in step_folders(run):
        with suppress(UserError):
            return read_record(folder)
    return None


def stored_values(record: Record, flags: Flags) -> Given:
    """The settings and facts of a checkpoint as `read_run` gives them."""
    known = options_of(DiTConfig) | flags
    settings = {k: v for k, v in settings_of(record.sections()).items() if k in known}
    facts = record.facts | {"images": record.images, "vae_sha256": record.vae_sha256}
    return read_values(settings, known) | facts


def differences(
    was: Given, now: Given, flags: Flags, binding: tuple[str, ...] = ("resume", "branch")
) -> list[str]:
    """ "NAME: was A, is B" for each setting and fact that binds and has another value now.

    A setting that there was not when the run began has its default. Images are compared by
    `training.start.compare_data`.
    """
    before, now = (json.loads(json.dumps(values)) for values in (was, now))
    found = []
    for name in dict.fromkeys([*now, *before]):
        binds = "branch" if name in (*DATA_FACTS, "script") else "resume"
        if name in flags and name not in DATA_FACTS:
            binds = flags[name].binds or "resume"
            before.setdefault(name, json.loads(json.dumps(flags[name].default_beside(was))))
        then, value = before.get(name), now.get(name)
        if binds in binding and then != value and name not in ("images", "version"):
            label = NAMES.get(name) or spelling(name)
            found.append(f"{label}: was {then!s:.300}, is {value!s:.300}")
    return found


def enter_run_folder(
    run: Path, config: TrainConfig, facts: dict[str, Any], dist: Distributed
) -> "RunLock | None":
    """Makes a run folder, locks it and writes config.yaml: all settings, which --config takes, and
    after --- the facts. All processes call it together.

    Raises UserError, on all of them, when it cannot be written or is in use.
    """
    text = f"# train.py --resume {run.name} goes on; train.py --config FILE trains alike\n"
    for section, settings in config.sections().items():
        text += f"{section}:\n"
        for name, value in settings.items():
            flow = None if isinstance(value, list) else False
            line = yaml.safe_dump({name: value}, default_flow_style=flow, width=1000)
            text += indent(line, "  ")
    facts = yaml.safe_dump({"version": __version__, **facts}, sort_keys=False)
    text = text.rstrip() + END_OF_RECIPE + facts

    def enter() -> RunLock:
        with reported_as(f"--results-dir: cannot write to {run}", OSError):
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = RunLock(run)
            write_durably(run / CONFIG_FILE, text)
            for path in (run / "checkpoints").glob("*.tmp"):  # a crash left it half done
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
        return lock

    lock = dist.on_main(enter)
    if not os.path.isfile(run / CONFIG_FILE):
        raise UserError(
            f"--results-dir: {run} cannot be seen from rank {dist.rank}, expected a folder that "
            "all nodes share"
        )
    return lock


class RunLock:
    """Keeps other runs out of a run folder until this process ends, however it ends.

    It is a POSIX record lock (fcntl), which the kernel drops with the process, which data-loading
    processes do not inherit, and which NFS passes on to the other nodes. The process must not open
    the file again: closing it drops the lock. UserError says which process has it.
    """

    def __init__(self, run: Path):
        self.file = open_run_file(run / LOCK_FILE)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read(300).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{run} is in use by {holder}; wait for it, stop it, or use --run-name"
            ) from None
        except OSError as error:
            print_safely(f"WARNING: {run} cannot be locked ({error.strerror}): start no second run")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
        with suppress(OSError):  # a full disk; the lock holds all the same
            self.file.truncate(0)
            self.file.write(holder.encode())
