"""--dry-run: what a command would train, and what it needs, without allocating any of it."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from latents.autoencoder import latent_geometry, load_autoencoder_config
from models import DiT, DiTConfig, count_macs, count_parameters
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.options import DATA_DEFAULTS, fill_flags
from runtime.processes import Distributed
from training.finetune import open_source
from training.inputs import geometry_of, model_config, open_dataset, total_steps

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
IMAGENET = (1_281_167, 1000)  # images, classes
GIB = 2**30


def print_plan(args: argparse.Namespace, dist: Distributed, micro_batch: int) -> None:
    """Prints the model, its parameters, the memory of a process and the number of steps."""
    if dist.is_main:
        config, num_images, notes = planned_config(args)
        total, active = count_parameters(config)
        parts = {
            "weights": 4 * total,
            "gradients": 4 * total,
            "AdamW": 8 * total,
            "EMA": 4 * total,
            "activations": activation_bytes(
                config, micro_batch, args.precision, args.gradient_checkpointing
            ),
        }
        batch = micro_batch * args.accum_iter * dist.world_size
        steps = total_steps(args, num_images, batch)
        print(f"model        {args.model}, {config}")
        print(f"parameters   {total:,} total, {active:,} active for a token")
        print(f"compute      {count_macs(config):,} multiply-adds a forward pass on an image")
        memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        print(f"memory       {sum(parts.values()) / GIB:.2f} GiB a process: {memory}")
        print(
            f"steps        {steps:,} of {batch} images ({dist.world_size} processes x "
            f"{args.accum_iter} micro-batches x {micro_batch}), "
            f"{steps * batch / num_images:.1f} epochs of {num_images:,} images"
        )
        for note in notes:
            print(f"note         {note}")


def planned_config(args: argparse.Namespace) -> tuple[DiTConfig, int, list[str]]:
    """Returns the config, the number of images, and what had to be assumed."""
    notes, source, dataset = [], open_source(args), None
    num_images, num_classes = IMAGENET
    if args.latents_path or (args.data_path and Path(args.data_path).exists()):
        dataset = open_dataset(args)
        num_images, num_classes = len(dataset), len(dataset.classes)
    else:
        fill_flags(args, DATA_DEFAULTS)
        num_classes = args.num_classes or num_classes
        notes.append(f"no images at {args.data_path}: ImageNet's {num_images:,} assumed")
    geometry = geometry_of(dataset, args) if args.latents_path else planned_geometry(args, notes)
    return model_config(args, num_classes, geometry, source), num_images, notes


def planned_geometry(args: argparse.Namespace, notes: list[str]) -> tuple[int, int]:
    """Returns (latent size, latent channels) of --vae-path, or Stable Diffusion's with a note."""
    try:
        config = load_autoencoder_config(args.vae_path, local_files_only=True)
    except UserError:
        config = STABLE_DIFFUSION
        notes.append(f"no autoencoder at {args.vae_path}: 8x downsampling, 4 channels assumed")
    return latent_geometry(config, args.image_size)


def activation_bytes(
    config: DiTConfig, batch: int, precision: str, gradient_checkpointing: bool
) -> int:
    """Counts the bytes that a forward pass keeps for the backward one, on tensors without data.

    With gradient checkpointing: each block's input, and all that one block keeps.
    """
    if gradient_checkpointing:
        sparse = (0,) if config.sparse_layers else ()
        one_block = replace(config, depth=1, sparse_layers=sparse)
        block_input = batch * (config.input_size // config.patch_size) ** 2 * config.hidden_size * 4
        return activation_bytes(one_block, batch, precision, False) + config.depth * block_input
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    alive: list[torch.UntypedStorage] = []
    with FakeTensorMode():
        model = DiT(**vars(config)).train()
        weights = {weight.untyped_storage() for weight in model.parameters()}
        size = (batch, config.in_channels, config.input_size, config.input_size)
        x, t, y = torch.zeros(size), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
        enabled = precision != "fp32"
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", DTYPES[precision], enabled=enabled):
            model(x, t, y)
    return sum(kept.values())
