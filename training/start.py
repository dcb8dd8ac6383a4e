"""From a command to the training loop, or to a plan of it.

command, said = parse_training("train.py", __doc__)
code = run_command(command, said)      # train(command, said, dist), in the launcher's processes

`plan` and `train` have the same beginning: `begin` reads what a command begins with, and `fit`
fits the config to the data.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from checkpoints import Checkpoint, Record, step_folders
from latents.loading import BatchStream, split
from latents.sources import Source, size_notes
from options.parts import options_of
from options.settings import Settings
from runtime import __version__
from runtime.devices import be_deterministic
from runtime.errors import UserError, print_safely, printable, reported_as
from runtime.flags import naming_flags
from runtime.processes import (
    ALONE,
    Distributed,
    close_distributed,
    read_environment,
    setup_distributed,
)
from training import finetune, going_on, setup
from training.config import TrainConfig, training_flags
from training.engine import Engine, new_weights
from training.engines import engine_for
from training.log import RunLog, import_wandb, warns_if_lost
from training.loop import TrainingLoop
from training.plan import open_planned, print_plan
from training.run_folder import enter_run_folder, new_folder, wait_for_folder, write_config
from training.sections import DEEPSPEED, CommandFlags, DataConfig


def run_command(command: CommandFlags, said: Settings) -> int:
    """Calls `train` in all processes that the launcher started, or `plan` in one."""
    if command.dry_run:
        return plan(command, said) if read_environment().is_main else 0
    dist = setup_distributed(always_group=command.script == DEEPSPEED)
    code = train(command, said, dist)
    close_distributed()
    return code


@dataclass(kw_only=True)
class Beginning:
    """What a command begins with: the newest checkpoint of a run, the weights of --finetune, or
    neither."""

    base: TrainConfig  # the settings of the checkpoint or the weights, or the defaults
    data: DataConfig  # also with what the command says
    folder: Path | None  # of the run to go on in
    steps: list[Path]  # checkpoints to go on from, the newest first
    step_folder: Path | None = None  # the newest intact one
    before: Record | None = None  # its record
    weights: Checkpoint | None = None
    changes: list[str] = field(default_factory=list)  # lines on what differs from the checkpoint
    notes: list[str]  # lines on what else a user should know

    @property
    def record(self) -> Record | None:
        """The record of the checkpoint or weights."""
        return self.before or self.weights and self.weights.record

    @property
    def origin(self) -> str | None:
        """The first weights."""
        return self.before.initialized_from if self.before else self.weights and self.weights.origin


class Fitted(NamedTuple):
    """What follows from the beginning, the command and the data."""

    config: TrainConfig
    stream: BatchStream  # the remaining steps
    held_out: np.ndarray  # indices of held-out images in the data
    facts: dict[str, Any]  # for the record


def plan(command: CommandFlags, said: Settings) -> int:
    """Prints what a command would train, for --gpus or the launcher's processes (--dry-run)."""
    begun = begin(command, said, ALONE)
    like = begun.base if begun.record else None
    dataset = open_planned(begun.data, said, like, begun.notes, begun.before)
    world_size = command.gpus or read_environment().world_size
    config, stream, *_ = fit(begun, command, said, dataset, ALONE, world_size)
    print_plan(command, config, stream, begun.changes + begun.notes, begun.before)
    return 0


def train(command: CommandFlags, said: Settings, dist: Distributed) -> int:
    """Trains to the last step, from the newest checkpoint of a run, from the weights of --finetune,
    or from new weights.

    command, said: see `training.config.parse_training`
    Returns the exit code, see `TrainingLoop.run`.
    """
    begun = begin(command, said, dist)
    dataset = setup.open_dataset(begun.data, dist)
    config, stream, held_out, facts = fit(begun, command, said, dataset, dist, dist.world_size)
    before, notes = begun.before, begun.notes

    # The data and their autoencoder.
    if config.run.deterministic:
        be_deterministic()
    if config.step.tf32:
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = config.step.tf32  # of convolutions; PyTorch's default is True
    if config.run.wandb:
        dist.on_main(import_wandb)
    vae, record = setup.inputs_of(config, dataset, dist)
    facts = {"version": __version__, **facts, **record.facts}
    record = replace(record, initialized_from=begun.origin, facts=facts)
    record = dist.broadcast(record)  # paths differ between nodes; all write the same header
    if before:
        begun.changes += going_on.data_changes(before, record)
        notes += finetune.held_out_notes(begun.step_folder, before, record)
    elif begun.weights:
        notes += finetune.weights_notes(begun.weights, record)
    if before and stream.start_step >= stream.end_step:
        return going_on.nothing_to_do(begun.folder, stream, dist)
    batches = setup.held_out_batches(config, dataset, vae, record, held_out, notes)
    dataset.requested = setup.tensors_of(config)
    if before is None:
        notes += setup.length_notes(config, stream)
    if dist.is_main and not dataset.vae_path:
        notes += size_notes(dataset)

    # The run folder.
    folder = begun.folder or dist.from_main(partial(new_folder, command, config))
    lock = dist.on_main(partial(enter_run_folder, folder))
    was_there = begun.steps if begun.folder else []  # listed without a lock
    if dist.broadcast(step_folders(folder)) != was_there:
        raise UserError(
            f"{folder}: another process saved a checkpoint meanwhile; run the same command again"
        )
    wait_for_folder(folder, dist.rank)

    # The steps. Only when the engine has its weights does the folder change.
    engine = make_engine(begun, config, dataset, dist)
    if not dataset.vae_path:  # images
        dist.on_main(partial(write_sheet, dataset, folder, keep=begun.folder is not None))
    with reported_as(f"{folder}: cannot write the log", OSError):
        log = dist.run_on_all(
            lambda: RunLog(folder, stream, config.stored(), config.run.wandb, is_main=dist.is_main)
        )
    with log:
        dist.on_main(partial(write_config, folder, config, record))
        log.changes(stream.start_step, begun.changes)
        for note in notes:
            log.text(printable(f"note: {note}"))
        if before:
            log.text(f"resumed from {begun.step_folder}")
        code = TrainingLoop(
            config=config, folder=folder, record=record, dataset=dataset, vae=vae,
            held_out=batches, stream=stream, log=log, engine=engine,
        ).run()  # fmt: skip
    del lock  # ends the exclusion of other runs
    return code


def begin(command: CommandFlags, said: Settings, dist: Distributed) -> Beginning:
    """Finds and reads what a command begins with."""
    folder, steps = dist.from_main(partial(going_on.find_start, command))
    notes: list[str] = []
    found: dict[str, Any] = {}
    if steps:
        base, before, step_folder = going_on.open_run(steps, notes, dist)
        found = {"before": before, "step_folder": step_folder}
    elif command.finetune:
        weights = finetune.open_weights(command.finetune, said)
        base = TrainConfig.of_weights(weights.record, command.script)
        found = {"weights": weights}
    else:
        base = TrainConfig.default(command.script)
    with naming_flags(training_flags()):
        data = base.changed({n: v for n, v in said.items() if n in options_of(DataConfig)}).data
    return Beginning(base=base, data=data, folder=folder, steps=steps, notes=notes, **found)


def fit(
    begun: Beginning, command: CommandFlags, said: Settings, dataset: Source, dist: Distributed,
    world_size: int,
) -> Fitted:  # fmt: skip
    """Returns the config, which is the base, changed by the recipes and the command and by what
    follows from the data, and the steps of `world_size` processes; adds changes and notes."""
    before, base = begun.before, begun.base
    trained, held_out = split(dataset, begun.data.val_share)
    conditions = said.get("conditions", base.model.conditions)
    setup.read_words(dataset, trained, conditions, begun.record, begun.notes, dist)
    with naming_flags(training_flags()):
        config = base.fitted(said, dataset)
    setup.check_model(config)
    facts = {"began_with": going_on.began_with(command, before, begun.folder)}
    if before:
        begun.changes += going_on.changed_settings(before, base, config, command.script, dataset)
    elif begun.weights:
        begun.notes += finetune.check_source(config, begun.weights)
    facts |= engine_for(config.engine).check(config, world_size)
    processes = replace(dist, world_size=world_size)
    stream = setup.remaining_steps(config, trained, before.step if before else 0, processes)
    if before:
        going_on.check_end(config, before, stream)
    return Fitted(config, stream, held_out, facts)


def make_engine(
    begun: Beginning, config: TrainConfig, dataset: Source, dist: Distributed
) -> Engine:
    """Returns the engine, with the state of the checkpoint, or with weights."""
    start = () if begun.before else new_weights(config)
    if begun.weights is not None:
        adapted, more = finetune.start_weights(begun.weights, config, dataset)
        start = adapted.items()
        begun.notes += more
    begun.weights = None  # freed with this function's `start`: the engine holds the weights
    try:
        engine = engine_for(config.engine)(dist, config, start)
        if begun.before:
            engine.load_state(begun.step_folder)
    except Exception:
        for note in begun.notes if dist.is_main else ():  # the log does not have them yet
            print_safely(f"note: {note}")
        raise
    return engine


def write_sheet(images: Source, folder: Path, *, keep: bool) -> None:
    """Writes some of the images, as training reads them, to images.png, unless a run that goes on
    has it."""
    if not (path := folder / "images.png").exists() or not keep:
        from latents.image_grid import contact_sheet, write_png  # imports matplotlib: a second

        with warns_if_lost(path):
            write_png(contact_sheet(images), path)
