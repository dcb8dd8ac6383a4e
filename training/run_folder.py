"""Run folders: named by the settings, so that the same command finds its run again.

    results/DiT-S-2-8E2A-1a2b3c4d/
        settings.json   what the run was begun with        run.lock      held while it trains
        checkpoints/0050000/                               log.txt, log.jsonl, tensorboard/

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

from checkpoints import MODEL_FILE, read_record, step_folders
from checkpoints.record import parse_config
from models import DiT_models, DiTConfig
from parts import options_of
from runtime import __version__
from runtime.errors import UserError, check_same, reported_as, say
from runtime.files import open_own, read_json, write_durably
from runtime.flags import spelling
from runtime.processes import Distributed
from training.config import DataConfig, PresetConfig, RunConfig, StepConfig, TrainConfig

SETTINGS_FILE, LOCK_FILE = "settings.json", "run.lock"
VERSION = 2  # of the settings: another one where an old run cannot go on


def begun_run(config: TrainConfig, own: Path | None) -> tuple[Path | None, dict | None]:
    """The folder of a run that a command names, else None; and what that run was begun with, if it
    has checkpoints and began from the weights that this command names."""
    own = own or named_folder(config)
    if own is None or not is_run_folder(own) or not step_folders(own):
        return own, None
    before, run = read_run_file(own), config.run
    sources = (before["flags"].get("finetune"), before["flags"].get("resume"))
    return own, before if sources == (run.finetune, run.resume) else None


def named_folder(config: TrainConfig) -> Path | None:
    """The folder of --run-name; UserError for what is no name of a folder."""
    name = config.run.run_name
    if name is None:
        return None
    is_plain = re.fullmatch(r"(?!\.\.?$)[^/\x00-\x1f]+", name)
    if not is_plain or len(os.fsencode(name)) > 150:
        expected = "a plain folder name of at most 150 bytes"
        raise UserError(f"--run-name: got {name[:200]!r}, expected {expected}")
    return Path(config.run.results_dir, name)


def choose_run_folder(config: TrainConfig, settings: dict) -> Path:
    """Names a new run's folder: --run-name, or the model and a digest of what flags changed."""
    if named := named_folder(config):
        return named
    usual = usual_settings(config)
    special = {k: v for k, v in sorted(settings.items()) if k not in usual or v != usual[k]}
    digest = hashlib.sha256(json.dumps(special).encode()).hexdigest()[:8]
    objective = "" if config.step.objective == "gaussian" else f"-{config.step.objective}"
    name = f"{name_of_experts(config.preset, config.model)}{objective}-{digest}"
    return Path(config.run.results_dir, re.sub(r"[^\w.+-]", "-", name))


def usual_settings(config: TrainConfig) -> dict:
    """What a run of this preset and router has where no flag says otherwise, as JSON has it.

    So does a run that began before there was a flag.
    """
    kinds = (PresetConfig, StepConfig, DataConfig, RunConfig, type(config.engine))
    values = {name: one.default for kind in kinds for name, one in options_of(kind).items()}
    for kind, part in (("objective", config.objective), ("optimizer", config.optimizer)):
        values |= {f"{kind}_{n}": one.default for n, one in options_of(type(part)).items()}
    for ema in config.emas:
        values |= {f"ema_{n}": [one.default] for n, one in options_of(type(ema)).items()}
    preset = DiT_models[config.preset].keywords if config.preset in DiT_models else {}
    model = DiTConfig.from_flat({**preset, "router": config.model.router}).flat()
    return as_json(values | model | {"router": DiTConfig.router})


def as_json(values: dict) -> dict:
    return json.loads(json.dumps(values))


def name_of_experts(model: str, config: DiTConfig) -> str:
    """A model's name with its experts, such as DiT-S/2-8E2A, or DiT-S/2-dense."""
    experts = f"{config.num_experts}E{config.num_experts_per_tok}A"
    return f"{model}-{experts if config.num_experts else 'dense'}"


def is_run_folder(path: Path) -> bool:
    return os.path.isfile(path / SETTINGS_FILE)  # also false for a name that is too long


def is_step_folder(path: Path) -> bool:
    return os.path.isfile(path / MODEL_FILE)


def read_run_file(run: Path) -> dict:
    """Reads what a run was begun with: "settings", which decide its result, and "flags", all that
    was said. UserError when the file is damaged or of another version."""
    path = run / SETTINGS_FILE
    expected = "a run's settings; remove the file to have this command write it anew"
    with reported_as(f"{path}: damaged, expected {expected}", OSError, ValueError):
        stored = read_json(path)
        version = stored.get("version", 1)
        if version == VERSION and not all(
            isinstance(stored.get(part), dict) for part in ("settings", "flags")
        ):
            raise ValueError("got no settings or no flags")
    if version != VERSION:
        raise UserError(
            f"{run} was begun by version {version!s:.20} of the settings, expected {VERSION}: "
            f"start another run from its weights by --finetune {run} --run-name NEW"
        )
    return stored


def read_flags(run: Path) -> dict:
    """The flags that began a run, by name."""
    flags = read_run_file(run)["flags"]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}


def check_settings(run: Path, config: TrainConfig, settings: dict) -> None:
    """Raises UserError when a run folder was begun with other settings than this command's.

    A setting that there was not when the run began has its default. Images are compared by
    `training.start.compare_data`.
    """
    if is_run_folder(run):
        stored = read_run_file(run)["settings"]
    else:  # where the file is gone, those of its checkpoints
        stored = next((read_record(folder).settings for folder in step_folders(run)), None)
    if stored is None:
        return
    fields = {k: v for k, v in stored.items() if k in config.model.flat()}
    names = {
        "vae_sha256": "--vae-path: weights", "started_from": "--finetune or --resume: weights",
        "start": "the start", "script": "the script",
    }  # fmt: skip

    def by_flag(values: dict) -> dict:
        return {names.get(k, spelling(k)): v for k, v in values.items() if k != "images"}

    then = {**usual_settings(config), **parse_config(fields).flat(), **stored}
    then = as_json({name: then.get(name, settings[name]) for name in settings})
    check_same(f"{run} was begun with other settings", by_flag(settings), by_flag(then))


def enter_run_folder(run: Path, settings: dict, flags: dict, dist: Distributed) -> "RunLock | None":
    """Makes a run folder, locks it and writes its settings; all processes call it together.

    Raises UserError, on all of them, when it cannot be written or is in use.
    """

    def enter() -> RunLock:
        with reported_as(f"--results-dir: cannot write to {run}", OSError):
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = RunLock(run)
            new = {"code": __version__, "version": VERSION, "settings": settings}
            before = read_run_file(run) if is_run_folder(run) else new
            if before.get("flags") != flags:
                stored = before | {"flags": flags}
                write_durably(run / SETTINGS_FILE, json.dumps(stored, indent=1))
            for path in (run / "checkpoints").glob("*.tmp"):  # a crash left it half done
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
        return lock

    lock = dist.on_main(enter)
    if not is_run_folder(run):
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
        self.file = open_own(run / LOCK_FILE)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read(300).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{run} is in use by {holder}; wait for it, stop it, or use --run-name"
            ) from None
        except OSError as error:
            say(f"WARNING: {run} cannot be locked ({error.strerror}): start no second run")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
        with suppress(OSError):  # a full disk; the lock holds all the same
            self.file.truncate(0)
            self.file.write(holder.encode())
