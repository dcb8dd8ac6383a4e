"""From a command to the training loop: one function, read from top to bottom.

command, said = parse_training("train.py", __doc__)
code = run_command(command, said)      # train(command, said, dist), in the launcher's processes
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from checkpoints import step_folders
from latents.loading import split
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
from training.engine import new_weights
from training.engines import engine_for
from training.log import RunLog, import_wandb, warns_if_lost
from training.loop import TrainingLoop
from training.plan import open_planned, print_plan
from training.run_folder import enter_run_folder, new_folder, wait_for_folder, write_config
from training.sections import DEEPSPEED, CommandFlags, DataConfig


def run_command(command: CommandFlags, said: Settings) -> int:
    """Calls `train` in all processes that the launcher started, or prints the plan in one."""
    if command.dry_run:
        return train(command, said, ALONE) if read_environment().is_main else 0
    dist = setup_distributed(always_group=command.script == DEEPSPEED)
    code = train(command, said, dist)
    close_distributed()
    return code


def train(command: CommandFlags, said: Settings, dist: Distributed) -> int:
    """Trains to the last step, from the newest checkpoint of a run, from the weights of --finetune,
    or from new weights.

    command, said: see `training.config.parse_training`
    Returns the exit code, see `TrainingLoop.run`.
    """
    notes: list[str] = []
    # The config: that of a checkpoint, of weights or the default; over it the recipes and the
    # command; over these what follows from the data.
    folder, steps = dist.from_main(partial(going_on.find_start, command))
    before = step_folder = weights = None
    if steps:
        base, before, step_folder = going_on.open_run(steps, notes, dist)
    elif command.finetune:
        weights = finetune.open_weights(command.finetune, said)
        base = TrainConfig.of_weights(weights.record, command.script)
    else:
        base = TrainConfig.default(command.script)
    flags = training_flags()
    with naming_flags(flags):
        data = base.changed({n: v for n, v in said.items() if n in options_of(DataConfig)}).data
    if command.dry_run:
        dataset = open_planned(data, said, base if before or weights else None, notes, before)
    else:
        dataset = setup.open_dataset(data, dist)
    trained, held_out = split(dataset, data.val_share)
    begun = before or weights and weights.record
    conditions = said.get("conditions", base.model.conditions)
    setup.read_words(dataset, trained, conditions, begun, notes, dist)
    with naming_flags(flags):
        config = base.fitted(said, dataset)
    setup.check_model(config)
    origin, changes = going_on.began_with(command, before, folder), []
    if before:
        changes = going_on.changed_settings(before, base, config, command.script, dataset)
    elif weights:
        notes += finetune.check_source(config, weights)
    if command.dry_run:  # plan for these processes
        dist = replace(dist, world_size=command.gpus or read_environment().world_size)
    of_engine = engine_for(config.engine).check(config, dist.world_size)
    stream = setup.remaining_steps(config, trained, before.step if before else 0, dist)
    if before:
        going_on.check_end(config, before, stream)
    if command.dry_run:
        print_plan(command, config, stream, changes + notes, before)
        return 0

    # The data and their autoencoder.
    if config.run.deterministic:
        be_deterministic()
    if config.step.tf32:
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = config.step.tf32  # of convolutions; PyTorch's default is True
    if config.run.wandb:
        dist.on_main(import_wandb)
    vae, record = setup.inputs_of(config, dataset, dist)
    record = replace(
        record,
        initialized_from=before.initialized_from if before else weights and weights.origin,
        facts={"version": __version__, "began_with": origin, **of_engine, **record.facts},
    )  # fmt: skip
    record = dist.broadcast(record)  # paths differ between nodes; all write the same header
    if before:
        changes += going_on.data_changes(before, record)
        notes += finetune.held_out_notes(step_folder, before, record)
    elif weights:
        notes += finetune.weights_notes(weights, record)
    if before and stream.start_step >= stream.end_step:
        return going_on.nothing_to_do(folder, stream, dist)
    batches = setup.held_out_batches(config, dataset, vae, record, held_out, notes)
    dataset.requested = setup.tensors_of(config)
    if before is None:
        notes += setup.length_notes(config, stream)
    if dist.is_main and not dataset.vae_path:
        notes += size_notes(dataset)

    # The run folder.
    goes_on = folder is not None
    folder = folder or dist.from_main(partial(new_folder, command, config))
    lock = dist.on_main(partial(enter_run_folder, folder))
    if dist.broadcast(step_folders(folder)) != (steps if goes_on else []):  # listed without a lock
        raise UserError(
            f"{folder}: another process saved a checkpoint meanwhile; run the same command again"
        )
    wait_for_folder(folder, dist.rank)

    # The engine, with its state or with weights. Only then does the folder change.
    start = () if before else new_weights(config)
    if weights is not None:
        adapted, more = finetune.start_weights(weights, config, dataset)
        start, notes = adapted.items(), notes + more
    try:
        engine = engine_for(config.engine)(dist, config, start)
        start = adapted = weights = None  # the engine holds the weights; free this copy
        if before:
            engine.load_state(step_folder)
    except Exception:
        for note in notes if dist.is_main else ():  # the log does not have them yet
            print_safely(f"note: {note}")
        raise
    if not dataset.vae_path:  # images
        dist.on_main(partial(write_sheet, dataset, folder, keep=goes_on))
    with reported_as(f"{folder}: cannot write the log", OSError):
        log = dist.run_on_all(
            lambda: RunLog(folder, stream, config.stored(), config.run.wandb, is_main=dist.is_main)
        )

    # The steps.
    with log:
        dist.on_main(partial(write_config, folder, config, record))
        log.changes(stream.start_step, changes)
        for note in notes:
            log.text(printable(f"note: {note}"))
        if before:
            log.text(f"resumed from {step_folder}")
        code = TrainingLoop(
            config=config, folder=folder, record=record, dataset=dataset, vae=vae,
            held_out=batches, stream=stream, log=log, engine=engine,
        ).run()  # fmt: skip
    del lock  # ends the exclusion of other runs
    return code


def write_sheet(images: Source, folder: Path, *, keep: bool) -> None:
    """Writes some of the images, as training reads them, to images.png, unless a run that goes on
    has it."""
    if not (path := folder / "images.png").exists() or not keep:
        from latents.image_grid import contact_sheet, write_png  # imports matplotlib: a second

        with warns_if_lost(path):
            write_png(contact_sheet(images), path)
