"""What a command opens before its first step: data, autoencoder, weights, run folder, log.

run = open_run(given, DDPEngine, dist)
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import Checkpoint, Record, read_checkpoint, read_record, step_folders
from checkpoints.adapting import ADAPTED, adapt
from checkpoints.manifest import find_fault
from checkpoints.weights import sampled_digest
from evaluation.heldout import BINS, latent_batches
from latents.autoencoder import (
    DEFAULT_VAE,
    load_autoencoder,
    resolve_vae_path,
    weights_digest,
)
from latents.cache import CachedLatents, open_data
from latents.loading import BatchStream
from latents.sources import Source, open_images, same_images
from latents.split import split
from models import DiT, DiTConfig
from runtime.devices import DTYPES
from runtime.errors import UserError, check_same, printable, reported_as
from runtime.flags import Given, spelling
from runtime.processes import Distributed
from training.config import DataConfig, DataFacts, RunConfig, TrainConfig, resolve
from training.engine import Engine
from training.freezing import freeze
from training.log import RunLog
from training.run_folder import (
    RunLock,
    check_settings,
    choose_run_folder,
    enter_run_folder,
    is_run_folder,
    is_step_folder,
    read_flags,
)
from training.schedule import jump_note

ChooseEngine = Callable[[TrainConfig], type[Engine]]


@dataclass
class Run:
    """A run that is ready to start or to go on: what it trains, on what, and from where."""

    config: TrainConfig
    settings: dict  # what decides the result, as settings.json has it
    engine: type[Engine]
    folder: Path
    lock: RunLock | None  # on the main process: keeps other runs out as long as it lives
    log: RunLog
    dataset: Source
    vae: nn.Module | None  # None: latents are cached and no samples drawn
    held_out: list[tuple[Tensor, Tensor]]  # latents and labels of --val-path or --val-share
    stream: BatchStream  # from the first step that is left to the last
    start: "Start"

    def record(self, step: int) -> Record:
        """What the checkpoint of a step says of itself."""
        config, data = self.config, self.config.data
        # Without an autoencoder it is that of the cache, whose folder need not be here.
        vae_path = self.dataset.vae_path if self.vae is None else resolve_vae_path(data.vae_path)
        return Record(
            config=config.model,
            step=step,
            model=config.preset,
            objective=config.step.objective,
            objective_options=config.objective.told(),
            image_size=data.image_size,
            vae_path=vae_path,
            vae_sha256=self.settings["vae_sha256"],
            class_names=tuple(self.dataset.classes),
            flip=data.flip,
            initialized_from=self.start.origin,
            settings=self.settings,
            data_path=data.latents_path or data.data_path,
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
    given: Given, engine_flags: type, choose_engine: ChooseEngine, dist: Distributed
) -> Run:
    """Opens what the flags name, down to the run's folder and log; all processes call it together.

    Raises UserError for flags, data, weights or folders that do not fit together.
    """
    given, resumed = resumed_run(given)
    config = resolve(given, engine_flags)
    own = resumed or named_run(config)
    source = open_weights(config, own)
    dataset, facts, vae_sha256 = open_inputs(config.data, dist)
    config = resolve(given, engine_flags, weights=source and source.record, data=facts)
    notes = check_weights(config, source) if source is not None else []
    engine = choose_engine(config)
    settings = {
        **config.settings(), **engine.check(config, dist), "images": dataset.listing,
        "vae_sha256": vae_sha256, "started_from": started_from(config, source),
    }  # fmt: skip
    folder = own or choose_run_folder(config, settings)
    check_settings(folder, config, settings)
    start = choose_start(config, folder, source, dataset.classes, dist)
    if resumed and not step_folders(folder):
        start.notes.append(f"{folder} has no checkpoint yet: it begins as its first command did")
    micro_batch = engine.micro_batch(config, dist.world_size)
    start.notes += compare_data(start, folder, settings, dataset, micro_batch)
    flags_before = read_flags(folder) if is_run_folder(folder) else config.given
    vae = open_autoencoder(config, dataset, dist.device)
    trained, places = split(dataset, config.data.val_share)
    held_out = open_held_out(config.data, dataset, places, vae)
    lock = enter_run_folder(folder, settings, config.given, dist)
    stream = make_stream(config, dist, trained, micro_batch, start.step)
    start.notes += rate_notes(config, flags_before, start.step, stream)
    with reported_as(f"{folder}: got a log that cannot be written", OSError):
        log = dist.together(lambda: RunLog(folder, stream, is_main=dist.is_main))
    for note in (*notes, *start.notes):
        log.text(printable(note))
    return Run(
        config=config, settings=settings, engine=engine, folder=folder, lock=lock, log=log,
        dataset=dataset, vae=vae, held_out=held_out, stream=stream, start=start,
    )  # fmt: skip


def resumed_run(given: Given) -> tuple[Given, Path | None]:
    """The run folder that --resume names, None for what else it may name.

    Its flags are then those of the command that began the run, under those of this one.
    """
    run = Path(given.get("resume") or "")
    if not given.get("resume") or not is_run_folder(run):
        return given, None
    stored = read_flags(run)
    merged = {**stored, **{name: value for name, value in given.items() if name != "resume"}}
    if "data_path" in given or "latents_path" in given:  # either stands for both
        for name in {"data_path", "latents_path"} - given.keys():
            merged.pop(name, None)
    return merged, run


def named_run(config: TrainConfig) -> Path | None:
    """The run that --run-name names, if it has begun."""
    if config.run.run_name is None:
        return None
    folder = choose_run_folder(config, {})
    return folder if is_run_folder(folder) else None


def open_weights(config: TrainConfig, own: Path | None) -> Checkpoint | None:
    """Reads what --finetune or --resume names, None without them.

    own: the folder of a run that has begun; it goes on from its own checkpoints if these weights
        are gone
    """
    path = config.run.finetune or config.run.resume
    if path is None:
        return None
    named = config.given.get("model")
    hints = {} if named is None else {"num_heads": config.model.num_heads}
    untold = ("num_heads", "num_experts_per_tok")
    hints |= {name: config.given[name] for name in untold if name in config.given}
    if config.given.get("objective") == "gaussian":  # a DiffMoE's file does not say
        hints["objective"] = "gaussian"
    if config.run.resume:
        hints |= {
            name: getattr(config.model, name) for name in ("num_heads", "num_experts_per_tok")
        }
    try:
        source = read_checkpoint(path, hints)
    except UserError:
        if own is None or not step_folders(own):
            raise
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


def open_inputs(data: DataConfig, dist: Distributed) -> tuple[Source, DataFacts, str]:
    """Opens --latents-path or --data-path: the source, what it says, the autoencoder's digest."""
    if data.latents_path is None and data.data_path is None:
        raise UserError(
            "--data-path: got nothing, expected a folder of class folders, or --latents-path"
        )
    dataset, facts = open_dataset(data)
    digest = dataset.vae_sha256
    if digest is None:
        digest = dist.broadcast(dist.on_main(lambda: autoencoder_digest(data.vae_path)))
    # Reading the sizes of many files takes a while: one process does.
    dataset.listing = dist.broadcast(dataset.listing if dist.is_main else None)
    return dataset, facts, digest


def open_dataset(data: DataConfig) -> tuple[Source, DataFacts]:
    """Opens the images or latents that flags name."""
    if data.latents_path is None:
        dataset: Source = open_images(data.data_path, data.image_size or 256)
    else:
        dataset = CachedLatents(data.latents_path)
    input_size, in_channels = dataset.geometry(data.vae_path or DEFAULT_VAE)
    facts = DataFacts(
        num_classes=len(dataset.classes), input_size=input_size, in_channels=in_channels,
        image_size=dataset.image_size, can_flip=dataset.can_flip,
        vae_path=data.vae_path or dataset.vae_path or DEFAULT_VAE,
    )  # fmt: skip
    return dataset, facts


def autoencoder_digest(path: str | None) -> str:
    return weights_digest(load_autoencoder(path or DEFAULT_VAE, "cpu", torch.float32))


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
    check_trained(resume, source.record, config)
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


def check_trained(resume: Path, record: Record, config: TrainConfig) -> None:
    """Raises UserError when a step folder's run trained otherwise than this command does.

    Its optimizer's state would be taken for that of others.
    """
    settings = config.settings()
    names = ("objective", "optimizer", "freeze", "train_router_only")
    got = {spelling(name): settings[name] for name in names}
    expected = {spelling(name): record.settings.get(name, settings[name]) for name in names}
    why = "its state is of another training (--finetune takes its weights only)"
    check_same(f"--resume {resume}: {why}", got, expected)


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


def open_autoencoder(
    config: TrainConfig, dataset: Source, device: torch.device
) -> nn.Module | None:
    """Loads --vae-path; None if latents are cached and no sample grids are to be decoded.

    Raises UserError when its weights are not those that the latents were made with.
    """
    path, wanted = config.data.vae_path, dataset.vae_sha256
    if wanted is not None:
        if not config.run.num_sample and path == dataset.vae_path:
            return None
        with reported_as(f"{dataset.vae_path} made the latents: say where it is now", UserError):
            got = autoencoder_digest(path)
        if got != wanted:
            raise UserError(
                f"--vae-path: got {path} with weights {got[:12]}, expected those that the latents "
                f"of {config.data.latents_path} were made with, {wanted[:12]} ({dataset.vae_path})"
            )
    return load_autoencoder(path, device, DTYPES[config.step.precision])


def open_held_out(
    data: DataConfig, dataset: Source, held_out: np.ndarray, vae: nn.Module | None
) -> list[tuple[Tensor, Tensor]]:
    """The latents and labels of --val-path or --val-share, the same in every run; else nothing.

    held_out: the places of --val-share's images in the dataset
    """
    if data.val_path is None and not data.val_share:
        return []
    images, flag = dataset, "--val-share"
    if data.val_path:
        images, flag = open_data(data.val_path, data.image_size), "--val-path"
        held_out = np.arange(len(images))
    if vae is None and images.vae_path is None:
        raise UserError(
            "--val-path: got images beside --latents-path without --num-sample, "
            "expected latents, since no autoencoder is loaded"
        )
    count = min(data.val_images, len(held_out))
    if count < 2 * BINS:
        raise UserError(f"{flag}: got {count} held-out images, expected at least {2 * BINS}")
    batches = latent_batches(
        images, vae, dataset.classes, num_images=count, batch_size=32, places=held_out
    )
    return list(batches)


def make_stream(
    config: TrainConfig, dist: Distributed, places: np.ndarray, micro_batch: int, start_step: int
) -> BatchStream:
    """The micro-batches of this process from a step to the last that the flags ask for.

    places: of the images to train on, in the dataset
    """
    accumulation = config.step.accum_iter
    global_batch = micro_batch * accumulation * dist.world_size
    return BatchStream(
        len(places),
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=dist.rank,
        world_size=dist.world_size,
        seed=config.run.global_seed,
        start_step=start_step,
        end_step=config.total_steps(len(places), global_batch),
        flip=config.data.flip,
        places=places,
    )


def rate_notes(
    config: TrainConfig, flags_before: Given, done: int, stream: BatchStream
) -> list[str]:
    """Notes on the rate of a run that has taken steps and is longer now than its flags were."""
    length = {k: flags_before.get(k, getattr(RunConfig, k)) for k in ("max_steps", "epochs")}
    before = replace(config, run=replace(config.run, **length))
    steps = before.total_steps(stream.num_images, stream.global_batch)
    note = jump_note(config.step, done, steps, stream.end_step)
    return [] if note is None else [note]
