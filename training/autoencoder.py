"""The autoencoder between pixels and latents: diffusers' AutoencoderKL, as its config says.

    vae = load_autoencoder("stabilityai/sd-vae-ft-mse", device, torch.bfloat16)
    latents = encode(vae, images)

Shape legend: N batch, H x W image, C latent channels, h x w latent size = H/f x W/f
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from training.data import to_model_range, to_uint8
from training.errors import UserError


def load_autoencoder_config(path: str, local_files_only: bool = False) -> FrozenDict:
    """Reads only the config of an AutoencoderKL, from a folder, a hub id or the hub's cache."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise UserError(f"--vae-path: got {path}, expected a folder with a config.json in it")
    try:
        config = AutoencoderKL.load_config(path, local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--vae-path: got {path}, expected a folder in diffusers' format or a hub id that can "
            f"be reached ({str(error).strip().splitlines()[0]})"
        ) from None
    if (name := config.get("_class_name")) != "AutoencoderKL":
        raise UserError(f"--vae-path {path}: got {name}, expected AutoencoderKL")
    return FrozenDict({"shift_factor": 0.0, **config})


def load_autoencoder(path: str, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
    """Loads an AutoencoderKL, frozen, in eval mode; UserError when its weights are not there."""
    load_autoencoder_config(path)
    try:
        vae = AutoencoderKL.from_pretrained(path, torch_dtype=dtype, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers, safetensors and torch each raise their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--vae-path {path}: cannot load the weights ({reason})") from None
    return vae.to(device).eval().requires_grad_(False)


def latent_geometry(config: FrozenDict, image_size: int) -> tuple[int, int]:
    """Returns (latent size, latent channels) of an autoencoder for square images."""
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if image_size % factor:
        raise UserError(
            f"--image-size: got {image_size}, expected a multiple of the autoencoder's factor "
            f"{factor}"
        )
    return image_size // factor, config["latent_channels"]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Samples the posterior of uint8 images (N, 3, H, W); latents (N, C, h, w) fp32, scaled.

    Latents are (z - shift_factor) * scaling_factor, both from the autoencoder's config.
    """
    posterior = vae.encode(to_model_range(images).to(vae.dtype)).latent_dist
    return (posterior.sample().float() - shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Maps latents (N, C, h, w) as from `encode` to uint8 images (N, 3, H, W)."""
    z = latents.float() / vae.config.scaling_factor + shift(vae)
    return to_uint8(vae.decode(z.to(vae.dtype)).sample)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Maps uint8 images (N, 3, H, W) to what is left of them in the mean of their latents."""
    z = vae.encode(to_model_range(images).to(vae.dtype)).latent_dist.mean  # (N, C, h, w)
    return to_uint8(vae.decode(z).sample)


def shift(vae: AutoencoderKL) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
