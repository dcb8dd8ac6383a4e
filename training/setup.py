"""A command made ready to train: what it asks for, where that starts, and what has to be opened.

spec = specify_run(given, own, DDPFlags, choose_engine, dist)
run = open_run(spec, choose_start(spec, dist), dist)
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from checkpoints import Record
from evaluation.heldout import BINS, latent_batches
from latents.autoencoder import Autoencoder, load_autoencoder, resolve_vae_path
from latents.cache import open_data
from latents.loading import BatchStream, split
from latents.sources import Batch, Source
from runtime.devices import DTYPES, be_deterministic
from runtime.errors import UserError, printable, reported_as
from runtime.processes import Distributed
from training.config import DataConfig, RunConfig, TrainConfig
from training.engine import Engine
from training.log import RunLog
from training.run_folder import RunLock, enter_run_folder, is_run_folder, read_flags
from training.schedule import rate_factor
from training.spec import RunSpec
from training.start import Start


@dataclass(kw_only=True)
class Run:
    """A run that is ready to start or to go on, alone in its folder."""

    config: TrainConfig
    settings: dict  # what decides the result, as settings.json has it
    engine: type[Engine]
    folder: Path
    dataset: Source
    start: Start
    stream: BatchStream  # from the first step that is left to the last
    vae: Autoencoder | None  # None: latents are cached and no samples drawn
    held_out: list[Batch]  # of --val-path or --val-share, with latents
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
            objective_options=config.objective.option_values(),
            image_size=data.image_size,
            vae_path=vae_path,
            vae_sha256=self.settings["vae_sha256"],
            latents_norm=self.dataset.norm.to_dict(),
            class_names=tuple(self.dataset.classes),
            flip=data.flip,
            initialized_from=self.start.origin,
            settings=self.settings,
            data_path=data.latents_path or data.data_path,
            micro_batch=self.stream.micro_batch,
            images=self.dataset.listing,
        )


def open_run(spec: RunSpec, start: Start, dist: Distributed) -> Run:
    """Opens the autoencoder, the held-out images, the run's folder and its log, in which the notes
    are; all processes call it together. Sets PyTorch's switches before latents are encoded.

    Raises UserError for what cannot be opened.
    """
    config, folder, dataset = spec.config, spec.folder, spec.dataset
    if config.run.deterministic:
        be_deterministic()
    if config.step.tf32:
        torch.set_float32_matmul_precision("high")
    trained, held_out_places = split(dataset, config.data.val_share)
    global_batch = spec.micro_batch * config.step.accum_iter * dist.world_size
    stream = BatchStream(
        len(trained), micro_batch=spec.micro_batch, accumulation=config.step.accum_iter,
        rank=dist.rank, world_size=dist.world_size, seed=config.run.global_seed,
        start_step=start.step, end_step=config.total_steps(len(trained), global_batch),
        flip=config.data.flip, places=trained,
    )  # fmt: skip
    vae = open_autoencoder(config, dataset, dist.device)
    held_out = open_held_out(config.data, dataset, held_out_places, vae)
    notes = [*spec.notes, *start.notes, *rate_notes(config, folder, stream)]
    if global_batch > len(trained):
        notes.append(
            f"note: a step takes {global_batch} images, but there are only {len(trained)}: each is "
            f"taken {global_batch / len(trained):.3g} times (--global-batch-size)"
        )
    lock = enter_run_folder(folder, spec.settings, config.given, dist)
    with reported_as(f"{folder}: got a log that cannot be written", OSError):
        log = dist.together(
            lambda: RunLog(folder, stream, spec.settings, config.run.wandb, is_main=dist.is_main)
        )
    for note in notes:
        log.text(printable(note))
    return Run(
        config=config, settings=spec.settings, engine=spec.engine, folder=folder, dataset=dataset,
        start=start, stream=stream, vae=vae, held_out=held_out, lock=lock, log=log,
    )  # fmt: skip


def rate_notes(config: TrainConfig, folder: Path, stream: BatchStream) -> list[str]:
    """A note where a run that had let its rate fall is longer now than its flags were: it jumps."""
    flags = read_flags(folder) if is_run_folder(folder) else config.given
    length = {name: flags.get(name, getattr(RunConfig, name)) for name in ("max_steps", "epochs")}
    before = replace(config, run=replace(config.run, **length))
    totals = before.total_steps(stream.num_images, stream.global_batch), stream.end_step
    done, lr = stream.start_step, config.step.lr
    fallen, now = (lr * rate_factor(config.step, done, total) for total in totals)
    if not done or now <= 1.01 * fallen:
        return []
    return [
        f"note: the rate fell to {fallen:.2g} by step {done}, as in a run of {totals[0]} steps; "
        f"for {totals[1]} it jumps to {now:.2g}"
    ]


def open_autoencoder(
    config: TrainConfig, dataset: Source, device: torch.device
) -> Autoencoder | None:
    """Loads --vae-path; None if latents are cached and no sample grids are to be decoded.

    Raises UserError when its weights are not those that the latents were made with.
    """
    path, wanted = config.data.vae_path, dataset.vae_sha256
    if wanted is not None:
        if not config.run.num_sample and path == dataset.vae_path:
            return None
        with reported_as(f"{dataset.vae_path} made the latents: say where it is now", UserError):
            got = load_autoencoder(path, "cpu", torch.float32).weights_sha256
        if got != wanted:
            raise UserError(
                f"--vae-path: got {path} with weights {got[:12]}, expected those that the latents "
                f"of {config.data.latents_path} were made with, {wanted[:12]} ({dataset.vae_path})"
            )
    return load_autoencoder(path, device, DTYPES[config.step.precision], dataset.norm)


def open_held_out(
    data: DataConfig, dataset: Source, held_out: np.ndarray, vae: Autoencoder | None
) -> list[Batch]:
    """The batches of --val-path or --val-share, the same in every run; else nothing.

    held_out: the places of --val-share's images in the dataset
    """
    if data.val_path is None and not data.val_share:
        return []
    images, flag = dataset, "--val-share"
    if data.val_path:
        images, flag = open_data(data.val_path, data.image_size, "--val-path"), "--val-path"
        images.norm = dataset.norm  # a cache has one of its own
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
