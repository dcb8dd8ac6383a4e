"""--dry-run: prints what a command would train, the memory and the disk that it needs.

print_plan(said, DDPFlags)
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from checkpoints.costs import count_macs, count_parameters
from latents.autoencoder import DEFAULT_VAE, AutoencoderKL, open_autoencoder
from latents.loading import BatchStream, split
from latents.sources import GivenImages, Source, expand_range
from moe import width_of
from options.settings import Layer
from runtime.devices import DTYPES
from runtime.errors import UserError, pluralize, print_safely
from runtime.processes import ALONE, Distributed, read_environment
from training.config import DataFacts, TrainConfig
from training.engine import Bytes
from training.memory import received_rows, state_bytes
from training.setup import length_notes, open_dataset, remaining_steps
from training.start import check_changes, plan_run

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
IMAGENET = (1_281_167, 1000)  # images, classes
GIB = 2**30
USABLE = 0.9  # usable fraction of GPU memory; CUDA, autoencoder and fragmentation need the rest
ASSUMED = 80.0  # GiB of GPU memory to plan for on a machine without a GPU


def print_plan(said: Layer, engine_flags: type) -> None:
    """Prints the model, its parameters, the memory per process, whether it fits, and the steps."""
    if not (dist := read_environment()).is_main:
        return
    plan = plan_run(said, engine_flags, open_planned, ALONE)  # there is no process group
    config = plan.config
    world_size = config.run.gpus or dist.world_size
    config.engine.engine_class().check(config, world_size)
    if plan.steps:
        check_changes(plan, {})
    trained = np.arange(IMAGENET[0])
    if plan.dataset is not None:
        trained, _ = split(plan.dataset, config.data.val_share)
    stream = remaining_steps(config, trained, None, replace(dist, world_size=world_size))
    lines = describe_model(config) | describe_memory(config, stream)
    lines |= describe_steps(config, stream)
    notes = plan.notes + length_notes(config, stream, is_pretrained=plan.weights is not None)
    for name, text in [*lines.items(), *(("note", note) for note in notes)]:
        print_safely(f"{name:<12} {text}")


def describe_model(config: TrainConfig) -> dict[str, str]:
    model = config.model
    parameters, active = count_parameters(model)
    return {
        "model": f"{config.name}: {model.depth} blocks of width {model.hidden_size}, latents of "
        f"{' x '.join(map(str, model.latent_shape))}, {pluralize(model.num_classes, 'class')}",
        "parameters": f"{parameters:,} total, {active:,} active per token",
        "compute": f"{count_macs(model):,} multiply-adds per image in a forward pass",
    }


def describe_memory(config: TrainConfig, stream: BatchStream) -> dict[str, str]:
    """Describes the memory of a process, and whether it fits."""
    engine, micro_batch = config.engine.engine_class(), stream.micro_batch
    gpu, host, layout = engine.memory(config, stream.world_size)
    needed, usable, source = in_gib(gpu), *usable_memory(config)
    tips = {
        "--gradient-checkpointing": config.step.recomputed == "nothing",
        "smaller micro-batches": micro_batch > 1,
        "more GPUs" if getattr(config.engine, "shard", True) else "--shard on several GPUs": True,
    }
    others = ", ".join(tip for tip, helps in tips.items() if helps)
    advice = "" if needed <= usable else f"; try {others}"
    lines = {
        "layout": f"{layout}, {config.step.precision}",
        "GPU": listed(gpu),
        "host": listed(host),
        "fits": f"{'yes' if needed <= usable else 'NO'}: {needed:.2f} GiB needed, {usable:.2f} "
        f"usable of {source}{advice}",
    }
    if getattr(config.engine, "expert_parallel", 1) > 1 and config.model.sparse_layers:
        lines["load"] = load_that_fits(config, micro_batch, GIB * (usable - needed))
    return lines


def describe_steps(config: TrainConfig, stream: BatchStream) -> dict[str, str]:
    state, steps = state_bytes(config), stream.end_step
    images, count = stream.num_images, stream.global_batch
    return {
        "disk": disk_use(config, steps, state["weights"] + state["optimizer"])[1],
        "steps": f"{steps:,} of {count} images ({pluralize(stream.world_size, 'process')} x "
        f"{config.step.accum_iter} micro-batches x {stream.micro_batch}), "
        f"{steps * count / images:.1f} epochs of {images:,} images",
    }


def in_gib(parts: Bytes) -> float:
    return sum(parts.values()) / GIB


def listed(parts: Bytes) -> str:
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"{in_gib(parts):.2f} GiB: {sizes}"


def usable_memory(config: TrainConfig) -> tuple[float, str]:
    """Returns the usable GiB of GPU memory, and a description of the GPU."""
    if size := config.run.gpu_memory:
        return USABLE * size, f"{size:g} (--gpu-memory)"
    if not torch.cuda.is_available():
        return USABLE * ASSUMED, f"{ASSUMED:g} (assumed, no GPU here)"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    size = properties.total_memory / GIB
    return USABLE * size, f"{size:.1f} of this {properties.name}"


def open_planned(settings: Layer, dist: Distributed) -> tuple[Source | None, DataFacts]:
    """Opens the data that the flags name. Assumes ImageNet's sizes for missing data, with notes."""
    path = settings.get("latents_path") or settings.get("data_path")
    is_there = path and (path in GivenImages.datasets or Path(expand_range(path)[0]).exists())
    if settings.get("latents_path") or is_there:
        return open_dataset(settings, dist)
    missing = f"{path} is not on this machine" if path else "no --data-path"
    notes = [f"{missing}; assuming ImageNet's {IMAGENET[0]:,} images"]
    image_size = settings.get("image_size", 256)
    vae_path = settings.get("vae_path") or DEFAULT_VAE
    try:
        vae = open_autoencoder(vae_path, local_files_only=True)
    except UserError:
        vae = AutoencoderKL(STABLE_DIFFUSION)
        notes.append(
            f"no autoencoder at {vae_path}; assuming 4 channels and 8x smaller latents, unless a "
            "run or weights have others"
        )
    facts = DataFacts(
        num_classes=settings.get("num_classes", IMAGENET[1]), in_channels=vae.channels,
        input_size=vae.latent_size(image_size), image_size=image_size, vae_path=vae_path,
        notes=tuple(notes),
    )  # fmt: skip
    return None, facts


def disk_use(config: TrainConfig, steps: int, state: float) -> tuple[float, str]:
    """Returns the bytes and a description of all checkpoints at the peak, while one is written and
    those that it replaces still exist, and of the snapshots that --keep-last leaves.

    state: bytes of a checkpoint without the EMAs
    """
    average = 4 * count_parameters(config.model)[0]
    checkpoint = state + len(config.ema) * average
    written = -(-steps // config.run.ckpt_every)
    kept = min(written, config.run.keep_last or written)
    snapshots = (written - kept) * sum(ema.is_rebuilt_from for ema in config.ema)
    at_once = kept + (config.run.save_minutes > 0) + (kept < written)
    parts = (("checkpoint", at_once, checkpoint), ("snapshot", snapshots, average))
    text = "; ".join(
        f"{count * size / GIB:.2f} GiB for {pluralize(count, name)} of {size / GIB:.2f}"
        for name, count, size in parts
        if count
    )
    return sum(count * size for _, count, size in parts), text


def disk_notes(config: TrainConfig, steps: int, state: float, folder: Path) -> list[str]:
    """Returns a note if the checkpoints of a run do not fit on the disk of their folder; see
    `disk_use`."""
    needed, text = disk_use(config, steps, state)
    present = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if needed <= (free := shutil.disk_usage(folder).free + present):
        return []
    return [
        f"the disk of {folder} is too small: {text}, but {free / GIB:.2f} GiB are free; use "
        "--keep-last, a larger --ckpt-every or another --results-dir"
    ]


def load_that_fits(config: TrainConfig, micro_batch: int, free: float) -> str:
    """Describes the load, relative to the mean, that fills `free` more bytes of GPU memory.

    Each received row keeps itself and the output of the expert's first product.
    """
    model = config.model
    width = model.hidden_size + width_of(model.hidden_size, model.mlp_ratio) * (
        2 if model.mlp_type.startswith("swiglu") else 1
    )
    size = received_rows(config, micro_batch) * width * DTYPES[config.step.precision].itemsize
    return (
        f"{size / GIB:.2f} GiB more on a process for each multiple of the mean number of rows that "
        f"it receives; {1 + max(0, free) / size:.1f} times the mean fit"
    )
