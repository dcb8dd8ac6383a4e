"""From a command to the training loop: one function, read from top to bottom.

command, said = parse_training("train.py", __doc__)
code = run_command(command, said, "train.py")      # train(..., dist), in the launcher's processes
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints import Record, read_record, step_folders
from checkpoints.checkpoint import averages_of
from checkpoints.weights import as_user_error
from latents.loading import split
from latents.sources import Source, images_name, same_images, size_notes
from models import MEANINGS, WITHOUT_EFFECT, DiTConfig
from options.parts import options_of
from options.settings import Settings, differences, spelling
from presets import PRESETS
from runtime import __version__
from runtime.devices import be_deterministic
from runtime.errors import UserError, printable, reported_as
from runtime.files import wait_for_file
from runtime.flags import naming_flags
from runtime.processes import (
    ALONE,
    Distributed,
    close_distributed,
    read_environment,
    setup_distributed,
)
from training.config import FITTED, TrainConfig, setting_names, training_flags
from training.engine import new_weights
from training.finetune import (
    check_source,
    latent_changes,
    open_weights,
    start_weights,
    weights_notes,
)
from training.flags import DEEPSPEED, CommandFlags, DataConfig
from training.log import RunLog, warns_if_lost
from training.loop import TrainingLoop
from training.manifest import find_fault
from training.plan import open_planned, planned_processes, print_plan
from training.run_folder import (
    CONFIG_FILE,
    branch_of,
    enter_run_folder,
    find_start,
    new_folder,
    write_config,
)
from training.setup import (
    check_model,
    held_out_batches,
    inputs_of,
    length_notes,
    open_dataset,
    remaining_steps,
    tensors_of,
)

# A run cannot change what shapes its state: the model, and these, of components only the name.
SHAPES_STATE = ("objective", "optimizer", "freeze", "train_router_only")


def run_command(command: CommandFlags, said: Settings, script: str) -> int:
    """Calls `train` in all processes that the launcher started, or prints the plan in one."""
    if command.dry_run:
        return train(command, said, script, ALONE) if read_environment().is_main else 0
    code = train(command, said, script, setup_distributed(always_group=script == DEEPSPEED))
    close_distributed()
    return code


def train(command: CommandFlags, said: Settings, script: str, dist: Distributed) -> int:
    """Trains to the last step, from the newest checkpoint of a run, from the weights of --finetune,
    or from new weights.

    command, said: see `training.config.parse_training`
    Returns the exit code, see `TrainingLoop.run`.
    """
    notes: list[str] = []
    # The config: that of a checkpoint, of weights or the default; over it the recipes and the
    # command; over these what follows from the data.
    folder, steps = dist.broadcast(dist.on_main(partial(find_start, command)))
    before = step_folder = weights = None
    flags = training_flags()
    if steps:  # the settings of the newest checkpoint hold, even if it is damaged
        newest = newest_record(steps)
        step_folder = newest_intact(steps, notes, dist)
        before = read_record(step_folder)
        with naming_flags(flags), as_user_error(step_folder, "cannot go on"):
            base = TrainConfig.of_record(newest or before)
    elif command.finetune:
        weights = open_weights(command.finetune, said)
        base = TrainConfig.of_weights(weights.record, script)
    else:
        base = TrainConfig.default(script)
    with naming_flags(flags):
        data = base.changed({n: v for n, v in said.items() if n in options_of(DataConfig)}).data
    if command.dry_run:
        dataset = open_planned(data, said, base if before or weights else None, notes)
    else:
        dataset = open_dataset(data, dist)
    with naming_flags(flags):
        config = base.fitted(said, dataset)
    check_model(config)
    changes: list[str] = []
    if before:
        check_origin(command, before, folder)
        changes = check_changes(before, base, config, script, dataset)
        changes += changed_state(base, config, step_folder)
        notes += kept_settings(before, config, said)
    elif weights:
        notes += check_source(config, weights)
    world_size = planned_processes(command) if command.dry_run else dist.world_size
    of_engine = config.engine.engine_class().check(config, world_size)
    trained, held_out = split(dataset, config.data.val_share)
    if command.dry_run:
        print_plan(command, config, trained, changes + notes, before, world_size)
        return 0

    # The data, their autoencoder, and the steps that are left.
    if config.run.deterministic:
        be_deterministic()
    if config.step.tf32:
        torch.set_float32_matmul_precision("high")
    of_data, vae = inputs_of(config, dataset, dist)
    facts = {"version": __version__, "began_with": began_with(command, before, folder)}
    facts |= {**of_engine, **of_data}
    if before:
        changes += data_changes(before, facts, dataset)
    elif weights:
        notes += weights_notes(weights, config, facts, dataset)
    stream = remaining_steps(config, trained, before.step if before else 0, dist)
    if before and stream.start_step >= stream.end_step:
        return nothing_to_do(folder, stream.start_step, stream.end_step, dist)
    batches = None
    if config.data.val_path or config.data.val_share:
        batches = held_out_batches(config, dataset, vae, facts, held_out, notes)
    dataset.requested = tensors_of(config)
    initialized_from = before.initialized_from if before else weights and weights.origin
    if before is None:
        notes += length_notes(config, stream)
    if dist.is_main and not dataset.vae_path:
        notes += size_notes(dataset)

    # The run folder and its log.
    goes_on = folder is not None
    if not goes_on:
        folder = dist.broadcast(dist.on_main(partial(new_folder, command, config)))
    lock = dist.on_main(partial(enter_run_folder, folder))
    if dist.broadcast(step_folders(folder)) != (steps if goes_on else []):  # listed without a lock
        raise UserError(
            f"{folder}: another process saved a checkpoint meanwhile; run the same command again"
        )
    dist.on_main(partial(write_config, folder, config, facts))
    if not wait_for_file(folder / CONFIG_FILE):
        raise UserError(
            f"--results-dir: {folder} does not exist on rank {dist.rank}, expected a folder that "
            "all nodes share"
        )
    if not dataset.vae_path:  # images
        dist.on_main(partial(write_sheet, dataset, folder, keep=goes_on))
    with reported_as(f"{folder}: cannot write the log", OSError):
        log = dist.run_on_all(
            lambda: RunLog(folder, stream, config.stored(), config.run.wandb, is_main=dist.is_main)
        )

    # The engine, with its state or with weights; then the steps.
    with log:
        log.changes(stream.start_step, changes)
        for note in notes:
            log.text(printable(f"note: {note}"))
        start = () if before else new_weights(config)
        if weights is not None:
            start = start_weights(weights, config, dataset, log).items()
        engine = config.engine.engine_class()(dist, config, start)
        start, weights = (), None  # the engine holds the weights; free this copy
        if before:
            engine.load_state(step_folder)
            log.text(f"resumed from {step_folder}")
        loop = TrainingLoop(
            config=config, folder=folder, facts=facts, initialized_from=initialized_from,
            dataset=dataset, vae=vae, held_out=batches, stream=stream, log=log, engine=engine,
        )  # fmt: skip
        code = loop.run()
    del lock  # ends the exclusion of other runs
    return code


def newest_intact(steps: list[Path], notes: list[str], dist: Distributed) -> Path:
    """Returns the first intact checkpoint to go on from; notes the damaged ones before it."""
    faults = []
    for folder in steps:
        if (fault := find_fault(folder, dist)) is None:
            notes += faults
            return folder
        faults.append(f"skipped the checkpoint {folder}: {fault}")
    raise UserError(
        f"got no intact checkpoint: {'; '.join(faults)}; expected one: restore the damaged files "
        "from a copy, or start a new run with another --run-name"
    )


def newest_record(steps: list[Path]) -> Record | None:
    """Returns the record of the first readable checkpoint; refuses that of an earlier version."""
    for step in steps:
        with suppress(UserError):
            record = read_record(step)
            break
    else:
        return None
    if "version" not in record.facts:
        raise UserError(
            f"{step} was saved by a version before 0.3, whose runs do not go on; start a new run "
            "from its weights (--finetune), or use that version"
        )
    return record


def began_with(command: CommandFlags, before: Record | None, folder: Path | None) -> str | None:
    """Returns what the run began with: the path or hub id of --finetune or --resume, or None."""
    if before and folder:
        return before.facts.get("began_with")
    word = command.finetune or command.resume
    return os.path.abspath(word) if word and os.path.exists(word) else word


def check_origin(command: CommandFlags, before: Record, folder: Path | None) -> None:
    """Refuses --finetune or a branch beside the name of a run that began from something else."""
    said, began = command.finetune or branch_of(command), before.facts.get("began_with")
    if folder and said and not same_path(said, began):
        raise UserError(
            f"--run-name: {folder} began with {began or 'new weights'} and has a checkpoint, so it "
            f"does not begin with {said}; expected another name for a new run"
        )


def same_path(one: str | Path, other: str | None) -> bool:
    """Compares a word of the command with what `began_with` returned."""
    return other is not None and (
        other in (str(one), os.path.abspath(one))
        or os.path.realpath(one) == os.path.realpath(other)
    )


def check_changes(
    before: Record, was: TrainConfig, now: TrainConfig, script: str, dataset: Source
) -> list[str]:
    """Returns what the command changes, as "--lr: was 0.0001, is 5e-05"; refuses what shapes the
    state."""
    changes, refused = [], []
    for section, config in now.by_section.items():
        for name, line in differences(was.by_section[section], config):
            if name == "vae_path":  # it may have moved; `latent_changes` compares the weights
                continue
            old, new = (getattr(c.by_section[section], name) for c in (was, now))
            is_other = getattr(old, "name", old) != getattr(new, "name", new)
            if section == "model" and is_same(was.model, now.model, name):
                continue
            if section == "model":
                shapes_state = name not in WITHOUT_EFFECT
            else:
                shapes_state = name in SHAPES_STATE and is_other
            (refused if shapes_state else changes).append(line)
    names, classes = before.class_names, tuple(dataset.classes)
    if any(classes) and len(names) > 1 and names != classes:
        refused.append(f"the class names ({names_difference(names, classes)})")
    if was.engine.script != script:
        refused.append(f"the script: was {was.engine.script}, is {script}")
    if refused:
        raise UserError(
            f"a run keeps what its state depends on: {'; '.join(refused)}; expected the same, or a "
            "new run, which --finetune starts from the weights of this one"
        )
    return changes


def names_difference(was: Sequence[str], now: Sequence[str]) -> str:
    """Returns "missing: A, B; new: C", or that only the order differs."""
    sides = {"missing": set(was) - set(now), "new": set(now) - set(was)}
    parts = [f"{side}: {', '.join(sorted(names)):.300}" for side, names in sides.items() if names]
    return "; ".join(parts) or "the same names in another order"


def is_same(was: DiTConfig, now: DiTConfig, name: str) -> bool:
    """Returns whether a field of two models means the same, as None and its default do."""
    meaning = MEANINGS.get(name, name)
    return getattr(was, meaning) == getattr(now, meaning)


def changed_state(was: TrainConfig, now: TrainConfig, step_folder: Path) -> list[str]:
    """Returns a line for each EMA and auxiliary loss that begins or ends."""
    pairs = (
        ("EMA", {*averages_of(step_folder)}, {ema.name for ema in now.ema}, "from these weights"),
        ("auxiliary loss", *({one.name for one in c.auxiliary} for c in (was, now)), "anew"),
    )
    lines = []
    for kind, before, after, how in pairs:
        lines += [f"{kind} {name} begins {how}" for name in sorted(after - before)]
        lines += [f"{kind} {name} ends" for name in sorted(before - after)]
    return lines


def kept_settings(before: Record, config: TrainConfig, said: Settings) -> list[str]:
    """Returns a line on the settings that are kept from the run, because neither the command nor
    the data say them, and one on those that this version does not know."""
    preset = PRESETS.get(config.preset, {})
    default = TrainConfig.default(config.engine.script).changed(preset).stored()
    kept = [
        f"{spelling(name)} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in config.stored().items()
        if name not in (*said, *FITTED) and value != default.get(name)
    ]
    unknown = before.settings.keys() - setting_names()
    notes = [f"kept from the run (not in this command): {', '.join(kept)}"] if kept else []
    if unknown:
        notes.append(f"ignored unknown settings of the checkpoint: {', '.join(sorted(unknown))}")
    return notes


def data_changes(before: Record, facts: Mapping[str, Any], dataset: Source) -> list[str]:
    """Returns lines on the images, their latents and the images of a step, where they differ from
    those of a checkpoint."""
    lines = latent_changes(before, facts, dataset)
    if before.images and not same_images(before.images, facts["images"]):
        was, now = images_name(before.images), images_name(facts["images"])
        lines.append(f"the images: was {was}, is {now}")
    labels = {"features_sha256": "the network of the features",
              "global_batch_size": "the images of a step"}  # fmt: skip
    for name, label in labels.items():
        was, now = before.facts.get(name), facts.get(name)
        if None not in (was, now) and was != now:
            lines.append(f"{label}: was {was!s:.12}, is {now!s:.12}")
    return lines


def write_sheet(images: Source, folder: Path, *, keep: bool) -> None:
    """Writes some of the images, as training reads them, to images.png, unless a run that goes on
    has it."""
    if not (path := folder / "images.png").exists() or not keep:
        from latents.image_grid import contact_sheet, write_png  # imports matplotlib: a second

        with warns_if_lost(path):
            write_png(contact_sheet(images), path)


def nothing_to_do(folder: Path | None, step: int, end: int, dist: Distributed) -> int:
    """Says that a run is finished; returns the exit code. A branch without steps is an error."""
    if folder is None:
        raise UserError(
            f"--max-steps: the branch would end at step {end}, expected a later step than that of "
            f"its checkpoint, {step}"
        )
    if dist.is_main:
        print(f"{folder} is finished: step {step} of {end}; a larger --max-steps adds steps")
    return 0
