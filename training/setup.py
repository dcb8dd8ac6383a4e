"""The preparation of a run: specification, start, batch stream, autoencoder, held-out data, log.

run = prepare_run(user_flags, DDPFlags, choose_engine, dist)
"""

import os
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from checkpoints import step_folders
from checkpoints.record import settings_of
from conditions import split_condition
from evaluation.heldout import BINS, latent_batches
from latents.autoencoder import DEFAULT_VAE
from latents.cache import CachedLatents, check_networks, open_data
from latents.loading import BatchStream, split
from latents.sources import Batch, ImageSource, Source, open_images, size_notes
from runtime.devices import be_deterministic
from runtime.errors import UserError, pluralize, printable, reported_as
from runtime.flags import FlagValues
from runtime.processes import Distributed
from training.config import DataConfig, DataFacts, RunConfig
from training.log import RunLog
from training.run_folder import CONFIG_FILE, enter_run_folder
from training.schedule import rate_factor
from training.start import ChooseEngine, Run, choose_start, specify_run


def prepare_run(
    user_flags: FlagValues, engine_flags: type, choose_engine: ChooseEngine, dist: Distributed
) -> Run:
    """Prepares the run that the flags specify; all processes call it together.

    The run folder is created after the checks of flags, data and weights. PyTorch's global options
    are set before latents are encoded. Raises UserError for wrong flags, data or weights, and if
    the run folder cannot be used.
    """
    run = specify_run(user_flags, engine_flags, choose_engine, partial(open_dataset, dist=dist))
    choose_start(run, dist)
    config, dataset = run.config, run.dataset
    if config.run.deterministic:
        be_deterministic()
    if config.step.tf32:
        torch.set_float32_matmul_precision("high")
    micro_batch = run.engine.micro_batch(config, dist.world_size)
    trained, held_out_indices = split(dataset, config.data.val_share)
    global_batch = micro_batch * config.step.accum_iter * dist.world_size
    run.stream = BatchStream(
        len(trained), micro_batch=micro_batch, accumulation=config.step.accum_iter,
        rank=dist.rank, world_size=dist.world_size, seed=config.run.global_seed,
        start_step=run.start.step if run.state_folder else 0,
        end_step=config.total_steps(len(trained), global_batch),
        flip=config.data.flip, indices=trained,
    )  # fmt: skip
    dataset.requested = [split_condition(word)[0] for word in config.model.conditions]
    if config.data.val_path or config.data.val_share:
        run.held_out = open_held_out(run, held_out_indices)
    dataset.requested += [name for one in config.auxiliary for name in one.needs]
    for one in config.auxiliary:
        if one.compares_images and micro_batch < 2:
            raise UserError(
                f"--auxiliary: got {one.name} with micro-batches of one image, expected at least "
                "two images (larger batches, or fewer --accum-iter)"
            )
    run.notes += batch_notes(global_batch, len(trained))
    if dist.is_main and isinstance(dataset, ImageSource):  # reads images
        run.notes += size_notes(dataset)
    if (warmup := config.step.warmup_steps) > (last := run.stream.end_step):
        run.notes.append(
            f"--warmup-steps {warmup} is more than the {pluralize(last, 'step')} of the run: "
            f"the learning rate reaches {config.step.lr * last / warmup:.2g}, not "
            f"{config.step.lr:.2g}"
        )
    is_finished = run.stream.start_step >= run.stream.end_step
    settings, folder = settings_of(config.sections()), run.folder
    run.lock = dist.on_main(partial(enter_run_folder, folder, config, run.facts, is_finished))
    # `run.found` was listed before this process had the lock.
    if dist.broadcast(step_folders(folder)) != run.found:
        raise UserError(
            f"{folder}: another process saved a checkpoint meanwhile; run the same command again"
        )
    if not os.path.isfile(folder / CONFIG_FILE):
        raise UserError(
            f"--results-dir: {folder} does not exist on rank {dist.rank}, expected a folder that "
            "all nodes share"
        )
    with reported_as(f"{folder}: cannot write the log", OSError):
        run.log = dist.run_on_all(
            lambda: RunLog(folder, run.stream, settings, config.run.wandb, is_main=dist.is_main)
        )
    for note in run.notes + (resume_notes(run) if run.state_folder else []):
        run.log.text(printable(f"note: {note}"))
    return run


def open_dataset(
    user_flags: FlagValues, dist: Distributed | None = None
) -> tuple[Source, DataFacts]:
    """Opens --latents-path or --data-path; returns the source and its facts.

    dist: if given, all processes call this function together, and only the main process lists the
        files of a local folder
    """
    vae_path = user_flags.get("vae_path")
    norm = user_flags.get("latents_norm", DataConfig.latents_norm)
    if user_flags.get("latents_path"):
        dataset: Source = CachedLatents(user_flags["latents_path"], norm=norm)
    elif norm == "data":
        raise UserError("--latents-norm data: has no effect without --latents-path")
    elif path := user_flags.get("data_path"):
        read = partial(open_images, path, user_flags.get("image_size", 256))
        is_local = dist and ":" not in path  # files, not a dataset on the hub
        dataset = dist.broadcast(dist.on_main(read)) if is_local else read()
    else:
        raise UserError("--data-path: images are required; pass this flag or --latents-path")
    input_size, in_channels = dataset.geometry(vae_path or DEFAULT_VAE)
    facts = DataFacts(
        num_classes=len(dataset.classes), input_size=input_size, in_channels=in_channels,
        image_size=dataset.image_size, can_flip=dataset.can_flip, shapes=dataset.shapes,
        vae_path=vae_path or dataset.vae_path or DEFAULT_VAE,
    )  # fmt: skip
    return dataset, facts


def resume_notes(run: Run) -> list[str]:
    """Returns notes on changed noise and on a jump of the learning rate in a resumed run.

    The learning rate jumps if an earlier command set a smaller number of steps and the learning
    rate has already decayed, following the schedule of the shorter run.
    """
    config, stream, notes, before = run.config, run.stream, [], run.start.micro_batch
    if before not in (None, stream.micro_batch):
        notes.append(
            f"micro-batches have {stream.micro_batch} images instead of {before}: the run "
            "continues, but the noise differs from the noise of an uninterrupted run"
        )
    defaults = {name: getattr(RunConfig, name) for name in ("max_steps", "epochs")}
    length = {name: run.was.get(name, value) for name, value in defaults.items() if run.was}
    shorter = replace(config, run=replace(config.run, **length))
    end, done = shorter.total_steps(stream.num_images, stream.global_batch), stream.start_step
    fallen, now = (
        config.step.lr * rate_factor(config.step, done, total) for total in (end, stream.end_step)
    )
    if now > 1.01 * fallen:
        notes.append(
            f"the learning rate fell to {fallen:.2g} by step {done}, as in a run of {end} "
            f"steps; in a run of {stream.end_step} steps, the learning rate jumps to {now:.2g}"
        )
    return notes


def open_held_out(run: Run, held_out: np.ndarray) -> list[Batch]:
    """Returns the batches of --val-path or --val-share, which are the same in every run.

    held_out: indices of the held-out images in the dataset
    """
    data, dataset, vae = run.config.data, run.dataset, run.vae
    images, flag = dataset, "--val-share"
    if data.val_path:
        flag = "--val-path"
        images = open_data(data.val_path, data.image_size, flag)
        check_networks(images, run.facts["vae_sha256"], run.facts.get("features_sha256"), flag)
        images.norm = dataset.norm  # instead of the norm stored in the cache of --val-path
        images.requested = dataset.requested
        held_out = np.arange(len(images))
    if vae is None and images.vae_path is None:
        raise UserError(
            "--val-path: got images, expected cached latents, because no autoencoder is loaded "
            "with --latents-path and --num-sample 0"
        )
    count = min(data.val_images, len(held_out))
    if count < 2 * BINS:
        raise UserError(f"{flag}: got {count} held-out images, expected at least {2 * BINS}")
    batches = latent_batches(
        images, vae, dataset.classes, num_images=count, batch_size=32, indices=held_out
    )
    return list(batches)


def batch_notes(global_batch: int, num_images: int) -> list[str]:
    """Returns a note if one step takes more images than the data set has."""
    if global_batch <= num_images:
        return []
    return [
        f"a step takes {global_batch} images, but there are only {num_images}: each step uses "
        f"every image {global_batch / num_images:.3g} times"
    ]
