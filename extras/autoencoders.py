"""Autoencoders of FLUX.2, Qwen-Image, SANA (DC) and RAE; see `latents.autoencoder.Autoencoder`.

Shape legend: N batch, H x W image, C latent channels, h x w latent size, M channels of a raw
posterior
"""

import torch.nn.functional as F
from torch import Tensor

from latents.autoencoder import AUTOENCODERS, Autoencoder, AutoencoderKL, LatentNorm
from runtime.errors import UserError


class AutoencoderKLFlux2(AutoencoderKL):
    """Autoencoder of FLUX.2: latents in patches, normalised by the statistics of its batch norm."""

    @property
    def patch(self) -> int:
        return self.config["patch_size"][0]

    def dimensions(self) -> tuple[int, int]:
        channels, downsampling = super().dimensions()
        return channels * self.patch**2, downsampling * self.patch

    def default_norm(self) -> LatentNorm:
        bn = self.model.bn
        scale = (bn.running_var.double() + bn.eps).rsqrt()
        return LatentNorm(tuple(bn.running_mean.tolist()), tuple(scale.tolist()))

    def encode_pixels(self, x: Tensor) -> Tensor:
        # pixel_unshuffle keeps the channels of a patch together, so means precede log-variances.
        return F.pixel_unshuffle(super().encode_pixels(x), self.patch)

    def decode_raw(self, z: Tensor) -> Tensor:
        return super().decode_raw(F.pixel_shuffle(z, self.patch))


class AutoencoderKLQwenImage(Autoencoder):
    """Video autoencoder of Qwen-Image; an image is encoded as a video of one frame."""

    def dimensions(self) -> tuple[int, int]:
        return self.config["z_dim"], 2 ** len(self.config["temperal_downsample"])

    def encode_pixels(self, x: Tensor) -> Tensor:
        return super().encode_pixels(x[:, :, None])[:, :, 0]

    def decode_raw(self, z: Tensor) -> Tensor:
        return super().decode_raw(z[:, :, None])[:, :, 0]


class AutoencoderDC(Autoencoder):
    """Deep-compression autoencoder of SANA (arXiv 2410.10733), without a variance."""

    has_variance = False

    def dimensions(self) -> tuple[int, int]:
        blocks = self.config["encoder_block_out_channels"]
        return self.config["latent_channels"], 2 ** (len(blocks) - 1)


class AutoencoderRAE(Autoencoder):
    """Representation autoencoder (arXiv 2510.11690), whose latents are features of a frozen encoder
    such as DINOv2, without a variance.

    diffusers' module normalises them, and takes square images of one size.
    """

    requires = "transformers"
    has_variance = False

    def dimensions(self) -> tuple[int, int]:
        return self.config["encoder_hidden_size"], self.config["patch_size"]

    def latent_side(self, pixels: int) -> int:
        side = self.config["encoder_input_size"] // self.config["encoder_patch_size"]
        if pixels != (expected := side * self.downsampling):
            raise UserError(
                f"--image-size: got {pixels}, expected {expected}, the autoencoder's image size"
            )
        return side

    def default_norm(self) -> LatentNorm:
        return LatentNorm()

    def encode_pixels(self, x: Tensor) -> Tensor:
        return super().encode_pixels(x / 2 + 0.5)

    def decode_raw(self, z: Tensor) -> Tensor:
        return super().decode_raw(z) * 2 - 1


for kind in (AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderDC, AutoencoderRAE):
    AUTOENCODERS[kind.__name__] = kind
