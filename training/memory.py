"""What a command would train and what memory that takes, without allocating any of it.

print_plan(config, world_size, micro_batch)                    # --dry-run
refuse_if_too_large(config, model_config, dist, micro_batch)   # of train.py
"""

from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from latents.autoencoder import DEFAULT_VAE, latent_geometry, load_autoencoder_config
from latents.split import split
from models import DiT, DiTConfig, count_macs, count_parameters
from runtime.devices import DTYPES
from runtime.errors import UserError, counted
from runtime.processes import Distributed
from training.config import DeepSpeedConfig, TrainConfig, fill
from training.finetune import open_source
from training.inputs import model_config, open_dataset, total_steps
from training.run_folder import name_of_experts
from training.zero_config import add_experts, complete_config, expert_parallel_size

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
IMAGENET = (1_281_167, 1000)  # images, classes
GIB = 2**30
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, the autoencoder and fragments
ASSUMED = 80.0  # GiB of a GPU where there is none

Parts = dict[str, float]  # bytes by what they are for


def print_plan(config: TrainConfig, world_size: int, micro_batch: int) -> None:
    """Prints the model, its parameters, the memory of a process, whether it fits, and the steps."""
    config, model_config, num_images, assumed = planned_run(config)
    parameters, active = count_parameters(model_config)
    gpu, host, layout = memory(config, model_config, world_size, micro_batch)
    needed, usable, source = in_gib(gpu), *usable_memory(config)
    batch = micro_batch * config.accum_iter * world_size
    steps = total_steps(config, num_images, batch)
    size, side = model_config.hidden_size, model_config.input_size
    lines = {
        "model": f"{name_of_experts(config.model, model_config)}: {model_config.depth} blocks of "
        f"width {size}, latents of {model_config.in_channels} x {side} x {side}, "
        f"{counted(model_config.num_classes, 'class')}",
        "parameters": f"{parameters:,} total, {active:,} active for a token",
        "compute": f"{count_macs(model_config):,} multiply-adds a forward pass on an image",
        "layout": f"{layout}, {config.precision}",
        "GPU": listed(gpu),
        "host": f"{listed(host)} on the first process",
        "fits": f"{'yes' if needed <= usable else 'NO'}: {needed:.2f} GiB needed, {usable:.2f} "
        f"usable of {source}",
        "steps": f"{steps:,} of {batch} images ({world_size} processes x {config.accum_iter} "
        f"micro-batches x {micro_batch}), {steps * batch / num_images:.1f} epochs of "
        f"{num_images:,} images",
    }
    for name, text in [*lines.items(), *(("note", note) for note in assumed)]:
        print(f"{name:<12} {text}")


def in_gib(parts: Parts) -> float:
    return sum(parts.values()) / GIB


def listed(parts: Parts) -> str:
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"{in_gib(parts):.2f} GiB: {sizes}"


def usable_memory(config: TrainConfig) -> tuple[float, str]:
    """The GiB of a GPU that a plan may take, and what GPU that is."""
    if isinstance(config, DeepSpeedConfig) and config.gpu_memory:
        return USABLE * config.gpu_memory, f"{config.gpu_memory:g} (--gpu-memory)"
    if not torch.cuda.is_available():
        return USABLE * ASSUMED, f"{ASSUMED:g} (assumed, no GPU here)"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    size = properties.total_memory / GIB
    return USABLE * size, f"{size:.1f} of this {properties.name}"


def refuse_if_too_large(
    config: TrainConfig, model_config: DiTConfig, dist: Distributed, micro_batch: int
) -> None:
    """Raises UserError for a model that data parallelism cannot fit here, with a command that does.

    On a CPU nothing is refused.
    """
    if dist.device.type != "cuda":
        return
    gpu, *_ = memory(config, model_config, dist.world_size, micro_batch)
    needed, usable, source = in_gib(gpu), *usable_memory(config)
    if needed > usable:
        raise UserError(
            f"--model: got {config.model}, which needs {needed:.1f} GiB a GPU for micro-batches "
            f"of {micro_batch} images, expected at most {usable:.1f}, usable of {source}; what "
            f"fits: {what_fits(config, model_config, dist.world_size, micro_batch, usable)}"
        )


def what_fits(
    config: TrainConfig, model_config: DiTConfig, world_size: int, micro_batch: int, usable: float
) -> str:
    """The first command that fits `usable` GiB of those that take less and less of a GPU."""

    def fits(choice: TrainConfig, gpus: int) -> bool:
        gpu, *_ = memory(choice, model_config, gpus, micro_batch)
        return in_gib(gpu) <= usable

    if fits(replace(config, gradient_checkpointing=True), world_size):
        return "the same command with --gradient-checkpointing"
    folder = Path(DeepSpeedConfig.deepspeed_config).parent
    values = {f.name: getattr(config, f.name) for f in fields(TrainConfig)} | {"compile": False}
    more_and_more = [world_size * 2**doublings for doublings in range(4)]
    for gpus, name, recompute in product(more_and_more, ("zero2", "zero3"), (False, True)):
        values |= {"gradient_checkpointing": recompute, "train_batch_size": micro_batch}
        if fits(DeepSpeedConfig(**values, deepspeed_config=str(folder / f"{name}.json")), gpus):
            return (
                f"train_deepspeed.py on {counted(gpus, 'GPU')} with --deepspeed_config "
                f"config/{name}.json --train_batch_size {micro_batch}"
                f"{' --gradient-checkpointing' if recompute else ''} in place of "
                "--global-batch-size, the other flags as they are"
            )
    return "smaller micro-batches, see --accum_iter"


def planned_run(config: TrainConfig) -> tuple[TrainConfig, DiTConfig, int, list[str]]:
    """The config, its gaps filled; the model's; the number of images; what had to be assumed."""
    config, source = open_source(config)
    path, assumed = config.data_path, []
    if config.latents_path or (path and Path(path).exists()):
        config, dataset = open_dataset(config)
        num_images = len(split(dataset, config.val_share)[0])
        num_classes = len(dataset.classes)
    else:
        config = fill(config, {"vae_path": DEFAULT_VAE, "image_size": 256})
        num_images, num_classes = IMAGENET[0], config.num_classes or IMAGENET[1]
        missing = f"no images at {path}" if path else "no --data-path"
        assumed.append(f"{missing}: ImageNet's {num_images:,} assumed")
    if config.latents_path:
        geometry = dataset.geometry(config.vae_path)
    else:
        try:
            vae = load_autoencoder_config(config.vae_path, local_files_only=True)
        except UserError:
            vae = STABLE_DIFFUSION
            assumed.append(f"no autoencoder at {config.vae_path}: 8x smaller, 4 channels assumed")
        geometry = latent_geometry(vae, config.image_size)
    planned = model_config(config, source, num_classes=num_classes, geometry=geometry)
    return config, planned, num_images, assumed


def memory(
    config: TrainConfig, model_config: DiTConfig, world_size: int, micro_batch: int
) -> tuple[Parts, Parts, str]:
    """Counts what a process keeps on its GPU and in the host's memory; says how it is laid out.

    Master weights, gradients, AdamW's two moments and the EMA are fp32. At a save the first process
    gathers the EMA on the host.
    """
    with torch.device("meta"):
        model = DiT(**vars(model_config))
    total = sum(weight.numel() for weight in model.parameters())
    activations = activation_bytes(
        model_config, micro_batch, config.precision, config.gradient_checkpointing
    )
    gpu, host = {"activations": activations}, {"EMA at a save": 4 * total}
    if isinstance(config, DeepSpeedConfig):
        more, on_host, layout = zero_memory(config, model, world_size)
        return {**more, **gpu}, {**on_host, **host}, layout
    fp32 = {"weights": 4 * total, "gradients": 4 * total, "AdamW": 8 * total, "EMA": 4 * total}
    layout = f"{counted(world_size, 'process')}, each with the whole model"
    return {**fp32, **gpu}, host, layout


def zero_memory(config: DeepSpeedConfig, model: DiT, world_size: int) -> tuple[Parts, Parts, str]:
    """What DeepSpeed keeps: master weights, AdamW and EMA cut over the processes, gradients from
    ZeRO-2 on, and weights in the training precision, whole up to ZeRO-2."""
    ds_config = complete_config(config, world_size)
    add_experts(ds_config, model.config, config, world_size)
    zero, spread = ds_config["zero_optimization"], expert_parallel_size(ds_config)
    stage, item = zero["stage"], DTYPES[config.precision].itemsize
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".moe.experts." in name)
    total, own_experts = sum(sizes.values()), experts // max(1, spread)
    own = total - experts + own_experts  # what a process computes with, gathered
    share = 4 * total // world_size
    weights = {"weights": item * (total // world_size if stage == 3 else own)}
    optimizer = {
        "master weights": 0 if stage == 3 and config.precision == "fp32" else share,
        "AdamW": 2 * share,
        "EMA": share,
        "gradients": item * own if stage == 1 else share,
    }
    gpu: Parts = {
        "buckets": 2 * item * min(int(zero.get("reduce_bucket_size", 5e8)), own),
        "gathered at a save": 2 * 4 * max(sizes.values()),
    }
    if stage == 3:  # at least the layer in use and the next one
        live = max(int(zero.get("stage3_max_live_parameters", 1e9)), 2 * own // len(model.blocks))
        gpu["gathered weights"] = item * min(live, own)
        if spread and not config.gradient_checkpointing:  # only then AutoEP frees them
            gpu["kept experts"] = item * own_experts
    host: Parts = {}
    for name, parts in (("offload_param", weights), ("offload_optimizer", optimizer)):
        is_offloaded = zero.get(name, {}).get("device") == "cpu"
        (host if is_offloaded else gpu).update(parts)
    layout = f"{counted(world_size, 'process')} under ZeRO-{stage}"
    return gpu, host, layout + (f", experts over {spread}" if spread else "")


@cache
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
    kept: set[torch.UntypedStorage] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with FakeTensorMode():
        model = DiT(**vars(config)).train()
        weights = {weight.untyped_storage() for weight in model.parameters()}
        size = (batch, config.in_channels, config.input_size, config.input_size)
        x, t, y = torch.zeros(size), torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
        enabled = precision != "fp32"
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", DTYPES[precision], enabled=enabled):
            model(x, t, y)
    return sum(storage.nbytes() for storage in kept - weights)
