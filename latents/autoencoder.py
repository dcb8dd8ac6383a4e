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

from latents.loading import to_model_range, to_uint8
from runtime.digest import weights_digest
from runtime.errors import UserError
from runtime.untrusted import check_safetensors, check_torch_zip, read_json

MAX_PARAMETERS = 10**9  # those of Stable Diffusion, SDXL and FLUX have 84 million

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"


def load_autoencoder_config(path: str, local_files_only: bool = False) -> FrozenDict:
    """Reads only the config of an AutoencoderKL, from a folder, a hub id or the hub's cache."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise UserError(f"--vae-path: got {path}, expected a folder with a config.json in it")
    try:
        if Path(path).exists():
            stored = read_json(Path(path) / "config.json")
            if not isinstance(stored, dict):
                raise ValueError(f"got a {type(stored).__name__} in config.json, expected {{}}")
        config = AutoencoderKL.load_config(path, local_files_only=local_files_only)
        if (name := config.get("_class_name")) != "AutoencoderKL":
            raise ValueError(f"got {name!s:.80}, expected AutoencoderKL")
        check_autoencoder(config)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--vae-path: got {path}, expected a folder in diffusers' format or a hub id that can "
            f"be reached ({str(error).strip().splitlines()[0]})"
        ) from None
    return FrozenDict({"shift_factor": 0.0, **config})


LARGEST = {"latent_channels": 1024, "layers_per_block": 32, "in_channels": 3, "out_channels": 3}


def check_autoencoder(config: dict) -> None:
    """Raises ValueError unless a config is of an autoencoder of images, of a size that can be."""
    channels = config.get("block_out_channels")
    sizes = isinstance(channels, list | tuple) and all(type(n) is int for n in channels)
    if not sizes or not 0 < len(channels) <= 8 or not 0 < min(channels) <= max(channels) <= 8192:
        raise ValueError(
            f"block_out_channels: got {str(channels)[:80]}, expected 1 to 8 numbers up to 8192"
        )
    for name, largest in LARGEST.items():
        value = config.get(name, 1)
        if type(value) is not int or not 0 < value <= largest:
            raise ValueError(f"{name}: got {str(value)[:80]}, expected 1 to {largest}")
    for name, value in (
        ("scaling_factor", config.get("scaling_factor", 1.0)),
        ("shift_factor", config.get("shift_factor") or 0.0),
    ):
        if type(value) not in (int, float) or not abs(value) < 1e6:
            raise ValueError(f"{name}: got {str(value)[:80]}, expected a number")


def load_autoencoder(path: str, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
    """Loads an AutoencoderKL, frozen, in eval mode; UserError when its weights are not there."""
    config = load_autoencoder_config(path)
    try:
        check_autoencoder_files(Path(path), config)
        vae = AutoencoderKL.from_pretrained(path, torch_dtype=dtype, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers, safetensors and torch each raise their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--vae-path {path}: cannot load the weights ({reason})") from None
    return vae.to(device).eval().requires_grad_(False)


def check_autoencoder_files(folder: Path, config: dict) -> None:
    """Raises ValueError for a model of more numbers than its files have bytes, or hostile files.

    diffusers loads safetensors, or else .bin files with weights_only.
    """
    with torch.device("meta"):
        numbers = sum(weight.numel() for weight in AutoencoderKL.from_config(config).parameters())
    if numbers > MAX_PARAMETERS:
        raise ValueError(f"got {numbers} numbers, expected at most {MAX_PARAMETERS}")
    if not folder.is_dir():
        return
    for path in folder.glob("*.safetensors"):
        check_safetensors(path)
    for path in folder.glob("*.bin"):
        check_torch_zip(path)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if files and numbers > (size := sum(path.stat().st_size for path in files)):
        raise ValueError(f"the config is of {numbers} numbers, the weights have {size} bytes")


def autoencoder_digest(path: str) -> str:
    """The SHA-256 of an autoencoder's fp32 weights, whatever path leads to them."""
    return weights_digest(load_autoencoder(path, "cpu", torch.float32))


def downsampling_of(config: FrozenDict) -> int:
    """How many pixels of a side make one of the latent's."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def latent_geometry(config: FrozenDict, image_size: int) -> tuple[int, int]:
    """Returns (latent size, latent channels) of an autoencoder for square images."""
    factor = downsampling_of(config)
    if image_size % factor:
        raise UserError(
            f"--image-size: got {image_size}, expected a multiple of the autoencoder's factor "
            f"{factor}"
        )
    return image_size // factor, config["latent_channels"]


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The posterior of uint8 images (N, 3, H, W): mean | log-variance, (N, 2C, h, w)."""
    posterior = vae.encode(to_model_range(images).to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def sample_posterior(moments: Tensor, *, scaling_factor: float, shift_factor: float) -> Tensor:
    """Draws latents (N, C, h, w) fp32, scaled, from moments (N, 2C, h, w): mean | log-variance.

    The noise is fp32 in any precision of the moments, so that latents encoded on the fly and from a
    cache are drawn alike. The latents are contiguous, since noise made like them is drawn in the
    order of their memory. Latents are (z - shift_factor) * scaling_factor.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)  # (N, C, h, w) each
    noise = torch.randn(mean.shape, device=mean.device)
    z = mean + (0.5 * log_variance).exp() * noise
    return ((z - shift_factor) * scaling_factor).contiguous()


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Samples the posterior of uint8 images (N, 3, H, W); latents (N, C, h, w) fp32, scaled."""
    moments = encode_moments(vae, images)
    return sample_posterior(
        moments, scaling_factor=vae.config.scaling_factor, shift_factor=shift(vae)
    )


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
