"""Where a run starts: its newest whole checkpoint, or given weights, or nothing."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from models import DiT, DiTConfig
from training.checkpoint import (
    Checkpoint,
    blame,
    config_difference,
    read_checkpoint,
    read_config,
    read_info,
    step_folders,
)
from training.data import ImageSource
from training.distributed import Distributed
from training.errors import UserError
from training.manifest import MANIFEST_FILE, find_fault
from training.run import is_step_folder
from training.stored_config import check_shapes, shapes_of


def find_start(
    folder: Path, args: argparse.Namespace, config: DiTConfig, dist: Distributed
) -> tuple[Path | None, Checkpoint | None, list[str]]:
    """Says where a run starts: a step folder with full state, or given weights, or neither.

    The run's own newest whole checkpoint goes first, so that a command with --resume can be
    interrupted and run again like any other; lines tell of those that were passed over. All
    processes call it. Raises UserError for weights of another model, and when no checkpoint of the
    run is whole.
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
    if args.resume is None or Path(args.resume) == folder:  # --finetune: see `train`
        return None, None, notes
    resume, weights = Path(args.resume), None
    if is_step_folder(resume):
        if fault := find_damage(resume, dist):
            raise UserError(f"--resume {resume}: {fault}")
        stored = read_step_config(resume)
    else:
        hints = {"num_heads": config.num_heads, "num_experts_per_tok": config.num_experts_per_tok}
        weights = read_checkpoint(resume, hints)
        stored = weights.config
        with blame(resume, "--resume: another model"), torch.device("meta"):
            check_shapes(shapes_of(weights.state_dict), shapes_of(DiT(**vars(stored)).state_dict()))
    stored = replace(stored, aux_loss_alpha=config.aux_loss_alpha)
    if difference := config_difference(stored, config):
        raise UserError(f"--resume {resume}: another model: {difference}")
    return (None, weights, notes) if weights else (resume, None, notes)


def read_step_config(folder: Path) -> DiTConfig:
    """The config of a checkpoint that a run goes on from; UserError if it does not say its step."""
    config, info = read_config(folder)
    if "step" not in info:
        raise UserError(f"{folder}: got no step in it, expected a checkpoint of a run")
    return config


def compare_data(
    stored: dict, dataset: ImageSource, micro_batch: int, state_folder: Path, folder: Path
) -> list[str]:
    """Compares what a checkpoint says of its data with this command's; returns notes on it.

    UserError when the run's own images are others now: their order would be another one.
    """
    notes = []
    before, now = stored.get("images", dataset.listing), dataset.listing
    if before != now:
        count = before.get("count") if isinstance(before, dict) else "unknown number"
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
    if stored.get("micro_batch", micro_batch) != micro_batch:
        notes.append(
            f"micro-batches of {micro_batch} images, not {stored['micro_batch']} as before: the "
            "run goes on, but draws another noise than the uninterrupted one would have drawn"
        )
    return notes


def newest_whole(run: Path, dist: Distributed) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint of a run that is as it was written; all processes call it.

    Returns it, None if the run has none, and lines about those passed over and about one that has
    no checksums. UserError when there are checkpoints and none is whole.
    """
    notes = []
    for folder in dist.broadcast(step_folders(run) if dist.is_main else None):
        fault = find_damage(folder, dist)
        if fault is None:
            if dist.broadcast(dist.is_main and not (folder / MANIFEST_FILE).is_file()):
                notes.append(f"{folder} has no checksums, being of an older version: not verified")
            return folder, notes
        notes.append(f"passed over the checkpoint {folder}: {fault}")
    if notes:
        raise UserError(
            f"{run}: got no whole checkpoint (nothing was changed): {'; '.join(notes)}; expected "
            f"one: restore a file from a copy, or start a new run with another --run-name"
        )
    return None, notes


def find_damage(folder: Path, dist: Distributed) -> str | None:
    """Says which file of a step folder is bad and why, or None; all processes call it together."""

    def of_metadata() -> str | None:
        try:
            missing = "manifest" in read_info(folder) and not (folder / MANIFEST_FILE).is_file()
        except UserError as error:
            return str(error).removeprefix(f"{folder}/")
        return f"{MANIFEST_FILE} is missing" if missing else None

    fault = find_fault(folder, dist)
    return fault or dist.broadcast(of_metadata() if dist.is_main else None)
