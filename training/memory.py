"""--dry-run: prints what a command would train and the memory required, without allocating it.

print_plan(said, DDPFlags)                               # --dry-run
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints import step_folders
from checkpoints.costs import (
    count_macs,
    count_parameters,
    fake_forward,
    fake_model,
    with_fixed_rows,
)
from latents.autoencoder import DEFAULT_VAE, AutoencoderKL, open_autoencoder
from latents.loading import split
from latents.sources import GivenImages, Source, expand_range
from models import DiTConfig
from moe import width_of
from moe_kernels.recomputation import KEPT_OPERATORS
from options.settings import Layer
from runtime.devices import DTYPES, pinned_bytes
from runtime.errors import UserError, pluralize
from runtime.processes import read_environment
from training.auxiliary import PROJECTORS, projectors_of
from training.changes import check_changes
from training.config import DataFacts, TrainConfig
from training.engine import Bytes, frozen_names, share_out
from training.optimizers import planned_state
from training.setup import length_notes, open_dataset
from training.start import plan_run, remaining_steps

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
IMAGENET = (1_281_167, 1000)  # images, classes
GIB = 2**30
USABLE = 0.9  # usable fraction of GPU memory; CUDA, autoencoder and fragmentation need the rest
ASSUMED = 80.0  # GiB of GPU memory to plan for on a machine without a GPU


def print_plan(said: Layer, engine_flags: type) -> None:
    """Prints the model, its parameters, the memory per process, whether it fits, and the steps."""
    if not (dist := read_environment()).is_main:
        return
    run = plan_run(said, engine_flags, open_planned)
    begin, config = run.begin, run.config
    if step := begin.branch if begin.own is None else step_folders(begin.folder)[0]:
        may = run.said if begin.resumes or begin.own is None else set()
        check_changes(begin.own or begin.record, config, {}, may, step, begin.folder)
    engine = config.engine.engine_class()
    trained = np.arange(IMAGENET[0])
    if run.dataset is not None:
        trained, _ = split(run.dataset, config.data.val_share)
    world_size, model = config.run.gpus or dist.world_size, config.model
    stream = remaining_steps(config, trained, None, replace(dist, world_size=world_size))
    micro_batch, batch, steps = stream.micro_batch, stream.global_batch, stream.end_step
    parameters, active = count_parameters(model)
    engine.check(config, world_size)
    gpu, host, layout = engine.memory(config, world_size)
    state = state_bytes(config)
    needed, usable, source = in_gib(gpu), *usable_memory(config)
    is_cut = getattr(config.engine, "shard", True)
    spreads = getattr(config.engine, "expert_parallel", 1) > 1 and model.sparse_layers
    tips = {
        "--gradient-checkpointing": config.step.recomputed == "nothing",
        "smaller micro-batches": micro_batch > 1,
        "more GPUs" if is_cut else "--shard on several GPUs": True,
    }
    others = ", ".join(tip for tip, helps in tips.items() if helps)
    advice = "" if needed <= usable else f"; try {others}"
    lines = {
        "model": f"{config.name}: {model.depth} blocks of "
        f"width {model.hidden_size}, latents of {' x '.join(map(str, model.latent_shape))}, "
        f"{pluralize(model.num_classes, 'class')}",
        "parameters": f"{parameters:,} total, {active:,} active per token",
        "compute": f"{count_macs(model):,} multiply-adds per image in a forward pass",
        "layout": f"{layout}, {config.step.precision}",
        "GPU": listed(gpu),
        "host": listed(host),
        "fits": f"{'yes' if needed <= usable else 'NO'}: {needed:.2f} GiB needed, {usable:.2f} "
        f"usable of {source}{advice}",
        **(
            {"load": load_that_fits(config, micro_batch, GIB * (usable - needed))}
            if spreads
            else {}
        ),
        "disk": disk_use(config, steps, state["weights"] + state["optimizer"])[1],
        "steps": f"{steps:,} of {batch} images ({pluralize(world_size, 'process')} x "
        f"{config.step.accum_iter} micro-batches x {micro_batch}), "
        f"{steps * batch / len(trained):.1f} epochs of {len(trained):,} images",
    }
    notes = run.notes + length_notes(config, stream, is_pretrained=begin.weights is not None)
    for name, text in [*lines.items(), *(("note", note) for note in notes)]:
        print(f"{name:<12} {text}")


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


def open_planned(settings: Layer) -> tuple[Source | None, DataFacts]:
    """Opens the data that the flags name. Assumes ImageNet's sizes for missing data, with notes."""
    path = settings.get("latents_path") or settings.get("data_path")
    is_there = path and (path in GivenImages.datasets or Path(expand_range(path)[0]).exists())
    if settings.get("latents_path") or is_there:
        return open_dataset(settings)
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
    checkpoint = state + len(config.emas) * average
    written = -(-steps // config.run.ckpt_every)
    kept = min(written, config.run.keep_last or written)
    snapshots = (written - kept) * sum(ema.is_rebuilt_from for ema in config.emas)
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


def planned_weights(config: TrainConfig) -> dict[str, nn.Parameter]:
    """Returns the weights of the model and of the projectors, without data."""
    with torch.device("meta"):
        projectors = projectors_of(
            config.model, config.auxiliary, config.shapes, config.run.global_seed
        )
    added = {f"{PROJECTORS}.{name}": weight for name, weight in projectors.named_parameters()}
    return {**dict(fake_model(config.model).named_parameters()), **added}


Shapes = Mapping[str, torch.Size]


def state_tensors(
    config: TrainConfig, shapes: Shapes | None = None
) -> tuple[Shapes, Shapes, dict[str, list[int]]]:
    """Describes the state that a process holds from step to step.

    shapes: shapes of the parameters, or of this process's shards; None: the complete parameters
    Returns the shapes of all parameters and of the trained ones, and, by parameter, the bytes of
    each tensor of the optimizer's state.
    """
    model = fake_model(config.model)
    shapes = shapes or {name: weight.shape for name, weight in planned_weights(config).items()}
    frozen = {*frozen_names(model, config.step)}
    trained = {name: shape for name, shape in shapes.items() if name not in frozen}
    state = {
        name: [t.numel() * t.element_size() for t in kept.values() if torch.is_tensor(t)]
        for name, kept in planned_state(config.optimizer, trained, model.matrices()).items()
    }
    return shapes, trained, state


def state_bytes(config: TrainConfig, shapes: Shapes | None = None) -> Bytes:
    """Returns the bytes that a process holds from step to step; see `state_tensors`."""
    shapes, trained, state = state_tensors(config, shapes)
    of_weights, of_gradients = (4 * sum(s.numel() for s in d.values()) for d in (shapes, trained))
    return {
        "weights": of_weights, "gradients": of_gradients,
        "optimizer": sum(map(sum, state.values())), "EMA": of_weights * len(config.emas),
    }  # fmt: skip


def copied_bytes(config: TrainConfig, copies: int, shapes: Shapes | None = None) -> Bytes:
    """Returns the bytes that a process copies to pinned host memory at a save.

    copies: number of processes that hold the same state and share the saving
    """
    shapes, _, state = state_tensors(config, shapes)
    sizes = {name: weight.numel() for name, weight in planned_weights(config).items()}
    totals = [0] * copies
    for name, writer in share_out(sizes, copies).items():
        weights = [4 * shapes[name].numel()] * (1 + len(config.emas))
        totals[writer] += sum(map(pinned_bytes, weights + state.get(name, [])))
    return {"copy at a save": max(totals)}


def activation_bytes(config: TrainConfig, micro_batch: int) -> int:
    """Returns the bytes that a forward pass saves for backward, from tensors without data."""
    step = config.step
    return model_activations(config.model, micro_batch, step.precision, step.recomputed)


def received_rows(config: TrainConfig, micro_batch: int) -> int:
    """Returns the number of rows that a process receives under --expert-parallel and keeps for the
    backward pass, for an even load."""
    model, kept = config.model, max if config.step.recomputed == "all" else sum
    tokens = kept(map(model.tokens_of, model.sparse_layers))
    return micro_batch * tokens * model.num_experts_per_tok


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


@contextmanager
def saved_tensors() -> Iterator[set[torch.UntypedStorage]]:
    """Collects the storages that autograd saves for the backward pass, including weights."""
    kept: set[torch.UntypedStorage] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class Outputs(TorchDispatchMode):
    """Collects the storages of the outputs of `KEPT_OPERATORS`."""

    def __init__(self):
        super().__init__()
        self.storages: set[torch.UntypedStorage] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func.name() in KEPT_OPERATORS:
            tensors = [one for one in outputs if torch.is_tensor(one)]
            self.storages.update(tensor.untyped_storage() for tensor in tensors)
        return outputs


def model_activations(config: DiTConfig, batch: int, precision: str, recomputed: str) -> int:
    """Computes `activation_bytes`; see `StepConfig.recomputed`.

    With checkpointing, the activations are the inputs of the blocks and all that one block saves.
    Selective checkpointing also keeps the outputs of some operators in the other blocks.
    """
    outside, blocks = forward_bytes(config, batch, precision)
    inputs, saved, kept = zip(*blocks, strict=True)
    if recomputed == "nothing":
        return outside + sum(saved)
    largest = max(saved)
    total = outside + sum(inputs) + largest
    if recomputed == "selective":
        total += sum(kept) - kept[saved.index(largest)]
    return total


@cache
@with_fixed_rows
def forward_bytes(
    config: DiTConfig, batch: int, precision: str
) -> tuple[int, list[tuple[int, int, int]]]:
    """Returns the bytes that a forward pass saves outside of the blocks, and for each block those
    of its input, of all that it saves, and of what `KEPT_OPERATORS` return.
    """
    model, places = fake_model(config), []
    weights = {weight.untyped_storage() for weight in model.parameters()}
    autocast = torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32")
    with ExitStack() as hooks, autocast, saved_tensors() as saved, Outputs() as outputs:

        def note(block: nn.Module, inputs: tuple[Tensor, ...], *_: Tensor) -> None:
            places.append((inputs[0].nbytes, {*saved}, {*outputs.storages}))

        for block in model.blocks:  # two notes for each block: before and after it
            hooks.enter_context(block.register_forward_pre_hook(note))
            hooks.enter_context(block.register_forward_hook(note))
        fake_forward(config, batch)
    blocks, outside = [], saved - weights
    for (size, *before), (_, *after) in zip(places[::2], places[1::2], strict=True):
        of_block = [now - then - weights for now, then in zip(after, before, strict=True)]
        blocks.append((size, *map(storage_bytes, of_block)))
        outside -= of_block[0]
    return storage_bytes(outside), blocks


def storage_bytes(storages: set[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)
