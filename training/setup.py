"""A command made ready: first all that it decides, then what has to be opened for it.

spec = specify_run(given, DDPFlags, choose_engine, dist)      # touches no run folder
run = open_run(spec, dist)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from checkpoints import Record, step_folders
from latents.autoencoder import resolve_vae_path
from latents.loading import BatchStream, split
from latents.sources import Source
from runtime.errors import printable, reported_as
from runtime.flags import Given
from runtime.processes import Distributed
from training.config import RunConfig, TrainConfig, resolve
from training.engine import Engine
from training.inputs import open_autoencoder, open_held_out, open_inputs
from training.log import RunLog
from training.run_folder import (
    RunLock,
    check_settings,
    choose_run_folder,
    enter_run_folder,
    is_run_folder,
    read_flags,
)
from training.start import (
    Start,
    check_weights,
    choose_start,
    compare_data,
    open_weights,
    started_from,
)
from training.step import jump_note

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
