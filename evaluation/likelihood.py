"""Bits per dimension of a Gaussian-diffusion model on held-out images.

Shape legend: N images, C latent channels, h x w latent size
"""

import argparse
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import PerImageNoise, create_diffusion
from latents.autoencoder import downsampling_of, shift
from latents.images import to_model_range
from latents.sources import ImageTree
from runtime.digest import weights_digest
from runtime.errors import UserError
from sampling.pipeline import SamplingPipeline, batches


def bits_per_dimension(pipeline: SamplingPipeline, args: argparse.Namespace) -> dict:
    """Bounds -log2 p of held-out images' latents, per latent dimension, with their true labels.

    The latents are draws of the autoencoder's posterior, scaled as in training and taken as rounded
    to bins of 2/255; noise comes from one generator per image. --num-sampling-steps shortens the
    chain, which loosens the bound; the default is all 1000 steps. So the number compares models
    over one autoencoder, and is not the bits per pixel of a model of pixels.

    Raises UserError for a model of another objective and for images that do not fit it.
    """
    if pipeline.objective != "gaussian":
        raise UserError(f"--bpd: got a model of {pipeline.objective}, expected Gaussian diffusion")
    config, vae = pipeline.model.config, pipeline.vae
    size = config.input_size * downsampling_of(vae.config)
    dataset = held_out_images(args, pipeline.class_names, size)
    chosen = torch.linspace(0, len(dataset) - 1, args.num_images).round().long().tolist()
    respacing = args.num_sampling_steps or ""
    diffusion = create_diffusion(respacing, learn_sigma=config.learn_sigma)
    parts = []
    for batch in tqdm(
        list(batches(list(enumerate(chosen)), args.batch_size)), unit="batch",
        disable=not sys.stderr.isatty(),
    ):  # fmt: skip
        noise = PerImageNoise(args.seed + place for place, _ in batch)
        images, labels, _ = zip(*(dataset[index, False] for _, index in batch), strict=True)
        device = next(pipeline.model.parameters()).device
        x = posterior_draw(vae, torch.stack(images).to(device), noise)
        y = torch.tensor([dataset.class_of[label] for label in labels], device=device)
        parts.append(
            diffusion.bits_per_dimension(
                pipeline.model,
                x,
                model_kwargs={"y": y},
                noise_fn=noise.randn_like,
                progress=sys.stderr.isatty(),
            )  # fmt: skip
        )
    total, prior, vb = (torch.cat([p[name] for p in parts]).cpu() for name in parts[0])
    return {
        "bits_per_dimension": total.mean().item(),
        "standard_error": (total.std() / len(total) ** 0.5).item() if len(total) > 1 else None,
        "decoder": vb[:, 0].mean().item(),
        "prior": prior.mean().item(),
        "dimensions": x[0].numel(),
        "bin_width": 2 / 255,
        "chain_steps": diffusion.num_timesteps,
        "num_images": len(total),
        "images": args.data_path,
        "seed": args.seed,
        "vae_sha256": weights_digest(vae),
    }


def held_out_images(args: argparse.Namespace, class_names: list[str], size: int) -> ImageTree:
    """Opens --data-path, whose folders are named like the model's classes or are as many."""
    if args.data_path is None:
        raise UserError("--bpd: got no --data-path, expected a folder of class folders")
    dataset = ImageTree(args.data_path, size)
    if set(dataset.classes) <= set(class_names):
        dataset.class_of = [class_names.index(name) for name in dataset.classes]
    elif len(dataset.classes) == len(class_names):
        dataset.class_of = list(range(len(class_names)))
    else:
        raise UserError(
            f"--data-path {args.data_path}: got {len(dataset.classes)} classes "
            f"({', '.join(dataset.classes[:3])}, ...), expected those of the model, "
            f"{len(class_names)} ({', '.join(class_names[:3])}, ...)"
        )
    if len(dataset) < args.num_images:
        raise UserError(
            f"--num-images: got {args.num_images}, expected at most the {len(dataset)} images of "
            f"{args.data_path}"
        )
    return dataset


@torch.no_grad()
def posterior_draw(vae, images: Tensor, noise: PerImageNoise) -> Tensor:
    """Encodes uint8 images (N, 3, H, W) to latents (N, C, h, w), one generator per image."""
    posterior = vae.encode(to_model_range(images).to(vae.dtype)).latent_dist
    latents = posterior.mean + posterior.std * noise.randn_like(posterior.mean)
    return (latents.float() - shift(vae)) * vae.config.scaling_factor
