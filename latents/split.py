"""The images that a run holds out: a fixed share of them, which it never trains on.

    trained, held_out = split(images, share=0.01)       # places in `images`, each in order

The draw has a seed of its own and depends on the number of images alone, so all runs on the same
images, or on their latents, hold out the same ones: whatever their seed, and when they go on. Where
images cannot be read, their latents are copies of a neighbour, and more of those may be held out.
"""

import numpy as np
import torch

from latents.cache import CachedLatents
from latents.sources import ImageSource

SEED = 0


def split(images: ImageSource | CachedLatents, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the images to train on and of those held out.

    An image that cannot be read is from then on replaced by one of its own side.
    """
    count = len(images)
    is_held_out = np.zeros(count, dtype=bool)
    drawn = np.random.default_rng(SEED).permutation(count)
    is_held_out[drawn[: min(round(share * count), count - 1)]] = True
    if isinstance(images, CachedLatents):
        add_copies(is_held_out, images)
    else:
        images.is_held_out = is_held_out
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def add_copies(is_held_out: np.ndarray, latents: CachedLatents) -> None:
    """Holds out the neighbours too that are copies: in a cache they stand for unreadable images."""
    for place in np.flatnonzero(is_held_out):
        moments = latents[place, False][0]
        for direction in (-1, 1):
            other = (place + direction) % len(latents)
            while not is_held_out[other] and torch.equal(latents[other, False][0], moments):
                is_held_out[other] = True
                other = (other + direction) % len(latents)
