"""How an image comes out of noise: the predictions of the data along a sampler's steps.

trajectory = Trajectory(num_steps=50)
pipeline.images(labels, seeds, callback=trajectory)
trajectory.save(Path("trajectory.png"), pipeline.vae, captions)
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from latents.autoencoder import decode
from sampling.grid import captioned_rows, enlarge, evenly, to_pil, write_picture

IMAGES = 16  # of the batch
COLUMNS = 10  # of a strip, the first and the last step among them
FRAMES = 50  # of a GIF
SECONDS, PAUSE = 3.0, 1.5  # a GIF's length, and how long its last frame stays


class Trajectory:
    """A sampler's callback; keeps predictions of up to IMAGES images at up to FRAMES steps."""

    def __init__(self, num_steps: int):
        self.wanted = set(evenly(num_steps, FRAMES))
        self.predictions: list[Tensor] = []  # each (N, C, h, w)
        self.times: list[Tensor] = []  # each ()

    def __call__(self, state: dict) -> None:
        if state["step"] in self.wanted:
            self.predictions.append(state["pred_xstart"][:IMAGES].clone())
            self.times.append(state["t"][0])

    def save(self, path: Path, vae: AutoencoderKL, captions: Sequence[str] = ()) -> None:
        """Writes a strip (.png: a row for each image, time from left to right) or a GIF.

        captions: the classes of the batch's images, which stand before the rows of a strip
        """
        if path.suffix.lower() == ".png":
            chosen = evenly(len(self.predictions), COLUMNS)
            frames = torch.stack([decode(vae, self.predictions[i]) for i in chosen], dim=1)
            rows = list(captions[: len(frames)]) or ["image"] * len(frames)
            times = [f"t = {self.times[i]:.3g}" for i in chosen]
            strip = captioned_rows(enlarge(frames.flatten(0, 1)), rows, times)
            write_picture(path, to_pil(strip))
        else:
            frames = [enlarge(decode(vae, x)) for x in self.predictions]
            save_gif(path, [to_pil(make_grid(x, nrow=min(4, len(x)))) for x in frames])


def save_gif(path: Path, frames: list[Image.Image]) -> None:
    duration = [1000 * SECONDS / len(frames)] * (len(frames) - 1) + [1000 * PAUSE]
    rest = {"save_all": True, "append_images": frames[1:], "duration": duration, "loop": 0}
    write_picture(path, frames[0], **rest)
