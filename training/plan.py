"""What a command would train and what memory that takes, without allocating any of it.

print_plan(config, world_size, micro_batch)      # --dry-run
refuse_if_too_large(config, dist, micro_batch)   # before train.py loads anything
"""

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from latents.autoencoder import latent_geometry, load_autoencoder_config
from latents.sources import counted
from models import DiT, DiTConfig, count_macs, count_parameters
from moe import Experts, GeluExperts
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.processes import Distributed
from training.config import DeepSpeedConfig, TrainConfig, fill
from training.finetune import open_source
from training.inputs import geometry_of, model_config, open_dataset, total_steps
from training.run_folder import name_of_experts
from training.zero_config import add_experts, complete_config, layout_of

STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
IMAGENET = (1_281_167, 1000)  # images, classes
GIB = 2**30
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, the autoencoder and fragments
ASSUMED = 80.0  # GiB of a GPU where there is none

Parts = dict[str, float]  # bytes by what they are for


def print_plan(
    config: TrainConfig, world_size: int, micro_batch: int, ds_config: dict | None = None
) -> None:
    """Prints the model, its parameters, the memory of a process and the steps.

    ds_config: of train_deepspeed.py, from `complete_config`; None: data parallelism
    """
    notes: list[str] = []
    config, planned, num_images = planned_run(config, notes, look_at_images=True)
    if ds_config is not None:
        add_experts(ds_config, planned, config, world_size)
    parameters, active = count_parameters(planned)
    gpu, host = memory(config, planned, world_size, micro_batch, ds_config)
    layout = f"{world_size} processes, each with the whole model"
    if ds_config is not None:
        layout = str(layout_of(ds_config, world_size))
    batch = micro_batch * config.accum_iter * world_size
    steps = total_steps(config, num_images, batch)
    print(
        f"model        {name_of_experts(config.model, planned)}: {planned.depth} blocks of width "
        f"{planned.hidden_size}, {counted(planned.num_heads, 'head')}, latents of "
        f"{planned.in_channels} x {planned.input_size} x {planned.input_size}, "
        f"{counted(planned.num_classes, 'class')}"
    )
    print(f"parameters   {parameters:,} total, {active:,} active for a token")
    print(f"compute      {count_macs(planned):,} multiply-adds a forward pass on an image")
    print(f"layout       {layout}, {config.precision}")
    for place, parts in (("GPU", gpu), ("host", host)):
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
        print(f"{place:<12} {sum(parts.values()) / GIB:.2f} GiB: {listed}")
    needed, usable, source = sum(gpu.values()) / GIB, *usable_memory(config)
    print(
        f"fits         {'yes' if needed <= usable else 'NO'}: {needed:.2f} GiB needed, "
        f"{usable:.2f} usable of {source}"
    )
    print(
        f"steps        {steps:,} of {batch} images ({world_size} processes x {config.accum_iter} "
        f"micro-batches x {micro_batch}), {steps * batch / num_images:.1f} epochs of "
        f"{num_images:,} images"
    )
    for note in notes:
        print(f"note         {note}")


def usable_memory(config: TrainConfig) -> tuple[float, str]:
    """The GiB of a GPU that a plan may take, and what GPU that is."""
    if given := getattr(config, "gpu_memory", None):
        return USABLE * given, f"{given:g} (--gpu-memory)"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = properties.total_memory / GIB
        return USABLE * size, f"{size:.1f} of this {properties.name}"
    return USABLE * ASSUMED, f"{ASSUMED:g} (assumed, no GPU here)"


def refuse_if_too_large(config: TrainConfig, dist: Distributed, micro_batch: int) -> None:
    """Raises UserError for a model that does not fit this GPU, with a command that does.

    On a CPU nothing is refused.
    """
    if dist.device.type != "cuda":
        return
    filled, planned, _ = planned_run(config, [], look_at_images=False)
    needed = sum(memory(filled, planned, dist.world_size, micro_batch)[0].values()) / GIB
    usable, source = usable_memory(config)
    if needed > usable:
        raise UserError(
            f"--model: got {filled.model}, which needs {needed:.1f} GiB a GPU for micro-batches "
            f"of {micro_batch} images, expected at most {usable:.1f}, usable of {source}; "
            f"{what_fits(filled, planned, dist.world_size, micro_batch)}"
        )


def what_fits(config: TrainConfig, planned: DiTConfig, world_size: int, micro_batch: int) -> str:
    """A command that fits where data parallelism as it was asked for does not."""
    usable, _ = usable_memory(config)
    less = replace(config, gradient_checkpointing=True)
    needed, _ = memory(less, planned, world_size, micro_batch)
    if sum(needed.values()) / GIB <= usable:
        return "what fits: the same command with --gradient-checkpointing"
    shared = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    folder = Path(DeepSpeedConfig.deepspeed_config).parent
    for gpus in (world_size, 8, 16, 32, 64, 128):
        for name in ("zero2", "zero3"):
            for checkpointing in (False, True):
                path = folder / f"{name}.json"
                choice = DeepSpeedConfig(
                    **{**shared, "gradient_checkpointing": checkpointing, "compile": False},
                    deepspeed_config=str(path), train_batch_size=micro_batch,
                )  # fmt: skip
                ds_config = complete_config(choice, gpus)
                needed, _ = memory(choice, planned, gpus, micro_batch, ds_config)
                if gpus >= world_size and sum(needed.values()) / GIB <= usable:
                    flag = " --gradient-checkpointing" if checkpointing else ""
                    return (
                        f"what fits: train_deepspeed.py on {gpus} GPUs with --deepspeed_config "
                        f"config/{name}.json --train_batch_size {micro_batch}{flag} in place of "
                        "--global-batch-size, and the other flags as they are"
                    )
    return "smaller micro-batches (--accum_iter), or see train_deepspeed.py --dry-run"


def planned_run(
    config: TrainConfig, notes: list[str], *, look_at_images: bool
) -> tuple[TrainConfig, DiTConfig, int]:
    """The config, its gaps filled, the model's, and the number of images; notes get what had to be
    assumed: all of the images if they are not to be looked at."""
    config, source = open_source(config)
    path, dataset, num_images = config.data_path, None, IMAGENET[0]
    if config.latents_path or (look_at_images and path and Path(path).exists()):
        config, dataset = open_dataset(config)
        num_images, num_classes = len(dataset), len(dataset.classes)
    else:
        config = fill(config, {"vae_path": "stabilityai/sd-vae-ft-mse", "image_size": 256})
        num_classes = config.num_classes or IMAGENET[1]
        missing = f"no images at {path}" if path else "no --data-path"
        notes.append(f"{missing}: ImageNet's {num_images:,} images assumed")
    if config.latents_path:
        geometry = geometry_of(dataset, config)
    else:
        try:
            vae = load_autoencoder_config(config.vae_path, local_files_only=True)
        except UserError:
            vae = STABLE_DIFFUSION
            notes.append(
                f"no autoencoder at {config.vae_path}: 8x downsampling, 4 channels assumed"
            )
        geometry = latent_geometry(vae, config.image_size)
    planned = model_config(config, source, num_classes=num_classes, geometry=geometry)
    return config, planned, num_images


def memory(
    config: TrainConfig,
    planned: DiTConfig,
    world_size: int,
    micro_batch: int,
    ds_config: dict | None = None,
) -> tuple[Parts, Parts]:
    """Counts what a process keeps on its GPU and in the host's memory, the first one at a save.

    Master weights, gradients, AdamW's two moments and the EMA are fp32. ZeRO cuts them over the
    processes, but gradients from stage 2 on, and keeps weights in the training precision beside
    them.
    """
    with torch.device("meta"):
        model = DiT(**vars(planned))
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    total = sum(sizes.values())
    gpu: Parts = {
        "activations": activation_bytes(
            planned, micro_batch, config.precision, config.gradient_checkpointing
        )
    }
    host: Parts = {"EMA at a save": 4 * total}  # on the first process
    if ds_config is None:
        weights = {"weights": 4 * total, "gradients": 4 * total, "AdamW": 8 * total}
        return {**weights, "EMA": 4 * total, **gpu}, host
    zero, layout = ds_config["zero_optimization"], layout_of(ds_config, world_size)
    item = DTYPES[config.precision].itemsize
    experts = sum(
        weight.numel()
        for module in model.modules()
        if isinstance(module, Experts | GeluExperts)
        for weight in module.parameters()
    )
    own_experts = experts // max(1, layout.expert_parallel_size)
    own = total - experts + own_experts  # what a process computes with, gathered
    is_stage_3 = layout.zero_stage == 3
    masters_are_weights = is_stage_3 and config.precision == "fp32"
    weights = {"weights": item * (total // world_size if is_stage_3 else own)}
    optimizer = {
        "master weights": 0 if masters_are_weights else 4 * total // world_size,
        "AdamW": 8 * total // world_size,
        "EMA": 4 * total // world_size,
        "gradients": item * own if layout.zero_stage == 1 else 4 * total // world_size,
    }
    gpu["buckets"] = 2 * item * min(int(zero.get("reduce_bucket_size", 5e8)), own)
    gpu["gathered at a save"] = 2 * 4 * max(sizes.values())
    if is_stage_3:  # at least the layer in use and the next one
        live = max(int(zero.get("stage3_max_live_parameters", 1e9)), 2 * own // planned.depth)
        gpu["gathered weights"] = item * min(live, own)
        if layout.expert_parallel_size and not config.gradient_checkpointing:
            gpu["kept experts"] = item * own_experts  # AutoEP frees them with checkpointing only

    def is_offloaded(what: str) -> bool:
        return zero.get(what, {}).get("device") == "cpu"

    (host if is_offloaded("offload_param") else gpu).update(weights)
    (host if is_offloaded("offload_optimizer") else gpu).update(optimizer)
    return gpu, host


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
