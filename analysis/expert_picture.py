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

from analysis.options import some_layers
from analysis.recorder import listen
from latents.autoencoder import decode
from models import DiT
from routers import Routing
from runtime.errors import UserError
from sampling.grid import load_font, to_pil
from sampling.trajectory import FRAMES, evenly, save_gif

IMAGES = 4  # of a GIF, side by side
COLUMNS = 8  # steps of a PNG, which shows the first image
CELL, GAP, MARGIN = 112, 4, 56  # pixels of a picture, between two, and left of them all
LINE = 20  # pixels of a line of text


class ExpertPicture:
    """A sampler's callback; keeps images and experts of up to FRAMES steps."""

    def __init__(self, model: DiT, num_steps: int):
        if not model.config.num_experts:
            raise UserError("--experts: got a dense model, expected one with experts")
        self.num_experts, self.grid_size = model.config.num_experts, model.x_embedder.grid_size
        self.wanted = set(evenly(num_steps, FRAMES))
        self.layers = some_layers(len(model.config.sparse_layers))
        self.experts: dict[int, Tensor] = {}  # of the step being taken, by layer: (N, T)
        self.frames: list[tuple[str, Tensor, Tensor]] = []  # step; (N, C, h, w); (L, N, T)
        self.handles = listen(model, self.note)

    def note(self, layer: int, x: Tensor, routing: Routing) -> None:
        if layer in self.layers and layer not in self.experts:  # the first call of a step
            experts = strongest_experts(routing, num_tokens=x.shape[0] * x.shape[1])
            self.experts[layer] = experts.view(x.shape[:2])[:IMAGES]

    def __call__(self, state: dict) -> None:
        if state["step"] in self.wanted:
            experts = torch.stack([self.experts[layer] for layer in self.layers])
            x, title = state["pred_xstart"][:IMAGES], f"step {state['step'] + 1}"
            self.frames.append((title, x.clone(), experts[:, : len(x)].cpu()))
        self.experts.clear()

    def save(self, path: Path, vae: AutoencoderKL) -> None:
        """Writes a GIF of up to four images, or for a .png the first one from left to right."""
        for handle in self.handles:
            handle.remove()
        frames, is_strip = self.frames, path.suffix.lower() == ".png"
        if is_strip:
            frames = [frames[i] for i in evenly(len(frames), COLUMNS)]
        pictures = []  # of each step: a column for each image
        for title, x, experts in frames:
            titles = [title, *[""] * (len(x) - 1)]
            images = decode(vae, x).cpu()  # (N, 3, H, W)
            pictures.append(list(zip(titles, images, experts.unbind(1), strict=True)))
        if is_strip:
            self.draw([columns[0] for columns in pictures]).save(path)
        else:
            save_gif(path, [self.draw(columns) for columns in pictures])

    def draw(self, columns: list[tuple[str, Tensor, Tensor]]) -> Image.Image:
        """Draws columns of (title, image (3, H, W), experts (L, T)), an expert map a layer."""
        width = MARGIN + len(columns) * (CELL + GAP)
        per_line = max(1, (width - MARGIN) // 36)  # experts of a line of the legend
        height = LINE + (1 + len(self.layers)) * (CELL + GAP)
        legend = LINE * math.ceil(self.num_experts / per_line)
        canvas = Image.new("RGB", (width, height + legend), "white")
        pen, font, colours = ImageDraw.Draw(canvas), load_font(11), expert_colours(self.num_experts)
        for row, name in enumerate(["image", *(f"layer {layer}" for layer in self.layers)]):
            middle = LINE + row * (CELL + GAP) + CELL / 2
            pen.text((MARGIN - 6, middle), name, "black", font, anchor="rm")
        for column, (title, image, experts) in enumerate(columns):
            left = MARGIN + column * (CELL + GAP)
            pen.text((left, LINE / 2), title, "black", font, anchor="lm")
            maps = colours[experts.numpy()].reshape(-1, self.grid_size, self.grid_size, 3)
            for row, part in enumerate([to_pil(image), *map(Image.fromarray, maps)]):
                how = Image.Resampling.NEAREST if part.width < CELL else Image.Resampling.LANCZOS
                canvas.paste(part.resize((CELL, CELL), how), (left, LINE + row * (CELL + GAP)))
        for expert in range(self.num_experts):
            x = MARGIN + expert % per_line * 36
            y = height + expert // per_line * LINE
            pen.rectangle((x, y + 4, x + 11, y + 15), fill=tuple(map(int, colours[expert])))
            pen.text((x + 15, y + 10), str(expert), "black", font, anchor="lm")
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
