"""How an image comes out of noise: the predictions of the data along a sampler's steps.

trajectory = Trajectory(num_steps=50)
pipeline.images(labels, seeds, callback=trajectory)
trajectory.save(Path("trajectory.png"), pipeline.vae)
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from latents.autoencoder import decode
from sampling.grid import to_pil

COLUMNS = 10  # of a strip, the first and the last step among them
FRAMES = 50  # of a GIF
SECONDS, PAUSE = 3.0, 1.5  # a GIF's length, and how long its last frame stays


class Trajectory:
    """A sampler's callback that keeps up to FRAMES predictions of the data, evenly over the steps.

    For up to 16 images of the batch.
    """

    def __init__(self, num_steps: int):
        self.wanted = set(evenly(num_steps, FRAMES))
        self.predictions: list[Tensor] = []  # each (N, C, h, w)

    def __call__(self, state: dict) -> None:
        if state["step"] in self.wanted:
            self.predictions.append(state["pred_xstart"][:16].clone())

    def save(self, path: Path, vae: AutoencoderKL) -> None:
        """Writes a strip (.png: a row for each image, time from left to right) or a GIF."""
        if path.suffix.lower() == ".png":
            chosen = evenly(len(self.predictions), COLUMNS)
            frames = torch.stack([decode(vae, self.predictions[i]) for i in chosen], dim=1)
            to_pil(make_grid(frames.flatten(0, 1), nrow=len(chosen))).save(path)
        else:
            frames = [decode(vae, x) for x in self.predictions]
            save_gif(path, [to_pil(make_grid(x, nrow=min(4, len(x)))) for x in frames])


def evenly(number: int, most: int) -> list[int]:
    """Up to `most` of 0 to number - 1, evenly spaced with both ends among them."""
    if number <= most:
        return list(range(number))
    return [round(i * (number - 1) / (most - 1)) for i in range(most)]


def save_gif(path: Path, frames: list[Image.Image]) -> None:
    duration = [1000 * SECONDS / len(frames)] * (len(frames) - 1) + [1000 * PAUSE]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
