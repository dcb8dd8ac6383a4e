"""Pictures of how images form during sampling, and of the expert of each patch in a few layers.

Shape legend: N images, T patches per image, L layers shown, E experts, R rows of a `Routing`,
    G x G' patches of an image
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale, to_pil_image

from analysis.heatmap import some_layers
from analysis.recorder import listen
from latents.fonts import FONT
from latents.image_grid import PADDING, captioned_grid, captioned_rows, enlarge, write_picture
from latents.loading import evenly_spaced
from models import DiT
from routers import Routing
from runtime.errors import UserError
from sampling.pipeline import SamplingPipeline

IMAGES, COLUMNS = 16, 10  # limits of a `Trajectory`: images, and steps in a PNG
MAPPED_IMAGES, MAPPED_COLUMNS = 4, 8  # limits of an `ExpertPicture`, whose PNG shows one image
FRAMES = 50  # largest number of frames of an animation, including the first and the last step
SECONDS, PAUSE = 3.0, 1.5  # duration of an animation, and of its last frame
LEGEND = 20  # pixels, height of the legend
DARKEST = 0.4  # brightness of an expert's colour where the image is black; 1 where it is white


class Trajectory:
    """Sampler callback that records predictions of up to IMAGES images at up to FRAMES steps."""

    def __init__(self, num_steps: int):
        self.recorded_steps = set(evenly_spaced(num_steps, FRAMES))
        self.shown: list[int] = []  # indices of the images in the batch, evenly spaced
        self.frames: list[tuple[Tensor, Tensor]] = []  # t (); predicted data (N, C, h, w)

    def __call__(self, state: dict) -> None:
        if state["step"] in self.recorded_steps:
            x = state["pred_xstart"]
            self.shown = evenly_spaced(len(x), IMAGES)
            self.frames.append((state["t"][0], x[self.shown]))

    def save(self, path: Path, pipeline: SamplingPipeline, captions: Sequence[str] = ()) -> None:
        """Writes a strip (.png, one row per image, time from left to right) or an animation.

        captions: class names of the images in the batch
        """
        is_strip = path.suffix.lower() == ".png"
        chosen = evenly_spaced(len(self.frames), COLUMNS if is_strip else FRAMES)
        times, latents = zip(*(self.frames[i] for i in chosen), strict=True)
        images = [enlarge(pipeline.decode(x)) for x in latents]  # each (N, 3, H, W)
        rows = [captions[i] if captions else "image" for i in self.shown]
        if is_strip:
            cells = torch.stack(images, dim=1).flatten(0, 1)
            strip = captioned_rows(cells, rows, [f"t = {t:.3g}" for t in times])
            write_picture(path, to_pil_image(strip))
        else:
            save_animation(
                path, [to_pil_image(captioned_grid(x, rows, min(4, len(x)))) for x in images]
            )


def save_animation(path: Path, frames: list[Image.Image]) -> None:
    """Writes a .gif or a .webp; WebP files are smaller and have all colours."""
    duration = [1000 * SECONDS / len(frames)] * (len(frames) - 1) + [1000 * PAUSE]
    rest = {"save_all": True, "append_images": frames[1:], "duration": duration, "loop": 0}
    write_picture(path, frames[0], **rest)


class ExpertPicture:
    """Sampler callback that records images and experts at up to FRAMES steps.

    layers: indices among the sparse layers; None: the first, a middle and the last one
    """

    def __init__(self, model: DiT, num_steps: int, layers: Sequence[int] | None = None):
        if not model.config.num_experts:
            raise UserError("--experts: got a dense model, expected one with experts")
        self.num_experts = model.config.experts_per_layer
        self.grid, self.patches_of = model.config.grid, model.patches_of
        self.recorded_steps = set(evenly_spaced(num_steps, FRAMES))
        self.numbers = model.config.sparse_blocks
        self.layers = some_layers(len(self.numbers)) if layers is None else layers
        self.experts: dict[int, Tensor] = {}  # experts (N, P) of the current step, by layer
        self.frames: list[tuple[Tensor, Tensor, Tensor]] = []  # t (); (N, C, h, w); (L, N, P)
        self.shown: list[int] = []  # indices of the images in the batch, evenly spaced
        self.hooks = listen(model, self.note)

    def note(self, layer: int, x: Tensor, routing: Routing) -> None:
        if layer in self.layers and layer not in self.experts:  # only the first call of a step
            experts = strongest_experts(routing, num_tokens=x.shape[0] * x.shape[1])
            self.experts[layer] = self.patches_of(experts.view(x.shape[:2]))

    def __call__(self, state: dict) -> None:
        if state["step"] in self.recorded_steps:
            x = state["pred_xstart"]
            self.shown = evenly_spaced(len(x), MAPPED_IMAGES)
            experts = torch.stack([self.experts[layer][self.shown] for layer in self.layers])
            self.frames.append((state["t"][0], x[self.shown], experts.cpu()))
        self.experts.clear()

    def save(self, path: Path, pipeline: SamplingPipeline, captions: Sequence[str] = ()) -> None:
        """Writes an animation of up to four images, or a .png of the first image.

        captions: class names of the images in the batch
        """
        self.hooks.close()
        is_strip = path.suffix.lower() == ".png"
        most, images = (MAPPED_COLUMNS, 1) if is_strip else (FRAMES, MAPPED_IMAGES)
        self.shown = self.shown[:images]
        frames = [self.frames[i] for i in evenly_spaced(len(self.frames), most)]
        tiles = [self.tiles(pipeline.decode(x[:images]), e[:, :images]) for _, x, e in frames]
        rows = [captions[i] if captions else "image" for i in self.shown]
        times = [f"t = {t:.3g}" for t, _, _ in frames]
        layers = [f"layer {self.numbers[layer]}" for layer in self.layers]
        if is_strip:
            strip = self.draw(torch.cat(tiles, dim=1), [rows[0], *layers], times)
            write_picture(path, strip)
        else:
            steps = zip(tiles, times, strict=True)
            save_animation(
                path, [self.draw(x.transpose(0, 1), rows, [t, *layers]) for x, t in steps]
            )

    def tiles(self, images: Tensor, experts: Tensor) -> Tensor:
        """Stacks images (N, 3, H, W) and maps of experts (L, N, T) to (1 + L, N, 3, H', W').

        The brightness of a map follows the image, so that the image stays visible.
        """
        images = enlarge(images.cpu())
        maps = enlarge(self.maps(experts).flatten(0, 1), images.shape[-1])
        brightness = DARKEST + (1 - DARKEST) / 255 * rgb_to_grayscale(images)  # (N, 1, H', W')
        maps = (maps.unflatten(0, experts.shape[:2]) * brightness).byte()
        return torch.cat([images[None], maps])

    def maps(self, experts: Tensor) -> Tensor:
        """Colours experts (L, N, T); returns maps (L, N, 3, G, G') uint8, one pixel per patch."""
        colours = torch.from_numpy(expert_colours(self.num_experts))[experts]  # (L, N, T, 3)
        return colours.mT.unflatten(-1, self.grid)

    def draw(self, tiles: Tensor, rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
        """Draws tiles (rows, columns, 3, H, W), with a legend of the experts' colours below."""
        grid = to_pil_image(captioned_rows(tiles.flatten(0, 1), rows, columns))
        canvas = Image.new("RGB", (grid.width, grid.height + LEGEND))
        canvas.paste(grid)
        pen, font = ImageDraw.Draw(canvas), ImageFont.truetype(FONT, 12)
        middle = grid.height + LEGEND / 2
        pen.text((PADDING, middle), "expert", "white", font, anchor="lm")
        left = math.ceil(font.getlength("expert")) + 3 * PADDING
        width = grid.width - left
        scale = Image.fromarray(expert_colours(self.num_experts)[None, :-1])
        canvas.paste(scale.resize((width, LEGEND), Image.Resampling.NEAREST), (left, grid.height))
        stride = math.ceil(font.getlength("000") * self.num_experts / width)
        for expert in range(0, self.num_experts, stride):
            position = (left + (expert + 0.5) * width / self.num_experts, middle)
            pen.text(position, str(expert), "black", font, anchor="mm")
        return canvas


def strongest_experts(routing: Routing, num_tokens: int) -> Tensor:
    """Returns each token's expert with the largest weight, (S,); -1 for a token without experts."""
    weight = routing.weight.float()
    largest = weight.new_full((num_tokens,), -torch.inf)
    largest.scatter_reduce_(0, routing.token, weight, "amax")
    is_largest = weight == largest[routing.token]  # (R,)
    experts = torch.full_like(largest, -1, dtype=torch.int64)
    experts[routing.token[is_largest]] = routing.expert[is_largest]
    return experts


def expert_colours(num_experts: int) -> np.ndarray:
    """Returns colours (E + 1, 3) uint8; the last one, white, means no expert."""
    name = "tab10" if num_experts <= 10 else "tab20" if num_experts <= 20 else "gist_rainbow"
    values = np.arange(num_experts) if num_experts <= 20 else np.linspace(0, 1, num_experts)
    colours = matplotlib.colormaps[name](values, bytes=True)[:, :3]
    return np.concatenate([colours, np.full((1, 3), 255, np.uint8)])
