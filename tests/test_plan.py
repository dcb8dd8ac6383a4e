"""What --dry-run counts is what a step keeps."""

import os
from dataclasses import replace

import torch
from conftest import ROOT, in_processes

from checkpoints import config_of
from cpu import fused_attention
from training.config import DataFacts, parse_training, resolve
from training.memory import activation_bytes, model_activations


def test_a_plan_for_gpus_has_no_attention_weights():
    """A GPU keeps none, one number a head and token apart, where a CPU in bf16 keeps T x T."""
    config = replace(config_of("DiT-S/2"), depth=2, sparse_layers=(0, 1))
    few, many = (
        model_activations(replace(config, num_heads=heads), 4, "bf16", False) for heads in (3, 12)
    )
    tokens, heads = (config.input_size // config.patch_size) ** 2, 12 - 3
    assert many - few == 2 * 4 * heads * tokens * torch.float32.itemsize


def kept_bytes(dist) -> tuple[int, int]:
    """What AutoEP's forward pass keeps on a process, and the plan."""
    os.environ |= {"RANK": str(dist.rank), "LOCAL_RANK": str(dist.rank), "WORLD_SIZE": "2"}
    os.environ["DS_ACCELERATOR"] = "cpu"
    from engines.deepspeed_engine import DeepSpeedEngine
    from engines.flags import DeepSpeedFlags
    from engines.zero_config import expert_parallel_bytes

    facts = DataFacts(num_classes=4, input_size=16, in_channels=4, image_size=64, vae_path="")
    arguments = [
        "--model=DiT-Ti/2", "--num_experts=4", "--depth=2", "--train_batch_size=16",
        f"--deepspeed_config={ROOT / 'config' / 'zero2_ep.json'}", "--gpus-per-node=2",
    ]  # fmt: skip
    config = resolve(parse_training(DeepSpeedFlags, None, arguments), DeepSpeedFlags, data=facts)
    engine = DeepSpeedEngine(dist, config, None)
    weights = {w.untyped_storage().data_ptr() for w in engine.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, fused_attention():
        x, t, y = torch.randn(16, 4, 16, 16), torch.rand(16), torch.zeros(16, dtype=torch.long)
        _graph = engine.network(x, t, y)
        size = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    return size, activation_bytes(config, 16) + expert_parallel_bytes(config, 16)


def test_the_plan_counts_what_expert_parallelism_keeps():
    """On average: the process whose experts are busier keeps more."""
    results = in_processes(kept_bytes)
    measured, planned = (sum(side) / 2 for side in zip(*results, strict=True))
    assert abs(planned - measured) < 0.06 * measured
