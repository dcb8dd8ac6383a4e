"""From a command to the training loop: one function, read from top to bottom.

    command, said = parse_training(DDPFlags, __doc__)
    code = train(command, said, DDPFlags, dist)
"""

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints import Record, read_record, step_folders
from latents.loading import split
from latents.sources import ImageSource, Source, size_notes
from models import DiTConfig
from options.parts import options_of
from options.settings import Settings, difference, differences, spelling, stored
from runtime.devices import be_deterministic
from runtime.errors import UserError, printable, reported_as
from runtime.flags import naming_flags
from runtime.processes import Distributed
from training.config import OF_EXPERTS, TrainConfig, fitted, training_flags
from training.engine import new_weights
from training.finetune import check_weights, open_weights, start_weights
from training.flags import CommandFlags, DataConfig
from training.log import RunLog
from training.loop import TrainingLoop
from training.manifest import find_fault
from training.plan import open_planned, planned_processes, print_plan
from training.run_folder import (
    CONFIG_FILE,
    enter_run_folder,
    find_start,
    is_step_folder,
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

# What a run cannot change, because it shapes the state: the model, except for these fields, and
FREE = ("expert_backend", "aux_loss_alpha")
SHAPES_STATE = ("objective", "optimizer", "freeze", "train_router_only")  # of components the name
SHARDING = ("shard_size", "reshard_after_forward", "expert_parallel", "copies_precision")


def train(command: CommandFlags, said: Settings, engine_flags: type, dist: Distributed) -> int:
    """Trains to the last step, from the newest checkpoint of --resume, from the weights of
    --finetune, or from new weights.

    command, said: see `training.config.parse_training`
    Returns the exit code, see `TrainingLoop.run`.
    """
    notes: list[str] = []
    flags = training_flags(engine_flags)
    # The config: that of a checkpoint, of weights or the default; then the recipes and the command;
    # then what follows from the data.
    folder, steps = find_start(command)
    steps = dist.broadcast(steps)
    step_folder = newest_intact(steps, notes, dist) if steps else None
    before = read_record(step_folder) if step_folder else None
    weights = None
    if before:  # the settings of the newest checkpoint hold, even if it is damaged
        base = TrainConfig.of_record(newest_record(steps) or before, engine_flags)
    elif command.finetune:
        weights = open_weights(command.finetune, said)
        base = TrainConfig.of_weights(weights.record, engine_flags)
    else:
        base = TrainConfig.default(engine_flags)
    with naming_flags(flags):
        data = base.changed({n: v for n, v in said.items() if n in options_of(DataConfig)}).data
        if command.dry_run:
            dataset = open_planned(data, said, base if before or weights else None, notes)
        else:
            dataset = open_dataset(data, dist)
        config = base.changed(fitted(base, said, dataset), shapes=dataset.shapes)
        refuse_idle_flags(command, said, config)
    check_model(config)
    notes += check_weights(config, weights) if weights else []
    world_size = planned_processes(command) if command.dry_run else dist.world_size
    facts = config.engine.engine_class().check(config, world_size)
    changes = check_changes(before, base, config, dataset) if before else []
    notes += kept_settings(config, said) if before else []
    trained, held_out = split(dataset, config.data.val_share)
    if command.dry_run:
        print_plan(command, config, trained, notes + changes, world_size)
        return 0

    # The data, their autoencoder, and the steps that are left.
    if config.run.deterministic:
        be_deterministic()
    if config.step.tf32:
        torch.set_float32_matmul_precision("high")
    found, vae = inputs_of(config, dataset, dist)
    facts |= {**found, "origin": origin_of(command, before if folder else None)}
    if before:
        changes += data_changes(before, facts, dataset)
    elif weights:
        notes += data_changes(weights.record, facts, dataset)
    flip = config.data.flip and dataset.can_flip
    stream = remaining_steps(config, trained, flip, before.step if before else 0, dist)
    if before and stream.start_step >= stream.end_step:
        at = f"step {stream.start_step} of {stream.end_step}"
        if dist.is_main:
            print(f"{folder or step_folder} is at {at}, nothing to do; --max-steps adds steps")
        return 0
    batches = None
    if config.data.val_path or config.data.val_share:
        batches = held_out_batches(config, dataset, vae, facts, held_out, notes)
    dataset.requested = tensors_of(config)
    origin = before.initialized_from if before else weights and weights.origin
    notes += length_notes(config, stream, is_pretrained=origin is not None)
    if dist.is_main and isinstance(dataset, ImageSource):
        notes += size_notes(dataset)

    # The run folder and its log.
    if not (goes_on := folder is not None):
        folder = dist.broadcast(dist.on_main(partial(new_folder, command, config)))
    lock = dist.on_main(partial(enter_run_folder, folder))
    if goes_on and dist.broadcast(step_folders(folder)) != steps:  # listed without the lock
        raise UserError(f"{folder}: another process saved a checkpoint meanwhile")
    dist.on_main(partial(write_config, folder, config, facts))
    if not os.path.isfile(folder / CONFIG_FILE):
        raise UserError(
            f"--results-dir: {folder} does not exist on rank {dist.rank}, expected a folder that "
            "all nodes share"
        )
    values = {name: v for part in config.by_section.values() for name, v in stored(part).items()}
    with reported_as(f"{folder}: cannot write the log", OSError):
        log = dist.run_on_all(
            lambda: RunLog(folder, stream, values, config.run.wandb, is_main=dist.is_main)
        )
    for note in notes:
        log.text(printable(f"note: {note}"))
    log.changes(stream.start_step, changes)

    # The engine, with its state or with weights.
    start = ()
    if weights is not None:
        start = start_weights(weights, config, dataset, log).items()
    elif before is None:
        start = new_weights(config)
    with log:
        engine = config.engine.engine_class()(dist, config, start)
        start, weights = (), None  # the engine holds the weights; free this copy
        if before:
            engine.load_state(step_folder)
            log.text(f"resumed from {step_folder}")
        loop = TrainingLoop(
            config=config, folder=folder, facts=facts, origin=origin, dataset=dataset, vae=vae,
            held_out=batches, stream=stream, log=log, engine=engine,
        )  # fmt: skip
        code = loop.run()
    del lock  # ends the exclusion of other runs
    return code


def origin_of(command: CommandFlags, before: Record | None) -> str | None:
    """Returns what the run began from: the words of --finetune or --resume, or None.

    before: record of the checkpoint from which the run goes on in its own folder, or None
    """
    resumed = command.resume if command.resume and is_step_folder(Path(command.resume)) else None
    said = command.finetune or resumed
    if before is None:
        return said
    began = before.facts.get("origin")
    if said not in (None, began):
        raise UserError(
            f"--run-name: {command.run_name} began with {began or 'new weights'} and has a "
            f"checkpoint, so it does not begin with {said}; for that, choose another name"
        )
    return began


def kept_settings(config: TrainConfig, said: Settings) -> list[str]:
    """Returns a line on the settings that a run keeps, without being said and not the defaults."""
    default, kept = TrainConfig.default(type(config.engine)), []
    for section in ("step", "run"):
        part, other = config.by_section[section], default.by_section[section]
        kept += [
            f"{spelling(name)} {in_words(getattr(part, name))}" for name in options_of(type(part))
            if name not in said and getattr(part, name) != getattr(other, name)
        ]  # fmt: skip
    return [f"kept from the run, not said now: {', '.join(kept)}"] if kept else []


def in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def newest_intact(steps: list[Path], notes: list[str], dist: Distributed) -> Path:
    """Returns the first intact checkpoint to go on from; notes the damaged ones before it."""
    faults = []
    for folder in steps:
        if (fault := find_fault(folder, dist)) is None:
            notes += faults
            return folder
        faults.append(f"skipped the checkpoint {folder}: {fault}")
    raise UserError(f"--resume: got no intact checkpoint: {'; '.join(faults)}")


def newest_record(steps: list[Path]) -> Record | None:
    """Returns the record of the first readable checkpoint."""
    for step in steps:
        with suppress(UserError):
            return read_record(step)
    return None


def check_changes(
    before: Record, was: TrainConfig, now: TrainConfig, dataset: Source
) -> list[str]:
    """Returns what the command changes, as "--lr: was 0.0001, is 5e-05"; refuses what shapes the
    state."""
    changes, refused = [], []
    for section, part in now.by_section.items():
        for name, line in differences(was.by_section[section], part):
            old, new = (getattr(c.by_section[section], name) for c in (was, now))
            is_renamed = getattr(old, "name", old) != getattr(new, "name", new)
            shapes = name not in FREE if section == "model" else name in SHAPES_STATE and is_renamed
            (refused if shapes else changes).append(line)
    names = before.class_names
    if len(names) > 1 and any(dataset.classes) and names != tuple(dataset.classes):
        refused.append(difference("classes", names[:5], tuple(dataset.classes[:5])))
    script = now.engine.engine_class().script
    if before.facts.get("script", script) != script:
        refused.append(f"the script: was {before.facts['script']}, is {script}")
    if refused:
        raise UserError(f"--resume: {'; '.join(refused)}; --finetune starts from the weights only")
    return changes


def data_changes(before: Record, facts: dict[str, Any], dataset: Source) -> list[str]:
    """Returns lines on the data that differ from those of a checkpoint."""
    lines = []
    for name in ("num_images", "vae_sha256", "features_sha256"):
        was, now = getattr(before, name, before.facts.get(name)), facts.get(name)
        if None not in (was, now) and was != now:
            lines.append(f"{name}: was {was!s:.12}, is {now!s:.12}")
    if before.norm and before.norm != dataset.norm:
        lines.append(f"normalisation of latents: was {before.norm}, is {dataset.norm}")
    return lines


def refuse_idle_flags(command: CommandFlags, said: Settings, config: TrainConfig) -> None:
    """Refuses the flags without effect that users meet."""
    for name in ("gpus", "gpu_memory"):
        if getattr(command, name) and not command.dry_run:
            raise ValueError(f"{name}: has no effect without --dry-run")
    for name in SHARDING:
        default = getattr(type(config.engine), name, None)
        if not getattr(config.engine, "shard", True) and said.get(name, default) != default:
            raise ValueError(f"{name}: has no effect without --shard")
    if not config.model.num_experts:
        for name in said.keys() & OF_EXPERTS:
            if said[name] != options_of(DiTConfig)[name].default:
                raise ValueError(f"{name}: given with a dense model, expected a model with experts")
