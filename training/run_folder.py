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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import Any, BinaryIO

import yaml

from checkpoints import MODEL_FILE, Record, read_record, step_folders
from checkpoints.record import settings_of
from latents.sources import images_name
from runtime import __version__
from runtime.errors import UserError, print_safely, reported_as
from runtime.files import open_run_file, open_untrusted, write_durably
from runtime.flags import Flags, FlagValues, layered, read_values, spelling, with_effect
from training.config import (
    DATA_FACTS,
    RunConfig,
    TrainConfig,
    dense_or_sparse,
    parse_yaml,
    training_flags,
)

CONFIG_FILE, LOCK_FILE = "config.yaml", "run.lock"
DATA = ("images", "vae_sha256", "normalisation")  # facts that some checkpoints do not record
NAMES = {  # how messages name facts, and settings that have no flag
    "images": "--data-path",
    "vae_sha256": "--vae-path: weights",
    "latents_norm_sha256": "--latents-path: mean and standard deviation per channel",
    "normalisation": "--vae-path: normalisation",
    "features_sha256": "--latents-path: the network of the features",
    "start": "the weights that the run started from",
    "input_size": "the latent size",
    "in_channels": "--vae-path: the number of latent channels",
    "script": "the script",
}


def named_run(user_flags: FlagValues, flags: Flags) -> tuple[FlagValues, Path | None, list[str]]:
    """Returns the flags, the folder that --resume or --run-name names, and notes for the user.

    For --resume RUN, the flags are the stored flags, overridden by flags of the command.
    """
    name, run = user_flags.get("run_name"), Path(user_flags.get("resume") or "")
    is_plain = name is None or re.fullmatch(r"(?!\.\.?$)[^/\x00-\x1f]+", name)
    if not is_plain or len(os.fsencode(name or "")) > 150:
        expected = "a plain folder name of at most 150 bytes"
        raise UserError(f"--run-name: got {name[:200]!r}, expected {expected}")
    # For a name that is too long, os.path.isfile returns False, and Path.is_file raises OSError.
    is_run = os.path.isfile(run / CONFIG_FILE)
    if not user_flags.get("resume") or not is_run and not step_folders(run):
        results = user_flags.get("results_dir", RunConfig.results_dir)
        return user_flags, name and Path(results, name), []
    named = Path(user_flags.get("results_dir", run.resolve().parent), name or run.resolve().name)
    if named.resolve() != run.resolve():
        other = f"--resume {run}/checkpoints/STEP --run-name NEW"
        raise UserError(
            f"--resume {run}: --run-name or --results-dir names {named}, expected the same folder; "
            f"to start a separate run: {other}"
        )
    now = {name: value for name, value in user_flags.items() if name != "resume"}
    stored, notes = read_settings(run, flags)
    return layered(dense_or_sparse(stored, now, flags), now, flags), run, notes


def default_folder(config: TrainConfig, user_flags: FlagValues, facts: dict[str, Any]) -> Path:
    """Returns the folder of a run without a name: model, objective if not Gaussian, digest."""
    flags = training_flags(type(config.engine))
    special = {
        name: value for name, value in sorted(user_flags.items())
        if flags[name].binds in (None, "resume", "branch") and value != flags[name].default
        and name not in DATA_FACTS
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps([special, facts], sort_keys=True).encode()).hexdigest()[:8]
    objective = "" if config.step.objective == "gaussian" else f"-{config.step.objective}"
    name = re.sub(r"[^\w.+-]", "-", f"{config.name}{objective}-{digest}")
    return Path(config.run.results_dir, name)


def is_step_folder(path: Path) -> bool:
    return os.path.isfile(path / MODEL_FILE)


def read_settings(run: Path, flags: Flags) -> tuple[FlagValues, list[str]]:
    """Returns the flags of a run, and a note on unknown settings.

    The flags come from config.yaml or, without this file, from the newest checkpoint. The fields of
    the model that the data determine are omitted, and so are flags without effect, which older
    versions stored. Raises UserError if the file is damaged.
    """
    path, record = run / CONFIG_FILE, newest_record(run)
    how = "delete the file, then repeat the command that started the run: it writes a new file"
    with reported_as(f"{path}: damaged; {how}", OSError, ValueError, UserError):
        if os.path.isfile(path):
            with open_untrusted(path) as file:
                settings, is_of_run = parse_yaml(file)
            if not is_of_run:
                raise ValueError("got no facts after the line ---")
        else:
            settings = settings_of(record.sections()) if record else {}
        known = {k: v for k, v in settings.items() if k in flags and k not in DATA_FACTS}
        return with_effect(read_values(known, flags), flags), unknown_settings(settings, flags, run)


def unknown_settings(settings: Mapping[str, Any], flags: Flags, source: Path) -> list[str]:
    """Returns a note on the settings that this version does not know, if there are any."""
    unknown = ", ".join(sorted(settings.keys() - flags.keys()))
    return [f"{source}: ignored unknown settings: {unknown}"] if unknown else []


def newest_record(run: Path) -> Record | None:
    """Returns the record of the newest readable checkpoint of a run; None if there is none."""
    for folder in step_folders(run):
        with suppress(UserError):
            return read_record(folder)
    return None


def stored_values(record: Record | None, flags: Flags) -> FlagValues:
    """Returns the settings and facts of a checkpoint; empty without a checkpoint."""
    if record is None:
        return {}
    settings = {k: v for k, v in settings_of(record.sections()).items() if k in flags}
    norm = record.norm and str(record.norm)
    data = {"images": record.images, "vae_sha256": record.vae_sha256, "normalisation": norm}
    return read_values(settings, flags) | record.facts | data


def differences(
    was: FlagValues, now: FlagValues, flags: Flags, binding: tuple[str, ...] = ("resume", "branch")
) -> list[str]:
    """Lists the settings and facts that have changed, as "NAME: was A, is B".

    A setting that did not exist when the run began has the default value. A setting is compared
    only if it has an effect on both sides, and the facts in DATA only if `was` has them.

    binding: values of `Option.binds`. This function compares only the settings and facts with one
        of these values. The fact "script" counts as "branch", every other fact as "resume".
    """
    defaults, found = {name: one.default for name, one in flags.items()}, []
    for name in dict.fromkeys([*now, *was]):
        then, value, one = was.get(name), now.get(name), flags.get(name)
        binds = one.binds if one else "branch" if name == "script" else None
        if (binds or "resume") not in binding or name in DATA and then is None:
            continue
        if one and any(one.is_idle(defaults | values) for values in (was, now)):
            continue
        if one and name not in was:
            then = one.default_beside(defaults | was)
        if name == "images" and then and value:
            then, value = images_name(then), images_name(value)
        then, value = json.loads(json.dumps([then, value]))
        if then != value:
            label = NAMES.get(name) or spelling(name)
            found.append(f"{label}: was {then!s:.300}, is {value!s:.300}")
    return found


def enter_run_folder(
    run: Path, config: TrainConfig, facts: dict[str, Any], is_finished: bool
) -> BinaryIO:
    """Creates and locks a run folder and writes config.yaml: settings and, after ---, the facts.

    Returns the lock, see `lock_folder`. Raises UserError if the folder cannot be written or is in
    use.
    """
    script = facts["script"]
    text = (
        f"# To resume the run: {script} --resume FOLDER, where FOLDER is the folder of this file.\n"
        f"# To start a new run with the same settings: {script} --config FILE, with this file.\n"
    )
    for section, settings in config.sections().items():
        text += f"{section}:\n"
        for name, value in settings.items():
            flow = None if isinstance(value, list | tuple) else False
            line = yaml.safe_dump({name: value}, default_flow_style=flow, width=1000)
            text += indent(line, "  ")
    facts = {"version": __version__, **facts}
    text += yaml.safe_dump(facts, sort_keys=False, explicit_start=True)  # after a line ---
    with reported_as(f"--results-dir: cannot write to {run}", OSError):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = lock_folder(run)
        # If the run is finished, this command trains no steps and keeps the config.yaml.
        if not (is_finished and os.path.isfile(run / CONFIG_FILE)):
            write_durably(run / CONFIG_FILE, text)
        for path in (run / "checkpoints").glob("*.tmp"):  # unfinished when a run crashed
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    return lock


def lock_folder(run: Path) -> BinaryIO:
    """Excludes other runs from a run folder until the returned file is closed or this process ends.

    The lock is a POSIX record lock (fcntl): the kernel releases the lock when the process ends,
    data-loading processes do not inherit the lock, and NFS enforces the lock on all nodes. The
    process must not open the file a second time, because closing the second descriptor releases the
    lock. Raises UserError, which names the other process, if the folder is in use. If the file
    system does not support locks, this function prints a warning and locks nothing.
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
