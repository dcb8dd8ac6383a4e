"""The flags of a script that reads images for an autoencoder."""

from dataclasses import dataclass

from parts import Size
from runtime.flags import flag, free


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    data_path: str | None = free(
        None, group="data",
        help="folder with one sub-folder of images for each class, or with images and no classes; "
        "datasets:ID[:SPLIT] (a hub id or a folder); or WebDataset shards, DATA-{000..099}.tar",
    )  # fmt: skip
    vae_path: str | None = free(
        None,
        help="autoencoder: a folder in diffusers' format, or a hub id (default: "
        "stabilityai/sd-vae-ft-mse, or what cached latents say)",
    )
    image_size: Size | None = flag(
        None, least=1,
        help="pixels a side of a square, or height and width (default: 256, or what cached latents "
        "say)",
    )  # fmt: skip
    flip: bool = flag(True, help="use images mirrored too; False where left and right matter")
    num_workers: int | None = free(
        None, least=0,
        help="processes of each rank that read images, at most its share of the cores (default: 4 "
        "with a GPU, 0 without: training needs those cores)",
    )  # fmt: skip
