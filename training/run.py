"""Run folders: named by the settings, so that the same command finds its run again.

A folder is for one run at a time: `RunLock`.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from checkpoints.checkpoint import MODEL_FILE
from models import DiTConfig
from runtime.errors import UserError, say
from runtime.files import read_json, write_durably
from runtime.options import MODEL_DEFAULTS
from runtime.processes import Distributed

SETTINGS_FILE, LOCK_FILE = "settings.json", "run.lock"
LONGEST_NAME = 150  # bytes; file systems take 255

# Flags that may change when a run goes on: they do not change what a step computes. Beside the
# global batch size, the batch of a process and --accum_iter only say who computes what of it.
FREE = {
    "results_dir", "run_name", "epochs", "max_steps", "log_every", "ckpt_every", "num_sample",
    "sample_every", "sample_cfg_scale", "num_workers", "dry_run", "compile", "keep_last",
    "gradient_checkpointing", "expert_backend", "pretraining_tp", "local_rank", "keep_every",
    "deepspeed", "deepspeed_config", "gpus", "gpus_per_node", "gpu_memory", "accum_iter",
    "train_batch_size", "defaults", "max_skipped_steps", "timeout", "deterministic",
}  # fmt: skip


def settings_of(args: argparse.Namespace) -> dict:
    """The flags that decide what a run computes."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in FREE}


def differences(stored: dict, args: argparse.Namespace, ignored: set[str] = frozenset()) -> list:
    """Names the settings of a command that are not those stored, as "--flag got A, expected B".

    A setting that is not stored is of a flag that came later: the run had its default.
    """
    wanted, defaults = settings_of(args), defaults_of(args)
    differing = []
    for name in sorted((stored.keys() | wanted.keys()) - FREE - ignored):
        got, expected = (side.get(name, defaults.get(name, False)) for side in (wanted, stored))
        if got != expected:
            differing.append(f"--{name.replace('_', '-')} got {got}, expected {expected}")
    return differing


def defaults_of(args: argparse.Namespace) -> dict:
    """What settings are that the command leaves out; those that no flag gives are false."""
    return {**dict.fromkeys(settings_of(args), False), **args.defaults, **MODEL_DEFAULTS}


def choose_run_folder(args: argparse.Namespace) -> Path:
    """Names the run folder of a command, without touching the disk.

    `--resume RUN` stays in that run. Otherwise the name is --run-name, or the model and a digest of
    the settings that are not the defaults. A run of the same settings under another digest, from
    before some flag was there, is found by what its folder says.
    """
    if args.resume and is_run_folder(Path(args.resume)):
        return Path(args.resume)
    results = Path(args.results_dir)
    if args.run_name:
        check_run_name(args.run_name)
        return results / args.run_name
    defaults = defaults_of(args)
    special = {name: v for name, v in settings_of(args).items() if v != defaults[name]}
    digest = hashlib.sha256(json.dumps(special).encode()).hexdigest()[:8]
    model = name_of_experts(args.model, args)
    prefix = plain_name(f"{model}{'-rf' if args.rf else ''}")
    named = results / f"{prefix}-{digest}"
    return named if os.path.isdir(named) else find_run(results, prefix, args) or named


def check_run_name(name: str) -> None:
    is_plain = name not in (".", "..") and not re.search(r"[/\x00-\x1f]", name)
    if not is_plain or len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(
            f"--run-name: got {name[:300]!r}, expected a plain folder name of at most "
            f"{LONGEST_NAME} bytes"
        )


def find_run(results: Path, prefix: str, args: argparse.Namespace) -> Path | None:
    """Finds a run whose name begins with the prefix and a digest, and that has these settings."""
    found = []
    for folder in results.glob(f"{prefix}-????????") if os.path.isdir(results) else ():
        try:
            stored = read_settings(folder)
        except UserError:
            continue
        if not differences(stored, args):
            found.append((stored.get("accum_iter") != args.accum_iter, folder))
    return min(found)[1] if found else None


def plain_name(text: str) -> str:
    """Makes of any text the name of a file or folder that cannot lead out of the one it is in."""
    name = re.sub(r"[^\w.,+=@ -]", "-", text).lstrip(". ") or "unnamed"
    return name.encode()[:LONGEST_NAME].decode(errors="ignore")


def name_of_experts(model: str, config: argparse.Namespace | DiTConfig) -> str:
    """A model's name with its experts, such as DiT-S/2-8E2A, or DiT-S/2-dense."""
    experts = f"{config.num_experts}E{config.num_experts_per_tok}A"
    return f"{model}-{experts if config.num_experts else 'dense'}"


def is_run_folder(path: Path) -> bool:
    return os.path.isfile(path / SETTINGS_FILE)  # false too of a name that is too long


def is_step_folder(path: Path) -> bool:
    return (path / MODEL_FILE).is_file()


def read_settings(run: Path) -> dict:
    """Reads what a run was begun with; UserError when the file is not there or damaged."""
    path = run / SETTINGS_FILE
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        settings = error
    if not isinstance(settings, dict):
        reason = settings if isinstance(settings, Exception) else "not a JSON object"
        raise UserError(
            f"{path}: damaged ({reason}), expected the settings that the run was begun with; its "
            "checkpoints are not touched; remove the file to have it written anew by this command"
        )
    return settings


def check_settings(run: Path, args: argparse.Namespace) -> None:
    """Raises UserError when a run folder was begun with other settings than this command's."""
    if not is_run_folder(run):
        return
    ignored = {"resume"} if args.resume and Path(args.resume) == run else set()
    if differing := differences(read_settings(run), args, ignored):
        raise UserError(f"{run} was begun with other settings: {'; '.join(differing)}")


class RunLock:
    """Keeps other runs out of a run folder until this process ends, however it ends.

    It is a POSIX record lock (fcntl), which the kernel drops with the process, which data-loading
    processes do not inherit, and which NFS passes on to the other nodes. The process must not open
    the file again: closing it drops the lock.
    """

    def __init__(self, run: Path, dist: Distributed):
        self.run, self.dist, self.file = run, dist, None

    def acquire(self) -> None:
        """Locks the folder if it is there; all processes call it, the main one holds the lock.

        UserError, on all of them, that says which process has it.
        """
        refusal = None
        if self.dist.is_main and self.file is None and os.path.isdir(self.run):
            refusal = self.try_to_lock()
        if refusal := self.dist.broadcast(refusal):
            raise UserError(refusal)

    def try_to_lock(self) -> str | None:
        try:
            self.file = open(self.run / LOCK_FILE, "ab+", buffering=0)  # noqa: SIM115
        except OSError as error:
            return str(cannot_write(self.run, error))
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read(300).decode(errors="replace").strip() or "another process"
            return f"{self.run} is in use by {holder}; wait for it, stop it, or use --run-name"
        except OSError as error:
            say(f"WARNING: {self.run} cannot be locked ({error.strerror}): start no second run")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
        with suppress(OSError):  # a full disk; the lock holds all the same
            self.file.truncate(0)
            self.file.write(owner.encode())
        return None


def enter_run_folder(run: Path, args: argparse.Namespace, lock: RunLock) -> None:
    """Makes a run folder and writes its settings, once it is locked; all processes call it.

    UserError, on all of them, when it cannot be written, is another run's, or has by now been begun
    with other settings; on one that does not see it.
    """

    def on_main(action: Callable[[], None]) -> None:
        lock.dist.together(lambda: action() if lock.dist.is_main else None)

    try:
        on_main(lambda: (run / "checkpoints").mkdir(parents=True, exist_ok=True))
        lock.acquire()
        on_main(lambda: write_settings(run, args))
    except OSError as error:
        raise cannot_write(run, error) from None
    if not is_run_folder(run):
        raise UserError(
            f"--results-dir: {run} cannot be seen from rank {lock.dist.rank}, expected a folder "
            "that all nodes share"
        )
    check_settings(run, args)


def write_settings(run: Path, args: argparse.Namespace) -> None:
    if not is_run_folder(run):
        temporary = run / (SETTINGS_FILE + ".tmp")
        write_durably(temporary, json.dumps(settings_of(args), indent=1))
        temporary.replace(run / SETTINGS_FILE)


def cannot_write(run: Path, error: OSError) -> UserError:
    return UserError(f"--results-dir: cannot write to {run} ({error.strerror or error})")
