"""Where a run starts from: its newest whole checkpoint, weights that the command names, or none.

source = open_weights(config, own_folder)          # what --finetune or --resume names
start = choose_start(config, folder, source, class_names, dist)
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from checkpoints import Checkpoint, Record, read_checkpoint, read_record, step_folders
from checkpoints.adapting import ADAPTED, adapt
from checkpoints.weights import sampled_digest
from latents.sources import Source, same_images
from models import DiT, DiTConfig
from runtime.errors import UserError, check_same
from runtime.flags import spelling
from runtime.processes import Distributed
from training.config import TrainConfig
from training.engine import freeze
from training.run_folder import is_step_folder
from training.saving import find_fault


@dataclass
class Start:
    """Where a run starts from: a step folder with full state, or given weights, or neither."""

    state_folder: Path | None = None
    weights: Checkpoint | None = None
    record: Record | None = None  # what either says of itself
    notes: list[str] = field(default_factory=list)  # lines for the user

    @property
    def step(self) -> int:
        return self.record.step if self.state_folder else 0

    @property
    def origin(self) -> dict | None:
        """What the run's first weights were, if they were given."""
        if self.weights is not None:
            return self.weights.origin
        return None if self.record is None else self.record.initialized_from


def open_weights(config: TrainConfig, own: Path | None) -> Checkpoint | None:
    """Reads what --finetune or --resume names, None without them.

    own: the folder of a run that has begun; it goes on from its own checkpoints if these weights
        are gone
    """
    path = config.run.finetune or config.run.resume
    if path is None:
        return None
    named = config.given.get("model")
    said = {"num_heads", *config.given} if named else config.given.keys()
    untold = ("num_heads", "num_experts_per_tok")  # by a published file
    hints = {n: getattr(config.model, n) for n in untold if n in said or config.run.resume}
    if config.given.get("objective") == "gaussian":  # a DiffMoE's file does not say
        hints["objective"] = "gaussian"
    try:
        source = read_checkpoint(path, hints)
    except UserError as error:
        if own is None or not step_folders(own):
            flag = "--finetune" if config.run.finetune else "--resume"
            raise UserError(f"{flag} {error}") from None
        source = read_checkpoint(own)
    width = source.config.hidden_size
    if named is not None and config.given.get("hidden_size", config.model.hidden_size) != width:
        raise UserError(
            f"--model: got {named}, expected {source.record.model_name}, which {path} is"
        )
    return source


def started_from(config: TrainConfig, source: Checkpoint | None) -> str | None:
    """Tells the weights that a run starts from, wherever they are; None without any."""
    if source is None:
        return None
    stored = source.record.settings.get("started_from")
    is_own = not Path(config.run.finetune or config.run.resume).exists() and source.source is None
    return stored if is_own else sampled_digest(source.path)


def check_weights(config: TrainConfig, source: Checkpoint) -> list[str]:
    """Checks that a run can start from these weights; returns notes on what the flags change.

    A flag that changes the function but no weight is obeyed. UserError, with the flags, for another
    model than the weights are.
    """
    path, before, model = source.path, source.config, config.model
    if config.run.resume:
        check_model(f"--resume {path}: another model", model, before)
        return []
    if model.in_channels != before.in_channels:
        raise UserError(
            f"--vae-path: got {model.in_channels} latent channels, expected {before.in_channels} "
            f"as in {path}"
        )
    is_upcycled = before.num_experts == 0 and model.num_experts > 0
    own = replace(before, input_size=model.input_size, num_classes=model.num_classes,
                  class_dropout_prob=model.class_dropout_prob)  # fmt: skip
    said = {k: v for k, v in model.flat().items() if k in config.given and own.flat().get(k) != v}
    others = {k: own.flat().get(k) for k in said}
    if not is_upcycled and weight_shapes(model) != weight_shapes(own):
        by_flag = lambda values: {spelling(k): v for k, v in values.items()}  # noqa: E731
        check_same(f"{path} is another model", by_flag(said), by_flag(others))
        raise UserError(f"--finetune: got {path}, whose weights are not those of this model")
    changes = {} if is_upcycled else {k: said[k] for k in said if k != "expert_backend"}
    return [
        f"note: {spelling(k)} {v}, which is {others[k]} in {path}: another function than it was"
        for k, v in changes.items()
    ]


def weight_shapes(config: DiTConfig) -> dict[str, torch.Size]:
    """The shapes of all weights but those that `adapt` makes anew."""
    with torch.device("meta"):
        state_dict = DiT(**vars(config)).state_dict()
    return {name: value.shape for name, value in state_dict.items() if name not in ADAPTED}


def check_model(message: str, got: DiTConfig, expected: DiTConfig) -> None:
    """Raises UserError unless both are one model, however experts are computed or balanced."""
    expected = replace(expected, expert_backend=got.expert_backend,
                       aux_loss_alpha=got.aux_loss_alpha)  # fmt: skip
    check_same(message, got.flat(), expected.flat())


def choose_start(
    config: TrainConfig, folder: Path, source: Checkpoint | None, class_names: list[str],
    dist: Distributed,
) -> Start:  # fmt: skip
    """The newest whole checkpoint of the run, else what --finetune or --resume names, else none."""
    if config.step.freezes:  # before there is a folder of a wrong pattern
        with torch.device("meta"):
            freeze(DiT(**vars(config.model)), config.step)
    own = newest_start(folder, config.model, dist)
    if own is not None or source is None:
        return own or Start()
    if config.run.finetune:
        weights, notes = adapt(source, config.model, class_names, config.run.global_seed)
        return Start(None, weights, weights.record, notes)
    resume = Path(config.run.resume)
    if not is_step_folder(resume):
        return Start(None, source, source.record)
    if fault := find_fault(resume, dist):
        raise UserError(f"--resume {resume}: {fault}")
    # The optimizer's state would be taken for that of another training.
    settings, names = config.settings(), ("objective", "optimizer", "freeze", "train_router_only")
    stored = {**settings, **source.record.settings}
    why = "its state is of another training (--finetune takes its weights only)"
    got, expected = ({spelling(n): of[n] for n in names} for of in (settings, stored))
    check_same(f"--resume {resume}: {why}", got, expected)
    return Start(resume, None, source.record)


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
        return Start(folder, None, record, notes)
    if notes:
        raise UserError(
            f"{run_folder}: got no whole checkpoint: {'; '.join(notes)}; expected one: restore "
            "a file from a copy, or start a new run with another --run-name"
        )
    return None


def compare_data(
    start: Start, folder: Path, settings: dict, dataset: Source, micro_batch: int
) -> list[str]:
    """Compares what a checkpoint says of its data with this command's; returns notes on it.

    Raises UserError when a run's own images are others now: their order would be another one.
    """
    stored, notes, now, state_folder = start.record, [], dataset.listing, start.state_folder
    if stored is None:
        return []
    if state_folder and stored.images and not same_images(stored.images, now):
        count = stored.images.get("count")
        change = (
            f"got {now['count']} images, expected the {count} that {state_folder} was trained on"
            f"{'' if count != now['count'] else ' (their names or sizes differ)'}"
        )
        if state_folder.parent.parent == folder:
            raise UserError(
                f"--data-path: {change}: put them back, or go on with these images as another run: "
                f"--resume {state_folder} --run-name NEW"
            )
        notes.append(f"note: {change}")
    if state_folder and stored.micro_batch not in (None, micro_batch):
        notes.append(
            f"note: micro-batches of {micro_batch} images, not {stored.micro_batch} as before: the "
            "run goes on, but draws another noise than the uninterrupted one would have drawn"
        )
    share, wanted = stored.settings.get("val_share", 0.0), settings["val_share"]
    if stored.images == now and share < wanted:
        notes.append(
            f"note: --val-share {wanted:g} holds out images that the weights were trained on "
            f"before, under --val-share {share:g}"
        )
    return notes
