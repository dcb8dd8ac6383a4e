"""Autoencoders between pixels and latents: classes of diffusers, each with one class here.

    vae = load_autoencoder("stabilityai/sd-vae-ft-mse", "cuda", torch.bfloat16)
    latents = vae.encode(images)       # uint8 (N, 3, H, W) to fp32 (N, C, h, w), normalised
    images = vae.decode(latents)

An autoencoder computes in its own dtype, also inside an autocast region. Latents are fp32.

Shape legend: N batch, H x W image, C latent channels, h x w latent size, M = 2C channels of a raw
posterior, mean | log-variance, or C where an autoencoder gives a latent without a variance
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latents.images import to_model_range, to_uint8
from parts import Size, as_size, is_of_type, sides
from runtime.errors import UserError, counted, reported_as
from runtime.files import read_json

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
NoiseFn = Callable[[Tensor], Tensor]
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
STATE_FILE = "training_state.pt"  # of scripts/train_autoencoder.py


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
    from huggingface_hub import snapshot_download  # slow to import

    # hf_hub_download would retry for 24 seconds, and print a line each time, without a network.
    return Path(
        snapshot_download(
            path, allow_patterns=list(names), local_files_only=local_files_only, etag_timeout=5
        )
    )


@dataclass(frozen=True)
class LatentNorm:
    """Normalisation of latents: a sample z of the raw posterior becomes (z - shift) * scale.

    Shift and scale are one number, or one for each channel. ValueError for anything else.
    """

    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not is_of_type(value, float | tuple[float, ...]):
                raise ValueError(f"{name}: got {value!r:.80}, expected a number for each channel")
            values = value if isinstance(value, list | tuple) else [value]
            per_channel = tuple(map(float, values))
            if name == "scale" and 0 in per_channel:
                raise ValueError("scale: got 0, expected a number above or below")
            uniform = len(set(per_channel)) == 1
            object.__setattr__(self, name, per_channel[0] if uniform else per_channel)

    @property
    def is_per_channel(self) -> bool:
        return isinstance(self.shift, tuple) or isinstance(self.scale, tuple)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()

    def __str__(self) -> str:
        if self.is_per_channel:
            return f"a shift and a scale for each channel ({self.sha256[:12]})"
        return f"shift {self.shift:g} and scale {self.scale:g}"

    def to_dict(self) -> dict:
        """What the class takes, as JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def apply(self, z: Tensor) -> Tensor:
        """Maps samples (N, C, h, w) of the raw posterior to latents."""
        shift, scale = (channels_on(value, z.device) for value in (self.shift, self.scale))
        return (z - shift) * scale

    def invert(self, latents: Tensor) -> Tensor:
        """Maps latents (N, C, h, w) to what `apply` made them of."""
        shift, scale = (channels_on(value, latents.device) for value in (self.shift, self.scale))
        return latents / scale + shift


@lru_cache(maxsize=16)
def channels_on(values: float | tuple[float, ...], device: torch.device) -> float | Tensor:
    """Numbers of the channels as a tensor (C, 1, 1), made once: a copy to a GPU waits for it."""
    if isinstance(values, tuple):
        return torch.tensor(values, device=device)[:, None, None]
    return values


class Autoencoder:
    """A frozen autoencoder: image -> raw posterior -> normalised latent -> image.

    A subclass knows one class of diffusers. From the config it has `downsampling`, pixels of a side
    that make one of the latent's, `channels` and `latent_side`; of a model `own_norm`,
    `encode_pixels` and `decode_raw`, whose images are in [-1, 1].

    config: as config.json has it
    model: diffusers' module with its weights; without it, only the config's facts are known
    norm: of a training, in place of the autoencoder's own
    """

    requires: str | None = None  # a package that diffusers needs for this class
    has_variance = True  # whether the raw posterior has one

    def __init__(
        self, config: Mapping, model: nn.Module | None = None, norm: LatentNorm | None = None
    ):
        self.config, self.model = config, model
        self.norm = norm if norm or model is None else self.own_norm()

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        return self.config["latent_channels"]

    def latent_side(self, pixels: int) -> int:
        """The latent's height or width of an image's; UserError for a size that does not fit."""
        if pixels % self.downsampling:
            raise UserError(
                f"--image-size: got {pixels}, expected a multiple of {self.downsampling}, the "
                "autoencoder's"
            )
        return pixels // self.downsampling

    def latent_size(self, image_size: Size) -> Size:
        """The latent's height and width of an image's; see `latent_side`."""
        return as_size([self.latent_side(pixels) for pixels in sides(image_size)])

    def own_norm(self) -> LatentNorm:
        """scaling_factor and shift_factor, or mean and std of each channel, as the config has."""
        scaling = self.config.get("scaling_factor") or 1.0
        mean, std = self.config.get("latents_mean"), self.config.get("latents_std")
        shift = (self.config.get("shift_factor") or 0.0) if mean is None else tuple(mean)
        return LatentNorm(shift, scaling if std is None else tuple(scaling / s for s in std))

    def encode_pixels(self, x: Tensor) -> Tensor:
        """The raw posterior (N, M, h, w) of images (N, 3, H, W) in [-1, 1]."""
        posterior = self.model.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def decode_raw(self, z: Tensor) -> Tensor:
        """Images (N, 3, H, W) of samples (N, C, h, w) of the raw posterior."""
        return self.model.decode(z).sample

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def weights_sha256(self) -> str:
        return weights_digest(self.model)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """The raw posterior (N, M, h, w) of uint8 images (N, 3, H, W)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.encode_pixels(to_model_range(images).to(self.model.dtype))

    def encode(self, images: Tensor, noise_fn: NoiseFn | None = None) -> Tensor:
        """Samples latents (N, C, h, w) fp32, normalised, of uint8 images (N, 3, H, W)."""
        return sample_latents(self.posterior(images), self.channels, self.norm, noise_fn)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Maps latents (N, C, h, w) as from `encode` to uint8 images (N, 3, H, W)."""
        z = self.norm.invert(latents.float())
        with torch.autocast(z.device.type, enabled=False):
            return to_uint8(self.decode_raw(z.to(self.model.dtype)))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Maps uint8 images (N, 3, H, W) to what is left of them in the mean of their latents."""
        mean = self.posterior(images)[:, : self.channels]  # (N, C, h, w)
        with torch.autocast(images.device.type, enabled=False):
            return to_uint8(self.decode_raw(mean))


class AutoencoderKL(Autoencoder):
    """The autoencoder of Stable Diffusion, SDXL, SD3, FLUX and LightningDiT."""


class AutoencoderKLFlux2(AutoencoderKL):
    """FLUX.2's: latents in patches, normalised by the statistics of its batch norm."""

    @property
    def patch(self) -> int:
        return self.config["patch_size"][0]

    @property
    def downsampling(self) -> int:
        return super().downsampling * self.patch

    @property
    def channels(self) -> int:
        return super().channels * self.patch**2

    def own_norm(self) -> LatentNorm:
        bn = self.model.bn
        scale = (bn.running_var.double() + bn.eps).rsqrt()
        return LatentNorm(tuple(bn.running_mean.tolist()), tuple(scale.tolist()))

    def encode_pixels(self, x: Tensor) -> Tensor:
        # The channels of a patch are neighbours, so means still come before log-variances.
        return F.pixel_unshuffle(super().encode_pixels(x), self.patch)

    def decode_raw(self, z: Tensor) -> Tensor:
        return super().decode_raw(F.pixel_shuffle(z, self.patch))


class AutoencoderKLQwenImage(Autoencoder):
    """Qwen-Image's, of videos; an image is a video of one frame."""

    @property
    def downsampling(self) -> int:
        return 2 ** len(self.config["temperal_downsample"])

    @property
    def channels(self) -> int:
        return self.config["z_dim"]

    def encode_pixels(self, x: Tensor) -> Tensor:
        return super().encode_pixels(x[:, :, None])[:, :, 0]

    def decode_raw(self, z: Tensor) -> Tensor:
        return super().decode_raw(z[:, :, None])[:, :, 0]


class AutoencoderDC(Autoencoder):
    """SANA's deep-compression autoencoder (arXiv 2410.10733), without a variance."""

    has_variance = False

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.config["encoder_block_out_channels"]) - 1)

    def encode_pixels(self, x: Tensor) -> Tensor:
        return self.model.encode(x).latent


class AutoencoderRAE(Autoencoder):
    """Representation autoencoder (arXiv 2510.11690): features of a frozen encoder, such as DINOv2,
    without a variance. Its encode and decode normalise, and take squares of one size."""

    requires = "transformers"
    has_variance = False

    @property
    def downsampling(self) -> int:
        return self.config["patch_size"]

    @property
    def channels(self) -> int:
        return self.config["encoder_hidden_size"]

    def latent_side(self, pixels: int) -> int:
        side = self.config["encoder_input_size"] // self.config["encoder_patch_size"]
        if pixels != (expected := side * self.downsampling):
            raise UserError(f"--image-size: got {pixels}, expected {expected}, the autoencoder's")
        return side

    def own_norm(self) -> LatentNorm:
        return LatentNorm()

    def encode_pixels(self, x: Tensor) -> Tensor:
        return self.model.encode(x / 2 + 0.5).latent

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample * 2 - 1


AUTOENCODERS = {  # by the class that a config.json names, diffusers' of the same name
    kind.__name__: kind
    for kind in (
        AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderDC, AutoencoderRAE
    )
}  # fmt: skip


def wrap_autoencoder(model: nn.Module, norm: LatentNorm | None = None) -> Autoencoder:
    """Makes the Autoencoder of a module of diffusers."""
    return AUTOENCODERS[type(model).__name__](model.config, model, norm)


def open_autoencoder(path: str, local_files_only: bool = False) -> Autoencoder:
    """Reads only the config of an autoencoder, from a folder, a hub id or the hub's cache."""
    path = resolve_vae_path(path)
    expected = "a folder in diffusers' format or a hub id that can be reached"
    message = f"--vae-path: got {path}, expected {expected}"
    with reported_as(message, OSError, ValueError, LookupError, TypeError):
        folder = fetch_files(path, CONFIG_FILE, local_files_only=local_files_only)
        if (folder / STATE_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
            raise ValueError("its training has not finished: run train_autoencoder.py again")
        config = read_json(folder / CONFIG_FILE)
        if (name := config.get("_class_name")) not in AUTOENCODERS:
            raise ValueError(f"its class is {name}, expected one of {', '.join(AUTOENCODERS)}")
        vae = AUTOENCODERS[name](config)
        _ = vae.channels, vae.downsampling  # of which a config of another version may say nothing
    return vae


def load_autoencoder(
    path: str, device: torch.device | str, dtype: torch.dtype, norm: LatentNorm | None = None
) -> Autoencoder:
    """Loads an autoencoder, frozen, in eval mode; UserError when its weights are not there.

    norm: of a training, in place of the autoencoder's own
    """
    import diffusers  # slow to import

    kind = type(open_autoencoder(path))
    path = resolve_vae_path(path)
    # Diffusers, safetensors and torch each raise their own.
    with reported_as(f"--vae-path {path}: cannot load the weights", Exception):
        if kind.requires and find_spec(kind.requires) is None:
            raise ValueError(f"{kind.__name__} needs the package {kind.requires}: pip install it")
        folder = fetch_files(path, CONFIG_FILE, WEIGHTS_FILE)
        model, keys = getattr(diffusers, kind.__name__).from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
        for what in ("missing", "unexpected"):  # diffusers leaves a missing tensor uninitialised
            if names := sorted(keys[f"{what}_keys"]):
                raise ValueError(f"{counted(len(names), f'{what} tensor')}, such as {names[0]}")
        vae = wrap_autoencoder(model, norm)  # its own norm is fp32, whatever the weights become
    is_gpu = torch.device(device).type == "cuda"  # whose convolutions want channels last
    layout = torch.channels_last if is_gpu else torch.preserve_format
    nn.Module.to(model, device, dtype, memory_format=layout)  # diffusers' own warns about fp32
    model.eval().requires_grad_(False)
    return vae


def weights_digest(module: nn.Module) -> str:
    """The SHA-256 of a module's weights."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
        sha.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def sample_latents(
    moments: Tensor, channels: int, norm: LatentNorm, noise_fn: NoiseFn | None = None
) -> Tensor:
    """Samples latents (N, C, h, w) fp32, normalised, of a raw posterior (N, M, h, w).

    channels: C; a posterior of only C channels is the latent
    noise_fn: gives noise like a tensor; None: torch's generator
    The noise is fp32 even of fp16 moments, so that encoding now and a cache draw alike. The latents
    are contiguous, because noise like them is drawn in the order of their memory.
    """
    z, log_variance = moments.float().tensor_split([channels], dim=1)  # (N, C or 0, h, w) each
    if log_variance.shape[1]:
        noise = noise_fn(z) if noise_fn else torch.randn(z.shape, device=z.device)
        z = z + (0.5 * log_variance).exp() * noise
    return norm.apply(z).contiguous()
