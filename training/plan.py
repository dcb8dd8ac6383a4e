"""--dry-run: prints what a command would train, the memory and the disk that it needs."""

import os
import shutil
from pathlib import Path

import torch

from checkpoints import Record
from checkpoints.costs import count_macs, count_parameters
from latents.autoencoder import PIXELS, AutoencoderKL, open_autoencoder
from latents.loading import BatchStream
from latents.sources import Source, source_of
from models import DiTConfig
from moe import width_of
from options.parts import Size
from options.settings import Settings
from runtime.devices import DTYPES
from runtime.errors import UserError, pluralize, print_safely
from training.config import TrainConfig
from training.engine import Bytes, node_size
from training.engines import engine_for
from training.going_on import MORE_STEPS
from training.memory import received_rows, state_bytes
from training.sections import CommandFlags, DataConfig
from training.setup import length_notes, open_dataset

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
IMAGENET = (1_281_167, 1000)  # images, classes
GIB = 2**30
USABLE = 0.9  # usable fraction of GPU memory; CUDA, autoencoder and fragmentation need the rest
ASSUMED = 80.0  # GiB of GPU memory to plan for on a machine without a GPU


def print_plan(
    command: CommandFlags, config: TrainConfig, stream: BatchStream, notes: list[str],
    before: Record | None,
) -> None:  # fmt: skip
    """Prints the model, its parameters, the memory per process, whether it fits, and the steps.

    before: record of the checkpoint from which the run would go on, or None
    """
    model, steps, count = config.model, stream.end_step, stream.global_batch
    parameters, active = count_parameters(model)
    macs = count_macs(model, (), stream.micro_batch, config.step.precision)
    memories = planned_memories(command.gpu_memory, node_size(config, stream.world_size))
    lines = {
        "model": f"{config.name}: {model.depth} blocks of width {model.hidden_size}, latents of "
        f"{' x '.join(map(str, model.latent_shape))}, {pluralize(model.num_classes, 'class')}",
        "parameters": f"{parameters:,} total, {active:,} active per token",
        "compute": f"{macs:,} multiply-adds per image in a forward pass",
        **describe_memory(config, stream, memories),
        "disk": disk_use(config, steps)[1],
        "steps": f"{steps:,} of {count} images ({pluralize(stream.world_size, 'process')} x "
        f"{pluralize(config.step.accum_iter, 'micro-batch')} x {stream.micro_batch}), "
        f"{steps * count / stream.num_images:.1f} epochs of {stream.num_images:,} images",
    }
    if before:
        is_finished = steps <= before.step
        lines["goes on"] = f"after step {before.step:,}"
        lines["goes on"] += f": finished; {MORE_STEPS}" * is_finished
    else:
        notes = notes + length_notes(config, stream)
    for name, text in [*lines.items(), *(("note", note) for note in notes)]:
        print_safely(f"{name:<12} {text}")


def describe_memory(
    config: TrainConfig, stream: BatchStream, memories: dict[str, tuple[float, str]]
) -> dict[str, str]:
    """Describes the memory of a process, and whether it fits.

    memories: where the process may run, such as "on a GPU, ", or "" if there is one choice: (usable
        GiB, description of the whole memory)
    """
    engine, micro_batch = engine_for(config.engine), stream.micro_batch
    gpu, host, layout = engine.memory(config, stream.world_size)
    total = sum(gpu.values())
    needed = total / GIB
    tips = {
        "--gradient-checkpointing": config.step.recomputed == "nothing",
        "smaller micro-batches (a larger --accum-iter)": micro_batch > 1,
        "more GPUs" if config.engine.shard else "--shard on several GPUs": True,
    }
    others = [tip for tip, helps in tips.items() if helps]
    verdicts = [
        f"{where}{'yes' if needed <= usable else 'NO'}: {in_gib(total)} needed, {usable:.2f} GiB "
        f"usable of {of}"
        for where, (usable, of) in memories.items()
    ]
    room = [usable - needed for usable, _ in memories.values()]
    if min(room) < 0:
        verdicts.append(f"try {', '.join(lighter_settings(config) + others)}")
    lines = {
        "layout": f"{layout}, {config.step.precision}",
        "GPU": sizes_in_gib(gpu),
        "host": sizes_in_gib(host),
        "fits": "; ".join(verdicts),
    }
    if config.engine.expert_parallel > 1 and config.model.sparse_blocks:
        lines["load"] = load_that_fits(config, micro_batch, GIB * room[0])
    return lines


def lighter_settings(config: TrainConfig) -> list[str]:
    """Names settings that make a step need less memory and time."""
    is_small = config.preset == "DiT-Ti/2" or config.engine.shard
    in_pixels = config.data.vae_path == PIXELS and config.step.objective.name != "flow_x"
    return ["--config config/recipes/pixels.yaml, made for --vae-path pixels"] * in_pixels + [
        "a smaller --model (the smallest is DiT-Ti/2)"
    ] * (not is_small)


def most_tokens(model: DiTConfig) -> int:
    """Returns the largest number of tokens that a block of the model computes for an image."""
    return max(map(model.tokens_of, range(model.depth)))


def in_gib(size: float) -> str:
    """Returns a number of bytes in GiB, or in MiB if it is below 0.01 GiB."""
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2g} MiB"


def sizes_in_gib(parts: Bytes) -> str:
    sizes = ", ".join(
        f"{name} {in_gib(size).removesuffix(' GiB')}" for name, size in parts.items() if size
    )
    return f"{in_gib(sum(parts.values()))}: {sizes}"


def planned_memories(size: float | None, processes: int) -> dict[str, tuple[float, str]]:
    """Returns the memories to plan for, see `describe_memory`: that of a GPU, and that of this
    machine if it has no GPU and the command names no size.

    processes: that would share the memory of this machine
    """
    if size:
        return {"": (USABLE * size, f"{size:g} (--gpu-memory)")}
    if torch.cuda.is_available():
        return {"": device_memory(torch.device("cuda"), 1)}
    return {
        "on a GPU, ": (USABLE * ASSUMED, f"{ASSUMED:g} (assumed, see --gpu-memory)"),
        "on this processor, ": device_memory(torch.device("cpu"), processes),
    }


def device_memory(device: torch.device, processes: int) -> tuple[float, str]:
    """Returns the usable GiB of a process, and a description of the whole memory.

    processes: that share the memory of a CPU
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        size = properties.total_memory / GIB
        return USABLE * size, f"{size:.1f} of this {properties.name}"
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    shared = f", which {pluralize(processes, 'process')} share" if processes > 1 else ""
    return USABLE * size / processes, f"this machine's {size:.1f}{shared}"


class AssumedImages(Source):
    """Stands in for data that are not on this machine: those of a run or weights, or ImageNet's."""

    shapes = {}

    def __init__(
        self, image_size: Size, num_classes: int, count: int, like: DiTConfig | None, notes: list
    ):
        self.image_size, self.count, self.like, self.notes = image_size, count, like, notes
        self.classes, self.fingerprint = [""] * num_classes, {"count": count}

    def __len__(self) -> int:
        return self.count

    def geometry(self, vae_path: str) -> tuple[Size, int]:
        if self.like:
            return self.like.input_size, self.like.in_channels
        try:
            vae = open_autoencoder(vae_path, local_files_only=True)
        except UserError:
            vae = AutoencoderKL(STABLE_DIFFUSION)
            self.notes.append(
                f"no autoencoder at {vae_path}; assuming 4 channels and 8x smaller latents"
            )
        return vae.latent_size(self.image_size), vae.channels


def open_planned(
    data: DataConfig, said: Settings, like: TrainConfig | None, notes: list[str],
    before: Record | None = None,
) -> Source:  # fmt: skip
    """Opens the data that the flags name, or stands in for missing ones.

    like: the config of the checkpoint or weights that the run begins from, if any
    before: record of the checkpoint from which the run goes on, or None
    """
    path = data.latents_path or data.data_path
    is_here = os.path.exists if data.latents_path else source_of(path or "").is_here
    if path and is_here(path):
        return open_dataset(data)
    missing = f"{path} is not on this machine" if path else "no --data-path"
    known = before and before.images.get("count")
    count, whose = (known, "the run's") if known else (IMAGENET[0], "ImageNet's")
    notes.append(f"{missing}; assuming {whose} {count:,} images")
    classes = said.get("num_classes", like.model.num_classes if like else IMAGENET[1])
    is_same_size = like and said.get("image_size") in (None, like.data.image_size)
    return AssumedImages(
        data.image_size or 256, classes, count, like.model if is_same_size else None, notes
    )


def disk_use(config: TrainConfig, steps: int) -> tuple[float, str]:
    """Returns the bytes and a description of all checkpoints at the peak, while one is written and
    those that it replaces still exist."""
    average, state = 4 * count_parameters(config.model)[0], state_bytes(config)
    checkpoint = state["weights"] + state["optimizer"] + max(1, len(config.ema)) * average
    written = -(-steps // config.run.ckpt_every)
    kept = min(written, config.run.keep_last or written)
    at_once = kept + (config.run.save_minutes > 0) + (kept < written)
    total, number = at_once * checkpoint, pluralize(at_once, "checkpoint")
    return total, f"{in_gib(total)} for {number} of {in_gib(checkpoint)}"


def disk_notes(config: TrainConfig, steps: int, folder: Path) -> list[str]:
    """Returns a note if the checkpoints of a run do not fit on the disk of their folder."""
    needed, text = disk_use(config, steps)
    present = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if needed <= (free := shutil.disk_usage(folder).free + present):
        return []
    return [
        f"the disk of {folder} is too small: {text}, but {in_gib(free)} are free; use "
        "--keep-last, a larger --ckpt-every or another --results-dir"
    ]


def load_that_fits(config: TrainConfig, micro_batch: int, free: float) -> str:
    """Describes the load, relative to the mean, that fills `free` more bytes of GPU memory.

    Each received row keeps itself and the output of the expert's first product.
    """
    model = config.model
    width = model.hidden_size + width_of(model.hidden_size, model.mlp_ratio) * (
        2 if model.expert_mlp.startswith("swiglu") else 1
    )
    size = received_rows(config, micro_batch) * width * DTYPES[config.step.precision].itemsize
    return (
        f"{in_gib(size)} more on a process for each multiple of the mean number of rows that "
        f"it receives; {1 + max(0, free) / size:.1f} times the mean fit"
    )
