"""Where a run starts from: its newest whole checkpoint, weights that the command names, or none.

start = choose_start(spec, dist)
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoints import Checkpoint, Record, read_record, step_folders
from checkpoints.adapting import adapt
from checkpoints.checkpoint import averages_of
from latents.sources import same_images
from models import DiT, DiTConfig
from runtime.errors import UserError, check_same
from runtime.flags import spelling
from runtime.processes import Distributed
from training.engine import freeze
from training.given_weights import check_model
from training.manifest import find_fault
from training.run_folder import check_settings, is_run_folder, is_step_folder
from training.spec import RunSpec


@dataclass
class Start:
    """Where a run starts from: a step folder with full state, or given weights, or neither."""

    state_folder: Path | None = None
    weights: Checkpoint | None = None
    record: Record | None = None  # what either says of itself
    origin: dict | None = None  # what the run's first weights were, if they were given
    notes: list[str] = field(default_factory=list)  # lines for the user

    @property
    def step(self) -> int:
        return self.record.step if self.state_folder else 0


def choose_start(spec: RunSpec, dist: Distributed) -> Start:
    """The newest whole checkpoint of the run, else what --finetune or --resume names, else none.

    All processes call it. Raises UserError where the folder or the checkpoint is of another run.
    """
    config, folder = spec.config, spec.folder
    check_settings(folder, config, spec.settings)
    if config.step.freezes:  # before there is a folder of a wrong pattern
        with torch.device("meta"):
            freeze(DiT(**vars(config.model)), config.step)
    start = newest_start(folder, config.model, dist)
    if start is None:
        start = first_start(spec, dist)
        if is_run_folder(folder):
            start.notes.append(f"{folder} has no checkpoint yet: it begins as if it were new")
    start.notes += compare_data(start, spec)
    return start


def first_start(spec: RunSpec, dist: Distributed) -> Start:
    """The start of a run that has no checkpoint."""
    config, weights = spec.config, spec.weights
    if weights is None:
        return Start()
    if config.run.finetune:
        seed = config.run.global_seed
        weights, notes = adapt(weights, config.model, spec.dataset.classes, seed)
        return Start(None, weights, weights.record, weights.origin, notes)
    resume = Path(config.run.resume)
    if not is_step_folder(resume):
        return Start(None, weights, weights.record, weights.origin)
    if fault := find_fault(resume, dist):
        raise UserError(f"--resume {resume}: {fault}")
    if missing := {ema.name for ema in config.emas[1:]} - averages_of(resume).keys():
        raise UserError(f"--ema: got {min(missing)}, expected those in {resume}")
    # The optimizer's state would be taken for that of another training.
    names = ("objective", "optimizer", "freeze", "train_router_only", "script")
    settings, stored = spec.settings, {**spec.settings, **weights.record.settings}
    why = "its state is of another training (--finetune takes its weights only)"
    got, expected = ({spelling(n): of[n] for n in names} for of in (settings, stored))
    check_same(f"--resume {resume}: {why}", got, expected)
    return Start(resume, None, weights.record, weights.record.initialized_from)


def newest_start(run_folder: Path, model: DiTConfig, dist: Distributed) -> Start | None:
    """The start from a run's newest checkpoint that is as it was written; None if it has none.

    All processes call it. Raises UserError when there are checkpoints and none is whole, or it is
    of another model.
    """
    notes = []
    for folder in dist.broadcast(step_folders(run_folder)):
        if fault := find_fault(folder, dist):
            notes.append(f"passed over the checkpoint {folder}: {fault}")
            continue
        record = read_record(folder)
        message = f"{folder}: the data, the autoencoder or the flags now ask for another model"
        check_model(message, model, record.config)
        return Start(folder, None, record, record.initialized_from, notes)
    if notes:
        raise UserError(
            f"{run_folder}: got no whole checkpoint: {'; '.join(notes)}; expected one: restore "
            "a file from a copy, or start a new run with another --run-name"
        )
    return None


def compare_data(start: Start, spec: RunSpec) -> list[str]:
    """Compares what a checkpoint says of its data with this command's; returns notes on it.

    Raises UserError when a run's own images are others now: their order would be another one.
    """
    stored, now, state_folder = start.record, spec.dataset.listing, start.state_folder
    notes: list[str] = []
    if stored is None:
        return notes
    if state_folder and stored.images and not same_images(stored.images, now):
        count = stored.images.get("count")
        change = (
            f"got {now['count']} images, expected the {count} that {state_folder} was trained on"
            f"{'' if count != now['count'] else ' (their names or sizes differ)'}"
        )
        if state_folder.parent.parent == spec.folder:
            raise UserError(
                f"--data-path: {change}: put them back, or go on with these images as another run: "
                f"--resume {state_folder} --run-name NEW"
            )
        notes.append(f"note: {change}")
    if state_folder and stored.micro_batch not in (None, spec.micro_batch):
        notes.append(
            f"note: micro-batches of {spec.micro_batch} images, {stored.micro_batch} before: the "
            "run goes on, but draws another noise than the uninterrupted one would have drawn"
        )
    share, wanted = stored.settings.get("val_share", 0.0), spec.settings["val_share"]
    if stored.images == now and share < wanted:
        notes.append(
            f"note: --val-share {wanted:g} holds out images that the weights were trained on "
            f"before, under --val-share {share:g}"
        )
    return notes
