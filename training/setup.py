"""Where a run starts: its newest whole checkpoint, or given weights, or nothing."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from checkpoints import Checkpoint, Record, read_checkpoint, read_record, step_folders
from checkpoints.adapting import adapt
from checkpoints.manifest import find_fault
from diffusion import objective_of
from latents.autoencoder import resolve_vae_path
from latents.loading import BatchStream
from latents.sources import Source, same_images
from latents.split import split
from models import DiTConfig
from runtime.errors import UserError, check_same, printable, reported_as
from runtime.processes import Distributed
from training import inputs
from training.config import DDPConfig, TrainConfig
from training.log import RunLog
from training.plan import refuse_if_too_large
from training.run_folder import (
    RunLock,
    check_settings,
    choose_run_folder,
    enter_run_folder,
    is_step_folder,
    resumed_run,
    settings_of,
)


@dataclass
class Run:
    """A run that is ready to start or to go on: what it trains, on what, and from where."""

    config: TrainConfig  # its gaps filled
    settings: dict  # what decides the result, as settings.json has it
    folder: Path
    lock: RunLock | None  # on the main process: keeps other runs out as long as it lives
    log: RunLog
    model_config: DiTConfig
    dataset: Source
    vae: nn.Module | None  # None: latents are cached and no samples drawn
    held_out: list[tuple[Tensor, Tensor]]  # latents and labels of --val-path or --val-share
    stream: BatchStream  # from the first step that is left to the last
    start: "Start"

    def record(self, step: int) -> Record:
        """What the checkpoint of a step says of itself."""
        vae_path = self.config.vae_path
        return Record(
            config=self.model_config,
            step=step,
            model=self.config.model,
            objective=objective_of(self.config.rf),
            image_size=self.config.image_size,
            # Without an autoencoder it is that of the cache, whose folder need not be here.
            vae_path=vae_path if self.vae is None else resolve_vae_path(vae_path),
            vae_sha256=self.dataset.vae_sha256,
            class_names=tuple(self.dataset.classes),
            flip=self.config.flip,
            initialized_from=self.start.origin,
            settings=self.settings,
            micro_batch=self.stream.micro_batch,
            images=self.dataset.listing,
        )


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


def open_run(
    config: TrainConfig, dist: Distributed, micro_batch: int, engine_settings: dict
) -> Run:
    """Opens what the flags name, down to the run's folder and log; all processes call it together.

    micro_batch: images of one rank's micro-step
    Raises UserError for flags, data, weights or folders that do not fit together.
    """
    config, resumed = resumed_run(config)
    config.check()
    config, source, dataset, model_config = inputs.open_inputs(config)
    if isinstance(config, DDPConfig):
        refuse_if_too_large(config, model_config, dist, micro_batch)
    settings = settings_of(config, engine_settings)
    folder = resumed or choose_run_folder(config, settings)
    check_settings(folder, config, settings)
    own = newest_start(folder, model_config, dist)
    if own is not None:
        start = own
    elif source is not None:
        weights, notes = adapt(source, model_config, dataset.classes, config.global_seed)
        start = Start(None, weights, weights.record, notes)
    elif config.resume:
        start = open_resumed(config, settings, model_config, dist)
    else:
        start = Start()
    if resumed and own is None:
        start.notes.append(f"{folder} has no checkpoint yet: it begins as its first command did")
    if start.record is not None:
        start.notes += compare_data(config, start, dataset, micro_batch, is_own=start is own)
    vae = inputs.open_autoencoder(config, dataset, dist.device)
    trained, places = split(dataset, config.val_share)
    held_out = inputs.open_held_out(config, dataset, places, vae)
    lock = enter_run_folder(folder, settings, dist)
    stream = make_stream(config, dist, trained, micro_batch, start.step)
    steps = {"start_step": stream.start_step, "total_steps": stream.end_step}
    with reported_as(f"{folder}: got a log that cannot be written", OSError):
        log = dist.together(lambda: RunLog(folder, is_main=dist.is_main, **steps))
    for note in start.notes:
        log.text(printable(note))
    return Run(
        config=config, settings=settings, folder=folder, lock=lock, log=log,
        model_config=model_config, dataset=dataset, vae=vae, held_out=held_out, stream=stream,
        start=start,
    )  # fmt: skip


def newest_start(run_folder: Path, model_config: DiTConfig, dist: Distributed) -> Start | None:
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
        check_model(message, model_config, record.config)
        return Start(folder, None, record, notes)
    if notes:
        raise UserError(
            f"{run_folder}: got no whole checkpoint: {'; '.join(notes)}; expected one: restore "
            "a file from a copy, or start a new run with another --run-name"
        )
    return None


def open_resumed(
    config: TrainConfig, settings: dict, model_config: DiTConfig, dist: Distributed
) -> Start:
    """The start from what --resume names: a step folder of another run, or else weights."""
    resume = Path(config.resume)
    if is_step_folder(resume):
        if fault := find_fault(resume, dist):
            raise UserError(f"--resume {resume}: {fault}")
        record = read_record(resume)
        check_trained(resume, record, settings)
        weights = None
    else:
        names = ("num_heads", "num_experts_per_tok")
        weights = read_checkpoint(resume, {name: getattr(model_config, name) for name in names})
        record = weights.record
    stored = replace(record.config, aux_loss_alpha=model_config.aux_loss_alpha)
    check_model(f"--resume {resume}: another model", model_config, stored)
    return Start(None if weights else resume, weights, record)


def check_model(message: str, got: DiTConfig, expected: DiTConfig) -> None:
    """Raises UserError unless both are one model, however its experts are computed."""
    got = replace(got, expert_backend=expected.expert_backend)
    check_same(message, vars(got), vars(expected))


def check_trained(resume: Path, record: Record, settings: dict) -> None:
    """Raises UserError when a step folder's run trained other parameters than this command does.

    The optimizer's state there says by place alone what it is of, and would be taken for another's.
    """
    names = {"--freeze": "freeze", "--train-router-only": "train_router_only"}
    got = {flag: settings[name] for flag, name in names.items()}
    expected = {flag: record.settings.get(name, got[flag]) for flag, name in names.items()}
    why = "its optimizer's state is of other parameters (--finetune takes its weights alone)"
    check_same(f"--resume {resume}: {why}", got, expected)


def compare_data(
    config: TrainConfig, start: Start, dataset: Source, micro_batch: int, *, is_own: bool
) -> list[str]:
    """Compares what a checkpoint says of its data with this command's; returns notes on it.

    Raises UserError when a run's own images are others now: their order would be another one.
    """
    stored, notes, now, state_folder = start.record, [], dataset.listing, start.state_folder
    if state_folder and not same_images(stored.images or {}, now):
        count = stored.images.get("count")
        change = (
            f"got {now['count']} images, expected the {count} that {state_folder} was trained on"
            f"{'' if count != now['count'] else ' (their names or sizes differ)'}"
        )
        if is_own:
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
    share = stored.settings.get("val_share", 0.0)
    if stored.images and same_images(stored.images, now) and share < config.val_share:
        notes.append(
            f"note: --val-share {config.val_share:g} holds out images that the weights were "
            f"trained on before, under --val-share {share:g}"
        )
    return notes


def make_stream(
    config: TrainConfig, dist: Distributed, places: np.ndarray, micro_batch: int, start_step: int
) -> BatchStream:
    """The micro-batches of this process from a step to the last that the flags ask for.

    places: of the images to train on, in the dataset
    """
    global_batch = micro_batch * config.accum_iter * dist.world_size
    return BatchStream(
        len(places),
        micro_batch=micro_batch,
        accumulation=config.accum_iter,
        rank=dist.rank,
        world_size=dist.world_size,
        seed=config.global_seed,
        start_step=start_step,
        end_step=inputs.total_steps(config, len(places), global_batch),
        flip=config.flip,
        places=places,
    )
