"""Which expert each patch goes to while its image forms, in a few layers, one colour an expert.

    picture = ExpertPicture(pipeline.model, num_steps)
    pipeline.images(labels, seeds, callback=picture)
    picture.save(Path("experts.gif"), pipeline.vae)

Shape legend: N images, T patches per image, L layers shown, E experts, R rows of a `Routing`
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor

from analysis.heatmap import some_layers
from analysis.recorder import listen
from latents.autoencoder import decode
from models import DiT
from routers import Routing
from runtime.errors import UserError
from sampling.grid import captioned_rows, load_font, to_pil
from sampling.trajectory import FRAMES, evenly, save_gif

IMAGES = 4  # of a GIF, side by side
COLUMNS = 8  # steps of a PNG, which shows the first image
SMALLEST = 112  # pixels a side of an image; a smaller one is enlarged
LEGEND = 20  # pixels


class ExpertPicture:
    """A sampler's callback; keeps images and experts of up to FRAMES steps."""

    def __init__(self, model: DiT, num_steps: int):
        if not model.config.num_experts:
            raise UserError("--experts: got a dense model, expected one with experts")
        self.num_experts = model.config.experts_per_layer
        self.grid_size = model.x_embedder.grid_size
        self.wanted = set(evenly(num_steps, FRAMES))
        self.layers = some_layers(len(model.config.sparse_layers))
        self.experts: dict[int, Tensor] = {}  # of the step being taken, by layer: (N, T)
        self.frames: list[tuple[Tensor, Tensor]] = []  # (N, C, h, w); (L, N, T)
        self.hooks = listen(model, self.note)

    def note(self, layer: int, x: Tensor, routing: Routing) -> None:
        if layer in self.layers and layer not in self.experts:  # the first call of a step
            experts = strongest_experts(routing, num_tokens=x.shape[0] * x.shape[1])
            self.experts[layer] = experts.view(x.shape[:2])[:IMAGES]

    def __call__(self, state: dict) -> None:
        if state["step"] in self.wanted:
            experts = torch.stack([self.experts[layer] for layer in self.layers])
            x = state["pred_xstart"][:IMAGES]
            self.frames.append((x.clone(), experts[:, : len(x)].cpu()))
        self.experts.clear()

    def save(self, path: Path, vae: AutoencoderKL) -> None:
        """Writes a GIF of up to four images, or for a .png the first one from left to right."""
        self.hooks.close()
        if path.suffix.lower() == ".png":
            frames = [self.frames[i] for i in evenly(len(self.frames), COLUMNS)]
            x = torch.cat([x[:1] for x, _ in frames])
            experts = torch.cat([experts[:, :1] for _, experts in frames], dim=1)
            self.draw(decode(vae, x), experts).save(path)
        else:
            save_gif(path, [self.draw(decode(vae, x), experts) for x, experts in self.frames])

    def draw(self, images: Tensor, experts: Tensor) -> Image.Image:
        """Draws images (N, 3, H, W) in a row, and below them a map of experts (L, N, T) a layer."""
        colours = expert_colours(self.num_experts)
        maps = torch.from_numpy(colours)[experts].view(-1, self.grid_size, self.grid_size, 3)
        size = images.shape[-1] * math.ceil(SMALLEST / images.shape[-1])
        tiles = [
            x.repeat_interleave(size // x.shape[-2], -2).repeat_interleave(size // x.shape[-1], -1)
            for x in (images.cpu(), maps.permute(0, 3, 1, 2))
        ]
        names = ["image", *(f"layer {layer}" for layer in self.layers)]
        grid = to_pil(captioned_rows(torch.cat(tiles), names))
        canvas = Image.new("RGB", (grid.width, grid.height + LEGEND))
        canvas.paste(grid)
        pen, width = ImageDraw.Draw(canvas), grid.width / self.num_experts
        for expert in range(self.num_experts):
            box = (expert * width, grid.height, (expert + 1) * width, canvas.height)
            pen.rectangle(box, fill=tuple(colours[expert].tolist()))
            middle = (box[0] + width / 2, grid.height + LEGEND / 2)
            pen.text(middle, str(expert), "black", load_font(10), anchor="mm")
        return canvas


def strongest_experts(routing: Routing, num_tokens: int) -> Tensor:
    """The expert of largest weight of each token, (S,); -1 for a token that no expert takes."""
    weight = routing.weight.float()
    largest = weight.new_full((num_tokens,), -torch.inf)
    largest.scatter_reduce_(0, routing.token, weight, "amax")
    is_largest = weight == largest[routing.token]  # (R,)
    experts = torch.full_like(largest, -1, dtype=torch.int64)
    experts[routing.token[is_largest]] = routing.expert[is_largest]
    return experts


def expert_colours(num_experts: int) -> np.ndarray:
    """Colours (E + 1, 3) uint8, the last one, white, for no expert."""
    name = "tab10" if num_experts <= 10 else "tab20" if num_experts <= 20 else "gist_rainbow"
    colours = matplotlib.colormaps[name]
    picked = [colours(i if colours.N <= 20 else i / (num_experts - 1)) for i in range(num_experts)]
    return np.array([[round(255 * c) for c in rgba[:3]] for rgba in picked] + [[255] * 3], np.uint8)
