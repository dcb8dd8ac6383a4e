"""A command made ready: first all that it decides, then what has to be opened for it.

spec = specify_run(given, DDPFlags, choose_engine, dist)      # touches no run folder
run = open_run(spec, dist)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import Record, step_folders
from evaluation.heldout import BINS, latent_batches
from latents.autoencoder import DEFAULT_VAE, load_autoencoder, resolve_vae_path, weights_digest
from latents.cache import CachedLatents, open_data
from latents.loading import BatchStream, split
from latents.sources import Source, open_images
from runtime.devices import DTYPES
from runtime.errors import UserError, printable, reported_as
from runtime.flags import Given
from runtime.processes import Distributed
from training.config import DataConfig, DataFacts, RunConfig, TrainConfig, resolve
from training.engine import Engine
from training.log import RunLog
from training.run_folder import (
    RunLock,
    check_settings,
    choose_run_folder,
    enter_run_folder,
    is_run_folder,
    read_flags,
)
from training.schedule import jump_note
from training.start import (
    Start,
    check_weights,
    choose_start,
    compare_data,
    open_weights,
    started_from,
)

ChooseEngine = Callable[[TrainConfig], type[Engine]]


@dataclass(kw_only=True)
class RunSpec:
    """What a command decides: what it trains, on what, in which folder and from where."""

    config: TrainConfig
    settings: dict  # what decides the result, as settings.json has it
    engine: type[Engine]
    folder: Path
    dataset: Source
    held_out_places: np.ndarray  # of --val-share's images in the dataset
    stream: BatchStream  # from the first step that is left to the last
    start: Start


@dataclass(kw_only=True)
class Run(RunSpec):
    """A run that is ready to start or to go on, alone in its folder."""

    vae: nn.Module | None  # None: latents are cached and no samples drawn
    held_out: list[tuple[Tensor, Tensor]]  # latents and labels of --val-path or --val-share
    lock: RunLock | None  # on the main process: keeps other runs out as long as it lives
    log: RunLog

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


def specify_run(
    given: Given, engine_flags: type, choose_engine: ChooseEngine, dist: Distributed
) -> RunSpec:
    """Finds what the flags ask for, and reads what it starts from; all processes call it together.

    Raises UserError for flags, data, weights or folders that do not fit together.
    """
    given, resumed = resumed_run(given)
    config = resolve(given, engine_flags)
    own = resumed
    if own is None and config.run.run_name is not None:  # it may have begun
        own = choose_run_folder(config, {})
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
    trained, held_out = split(dataset, config.data.val_share)
    accumulation = config.step.accum_iter
    global_batch = micro_batch * accumulation * dist.world_size
    stream = BatchStream(
        len(trained), micro_batch=micro_batch, accumulation=accumulation, rank=dist.rank,
        world_size=dist.world_size, seed=config.run.global_seed, start_step=start.step,
        end_step=config.total_steps(len(trained), global_batch), flip=config.data.flip,
        places=trained,
    )  # fmt: skip
    start.notes = [*notes, *start.notes, *rate_notes(config, folder, start.step, stream)]
    return RunSpec(
        config=config, settings=settings, engine=engine, folder=folder, dataset=dataset,
        held_out_places=held_out, stream=stream, start=start,
    )  # fmt: skip


def open_run(spec: RunSpec, dist: Distributed) -> Run:
    """Opens the autoencoder, the held-out images, the run's folder and its log, in which the notes
    are; all processes call it together.

    Raises UserError for what cannot be opened.
    """
    config, folder, dataset = spec.config, spec.folder, spec.dataset
    vae = open_autoencoder(config, dataset, dist.device)
    held_out = open_held_out(config.data, dataset, spec.held_out_places, vae)
    lock = enter_run_folder(folder, spec.settings, config.given, dist)
    with reported_as(f"{folder}: got a log that cannot be written", OSError):
        log = dist.together(
            lambda: RunLog(
                folder, spec.stream, spec.settings, config.run.wandb, is_main=dist.is_main
            )
        )
    for note in spec.start.notes:
        log.text(printable(note))
    return Run(**vars(spec), vae=vae, held_out=held_out, lock=lock, log=log)


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


def rate_notes(config: TrainConfig, folder: Path, done: int, stream: BatchStream) -> list[str]:
    """Notes on the rate of a run that has taken steps and is longer now than its flags were."""
    flags = read_flags(folder) if is_run_folder(folder) else config.given
    length = {name: flags.get(name, getattr(RunConfig, name)) for name in ("max_steps", "epochs")}
    before = replace(config, run=replace(config.run, **length))
    steps = before.total_steps(stream.num_images, stream.global_batch)
    note = jump_note(config.step, done, steps, stream.end_step)
    return [] if note is None else [note]


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
        images, flag = open_data(data.val_path, data.image_size, "--val-path"), "--val-path"
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
