"""Flags of the scripts that read images and an autoencoder."""

from dataclasses import dataclass

from options.parts import Config, Size, option

IMAGES_HELP = (
    "images: a folder with one sub-folder per class, or of images without classes; "
    "datasets:ID[:SPLIT] (a hub id or a folder); or WebDataset shards, DATA-{000..099}.tar"
)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Config):
    data_path: str | None = option(None, group="data", help=IMAGES_HELP)
    vae_path: str | None = option(
        None,
        help="autoencoder or pipeline: a folder in diffusers' format, or a hub id; or pixels, to "
        "train without an autoencoder, with the settings of config/recipes/pixels.yaml (default: "
        "stabilityai/sd-vae-ft-mse, or the autoencoder of cached latents)",
    )
    image_size: Size | None = option(
        None, ge=1,
        help="pixels per side of a square, or height and width (default: 256, or the size of "
        "cached latents)",
    )  # fmt: skip
    flip: bool = option(
        True,
        help="also use mirrored images; pass False if left and right have a meaning",
    )
    num_workers: int | None = option(
        None, ge=0,
        help="worker processes per rank that read images, at most the rank's share of the cores "
        "(default: 4 with a GPU, 0 without, because training then needs all cores)",
    )  # fmt: skip
