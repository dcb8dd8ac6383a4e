"""What a run learns from: images or cached latents, the autoencoder, held-out images."""

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.heldout import BINS, latent_batches
from latents.autoencoder import DEFAULT_VAE, load_autoencoder, weights_digest
from latents.cache import CachedLatents, open_data
from latents.sources import Source, open_images
from runtime.devices import DTYPES
from runtime.errors import UserError, reported_as
from runtime.processes import Distributed
from training.config import DataConfig, DataFacts, TrainConfig


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
