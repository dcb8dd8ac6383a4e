"""Trains a small AutoencoderKL: 32 x 32 images to 8 x 8 x 4 latents, a stand-in for the SD VAE.

    python scripts/prepare_fashion_mnist.py --output data/fashion-mnist
    python scripts/train_autoencoder.py --data-path data/fashion-mnist --output results/vae

Loss: squared error per pixel value + kl_weight * KL divergence per latent value. The KL term makes
the posterior wide enough to smooth the latents. It is ramped up over the first half and must stay
small: near 1e-3 whole channels collapse to noise and do not recover. At the end each channel is
brought to the SD VAE's scale. assets/vae-fashion-mnist/README.md has the commands of that one.

--decoder-of trains the decoder of such an autoencoder further, and its latents stay the same. The
decoder sees them with noise, so that it forgives the errors of a model's samples (noise-augmented
decoding, Zheng et al. 2025, arXiv 2510.11690).

Shape legend: N batch; images (N, 3, 32, 32), latents (N, 4, 8, 8)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its folder alone

from latents.autoencoder import load_autoencoder, reconstruct
from latents.images import to_model_range
from latents.sources import open_images
from runtime.errors import run_main
from runtime.files import check_new_folder
from runtime.flags import flag, parse_config

IMAGE_SIZE = 32
SCALING_FACTOR = 0.18215  # of the SD VAE: its latents have a std of about 1 / 0.18215


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    data_path: str = flag(help="folder of class folders, or another source of train.py's")
    eval_data: str | None = flag(None, help="held-out images to measure PSNR on")
    output: Path = flag(help="new folder for config.json and the weights")
    steps: int = flag(4000, least=1, help="optimizer steps")
    batch_size: int = flag(32, least=1, help="images of a step")
    lr: float = flag(2e-3, above=0, help="peak learning rate")
    kl_weight: float = flag(2e-4, least=0, help="weight of the KL term; unused with --decoder-of")
    seed: int = flag(0, help="of every random draw")
    decoder_of: str | None = flag(None, help="autoencoder whose decoder to train, and nothing else")
    decoder_noise: float = flag(
        0.2, least=0,
        help="with --decoder-of: largest std of the noise on scaled latents; drawn from 0 to this",
    )  # fmt: skip


def parse_args() -> AutoencoderConfig:
    return parse_config(AutoencoderConfig, __doc__)


def load_images(path: str) -> Tensor:
    """Reads all images of a source into memory, (N, 3, 32, 32) uint8."""
    source = open_images(path, IMAGE_SIZE)
    return torch.stack([source[index, False][0] for index in range(len(source))])


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def train(vae: AutoencoderKL, images: Tensor, config: AutoencoderConfig) -> None:
    """Trains in place on images (N, 3, 32, 32) uint8."""
    noise_std = 0.0
    if config.decoder_of is not None:
        noise_std = config.decoder_noise / vae.config.scaling_factor
        for name, weight in vae.named_parameters():
            weight.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
    trained = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, config.steps, pct_start=0.03, cycle_momentum=False
    )
    bar = tqdm(range(config.steps), mininterval=0.1 if sys.stderr.isatty() else 30)
    for step in bar:
        x = to_model_range(images[torch.randint(len(images), (config.batch_size,))]).to(vae.device)
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        x = torch.where(mirrored, x.flip(-1), x)  # (N, 3, 32, 32)
        with torch.autocast(x.device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()  # (N, 4, 8, 8)
            std = (0.5 * log_variance).exp()
            if noise_std:  # another one for each image
                std = std.hypot(noise_std * torch.rand(len(x), 1, 1, 1, device=x.device))
            reconstruction = vae.decode(mean + std * torch.randn_like(mean)).sample
        mse = (reconstruction.float() - x).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = mse + config.kl_weight * min(1.0, 2 * step / config.steps) * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            bar.set_postfix(mse=f"{mse.item():.5f}", kl=f"{kl.item():.2f}")


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Brings each latent channel to mean 0 and std 1 / SCALING_FACTOR over images, uint8.

    The affine map goes into the two 1 x 1 convolutions around the latents, so reconstructions stay
    the same up to rounding.
    """
    batches = images[:: max(1, len(images) // 10_000)].split(250)
    latents = [vae.encode(to_model_range(x).to(vae.device)).latent_dist.sample() for x in batches]
    std, mean = torch.std_mean(torch.cat(latents), dim=(0, 2, 3))  # (4,) each
    gain = 1 / (SCALING_FACTOR * std)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight[:4] *= gain[:, None, None, None]  # (8, 8, 1, 1): 4 means, then 4 log-variances
    inner.bias[:4] = (inner.bias[:4] - mean) * gain
    inner.bias[4:] += 2 * gain.log()
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight /= gain[None, :, None, None]


def mean_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """The mean PSNR, in dB, of reconstructions of images (N, 3, 32, 32) uint8."""
    got = torch.cat([reconstruct(vae, x.to(vae.device)).cpu() for x in images.split(250)])
    error = ((got.float() - images) / 255).square().mean(dim=(1, 2, 3))  # (N,)
    return -10 * error.log10().mean().item()


def main(config: AutoencoderConfig) -> None:
    check_new_folder("--output", config.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    if config.decoder_of is not None:
        vae = load_autoencoder(config.decoder_of, device, torch.float32)
    else:
        vae = build_autoencoder().to(device)
    images = load_images(config.data_path)
    held_out = load_images(config.eval_data) if config.eval_data else None
    train(vae.train(), images, config)
    vae.eval()
    if config.decoder_of is None:
        standardize_latents(vae, images)
    if held_out is not None:
        print(f"held-out PSNR: {mean_psnr(vae, held_out):.2f} dB")
    vae.save_pretrained(config.output)
    mode = (config.output / "config.json").stat().st_mode
    for file in config.output.iterdir():
        file.chmod(mode)  # safetensors lets nobody but the owner read what it writes
    print(f"written: {config.output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
