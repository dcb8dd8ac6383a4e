"""What DeepSpeed keeps on a process, counted without allocating any of it."""

import torch

from engines.zero_config import complete_config, expert_parallel_size
from models import DiT
from moe import width_of
from runtime.devices import DTYPES
from runtime.errors import counted
from training.config import TrainConfig
from training.engine import Parts
from training.memory import activation_bytes


def zero_memory(config: TrainConfig, world_size: int, micro_batch: int) -> tuple[Parts, Parts, str]:
    """What DeepSpeed keeps: master weights, AdamW and EMA cut over the processes, gradients from
    ZeRO-2 on, and weights in the training precision, whole up to ZeRO-2."""
    ds_config = complete_config(config, world_size)
    with torch.device("meta"):
        model = DiT(**vars(config.model))
    zero, spread = ds_config["zero_optimization"], expert_parallel_size(ds_config)
    stage, item = zero["stage"], DTYPES[config.step.precision].itemsize
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".moe.experts." in name)
    total, own_experts = sum(sizes.values()), experts // max(1, spread)
    own = total - experts + own_experts  # what a process computes with, gathered
    share = 4 * total // world_size
    weights = {"weights": item * (total // world_size if stage == 3 else own)}
    optimizer = {
        "master weights": 0 if stage == 3 and config.step.precision == "fp32" else share,
        "AdamW": 2 * share,
        "EMA": share,
        "gradients": item * own if stage == 1 else share,
    }
    gpu: Parts = {
        "activations": activation_bytes(config, micro_batch),
        "buckets": 2 * item * min(int(zero.get("reduce_bucket_size", 5e8)), own),
        "gathered at a save": 2 * 4 * max(sizes.values()),
    }
    if stage == 3:  # at least the layer in use and the next one
        live = max(int(zero.get("stage3_max_live_parameters", 1e9)), 2 * own // len(model.blocks))
        gpu["gathered weights"] = item * min(live, own)
        if spread and not config.step.gradient_checkpointing:  # only then AutoEP frees them
            gpu["kept experts"] = item * own_experts
    if spread:
        gpu["activations"] += expert_parallel_bytes(config, micro_batch)
    host: Parts = {"EMA at a save": 4 * total}
    for name, parts in (("offload_param", weights), ("offload_optimizer", optimizer)):
        is_offloaded = zero.get(name, {}).get("device") == "cpu"
        (host if is_offloaded else gpu).update(parts)
    layout = f"{counted(world_size, 'process')} under ZeRO-{stage}"
    return gpu, host, layout + (f", experts over {spread}" if spread else "")


def expert_parallel_bytes(config: TrainConfig, micro_batch: int) -> int:
    """What AutoEP's layers keep for the backward pass and ours compute again.

    That is, of each row, its input, silu(gate), the product with up, and the output. As many rows
    come to a process as it sends, on average: with uneven experts one gets more.
    """
    model, step = config.model, config.step
    tokens = micro_batch * (model.input_size // model.patch_size) ** 2
    numbers = 2 * (model.hidden_size + width_of(model.hidden_size, model.mlp_ratio))
    layers = 1 if step.gradient_checkpointing else len(model.sparse_layers)
    rows = layers * tokens * model.num_experts_per_tok
    return DTYPES[step.precision].itemsize * rows * numbers
