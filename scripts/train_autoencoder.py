"""
Trains a small AutoencoderKL: 32x32 RGB images to 8x8x4 latents, the demo's stand-in for the SD VAE.

    python scripts/prepare_fashion_mnist.py --output data/fashion-mnist
    python scripts/train_autoencoder.py --data-path data/fashion-mnist --output results/vae

Loss: mean squared error per pixel value + kl_weight * KL divergence per latent value. The KL term
keeps the latents near a unit normal with a posterior wide enough to smooth them, which is what
makes them easy for a diffusion model. It is ramped up over the first half of the run, and must
stay small: near 1e-3 whole channels collapse to noise (their kl in the log goes to 0) and do not
recover. After training the latents are measured and each channel is brought to zero mean and the
scale of the SD VAE, so the config's scaling_factor is the familiar 0.18215 and
latents * scaling_factor have unit variance. The output is in diffusers' save_pretrained format,
for AutoencoderKL.from_pretrained. assets/vae-fashion-mnist/README.md has the command that trained
the shipped one on the 60,000 training images.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torchvision.datasets import ImageFolder
from tqdm import tqdm

# N batch, latents (N, 4, 8, 8); images are uint8 in [0, 255] in memory and fp32 in [-1, 1] in use.
IMAGE_SIZE = 32
SCALING_FACTOR = 0.18215  # of the SD VAE: its latents have a std of about 1 / 0.18215
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def load_images(path):
    """
    Loads a class-per-folder image tree into memory.

    Returns images (N, 3, 32, 32) uint8. Raises ValueError when the folder holds no such images.
    """
    try:
        dataset = ImageFolder(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: got {error}, expected a folder of class folders") from error
    images = torch.empty(len(dataset), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for index, (image, _) in enumerate(tqdm(dataset, desc=f"load {path}", disable=None)):
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            name, size = dataset.imgs[index][0], (IMAGE_SIZE, IMAGE_SIZE)
            raise ValueError(f"{name}: got size {image.size}, expected {size}")
        images[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return images


def build_autoencoder():
    """Returns an untrained AutoencoderKL that downsamples by 4 to 4 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
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


def learning_rate_factor(step, steps, warmup_share=0.03):
    """Linear warm-up, then cosine decay to zero; a factor in [0, 1] for step in [0, steps)."""
    warmup = max(1, int(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def draw_batch(images, *, batch_size, generator):
    """Returns randomly drawn, randomly flipped images (N, 3, 32, 32), fp32 in [-1, 1]."""
    index = torch.randint(len(images), (batch_size,), generator=generator)
    flip = torch.rand(batch_size, generator=generator) < 0.5
    x = images[index].float() / 127.5 - 1  # (N, 3, 32, 32)
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


def training_losses(vae, x, *, generator, autocast):
    """
    Returns the reconstruction loss (mean squared error per value of x (N, 3, 32, 32) in [-1, 1])
    and the KL divergence (4,) to a standard normal, in nats per value of each latent channel.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()  # (N, 4, 8, 8) each
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        reconstruction = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample
    mse = (reconstruction.float() - x).square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(0, 2, 3))  # (4,)
    return mse, kl


def train(vae, images, args, device):
    """Trains `vae` in place on images (N, 3, 32, 32) uint8."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, args.steps)
    )
    vae.train()
    running_mse, running_kl = torch.zeros((), device=device), torch.zeros(4, device=device)
    start_time = time.time()
    for step in tqdm(range(1, args.steps + 1), desc="train", disable=None):
        x = draw_batch(images, batch_size=args.batch_size, generator=generator).to(device)
        mse, kl = training_losses(vae, x, generator=generator, autocast=args.precision == "bf16")
        kl_weight = args.kl_weight * min(1.0, 2 * step / args.steps)
        (mse + kl_weight * kl.mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        running_mse += mse.detach()
        running_kl += kl.detach()
        if step % args.log_every == 0 or step == args.steps:
            count = (step - 1) % args.log_every + 1
            channel_kl = " ".join(f"{value:.2f}" for value in (running_kl / count).tolist())
            print(
                f"step {step} mse {running_mse.item() / count:.5f} kl {channel_kl} "
                f"seconds {time.time() - start_time:.0f}",
                flush=True,
            )
            running_mse.zero_()
            running_kl.zero_()


@torch.no_grad()
def measure_latents(vae, images, *, seed, batch_size=250):
    """Returns per-channel mean (4,) and std (4,), fp64, of posterior samples of uint8 images."""
    vae.eval()
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    latents = []
    for batch in images.split(batch_size):
        x = batch.to(device).float() / 127.5 - 1
        latents.append(vae.encode(x).latent_dist.sample(generator).cpu())  # (N, 4, 8, 8)
    latents = torch.cat(latents).double()
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


@torch.no_grad()
def measure_psnr(vae, images, batch_size=250):
    """
    Compares uint8 images with their 8-bit reconstruction from the posterior mean.

    Returns (mean over images of the PSNR of each, PSNR of the mean squared error), both in dB.
    """
    vae.eval()
    device = next(vae.parameters()).device
    errors = []
    for batch in images.split(batch_size):
        x = batch.to(device).float() / 127.5 - 1
        reconstruction = vae.decode(vae.encode(x).latent_dist.mean).sample
        reconstruction = ((reconstruction + 1) * 127.5).round().clamp(0, 255)
        error = (reconstruction - batch.to(device).float()) / 255
        errors.append(error.square().mean(dim=(1, 2, 3)).cpu())  # (N,)
    errors = torch.cat(errors).double().clamp_min(1e-10)
    return float(-10 * errors.log10().mean()), float(-10 * errors.mean().log10())


@torch.no_grad()
def standardize_latents(vae, mean, std):
    """
    Changes latents of channel mean (4,) and std (4,) to mean 0 and std 1 / SCALING_FACTOR, exactly.

    The affine map goes into the two 1x1 convolutions around the latents, so reconstructions stay
    the same up to rounding.
    """
    weight = vae.quant_conv.weight  # (8, 8, 1, 1), rows: 4 means, then 4 log variances
    mean, gain = mean.to(weight), (1 / (SCALING_FACTOR * std)).to(weight)  # (4,) each
    weight[:4] *= gain[:, None, None, None]
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) * gain
    vae.quant_conv.bias[4:] += 2 * gain.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight /= gain[None, :, None, None]


def save(vae, output):
    """Writes config and weights to the folder `output`; the weights appear last, when complete."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as partial:
        vae.save_pretrained(partial)
        for name in ("config.json", WEIGHTS_NAME):
            os.replace(Path(partial) / name, output / name)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", required=True, help="class-per-folder tree of 32x32 images")
    data.add_argument("--eval-data", help="tree of held-out images to measure PSNR on (optional)")
    data.add_argument("--output", required=True, help="folder for config.json and the weights")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    training.add_argument("--batch-size", type=int, default=32, help="images per step")
    training.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    training.add_argument("--kl-weight", type=float, default=2e-4, help="weight of the KL term")
    training.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    training.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        default="bf16",
        help="autocast type of the forward pass; weights are fp32 in both (default: %(default)s)",
    )
    training.add_argument("--log-every", type=int, default=200, help="steps between log lines")
    return parser.parse_args(argv)


def main(args):
    try:
        images = load_images(args.data_path)
        eval_images = load_images(args.eval_data) if args.eval_data else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    vae = build_autoencoder().to(device)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(images):,} images")
    train(vae, images, args, device)

    sample = images[:: max(1, len(images) // 10000)]
    standardize_latents(vae, *measure_latents(vae, sample, seed=args.seed))
    mean, std = measure_latents(vae, sample, seed=args.seed + 1)
    print(f"scaled latents: mean {mean * SCALING_FACTOR}, std {std * SCALING_FACTOR}")
    if eval_images is not None:
        per_image, of_mean = measure_psnr(vae, eval_images)
        print(f"held-out PSNR: {per_image:.2f} dB mean over images, {of_mean:.2f} dB of mean MSE")
    save(vae, args.output)


if __name__ == "__main__":
    main(parse_args())
