"""What a training command asks for: its data, the autoencoder and the config of the model."""

import argparse
import math
from pathlib import Path

import torch
from torch import nn

from checkpoints.checkpoint import Checkpoint, config_of
from latents.autoencoder import (
    autoencoder_digest,
    latent_geometry,
    load_autoencoder,
    load_autoencoder_config,
)
from latents.cache import CachedLatents
from latents.sources import ImageSource, open_images
from models import DiTConfig
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.options import DATA_DEFAULTS, fill_flags
from training.finetune import target_config
from training.run import is_run_folder


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that contradict each other or make no sense."""
    if args.data_path is None and args.latents_path is None:
        raise UserError(
            "--data-path: got nothing, expected a folder of class folders, or --latents-path"
        )
    if args.data_path is not None and args.latents_path is not None:
        raise UserError("--latents-path: got it beside --data-path, expected one of them")
    if args.resume and args.finetune and not is_run_folder(Path(args.resume)):
        raise UserError(
            "--finetune: got it beside --resume, expected one of them (an interrupted run goes on "
            "by itself)"
        )
    if args.keep_every is not None and args.keep_last is None:
        raise UserError("--keep-every: got it without --keep-last, expected both")
    for name in ("lr", "aux_loss_alpha", "grad_clip", "weight_decay"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected a number >= 0")
    if not 0 <= args.ema_decay < 1:
        raise UserError(f"--ema-decay: got {args.ema_decay}, expected 0 <= decay < 1")


def open_dataset(args: argparse.Namespace) -> ImageSource | CachedLatents:
    """Opens --latents-path or --data-path; fills in --image-size and --vae-path.

    UserError when --image-size or --num-classes does not fit.
    """
    if args.latents_path is None:
        fill_flags(args, DATA_DEFAULTS)
        dataset = open_images(args.data_path, args.image_size)
    else:
        dataset = CachedLatents(args.latents_path)
        size, vae_path = dataset.image_size, dataset.settings.vae_path
        fill_flags(args, {"image_size": size, "vae_path": vae_path})
        if args.image_size != size:
            raise UserError(
                f"--image-size: got {args.image_size}, expected {size}, that of {args.latents_path}"
            )
    if args.num_classes not in (None, len(dataset.classes)):
        raise UserError(
            f"--num-classes: got {args.num_classes}, expected {len(dataset.classes)}, the number "
            f"of classes in {args.latents_path or args.data_path}"
        )
    return dataset


def geometry_of(dataset: ImageSource | CachedLatents, args: argparse.Namespace) -> tuple[int, int]:
    """Returns (latent size, latent channels) of cached latents, or of what --vae-path makes."""
    if isinstance(dataset, CachedLatents):
        channels, size, _ = dataset.settings.latent_shape
        return size, channels
    return latent_geometry(load_autoencoder_config(args.vae_path), args.image_size)


def open_autoencoder(
    args: argparse.Namespace, dataset: ImageSource | CachedLatents, device: torch.device
) -> nn.Module | None:
    """Loads --vae-path; None if latents are cached and no sample grids are to be decoded.

    UserError when its weights are not those that the latents were made with.
    """
    if isinstance(dataset, CachedLatents):
        settings = dataset.settings
        if not args.num_sample and args.vae_path == settings.vae_path:
            return None
        got = autoencoder_digest(args.vae_path)
        if got != settings.vae_sha256:
            raise UserError(
                f"--vae-path: got {args.vae_path} with weights {got[:12]}, expected those of "
                f"{args.latents_path}, {settings.vae_sha256[:12]} ({settings.vae_path})"
            )
    return load_autoencoder(args.vae_path, device, DTYPES[args.precision])


def model_config(
    args: argparse.Namespace,
    num_classes: int,
    geometry: tuple[int, int],
    source: Checkpoint | None = None,
) -> DiTConfig:
    """The DiTConfig that the flags, the data and --finetune's weights ask for.

    geometry: (latent size, latent channels)
    """
    input_size, in_channels = geometry
    patch_size = (source.config if source else config_of(args.model)).patch_size
    if input_size % patch_size:
        factor = args.image_size // input_size
        raise UserError(
            f"--image-size: got {args.image_size}, expected a multiple of {factor * patch_size}, "
            f"the autoencoder's factor {factor} x the model's patches of {patch_size}"
        )
    if source is not None:
        return target_config(args, source, num_classes, input_size, in_channels)
    return config_of(
        args.model,
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        class_dropout_prob=0.1 if num_classes > 1 else 0.0,  # one class leaves nothing to drop
        mlp_type=args.mlp_type,
        num_experts=args.num_experts,
        num_experts_per_tok=args.num_experts_per_tok,
        n_shared_experts=args.n_shared_experts,
        aux_loss_alpha=args.aux_loss_alpha,
        qk_norm=args.qk_norm,
        expert_backend=args.expert_backend,
    )


def total_steps(args: argparse.Namespace, num_images: int, global_batch: int) -> int:
    return args.max_steps or max(1, args.epochs * num_images // global_batch)
