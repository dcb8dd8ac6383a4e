"""The data of a run: the images or latents, what encodes them, the held-out ones, and the steps."""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial

import numpy as np

from checkpoints import Record
from checkpoints.meta import meta_model
from checkpoints.record import NOTED_SHARE
from conditions import split_condition
from evaluation.heldout import BINS, latent_batches
from latents.autoencoder import Autoencoder, load_autoencoder
from latents.cache import FEATURES, CachedLatents, check_networks, open_data
from latents.loading import BatchStream, evenly_spaced
from latents.sources import Batch, Source, open_on_all, same_images
from latents.words import Words
from runtime.devices import DTYPES
from runtime.errors import UserError, pluralize, reported_as
from runtime.processes import ALONE, Distributed
from runtime.progress import progress
from training.config import TrainConfig
from training.engine import frozen_names
from training.engines import engine_for
from training.sections import DataConfig


def open_dataset(data: DataConfig, dist: Distributed = ALONE) -> Source:
    """Opens --latents-path or --data-path. All processes call this function together."""
    if data.latents_path:
        return CachedLatents(data.latents_path, norm=data.latents_norm)
    if data.latents_norm == "data":
        raise UserError("--latents-norm data: has no effect without --latents-path")
    if data.data_path is None:
        raise UserError("--data-path: images are required; pass this flag or --latents-path")
    return open_on_all(data.data_path, data.image_size or 256, dist)


def read_words(
    dataset: Source, trained: np.ndarray, conditions: Iterable[str], begun: Record | None,
    notes: list[str], dist: Distributed = ALONE,
) -> None:  # fmt: skip
    """Prepares the condition "text", if it is among the conditions: the captions of the dataset and
    the words that the model knows, which stay those of the weights that the run begins with.

    trained: indices of the training images
    begun: record of these weights
    notes: receives a note on images without a caption, and on unknown words
    """
    if "text" not in {word.partition(":")[0] for word in conditions}:
        return
    dataset.captions = captions = dist.from_main(lambda: dataset.captions)
    if not captions:
        return
    count = len(captions)
    known = begun and begun.vocabulary
    with reported_as(dataset.flag, ValueError):
        dataset.use_words(known or dist.from_main(partial(Words.of, captions, trained)))
    if len(missing := captions.missing):
        notes.append(
            f"{len(missing):,} of {pluralize(count, 'image')} have no caption, such as "
            f"{dataset.name(missing[0])}; they are trained as no text"
        )
    notes.append(
        f"text: {pluralize(len(dataset.words.names), 'word')}, at most {dataset.words.length} of a "
        f"caption{' (those of the weights)' if known else ''}; other words are no words"
    )


def inputs_of(
    config: TrainConfig, dataset: Source, dist: Distributed
) -> tuple[Autoencoder | None, Record]:
    """Returns the autoencoder, if needed, and a record of the settings and the data."""
    captions = dataset.words and dataset.captions.sha256
    facts = dist.gather((dataset.fingerprint, dataset.classes, dataset.vae_sha256, captions))
    if others := [rank for rank, one in enumerate(facts) if one != facts[0]]:
        got = f"other images or latents on rank {others[0]} than on rank 0"
        raise UserError(f"{dataset.flag}: got {got}, expected the same on every machine")
    digest, path, vae = dataset.vae_sha256, config.data.vae_path, None
    if digest is None or config.run.num_sample or path != dataset.vae_path:
        moved = f"the latents were made with {dataset.vae_path}; if it has moved, pass --vae-path"
        with nullcontext() if digest is None else reported_as(moved, UserError):
            dtype = DTYPES[config.step.precision]
            load = partial(load_autoencoder, path, dist.device, dtype, dataset.norm)
            vae = dist.on_main(load) or load()  # the main process first: it may have to download
            got = dist.broadcast(vae.weights_sha256)
        if digest not in (None, got):
            raise UserError(
                f"--vae-path: got {path}, whose weights have the digest {got[:12]}, expected the "
                f"digest {digest[:12]} of {dataset.vae_path}, which encoded the latents of "
                f"{config.data.latents_path}"
            )
        digest, dataset.norm = got, vae.norm
    has_features = bool(set(FEATURES).intersection(tensors_of(config)))
    facts = {"features_sha256": dataset.features_sha256} if has_features else {}
    if has_features and dataset.text_encoder:
        facts["text_encoder"] = dataset.text_encoder
    facts |= {"captions_sha256": captions} if captions else {}
    return vae, config.record(
        # The autoencoder of a cache may not exist on this machine, so its path is not resolved.
        vae_path=vae.path if vae else dataset.vae_path, vae_sha256=digest,
        images=dataset.fingerprint, class_names=dataset.classes,
        latents_norm=dataset.norm.to_dict(),
        words=dataset.words.names if dataset.words else (),
        facts=facts,
    )  # fmt: skip


def check_model(config: TrainConfig) -> None:
    """Refuses a model that cannot be built or resumed, and a --freeze that matches nothing."""
    with reported_as(f"{config.name} cannot be built", ValueError):
        model = meta_model(config.model)
        names, buffers = model.state_dict().keys(), dict(model.named_buffers()).keys()
        if lost := buffers - names:
            expected = "expected True, so that a run can resume"
            raise ValueError(f"{min(lost)}: got a buffer with persistent=False, {expected}")
        if tied := names - buffers - dict(model.named_parameters()).keys():
            expected = "expected parameters and buffers of its own for every module"
            raise ValueError(f"{min(tied)}: got state that is tied to another, {expected}")
    frozen_names(model, config.step)  # checks the patterns


def tensors_of(config: TrainConfig) -> list[str]:
    """Returns the tensors of an image that training reads besides its latents and label."""
    conditions = [split_condition(word)[0] for word in config.model.conditions]
    return conditions + [name for one in config.auxiliary for name in one.needs]


def remaining_steps(
    config: TrainConfig, trained: np.ndarray, done: int, dist: Distributed
) -> BatchStream:
    """Returns the steps after the first `done`, over the images with the indices `trained`."""
    micro_batch = engine_for(config.engine).micro_batch(config, dist.world_size)
    for one in config.auxiliary:
        if one.compares_images and micro_batch < 2:
            raise UserError(
                f"--auxiliary: got {one.name} with micro-batches of one image, expected at least "
                "two images (larger batches, or fewer --accum-iter)"
            )
    global_batch = micro_batch * config.step.accum_iter * dist.world_size
    return BatchStream(
        trained, micro_batch=micro_batch, accumulation=config.step.accum_iter,
        rank=dist.rank, world_size=dist.world_size, seed=config.run.global_seed,
        start_step=done, end_step=config.total_steps(len(trained), global_batch),
        flip=config.data.flip, draws="text" in tensors_of(config),
    )  # fmt: skip


def held_out_batches(
    config: TrainConfig, dataset: Source, vae: Autoencoder | None, record: Record,
    held_out: np.ndarray, notes: list[str],
) -> list[Batch]:  # fmt: skip
    """Returns the batches of --val-path or --val-share, if any, which are the same in every run.

    record: has the training images, and the digests of the autoencoder and the features
    held_out: indices of the held-out images in the dataset
    notes: receives a note if --val-path has the training images
    """
    data, images, flag = config.data, dataset, "--val-share"
    if not data.val_path and not data.val_share:
        return []
    if data.val_path:
        flag = "--val-path"
        images = open_data(data.val_path, data.image_size, flag)
        if same_images(images.fingerprint, record.images):
            notes.append(f"{data.val_path} has the training images, so val_loss is not held out")
        check_networks(images, record.vae_sha256, record.facts.get("features_sha256"), flag)
        if dataset.words and images.captions:
            images.use_words(dataset.words)
        images.norm = dataset.norm  # instead of the norm stored in the cache of --val-path
        held_out = np.arange(len(images))
    images.requested = [split_condition(word)[0] for word in config.model.conditions]
    if vae is None and images.vae_path is None:
        raise UserError(
            "--val-path: got images, expected cached latents, because no autoencoder is loaded "
            "with --latents-path and --num-sample 0"
        )
    chosen = held_out[evenly_spaced(len(held_out), data.val_images)].tolist()
    if len(chosen) < 2 * BINS:
        raise UserError(f"{flag}: got {len(chosen)} held-out images, expected at least {2 * BINS}")
    batches = latent_batches(images, chosen, vae, dataset.classes, batch_size=32)
    return list(progress(batches, desc="held-out images", unit="batch", delay=5))


def length_notes(config: TrainConfig, stream: BatchStream) -> list[str]:
    """Returns notes on few images for a batch, or few steps for the warm-up or an EMA."""
    notes, batch, steps = [], stream.global_batch, stream.end_step
    if batch > stream.num_images:
        notes.append(
            f"a step takes {batch} images, but there are only {stream.num_images}: each step uses "
            f"every image {batch / stream.num_images:.3g} times"
        )
    if (warmup := config.step.warmup_steps) > steps:
        notes.append(
            f"--warmup-steps {warmup} is more than the {pluralize(steps, 'step')} of the run: the "
            f"learning rate reaches {config.step.lr * steps / warmup:.2g}, not {config.step.lr:.2g}"
        )
    for ema in config.ema:
        if (share := ema.initial_fraction(steps)) >= NOTED_SHARE:
            notes.append(
                f"after {pluralize(steps, 'step')} {share:.0%} of EMA {ema.name} will still be the "
                "weights that it began with (use a smaller decay, or --ema "
                "exponential:warmup=True)"
            )
    return notes
