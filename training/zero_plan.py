"""--dry-run of train_deepspeed.py: what each GPU of a cluster would hold, without having one."""

import argparse
import os

import torch

from models import DiT, DiTConfig, count_macs, count_parameters
from moe import Experts, GeluExperts
from runtime.devices import DTYPES
from training.inputs import total_steps
from training.plan import GIB, activation_bytes, planned_config
from training.zero_config import add_experts, complete_config, layout_of

USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, the autoencoder and fragments


def print_zero_plan(args: argparse.Namespace, gpus_per_node: int) -> None:
    """Prints the model, the memory of a GPU (and of its share of the host) and whether it fits."""
    world_size = args.gpus or int(os.environ.get("WORLD_SIZE", 1))
    ds_config = complete_config(args, world_size)
    config, num_images, notes = planned_config(args)
    add_experts(
        ds_config, config, args.deepspeed_config,
        world_size=world_size, gpus_per_node=min(world_size, gpus_per_node),
    )  # fmt: skip
    total, active = count_parameters(config)
    gpu, host = memory(args, config, ds_config, world_size)
    layout = layout_of(ds_config, world_size)
    batch = ds_config["train_batch_size"]
    steps = total_steps(args, num_images, batch)
    needed, usable = sum(gpu.values()) / GIB, USABLE * args.gpu_memory
    print(f"model        {args.model}, {config}")
    print(f"parameters   {total:,} total, {active:,} active for a token")
    print(f"compute      {count_macs(config):,} multiply-adds a forward pass on an image")
    print(f"layout       {layout}, {args.precision}")
    for place, parts in (("GPU", gpu), ("host", host)):
        if parts:
            listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
            print(f"{place:<12} {sum(parts.values()) / GIB:.2f} GiB a process: {listed}")
    print(
        f"fits         {'yes' if needed <= usable else 'NO'}: {needed:.2f} GiB needed, "
        f"{usable:.2f} usable of {args.gpu_memory:g} (--gpu-memory)"
    )
    print(
        f"steps        {steps:,} of {batch} images ({world_size} processes x {args.accum_iter} "
        f"micro-batches x {args.train_batch_size}), {steps * batch / num_images:.1f} epochs of "
        f"{num_images:,} images"
    )
    if "kept experts" in gpu:
        notes.append("AutoEP frees its experts under ZeRO-3 only with --gradient-checkpointing")
    for note in notes:
        print(f"note         {note}")


def memory(
    args: argparse.Namespace, config: DiTConfig, ds_config: dict, world_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Counts the bytes that a process keeps on its GPU and in the host's memory.

    Weights are in the training precision; master weights, gradients, the two moments of AdamW and
    the EMA are fp32 and cut over all processes from ZeRO-2 on (gradients) or always (the others).
    """
    zero, layout = ds_config["zero_optimization"], layout_of(ds_config, world_size)
    size = DTYPES[args.precision].itemsize
    with torch.device("meta"):
        model = DiT(**vars(config))
    total = sum(weight.numel() for weight in model.parameters())
    experts = sum(
        weight.numel()
        for module in model.modules()
        if isinstance(module, Experts | GeluExperts)
        for weight in module.parameters()
    )
    own_experts = experts // max(1, layout.expert_parallel_size)
    own = total - experts + own_experts  # what a process computes with, gathered
    is_stage_3 = layout.zero_stage == 3
    masters_are_weights = is_stage_3 and args.precision == "fp32"
    weights = {"weights": size * (total // world_size if is_stage_3 else own)}
    optimizer = {
        "master weights": 0 if masters_are_weights else 4 * total // world_size,
        "AdamW": 8 * total // world_size,
        "EMA": 4 * total // world_size,
    }
    gradients = {"gradients": size * own if layout.zero_stage == 1 else 4 * total // world_size}
    working = {
        "buckets": 2 * size * min(int(zero.get("reduce_bucket_size", 5e8)), own),
        "activations": activation_bytes(
            config, args.train_batch_size, args.precision, args.gradient_checkpointing
        ),
    }
    if is_stage_3:  # at least the layer in use and the next one
        live = max(int(zero.get("stage3_max_live_parameters", 1e9)), 2 * own // config.depth)
        working["gathered weights"] = size * min(live, own)
        if layout.expert_parallel_size and not args.gradient_checkpointing:
            working["kept experts"] = size * own_experts

    def is_offloaded(what: str) -> bool:
        return zero.get(what, {}).get("device") == "cpu"

    gpu, host = {}, {}
    (host if is_offloaded("offload_param") else gpu).update(weights)
    (host if is_offloaded("offload_optimizer") else gpu).update({**optimizer, **gradients})
    return {**gpu, **working}, host
