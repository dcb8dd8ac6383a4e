"""The held-out loss: the training objective on fixed images, times and noises, by time.

Nothing is drawn anew, so two models, or two steps of one run, differ only by what they learnt.

Shape legend: N images of a batch, C latent channels, h x w latent size
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from diffusion import Objective, PerImageNoise
from latents.autoencoder import Autoencoder
from latents.loading import collate, evenly_spaced
from latents.sources import Batch, Source
from models import DiT
from runtime.errors import UserError

BINS = 10
POSTERIOR = 2**31  # seeds of the posteriors' noise, apart from those of the noise that images get


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean and standard error over images, and the mean in each bin of time, data to noise.

    Each bin has a tenth of the times; `edges` are those between them.
    """

    mean: float
    standard_error: float
    bins: list[float]
    edges: list[float]
    num_images: int
    experts_per_token: list[float]  # of each sparse layer, the mean over all images


@torch.no_grad()
def held_out_loss(
    model: DiT, objective: Objective, batches: Iterable[Batch], seed: int = 0,
    times: str = "uniform",
) -> HeldOutLoss:  # fmt: skip
    """Computes the objective's loss, without balance loss; no condition is dropped.

    batches: "latents" (N, C, h, w) and the conditions, always the same ones in the same order
    times: "uniform", so that runs that draw other times compare, or "training", as it draws them

    Image i has a time within bin i modulo 10 and a noise, both from seed and i. Raises UserError
    for fewer than 20 images.
    """
    time_at = objective.uniform_time if times == "uniform" else objective.time_quantile
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    losses, spent = [], 0.0
    for batch in batches:
        y = {name: value.to(device) for name, value in batch.items()}
        x = y.pop("latents")
        indices = range(len(losses), len(losses) + len(x))
        share = [(i % BINS + np.random.default_rng((seed, i)).random()) / BINS for i in indices]
        t = time_at(torch.tensor(share)).to(device)  # (N,)
        noise = PerImageNoise(seed + i for i in indices).randn_like(x)
        losses += objective.losses(model, x, y, t, noise)["loss"].tolist()
        spent = spent + len(x) * torch.tensor(model.experts_per_token)
    model.train(was_training)
    if len(losses) < 2 * BINS:
        raise UserError(f"held-out loss: got {len(losses)} images, expected at least {2 * BINS}")
    bins = [torch.tensor(losses[first::BINS], dtype=torch.float64) for first in range(BINS)]
    means = torch.stack([values.mean() for values in bins])
    variance = torch.stack([values.var() / len(values) for values in bins]).sum() / BINS**2
    edges = time_at(torch.arange(1, BINS) / BINS).tolist()
    mean, error = means.mean().item(), variance.sqrt().item()
    per_token = (spent / len(losses)).tolist()
    return HeldOutLoss(mean, error, means.tolist(), edges, len(losses), per_token)


def latent_batches(
    images: Source, vae: Autoencoder | None, class_names: list[str],
    *, num_images: int, batch_size: int, indices: np.ndarray | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Yields batches of evenly spaced images, on the CPU, with "latents" (N, C, h, w) fp32.

    vae: encodes images; cached latents need none. Each posterior is drawn from by its place
    class_names: the model's; the images' classes must be among them, or as many
    indices: of the images to take them from; None for all

    Raises UserError for other classes.
    """
    label_of = range(len(class_names))
    if set(images.classes) <= set(class_names):
        label_of = [class_names.index(name) for name in images.classes]
    elif len(images.classes) != len(class_names):
        raise UserError(
            f"held-out images: got {len(images.classes)} classes ({images.classes[0]}, ...), "
            f"expected those of the model, {len(class_names)} ({class_names[0]}, ...)"
        )
    indices = np.arange(len(images)) if indices is None else indices
    chosen = indices[evenly_spaced(len(indices), num_images)]
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size].tolist()
        batch, _ = collate([images[index, False] for index in indices])
        noise = PerImageNoise(POSTERIOR + index for index in indices)
        batch = images.to_latents(vae, batch, noise.randn_like)
        labels = torch.tensor([label_of[label] for label in batch["label"].tolist()])
        yield {name: value.cpu() for name, value in batch.items()} | {"label": labels}
