"""Where a run starts: its newest whole checkpoint, or given weights, or nothing."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from checkpoints.checkpoint import (
    Checkpoint,
    config_difference,
    read_checkpoint,
    read_record,
    step_folders,
)
from checkpoints.manifest import MANIFEST_FILE, find_fault
from checkpoints.record import Record
from checkpoints.weights import as_user_error, check_shapes, shapes_of
from diffusion import objective_of
from latents.cache import CachedLatents
from latents.loading import BatchStream
from latents.sources import ImageSource
from models import DiT, DiTConfig
from runtime.errors import UserError, printable
from runtime.processes import Distributed
from training import inputs
from training.finetune import adapt, note_objective, open_source, origin_of
from training.log import RunLog
from training.run import (
    RunLock,
    cannot_write,
    check_settings,
    choose_run_folder,
    enter_run_folder,
    is_step_folder,
    settings_of,
)
from training.saving import remove_leftovers


@dataclass
class Run:
    """A run that is ready to start or to go on: what it trains, on what, and from where."""

    folder: Path
    lock: RunLock  # keeps other runs out as long as this object lives
    log: RunLog
    config: DiTConfig
    dataset: ImageSource | CachedLatents
    vae: nn.Module | None  # None: latents are cached and no samples drawn
    stream: BatchStream  # from the first step that is left to the last
    state_folder: Path | None  # the checkpoint to go on from
    weights: Checkpoint | None  # else what to start from; None: weights that are drawn
    origin: dict | None  # what the run's first weights were, if they were given

    def record(self, args: argparse.Namespace, step: int) -> Record:
        """What the checkpoint of a step says of itself."""
        is_cached = isinstance(self.dataset, CachedLatents)
        return Record(
            config=self.config,
            step=step,
            model=args.model,
            objective=objective_of(args.rf),
            image_size=args.image_size,
            vae_path=args.vae_path,
            vae_sha256=self.dataset.settings.vae_sha256 if is_cached else None,
            class_names=tuple(self.dataset.classes),
            initialized_from=self.origin,
            settings=settings_of(args),
            micro_batch=self.stream.micro_batch,
            images=self.dataset.listing,
        )


def open_run(args: argparse.Namespace, dist: Distributed, micro_batch: int) -> Run:
    """Opens what the flags name, down to the run's folder and log; all processes call it together.

    micro_batch: images of one rank's micro-step
    Raises UserError for flags, data, weights or folders that do not fit together.
    """
    inputs.check_flags(args)
    source = open_source(args)
    dataset = inputs.open_dataset(args)
    geometry = inputs.geometry_of(dataset, args)
    config = inputs.model_config(args, len(dataset.classes), geometry, source)
    folder = choose_run_folder(args)
    lock = RunLock(folder, dist)
    lock.acquire()
    check_settings(folder, args)
    state_folder, weights, notes = find_start(
        args, folder, config, dist, source=source, class_names=dataset.classes
    )
    origin = origin_of(state_folder, weights)
    vae = inputs.open_autoencoder(args, dataset, dist.device)
    enter_run_folder(folder, args, lock)
    is_own = state_folder is not None and state_folder.parent.parent == folder
    if dist.broadcast(step_folders(folder) if dist.is_main else None) and not is_own:
        raise UserError(f"{folder} was begun by another start meanwhile: run the command again")
    start_step = 0
    if state_folder:
        stored = read_record(state_folder)
        start_step = stored.step
        notes += compare_data(stored, dataset, micro_batch, state_folder, folder)
    stream = make_stream(args, dist, len(dataset), micro_batch, start_step)
    if dist.is_main:
        remove_leftovers(folder)
    log = open_log(folder, dist, stream)
    for note in notes:
        log.text(printable(note))
    return Run(
        folder=folder, lock=lock, log=log, config=config, dataset=dataset, vae=vae, stream=stream,
        state_folder=state_folder, weights=weights, origin=origin,
    )  # fmt: skip


def find_start(
    args: argparse.Namespace,
    folder: Path,
    config: DiTConfig,
    dist: Distributed,
    *,
    source: Checkpoint | None,
    class_names: list[str],
) -> tuple[Path | None, Checkpoint | None, list[str]]:
    """Says where a run starts: a step folder with full state, or given weights, or neither.

    source: --finetune's weights, which are fitted to the config and the classes

    The run's own newest whole checkpoint goes first, so that a command with --resume or --finetune
    can be interrupted and run again like any other. Lines tell of checkpoints that were passed
    over, or what was changed in the weights. All processes call it. Raises UserError for weights of
    another model, and when no checkpoint of the run is whole.
    """
    newest, notes = newest_whole(folder, dist)
    if newest:
        stored = read_step_config(newest)
        if difference := config_difference(stored, config):
            raise UserError(
                f"{newest}: the data, the autoencoder or the flags now ask for another model: "
                f"{difference}"
            )
        return newest, None, notes
    if source is not None:
        weights, notes = adapt(source, config, class_names, args.global_seed)
        return None, weights, notes + note_objective(source, args.rf)
    if args.resume is None or Path(args.resume) == folder:
        return None, None, []
    return *open_resumed(args, config, dist), []


def open_resumed(
    args: argparse.Namespace, config: DiTConfig, dist: Distributed
) -> tuple[Path | None, Checkpoint | None]:
    """Opens what --resume names for a run to start from: a step folder, or else weights."""
    resume, weights = Path(args.resume), None
    if is_step_folder(resume):
        if fault := find_damage(resume, dist):
            raise UserError(f"--resume {resume}: {fault}")
        stored = read_step_config(resume)
        check_frozen(resume, args)
    else:
        hints = {"num_heads": config.num_heads, "num_experts_per_tok": config.num_experts_per_tok}
        weights = read_checkpoint(resume, hints)
        stored = weights.config
        with as_user_error(resume, "--resume: another model"), torch.device("meta"):
            check_shapes(shapes_of(weights.state_dict), shapes_of(DiT(**vars(stored)).state_dict()))
    stored = replace(stored, aux_loss_alpha=config.aux_loss_alpha)
    if difference := config_difference(stored, config):
        raise UserError(f"--resume {resume}: another model: {difference}")
    return (None, weights) if weights else (resume, None)


def check_frozen(resume: Path, args: argparse.Namespace) -> None:
    """Raises UserError when a step folder's run trained other parameters than this command does.

    The optimizer's state there says by place alone what it is of, and would be taken for another's.
    """
    before = read_record(resume).settings
    for name, default in (("freeze", []), ("train_router_only", False)):
        got, expected = getattr(args, name), before.get(name, default)
        if got != expected:
            raise UserError(
                f"--{name.replace('_', '-')}: got {got}, expected {expected} as {resume} was "
                "trained, to go on with its optimizer's state; --finetune takes its weights alone"
            )


def read_step_config(folder: Path) -> DiTConfig:
    """The config of a checkpoint that a run goes on from; UserError if it does not say its step."""
    record = read_record(folder)
    if record.step is None:
        raise UserError(f"{folder}: got no step in it, expected a checkpoint of a run")
    return record.config


def compare_data(
    stored: Record, dataset: ImageSource, micro_batch: int, state_folder: Path, folder: Path
) -> list[str]:
    """Compares what a checkpoint says of its data with this command's; returns notes on it.

    UserError when the run's own images are others now: their order would be another one.
    """
    notes = []
    before, now = stored.images or dataset.listing, dataset.listing
    if before != now:
        count = before.get("count")
        change = (
            f"got {now['count']} images, expected the {count} that {state_folder} was trained on"
            f"{'' if count != now['count'] else ' (their names differ)'}"
        )
        if state_folder.parent.parent == folder:
            raise UserError(
                f"--data-path: {change}: put them back, or go on with these images as another run: "
                f"--resume {state_folder} --run-name NEW"
            )
        notes.append(change.replace("expected", "not"))
    if stored.micro_batch not in (None, micro_batch):
        notes.append(
            f"micro-batches of {micro_batch} images, not {stored.micro_batch} as before: the "
            "run goes on, but draws another noise than the uninterrupted one would have drawn"
        )
    return notes


def newest_whole(run_folder: Path, dist: Distributed) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint of a run that is as it was written; all processes call it.

    Returns it, None if the run has none, and lines about those passed over. UserError when there
    are checkpoints and none is whole.
    """
    notes = []
    for folder in dist.broadcast(step_folders(run_folder) if dist.is_main else None):
        fault = find_damage(folder, dist)
        if fault is None:
            return folder, notes
        notes.append(f"passed over the checkpoint {folder}: {fault}")
    if notes:
        raise UserError(
            f"{run_folder}: got no whole checkpoint (nothing was changed): {'; '.join(notes)}; "
            "expected one: restore a file from a copy, or start a new run with another --run-name"
        )
    return None, notes


def find_damage(folder: Path, dist: Distributed) -> str | None:
    """Says which file of a step folder is bad and why, or None; all processes call it together."""

    def of_metadata() -> str | None:
        try:
            read_record(folder)
        except UserError as error:
            return str(error).removeprefix(f"{folder}/")
        missing = not (folder / MANIFEST_FILE).is_file()
        return f"{MANIFEST_FILE} is missing" if missing else None

    fault = find_fault(folder, dist)
    return fault or dist.broadcast(of_metadata() if dist.is_main else None)


def make_stream(
    args: argparse.Namespace, dist: Distributed, num_images: int, micro_batch: int, start_step: int
) -> BatchStream:
    """The micro-batches of this process from a step to the last that the flags ask for."""
    global_batch = micro_batch * args.accum_iter * dist.world_size
    return BatchStream(
        num_images,
        micro_batch=micro_batch,
        accumulation=args.accum_iter,
        rank=dist.rank,
        world_size=dist.world_size,
        seed=args.global_seed,
        start_step=start_step,
        end_step=inputs.total_steps(args, num_images, global_batch),
    )


def open_log(folder: Path, dist: Distributed, stream: BatchStream) -> RunLog:
    try:
        return dist.together(
            lambda: RunLog(
                folder,
                is_main=dist.is_main,
                start_step=stream.start_step,
                total_steps=stream.end_step,
            )
        )
    except OSError as error:
        raise cannot_write(folder, error) from None
