"""The held-out loss: the training objective on fixed images, times and noise, by time.

Images, times and noise are always the same, so two models, or two steps of one run, differ only in
their weights.

Shape legend: N images of a batch, C latent channels, h x w latent size
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from conditions import CONDITIONS
from diffusion import Objective, PerImageNoise
from latents.autoencoder import Autoencoder
from latents.cache import check_networks, open_data, read_settings
from latents.loading import collate, evenly_spaced, split
from latents.sources import Batch, Source, same_images
from models import DiT
from options.parts import Size, convert
from runtime.errors import UserError, print_safely
from runtime.progress import progress
from sampling.pipeline import SamplingPipeline

BINS = 10
POSTERIOR = 2**31  # seed offset of the posterior noise, which differs from the diffusion noise


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean and standard error over images, and means in ten bins of time, from data to noise.

    Each bin has a tenth of the times. `edges` are the times between the bins.
    """

    mean: float
    standard_error: float
    bins: list[float]
    edges: list[float]
    num_images: int
    experts_per_token: list[float]  # mean over all images, for each sparse layer


@torch.no_grad()
def held_out_losses(
    model: DiT, objective: Objective, batches: Iterable[Batch], seed: int = 0,
    times: str = "uniform",
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Returns the loss of each image, and the mean experts per token of each sparse layer.

    Without auxiliary loss and without dropped conditions. For the arguments see `held_out_loss`.
    """
    time_at = objective.uniform_time if times == "uniform" else objective.time_quantile
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    losses, total = [], 0.0
    for batch in progress(batches, desc="held-out images", unit="batch", delay=5, leave=False):
        y = {name: value.to(device) for name, value in batch.items()}
        x = y.pop("latents")
        indices = range(len(losses), len(losses) + len(x))
        u = [(i % BINS + np.random.default_rng((seed, i)).random()) / BINS for i in indices]
        t = time_at(torch.tensor(u)).to(device)  # (N,)
        noise = PerImageNoise(seed + i for i in indices).randn_like(x)
        losses += objective.losses(model, x, y, t, noise)["loss"].tolist()
        total = total + len(x) * torch.tensor(model.experts_per_token)
    model.train(was_training)
    if len(losses) < 2 * BINS:
        raise UserError(f"held-out loss: got {len(losses)} images, expected at least {2 * BINS}")
    return losses, (total / len(losses)).tolist()


def held_out_loss(
    model: DiT, objective: Objective, batches: Iterable[Batch], seed: int = 0,
    times: str = "uniform",
) -> HeldOutLoss:  # fmt: skip
    """Computes the loss of the objective, without auxiliary loss and without dropped conditions.

    batches: "latents" (N, C, h, w) and the conditions, always the same batches in the same order
    times: distribution of the times: "uniform", which makes runs with different training times
        comparable, or "training"

    The time of image i lies in bin i modulo 10. The seed and i determine time and noise. At least
    20 images are required.
    """
    losses, per_token = held_out_losses(model, objective, batches, seed, times)
    time_at = objective.uniform_time if times == "uniform" else objective.time_quantile
    bins = [torch.tensor(losses[first::BINS], dtype=torch.float64) for first in range(BINS)]
    means = torch.stack([values.mean() for values in bins])
    variance = torch.stack([values.var() / len(values) for values in bins]).sum() / BINS**2
    edges = time_at(torch.arange(1, BINS) / BINS).tolist()
    mean, error = means.mean().item(), variance.sqrt().item()
    return HeldOutLoss(mean, error, means.tolist(), edges, len(losses), per_token)


def open_held_out(
    pipeline: SamplingPipeline, data_path: str | None, latents_path: str | None, num_images: int
) -> tuple[Source, list[int], dict]:
    """Opens held-out images; returns the images, the indices of up to num_images of them, evenly
    spaced, and the facts to record.

    Without a path, and for the data set of the training run, these are the images that the run held
    out.
    """
    record = pipeline.checkpoint.record
    data = record.settings
    share = data.get("val_share", 0.0)
    of_run = share and not (data_path or latents_path)
    if of_run:
        data_path, latents_path = data.get("data_path"), data.get("latents_path")
    if (data_path is None) == (latents_path is None):
        raise UserError("held-out images: pass exactly one of --data-path and --latents-path")
    if latents_path:
        read_settings("--latents-path", Path(latents_path))  # raises UserError for another folder
    flag, path = "--latents-path" if latents_path else "--data-path", latents_path or data_path
    images = open_data(path, convert(pipeline.image_size, Size), flag)
    check_networks(images, pipeline.vae.weights_sha256, record.facts.get("features_sha256"), flag)
    images.norm = pipeline.vae.norm  # replaces the norm of a cache
    images.requested = list(pipeline.model.conditions)
    if (words := record.vocabulary) and images.captions:
        images.use_words(words)
    facts = {"images": data_path or latents_path}
    indices, path = np.arange(len(images)), pipeline.checkpoint.path
    if same_images(images.fingerprint, record.images):
        if share:
            _, indices = split(images, share)
            facts["val_share"] = share
            print_safely(
                f"{facts['images']}: using the {len(indices):,} images that {path} held out"
            )
        else:
            print_safely(
                f"note: {path} was trained on {facts['images']}, so the loss is not a held-out one"
            )
    elif of_run and record.images:
        raise UserError(
            f"{flag}: {facts['images']} has changed since {path} held out a part of it, expected "
            "the same images; pass --data-path or --latents-path with held-out images"
        )
    elif share and record.images is None:
        print_safely(
            f"note: {path} does not record its training images, so those among {facts['images']} "
            "are not left out"
        )
    return images, indices[evenly_spaced(len(indices), num_images)].tolist(), facts


def latent_batches(
    images: Source, indices: Sequence[int], vae: Autoencoder | None, class_names: list[str],
    *, batch_size: int,
) -> Iterator[Batch]:  # fmt: skip
    """Yields batches of the images `indices`, on the CPU, with "latents" (N, C, h, w) fp32.

    vae: encodes images; cached latents need none; the index of an image seeds its posterior noise
    class_names: names of the model's classes

    The images have to provide the requested conditions. Their classes have to be classes of the
    model by name, or as many as the model has.
    """
    conditions = [name for name in images.requested if CONDITIONS[name].in_batch]
    if missing := [name for name in conditions if name not in images.shapes]:
        raise UserError(
            f"held-out images: got no {missing[0]}, expected the conditions of the model: "
            f"{', '.join(conditions)}; a cache stores features (cache_latents.py --features or "
            "--text-encoder), and captions stand beside the images"
        )
    label_of = range(len(class_names))
    if set(images.classes) <= set(class_names):
        label_of = [class_names.index(name) for name in images.classes]
    elif len(images.classes) != len(class_names):
        raise UserError(
            f"held-out images: got {len(images.classes)} classes ({images.classes[0]}, ...), "
            f"expected the {len(class_names)} classes of the model ({class_names[0]}, ...)"
        )
    for start in range(0, len(indices), batch_size):
        keys = indices[start : start + batch_size]
        batch, _ = collate([images[index, False] for index in keys])
        noise = PerImageNoise(POSTERIOR + index for index in keys)
        batch = images.to_latents(vae, batch, noise.randn_like)
        labels = torch.tensor([label_of[label] for label in batch["label"].tolist()])
        yield {name: value.cpu() for name, value in batch.items()} | {"label": labels}
