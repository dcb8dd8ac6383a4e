"""Autoencoders between pixels and latents: one class per autoencoder class of diffusers.

    vae = load_autoencoder("stabilityai/sd-vae-ft-mse", "cuda", torch.bfloat16)
    latents = vae.encode(images)       # uint8 (N, 3, H, W) to fp32 (N, C, h, w), normalised
    images = vae.decode(latents)

An autoencoder computes in the dtype of its weights, even within an autocast region. Latents are
fp32.

Shape legend: N batch, H x W image, C latent channels, h x w latent size, M channels of a raw
posterior: 2C (mean | log-variance), or C for an autoencoder without a variance
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from latents.images import to_model_range, to_uint8
from options.parts import Registry, Size, convert, sides
from runtime.errors import UserError, pluralize, reported_as
from runtime.files import hub_folder, read_json

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
NoiseFn = Callable[[Tensor], Tensor]
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
PICKLED_FILE = "diffusion_pytorch_model.bin"  # in older repositories; read with weights_only=True
# Images. Per image, a decoder needs far more memory than a model: at 512 pixels 0.8 GB.
DECODED_AT_ONCE = 4
VAE_FOLDER = "vae"  # in the folder of a pipeline
PIXELS = "pixels"  # the path that means no autoencoder; a folder of this name is ./pixels
STATE_FILE = "training_state.pt"  # written by tools/train_autoencoder.py


def local_folder(path: str, *names: str, local_files_only: bool = False) -> Path:
    """Returns the folder of an autoencoder; for a hub id OWNER/NAME, one of the hub's cache, with
    the files `names`.

    The folder of a pipeline becomes the folder of its autoencoder. OWNER/NAME is a path, not a hub
    id, if the folder OWNER exists.
    """
    folder = Path(path).expanduser()
    if os.path.isdir(folder):  # False without permission
        folder = folder.resolve()
    elif os.path.isdir(folder.parent) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(
            f"--vae-path: got {path}, expected a folder in diffusers' format, a hub id such as "
            f"{DEFAULT_VAE}, or {PIXELS}"
        )
    else:
        patterns = (*names, *(f"{VAE_FOLDER}/{name}" for name in names))
        folder = hub_folder(path, patterns, local_files_only=local_files_only)
    part = folder / VAE_FOLDER
    is_pipeline = not (folder / CONFIG_FILE).is_file() and (part / CONFIG_FILE).is_file()
    return part if is_pipeline else folder


@dataclass(frozen=True)
class LatentNorm:
    """Normalisation of latents: a sample z of the raw posterior becomes (z - shift) * scale.

    Shift and scale are one number, or one number per channel.
    """

    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            try:
                per_channel = convert(value, tuple[float, ...])
            except ValueError:
                expected = "a number, or one number per channel"
                raise ValueError(f"{name}: got {value!r:.80}, expected {expected}") from None
            if name == "scale" and 0 in per_channel:
                raise ValueError("scale: got 0, expected nonzero numbers")
            uniform = len(set(per_channel)) == 1
            object.__setattr__(self, name, per_channel[0] if uniform else per_channel)

    def check_channels(self, channels: int) -> None:
        """Requires one number, or one for each of `channels`, in shift and scale."""
        for name, value in vars(self).items():
            if isinstance(value, tuple) and len(value) != channels:
                raise ValueError(f"{name}: got {len(value)}, expected {channels}")

    @property
    def is_per_channel(self) -> bool:
        return isinstance(self.shift, tuple) or isinstance(self.scale, tuple)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()

    def __str__(self) -> str:
        if self.is_per_channel:
            return f"shift and scale per channel ({self.sha256[:12]})"
        return f"shift {self.shift:g} and scale {self.scale:g}"

    def to_dict(self) -> dict:
        """Returns the arguments of the class as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def apply(self, z: Tensor) -> Tensor:
        """Maps samples (N, C, h, w) of the raw posterior to latents."""
        shift, scale = (channels_on(value, z.device) for value in (self.shift, self.scale))
        return (z - shift) * scale

    def invert(self, latents: Tensor) -> Tensor:
        """Inverts `apply`: maps latents (N, C, h, w) to samples of the raw posterior."""
        shift, scale = (channels_on(value, latents.device) for value in (self.shift, self.scale))
        return latents / scale + shift


@lru_cache(maxsize=16)
def channels_on(values: float | tuple[float, ...], device: torch.device) -> float | Tensor:
    """Returns one number per channel as a tensor (C, 1, 1).

    The tensor is cached, because copying it makes the host wait for the GPU.
    """
    if isinstance(values, tuple):
        return torch.tensor(values, device=device)[:, None, None]
    return values


class Autoencoder:
    """Frozen autoencoder: image -> raw posterior -> normalised latent -> image.

    A subclass implements one class of diffusers. The config gives `channels`, `downsampling`
    (pixels per latent pixel, along one side) and `latent_side`. `encode_pixels` takes and
    `decode_raw` returns images in [-1, 1]; they need the model.

    config: content of config.json
    model: diffusers' module with weights; None: `load` reads them
    norm: normalisation that a model was trained with; None: the autoencoder's default
    """

    requires: str | None = None  # package that diffusers needs for this class
    has_variance = True  # whether the raw posterior has a variance
    path: str | None = None  # as checkpoints store it: an absolute folder, or a hub id
    weights_sha256: str | None = None  # digest of the fp32 weights
    device, dtype = torch.device("cpu"), torch.float32  # of the weights

    def __init__(
        self, config: Mapping, model: nn.Module | None = None, norm: LatentNorm | None = None
    ):
        self.config, self.model = config, model
        if model is not None:
            self.device, self.dtype = model.device, model.dtype
        self.channels, self.downsampling = self.dimensions()
        self.norm = norm if norm or model is None else self.default_norm()

    def dimensions(self) -> tuple[int, int]:
        """Returns the channels of a latent, and the downsampling."""
        return self.config["latent_channels"], 2 ** (len(self.config["block_out_channels"]) - 1)

    def load(
        self, device: torch.device | str, dtype: torch.dtype, norm: LatentNorm | None = None
    ) -> None:
        """Reads the weights, frozen and in eval mode."""
        import diffusers  # imported here: slow

        kind = type(self).__name__
        # diffusers, safetensors and torch raise many kinds of exceptions.
        with reported_as(f"--vae-path {self.path}: cannot load the weights", Exception):
            if self.requires and find_spec(self.requires) is None:
                fix = f"run: pip install {self.requires}"
                raise ValueError(f"{kind} requires the package {self.requires}; {fix}")
            folder = local_folder(self.path, CONFIG_FILE, WEIGHTS_FILE)
            is_pickled = False
            if not (folder / WEIGHTS_FILE).exists():
                folder = local_folder(self.path, CONFIG_FILE, PICKLED_FILE)
                is_pickled = (folder / PICKLED_FILE).exists()
            # Silence diffusers' warnings about missing tensors: the error below reports them.
            logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.CRITICAL)
            model, keys = getattr(diffusers, kind).from_pretrained(
                folder, dtype=torch.float32, low_cpu_mem_usage=False,
                output_loading_info=True, use_safetensors=not is_pickled,
            )  # fmt: skip
            for what in ("missing", "unexpected"):  # diffusers leaves missing ones uninitialised
                if names := sorted(keys[f"{what}_keys"]):
                    count = pluralize(len(names), f"{what} tensor")
                    raise ValueError(f"{count}, such as {names[0]}")
            for name, value in model.state_dict().items():
                if not value.isfinite().all():
                    raise ValueError(f"{name} has values that are infinite or nan")
            self.model, self.config = model, model.config  # with diffusers' defaults
            self.norm = norm or self.default_norm()  # before the cast: it stays fp32
        self.weights_sha256 = weights_digest(model)
        self.device, self.dtype = torch.device(device), dtype
        nn.Module.to(model, device, dtype)  # diffusers' `to` warns about fp32
        model.eval().requires_grad_(False)
        if self.device.type == "cuda":
            nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)

    def latent_side(self, pixels: int) -> int:
        """Maps the height or width of an image to that of the latent."""
        if pixels % self.downsampling:
            raise UserError(
                f"--image-size: got {pixels}, expected a multiple of {self.downsampling}, the "
                "downsampling of the autoencoder"
            )
        return pixels // self.downsampling

    def latent_size(self, image_size: Size) -> Size:
        """Maps the size of an image to the size of the latent; see `latent_side`."""
        return convert([self.latent_side(pixels) for pixels in sides(image_size)], Size)

    def default_norm(self) -> LatentNorm:
        """Returns the normalisation in the config: one factor and shift, or one per channel."""
        scaling = 1.0 if (value := self.config.get("scaling_factor")) is None else value
        mean, std = self.config.get("latents_mean"), self.config.get("latents_std")
        shift = (self.config.get("shift_factor") or 0.0) if mean is None else tuple(mean)
        return LatentNorm(shift, scaling if std is None else tuple(scaling / s for s in std))

    def encode_pixels(self, x: Tensor) -> Tensor:
        """Encodes images (N, 3, H, W) in [-1, 1]; returns the raw posterior (N, M, h, w)."""
        encoded = self.model.encode(x)
        if not self.has_variance:
            return encoded.latent
        posterior = encoded.latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def decode_raw(self, z: Tensor) -> Tensor:
        """Decodes samples (N, C, h, w) of the raw posterior; returns images (N, 3, H, W)."""
        return self.model.decode(z).sample

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """Encodes uint8 images (N, 3, H, W); returns the raw posterior (N, M, h, w)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.encode_pixels(to_model_range(images).to(self.dtype))

    def encode(self, images: Tensor, noise_fn: NoiseFn | None = None) -> Tensor:
        """Encodes uint8 images (N, 3, H, W); samples normalised latents (N, C, h, w), fp32."""
        return sample_latents(self.posterior(images), self.channels, self.norm, noise_fn)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes normalised latents (N, C, h, w), a few at a time; returns uint8 images
        (N, 3, H, W) on the CPU."""
        images = []
        with torch.autocast(latents.device.type, enabled=False):
            for part in latents.float().split(DECODED_AT_ONCE):
                z = self.norm.invert(part).to(self.dtype)
                images.append(to_uint8(self.decode_raw(z)).cpu())
        return torch.cat(images)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Encodes uint8 images (N, 3, H, W) and decodes the posterior means, a few at a time;
        returns images."""
        decoded = []
        with torch.autocast(images.device.type, enabled=False):
            for part in images.split(DECODED_AT_ONCE):
                mean = self.posterior(part)[:, : self.channels]  # (n, C, h, w)
                decoded.append(to_uint8(self.decode_raw(mean)))
        return torch.cat(decoded)


class AutoencoderKL(Autoencoder):
    """Autoencoder of Stable Diffusion, SDXL, SD3, FLUX and LightningDiT."""


class Pixels(Autoencoder):
    """No autoencoder (--vae-path pixels): the latents are the images in [-1, 1], in fp32."""

    has_variance = False
    path, weights_sha256 = PIXELS, hashlib.sha256(b"pixels").hexdigest()

    def __init__(self, norm: LatentNorm | None = None):
        super().__init__({"_class_name": "Pixels"}, norm=norm or LatentNorm())

    def dimensions(self) -> tuple[int, int]:
        return 3, 1

    def load(
        self, device: torch.device | str, dtype: torch.dtype, norm: LatentNorm | None = None
    ) -> None:
        self.device, self.norm = torch.device(device), norm or self.norm

    def encode_pixels(self, x: Tensor) -> Tensor:
        return x

    def decode_raw(self, z: Tensor) -> Tensor:
        return z


AUTOENCODERS = Registry(  # by the class name in config.json, which is also the name in diffusers
    {"AutoencoderKL": AutoencoderKL},
    elsewhere=dict.fromkeys(
        ("AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderDC", "AutoencoderRAE"),
        "extras.autoencoders",
    ),
)


def open_autoencoder(path: str, local_files_only: bool = False) -> Autoencoder:
    """Opens an autoencoder without its weights, from a folder, a hub id or the hub's cache."""
    if path == PIXELS:
        return Pixels()
    message = (
        f"--vae-path: got {path}, expected a folder in diffusers' format, a hub id that can be "
        f"downloaded, or {PIXELS} to train without an autoencoder (--config "
        "config/recipes/pixels.yaml)"
    )
    with reported_as(message, OSError, ValueError, LookupError, TypeError):
        folder = local_folder(path, CONFIG_FILE, local_files_only=local_files_only)
        if (folder / STATE_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
            raise ValueError(
                "its training is not finished; run python -m tools.train_autoencoder again"
            )
        config = read_json(folder / CONFIG_FILE)
        if (name := config.get("_class_name")) not in AUTOENCODERS:
            raise ValueError(f"its class is {name}, expected one of {', '.join(AUTOENCODERS)}")
        vae = AUTOENCODERS[name](config)  # fails if a config of another version lacks a field
    vae.path = str(folder) if os.path.isdir(Path(path).expanduser()) else path
    return vae


def load_autoencoder(
    path: str, device: torch.device | str, dtype: torch.dtype, norm: LatentNorm | None = None
) -> Autoencoder:
    """Opens an autoencoder and loads its weights.

    norm: normalisation that a model was trained with; None: the autoencoder's default
    """
    vae = open_autoencoder(path)
    vae.load(device, dtype, norm)
    return vae


def weights_digest(module: nn.Module) -> str:
    """Returns the SHA-256 of a module's weights."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
        sha.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def sample_latents(
    moments: Tensor, channels: int, norm: LatentNorm, noise_fn: NoiseFn | None = None
) -> Tensor:
    """Samples normalised latents (N, C, h, w), fp32, from a raw posterior (N, M, h, w).

    channels: C; with M = C, the posterior itself is the latent
    noise_fn: x -> noise like x; None: torch.randn

    The noise is fp32 even for fp16 moments, so that encoded images and cached moments give the same
    latents. The result is contiguous, because torch.randn_like fills a tensor in memory order.
    """
    z, log_variance = moments.float().tensor_split([channels], dim=1)  # (N, C or 0, h, w) each
    if log_variance.shape[1]:
        noise = noise_fn(z) if noise_fn else torch.randn(z.shape, device=z.device)
        z = z + (0.5 * log_variance).exp() * noise
    return norm.apply(z).contiguous()
