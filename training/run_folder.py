"""Run folders, named after the settings, so that the same command finds the same run again.

    results/DiT-S-2-8E2A-1a2b3c4d/
        config.yaml                            all settings
        run.lock                               locked during training
        checkpoints/0050000/
        log.txt, log.jsonl, tensorboard/

Only one run trains in a folder at a time. The run never writes its files through links, but
`checkpoints` may be a link, for example to a larger disk.
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
from typing import Any, BinaryIO

import yaml

from checkpoints import MODEL_FILE, Record, read_record, step_folders
from options.parts import Option, Part, options_of
from options.settings import Flags, Layer, as_tuple, flat, flattened, unfolded
from runtime import __version__
from runtime.errors import UserError, print_safely, reported_as
from runtime.files import open_run_file, write_durably
from runtime.flags import read_values
from training.config import DATA_FACTS, TrainConfig, training_flags
from training.flags import RunConfig
from training.manifest import MANIFEST_FILE

CONFIG_FILE, LOCK_FILE = "config.yaml", "run.lock"


def is_run(path: Path) -> bool:
    """Returns whether a path is a run folder."""
    # For a name that is too long, os.path.isfile returns False, and Path.is_file raises OSError.
    return os.path.isfile(path / CONFIG_FILE) or bool(step_folders(path))


def named_folder(said: Layer, run: Path | None) -> Path | None:
    """Returns the run folder that the flags name; None for a run without a name.

    run: the run that --resume names, if any
    """
    name = said.get("run_name")
    is_plain = name is None or re.fullmatch(r"(?!\.\.?$)[^/\x00-\x1f]+", name)
    if not is_plain or len(os.fsencode(name or "")) > 150:
        expected = "a plain folder name of at most 150 bytes"
        raise UserError(f"--run-name: got {name[:200]!r}, expected {expected}")
    if run is None:
        return name and Path(said.get("results_dir", RunConfig.results_dir), name)
    resolved = run.resolve()
    named = Path(said.get("results_dir", resolved.parent), name or resolved.name)
    if named.resolve() != resolved:
        other = f"--resume {run}/checkpoints/STEP --run-name NEW"
        raise UserError(
            f"--resume {run}: --run-name or --results-dir names {named}, expected the same "
            f"folder; to start a separate run: {other}"
        )
    return run


def default_folder(config: TrainConfig, facts: dict[str, Any]) -> Path:
    """Returns the folder of a run without a name: model, objective if not Gaussian, digest.

    The digest is that of the facts and of the settings that decide the result and differ from
    their defaults, so that a new setting renames no run.
    """
    flags, parts = training_flags(type(config.engine)), config.by_section.values()
    defaults = flat(*(type(part)() for part in parts))
    for section in parts:  # the defaults of the options of other components
        for one in options_of(type(section)).values():
            chosen = as_tuple(getattr(section, one.name)) if one.table else ()
            if chosen:
                bare = (one.complete(Part(part.name)) for part in chosen)
                defaults = unfolded(one, tuple(bare)) | defaults
    special = {
        name: value for name, value in flat(*parts).items()
        if flags[name].change in ("state", "result") and name not in DATA_FACTS
        and value not in (None, defaults[name])
    }  # fmt: skip
    content = json.dumps([special, facts], sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    objective = config.step.objective.name
    objective = "" if objective == "gaussian" else f"-{objective}"
    name = re.sub(r"[^\w.+-]", "-", f"{config.name}{objective}-{digest}")
    return Path(config.run.results_dir, name)


def is_step_folder(path: Path) -> bool:
    """Returns whether a run saved this folder. Exported weights have no manifest, nor has a damaged
    step folder, which has a number as its name."""
    has_weights = os.path.isfile(path / MODEL_FILE)
    return os.path.isfile(path / MANIFEST_FILE) or has_weights and path.name.isdecimal()


def not_resumable(source: Path) -> UserError:
    """Describes the error for a --resume that names neither a run nor a checkpoint."""
    expected = "expected a run folder or RUN/checkpoints/STEP"
    if os.path.exists(source):
        weights = f"to start from weights: --finetune {source}"
        return UserError(f"--resume: got {source}, {expected}; {weights}")
    steps = [folder.name for folder in step_folders(source.parent.parent)]
    if source.parent.name == "checkpoints" and steps:
        expected = f"expected a checkpoint of the run: {', '.join(steps[:20])}"
    return UserError(f"--resume: {source} does not exist, {expected}")


def newest_record(steps: list[Path]) -> Record | None:
    """Returns the record of the first readable checkpoint; None if there is none."""
    for step in steps:
        with suppress(UserError):
            return read_record(step)
    return None


def known_options(choice: Option, value: Any) -> tuple[Any, list[str]]:
    """Returns stored components without the options that this version does not know."""
    unknown: list[str] = []
    kept = []
    for one in value if isinstance(value, list) else [value]:
        for name, options in one.items() if isinstance(one, dict) else [(one, {})]:
            has = options_of(choice.table[name]) if name in choice.table else options
            unknown += [f"{choice.name}: {name}: {key}" for key in options if key not in has]
            kept.append({name: {key: v for key, v in options.items() if key in has}})
    return kept, unknown


def stored_settings(record: Record, flags: Flags) -> tuple[Layer, list[str]]:
    """Returns the settings of a checkpoint, and a note on those that this version does not know."""
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in flattened(record.sections(), flags).items():
        if name not in flags:
            unknown.append(name)
            continue
        if flags[name].table:
            value, gone = known_options(flags[name].field, value)
            unknown += gone
        known[name] = value
    note = f"ignored unknown settings of the checkpoint: {', '.join(sorted(unknown))}"
    stored = {"model": record.model_name} | read_values(known, flags)
    return stored, [note] if unknown else []


def enter_run_folder(run: Path) -> BinaryIO:
    """Creates and locks a run folder; returns the lock, see `lock_folder`."""
    with reported_as(f"--results-dir: cannot write to {run}", OSError):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = lock_folder(run)
        for path in (run / "checkpoints").glob("*.tmp"):  # unfinished when a run crashed
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    return lock


class ConfigDumper(yaml.SafeDumper):
    """Writes each list in one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


def write_config(run: Path, config: TrainConfig, facts: dict[str, Any], is_finished: bool) -> None:
    """Writes config.yaml: settings and, after ---, the facts. That of a finished run stays."""
    if is_finished and os.path.isfile(run / CONFIG_FILE):
        return
    script = facts["script"]
    text = (
        f"# To resume the run: {script} --resume FOLDER, where FOLDER is the folder of this file.\n"
        f"# To start a new run with the same settings: {script} --config FILE, with this file\n"
        "# (and --finetune, if the run began from weights).\n"
    )
    documents = [config.sections(), {"version": __version__, **facts}]
    text += yaml.dump_all(documents, Dumper=ConfigDumper, sort_keys=False, width=10_000)
    with reported_as(f"--results-dir: cannot write to {run}", OSError):
        write_durably(run / CONFIG_FILE, text)


def lock_folder(run: Path) -> BinaryIO:
    """Excludes other runs from a run folder until the returned file is closed or this process ends.

    A POSIX record lock (fcntl): it ends with the process, data-loading processes do not inherit it,
    and NFS enforces it on all nodes. Do not open the file a second time: closing the second
    descriptor releases the lock. Without locks in the file system, prints a warning.
    """
    file = open_run_file(run / LOCK_FILE)
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
