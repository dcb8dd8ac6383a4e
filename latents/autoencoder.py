"""The autoencoder between pixels and latents: diffusers' AutoencoderKL, as its config says.

It computes in its own dtype, also inside an autocast region. Latents are fp32 and scaled:
(z - shift_factor) * scaling_factor.

Shape legend: N batch, H x W image, C latent channels, h x w latent size = H/f x W/f
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from latents.images import to_model_range, to_uint8
from runtime.errors import UserError, counted, reported_as
from runtime.files import read_json

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
NoiseFn = Callable[[Tensor], Tensor]
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"


def resolve_vae_path(path: str) -> str:
    """A path as a checkpoint stores it: a folder absolute, a hub id OWNER/NAME as it is.

    UserError for neither. A name in a folder that exists is a path and not a hub id.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if folder.parent.is_dir() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(
            f"--vae-path: got {path}, expected a folder in diffusers' format or a hub id such as "
            f"{DEFAULT_VAE}"
        )
    return path


def fetch_files(path: str, *names: str, local_files_only: bool = False) -> Path:
    """A folder as it is, or the folder of the hub's cache with these files of a hub id."""
    if Path(path).is_dir():
        return Path(path)
    for name in names:
        file = hf_hub_download(path, name, local_files_only=local_files_only)
    return Path(file).parent


def load_autoencoder_config(path: str, local_files_only: bool = False) -> dict:
    """Reads only the config of an AutoencoderKL, from a folder, a hub id or the hub's cache."""
    path = resolve_vae_path(path)
    expected = "a folder in diffusers' format or a hub id that can be reached"
    with reported_as(f"--vae-path: got {path}, expected {expected}", OSError, ValueError):
        folder = fetch_files(path, CONFIG_FILE, local_files_only=local_files_only)
        config = read_json(folder / CONFIG_FILE)
        if (name := config.get("_class_name")) != "AutoencoderKL":
            raise ValueError(f"got a {name}, expected an AutoencoderKL")
    return config


def load_autoencoder(path: str, device: torch.device | str, dtype: torch.dtype) -> AutoencoderKL:
    """Loads an AutoencoderKL, frozen, in eval mode; UserError when its weights are not there."""
    path = resolve_vae_path(path)
    # Diffusers, safetensors and torch each raise their own.
    with reported_as(f"--vae-path {path}: cannot load the weights", Exception):
        folder = fetch_files(path, CONFIG_FILE, WEIGHTS_FILE)
        vae, keys = AutoencoderKL.from_pretrained(
            folder, torch_dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True
        )
        for kind in ("missing", "unexpected"):  # diffusers leaves a missing tensor uninitialised
            if names := sorted(keys[f"{kind}_keys"]):
                raise ValueError(f"{counted(len(names), f'{kind} tensor')}, such as {names[0]}")
    is_gpu = torch.device(device).type == "cuda"  # whose convolutions want channels last
    layout = torch.channels_last if is_gpu else torch.preserve_format
    return vae.to(device, memory_format=layout).eval().requires_grad_(False)


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 of a module's weights."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
        sha.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def autoencoder_digest(path: str) -> str:
    """The digest of an autoencoder's fp32 weights, by folder or hub id."""
    return weights_digest(load_autoencoder(path, "cpu", torch.float32))


def downsampling_of(config: dict) -> int:
    """How many pixels of a side make one of the latent's."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def latent_geometry(config: dict, image_size: int) -> tuple[int, int]:
    """Returns (latent size, latent channels) of an autoencoder for square images."""
    factor = downsampling_of(config)
    if image_size % factor:
        raise UserError(
            f"--image-size: got {image_size}, expected a multiple of {factor}, the autoencoder's"
        )
    return image_size // factor, config["latent_channels"]


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The posterior of uint8 images (N, 3, H, W): mean | log-variance, (N, 2C, h, w)."""
    with torch.autocast(images.device.type, enabled=False):
        posterior = vae.encode(to_model_range(images).to(vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)


def sample_posterior(moments: Tensor, config, noise_fn: NoiseFn | None = None) -> Tensor:
    """Draws latents (N, C, h, w) fp32, scaled, from moments (N, 2C, h, w): mean | log-variance.

    config: an autoencoder's or a cache's, for scaling_factor and shift_factor
    noise_fn: gives noise like a tensor; None: torch's generator
    The noise is fp32 even of fp16 moments, so that encoding now and a cache draw alike. The latents
    are contiguous, because noise like them is drawn in the order of their memory.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)  # (N, C, h, w) each
    noise = noise_fn(mean) if noise_fn else torch.randn(mean.shape, device=mean.device)
    z = mean + (0.5 * log_variance).exp() * noise
    return ((z - (config.shift_factor or 0.0)) * config.scaling_factor).contiguous()


def encode(vae: AutoencoderKL, images: Tensor, noise_fn: NoiseFn | None = None) -> Tensor:
    """Samples the posterior of uint8 images (N, 3, H, W); latents (N, C, h, w) fp32, scaled."""
    return sample_posterior(encode_moments(vae, images), vae.config, noise_fn)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Maps latents (N, C, h, w) as from `encode` to uint8 images (N, 3, H, W)."""
    z = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    with torch.autocast(z.device.type, enabled=False):
        return to_uint8(vae.decode(z.to(vae.dtype)).sample)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Maps uint8 images (N, 3, H, W) to what is left of them in the mean of their latents."""
    mean, _ = encode_moments(vae, images).chunk(2, dim=1)  # (N, C, h, w)
    with torch.autocast(images.device.type, enabled=False):
        return to_uint8(vae.decode(mean).sample)
