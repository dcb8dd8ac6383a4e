"""What a training command names: its images or latents, the autoencoder, the model's config."""

from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import Checkpoint, config_of
from checkpoints.upcycling import select_layers
from evaluation.heldout import BINS, latent_batches
from latents.autoencoder import DEFAULT_VAE, load_autoencoder, weights_digest
from latents.cache import CachedLatents, open_data
from latents.sources import Source, open_images
from models import DiT, DiTConfig
from runtime.devices import DTYPES
from runtime.errors import UserError, reported_as
from training.config import TrainConfig, fill
from training.finetune import freeze, open_source, target_config


def open_inputs(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None, Source, DiTConfig]:
    """Opens --finetune's weights and the data; gives the config, its gaps filled, and the model's.

    Raises UserError for flags, weights or data that do not fit together.
    """
    config, source = open_source(config)
    config, dataset = open_dataset(config)
    classes, geometry = len(dataset.classes), dataset.geometry(config.vae_path)
    wanted = model_config(config, source, num_classes=classes, geometry=geometry)
    if config.freeze or config.train_router_only:  # before there is a folder of a wrong pattern
        with torch.device("meta"):
            freeze(DiT(**vars(wanted)), config.freeze, config.train_router_only)
    return config, source, dataset, wanted


def open_dataset(config: TrainConfig) -> tuple[TrainConfig, Source]:
    """Opens --latents-path or --data-path; fills in --image-size, --vae-path and --flip.

    Raises UserError when --image-size or --num-classes does not fit.
    """
    if config.latents_path is None:
        config = fill(config, {"vae_path": DEFAULT_VAE, "image_size": 256})
        dataset = open_images(config.data_path, config.image_size)
    else:
        dataset = CachedLatents(config.latents_path)
        size = dataset.image_size
        config = fill(config, {"image_size": size, "vae_path": dataset.vae_path})
        if config.image_size != size:
            raise UserError(
                f"--image-size: got {config.image_size}, expected {size}, that of "
                f"{config.latents_path}"
            )
    config = replace(config, flip=config.flip and dataset.can_flip)
    classes, path = len(dataset.classes), config.latents_path or config.data_path
    if config.num_classes not in (None, classes):
        raise UserError(
            f"--num-classes: got {config.num_classes}, expected {classes}, as many as {path} has"
        )
    return config, dataset


def open_held_out(
    config: TrainConfig, dataset: Source, held_out: np.ndarray, vae: nn.Module | None
) -> list[tuple[Tensor, Tensor]]:
    """The latents and labels of --val-path or --val-share, the same in every run; else nothing.

    held_out: the places of --val-share's images in the dataset
    """
    if config.val_path is None and not config.val_share:
        return []
    images = dataset
    if path := config.val_path:
        images = open_data(path, config.image_size)
        held_out = np.arange(len(images))
    if vae is None and images.vae_path is None:
        raise UserError(
            "--val-path: got images beside --latents-path without --num-sample, "
            "expected latents, since no autoencoder is loaded"
        )
    count = min(config.val_images, len(held_out))
    if count < 2 * BINS:
        name = "--val-share" if config.val_share else "--val-path"
        raise UserError(f"{name}: got {count} held-out images, expected at least {2 * BINS}")
    batches = latent_batches(
        images, vae, dataset.classes, num_images=count, batch_size=32, places=held_out
    )
    return list(batches)


def open_autoencoder(
    config: TrainConfig, dataset: Source, device: torch.device
) -> nn.Module | None:
    """Loads --vae-path; None if latents are cached and no sample grids are to be decoded.

    Raises UserError when its weights are not those that the latents were made with.
    """
    if dataset.vae_sha256:
        if not config.num_sample and config.vae_path == dataset.vae_path:
            return None
        got = weights_digest(load_autoencoder(config.vae_path, "cpu", torch.float32))
        if got != dataset.vae_sha256:
            raise UserError(
                f"--vae-path: got {config.vae_path} with weights {got[:12]}, expected those of "
                f"{config.latents_path}, {dataset.vae_sha256[:12]} ({dataset.vae_path})"
            )
    return load_autoencoder(config.vae_path, device, DTYPES[config.precision])


def model_config(
    config: TrainConfig, source: Checkpoint | None, *, num_classes: int, geometry: tuple[int, int]
) -> DiTConfig:
    """The DiTConfig that the flags, the data and --finetune's weights ask for.

    Flags that are named as fields of it become those.

    geometry: (latent size, latent channels)
    """
    input_size, in_channels = geometry
    patch_size = (source.config if source else config_of(config.model)).patch_size
    if input_size % patch_size:
        factor = config.image_size // input_size
        raise UserError(
            f"--image-size: got {config.image_size}, expected a multiple of {factor * patch_size}, "
            f"the autoencoder's factor {factor} x the model's patches of {patch_size}"
        )
    data = dict(num_classes=num_classes, input_size=input_size, in_channels=in_channels)
    if source is not None:
        return target_config(config, source, **data)
    preset = config_of(config.model)
    own = {f.name: getattr(config, f.name) for f in fields(DiTConfig) if hasattr(config, f.name)}
    own["mlp_ratio"] = mlp_ratio = config.mlp_ratio or preset.mlp_ratio
    with reported_as("--sparse-layers", ValueError):
        sparse_layers = select_layers(config.sparse_layers, preset.depth)
    own["sparse_layers"] = sparse_layers if config.num_experts else None
    if 0 < len(sparse_layers) < preset.depth:  # the others are as wide as what a token activates
        active = config.num_experts_per_tok * mlp_ratio + config.n_shared_experts
        own["dense_mlp_ratio"] = active
    own["class_dropout_prob"] = 0.1 if num_classes > 1 else 0.0  # one class leaves nothing to drop
    return config_of(config.model, **{**own, **data})


def total_steps(config: TrainConfig, num_images: int, global_batch: int) -> int:
    return config.max_steps or max(1, config.epochs * num_images // global_batch)
