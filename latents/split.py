"""The images that a run holds out: a fixed share of them, which it never trains on.

    trained, held_out = split(images, share=0.01)       # places in `images`, each in order

The draw has a seed of its own and depends on the number of images alone, so all runs on the same
images, or on their latents, hold out the same ones: whatever their seed, and when they go on. Where
images cannot be read, their latents are copies of a neighbour, and more of those may be held out.
"""

import numpy as np

from latents.sources import Source

SEED = 0


def split(images: Source, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the images to train on and of those held out.

    An image that cannot be read is from then on replaced by one of its own side.
    """
    count = len(images)
    is_held_out = np.zeros(count, dtype=bool)
    drawn = np.random.default_rng(SEED).permutation(count)
    is_held_out[drawn[: min(round(share * count), count - 1)]] = True
    is_held_out = images.hold_out(is_held_out)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
