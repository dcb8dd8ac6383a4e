"""The patches that each expert weighs most, each with its surroundings in the image.

The memory depends on layers and experts, but not on the number of images.

Shape legend:
    L layers, N images of a batch, P patches of an image, E experts, M = MOST entries of an expert
"""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MOST = 16  # entries of an expert
AROUND = 5  # side of a crop in patches, at most that of the image
SIDE = 64  # pixels, largest side of a crop
NONE = -1  # in place of an image: fewer entries than MOST


class Gallery:
    """Collects, for each layer and expert, the M images with the largest weight at one patch.

    The weight of an expert at a patch is its mean over the sampling steps.
    """

    def __init__(self, layers: int, experts: int):
        shape = layers, experts, MOST
        self.weight = torch.zeros(shape)
        self.image = torch.full(shape, NONE)  # number of the image
        self.place = torch.zeros(shape, dtype=torch.int64)  # number of the patch
        self.crops: dict[tuple[int, int], bytes] = {}  # WebP, by image and place

    def add(
        self, weights: Sequence[Tensor], grid: tuple[int, int], first: int,
        decode: Callable[[list[int]], Tensor],
    ) -> None:  # fmt: skip
        """Adds a batch.

        weights: mean weights (N, P, E) of each layer
        first: number of the first image
        decode: returns the images (n, 3, H, W) uint8 with these indices in the batch
        """
        best = [layer.max(dim=1) for layer in weights]  # (N, E) each
        weight = torch.stack([values for values, _ in best]).mT.cpu()  # (L, E, N)
        place = torch.stack([places for _, places in best]).mT.cpu()
        image = (first + torch.arange(weight.shape[-1])).where(weight > 0, NONE)
        entries = (self.weight, weight), (self.image, image), (self.place, place)
        joined = [torch.cat(pair, dim=-1) for pair in entries]  # (L, E, M + N)
        order = joined[0].argsort(dim=-1, descending=True, stable=True)[..., :MOST]
        self.weight, self.image, self.place = (x.gather(-1, order) for x in joined)
        found = self.keys()
        new = sorted(found - self.crops.keys())
        self.crops = {key: crop for key, crop in self.crops.items() if key in found}
        numbers = sorted({number for number, _ in new})
        pictures = decode([number - first for number in numbers]) if numbers else ()
        shown = dict(zip(numbers, pictures, strict=True))
        self.crops |= {key: encode(crop(shown[key[0]], key[1], grid)) for key in new}

    def keys(self) -> set[tuple[int, int]]:
        """Returns the image and the place of every entry."""
        both = torch.stack([self.image, self.place], dim=-1)[self.image != NONE]
        return {(image, place) for image, place in both.unique(dim=0).tolist()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the fields gallery_* of `RoutingCounts`."""
        numbers = {key: i for i, key in enumerate(self.crops)}
        pairs = zip(self.image.flatten().tolist(), self.place.flatten().tolist(), strict=True)
        crop = np.array([numbers.get(pair, NONE) for pair in pairs], np.int32)
        return {
            "gallery_weight": self.weight.numpy(),
            "gallery_image": self.image.numpy(),
            "gallery_place": self.place.numpy(),
            "gallery_crop": crop.reshape(self.image.shape),
            "crops": np.frombuffer(b"".join(self.crops.values()), np.uint8),
            "crop_ends": np.cumsum([len(x) for x in self.crops.values()], dtype=np.int64),
        }


def surroundings(place: int, grid: tuple[int, int]) -> tuple[range, range]:
    """Returns the rows and columns of the patches of a crop: the patch is in the middle, or nearer
    to an edge of the image."""
    first = [max(0, min(at - AROUND // 2, side - AROUND))
             for at, side in zip(divmod(place, grid[1]), grid, strict=True)]  # fmt: skip
    rows, columns = (range(at, min(at + AROUND, side))
                     for at, side in zip(first, grid, strict=True))  # fmt: skip
    return rows, columns


def crop(image: Tensor, place: int, grid: tuple[int, int]) -> Image.Image:
    """Cuts the surroundings of a patch out of an image (3, H, W) uint8."""
    height, width = image.shape[1] // grid[0], image.shape[2] // grid[1]  # of a patch
    rows, columns = surroundings(place, grid)
    part = image[:, rows.start * height : rows.stop * height]
    part = part[:, :, columns.start * width : columns.stop * width]
    picture = Image.fromarray(part.permute(1, 2, 0).contiguous().cpu().numpy())
    scale = min(1, SIDE / max(picture.size))
    if scale < 1:
        picture = picture.resize([math.ceil(side * scale) for side in picture.size])
    return picture


def encode(picture: Image.Image) -> bytes:
    """Encodes a picture as WebP."""
    content = io.BytesIO()
    picture.save(content, "webp", quality=80)
    return content.getvalue()
