"""The DeepSpeed config of a run: the user's JSON completed by the flags, and the memory plan.

The JSON sets the sharding (ZeRO stage, offload, buckets) and the loss scaling of fp16. The flags
set batch size, accumulation, precision, clipping and learning rate: a JSON with other values is
rejected, and missing values and "auto" are filled in. DeepSpeed checks the rest.
"""

import json
from typing import Any

from runtime.devices import DTYPES, pinned_bytes
from runtime.errors import UserError, pluralize, reported_as
from runtime.files import read_json
from training.config import TrainConfig
from training.engine import Bytes
from training.memory import activation_bytes, planned_weights
from training.optimizers import AdamW
from training.sections import find_file

INSTEAD = "expected train.py --shard --expert-parallel N, which spreads experts for every router"
FLAGS = {
    "train_micro_batch_size_per_gpu": "--train_batch_size",
    "train_batch_size": "--train_batch_size x --accum_iter x processes",
    "gradient_accumulation_steps": "--accum_iter",
    "gradient_clipping": "--grad-clip",
    "bf16.enabled": "--precision",
    "fp16.enabled": "--precision",
    "optimizer.params.lr": "--lr",
    "optimizer.params.betas": "--optimizer adamw:betas",
    "optimizer.params.weight_decay": "--optimizer adamw:weight_decay",
    "optimizer.params.eps": "--optimizer adamw:eps",
}


def asks_for_fp16(path: str) -> bool:
    """Returns whether a JSON enables fp16, as in the published files."""
    try:
        return read_json(find_file(path))["fp16"]["enabled"] is True
    except (OSError, ValueError, LookupError, TypeError):
        return False


def only_of_train(config: TrainConfig) -> dict[str, tuple[Any, str]]:
    """Returns, by flag, what is given of the settings that only train.py supports, or a value that
    is false; and what DeepSpeed supports."""
    step, optimizer, emas = config.step, config.optimizer, len(config.ema)
    has_adamw = isinstance(optimizer, AdamW)
    projectors = {one.name: one.projector(config.model, config.shapes) for one in config.auxiliary}
    trained = [name for name, projector in projectors.items() if projector is not None]
    return {
        "--objective": (
            config.objective.uses_jvp and step.objective.name, "one without torch.func.jvp"
        ),
        "--optimizer": (not has_adamw and step.optimizer.name, "adamw"),
        "--optimizer adamw:decay_vectors": (
            has_adamw and not optimizer.decay_vectors and "False", "True"
        ),
        "--ema": (emas > 1 and f"{emas} averages", "one"),
        "--auxiliary": (", ".join(trained), "a loss without weights of its own"),
        "--freeze": (" ".join(step.freeze), "none"),
        "--train-router-only": (step.train_router_only, "False"),
        "--selective-checkpointing": (step.selective_checkpointing, "--gradient-checkpointing"),
        "--grad-skip": (step.grad_skip, "0"),
    }  # fmt: skip


def complete_config(config: TrainConfig, world_size: int) -> dict:
    """Completes --deepspeed_config by the flags, which must not contradict it."""
    for flag, (got, expected) in only_of_train(config).items():
        if got:
            raise UserError(
                f"{flag}: got {got} under DeepSpeed, expected {expected}; train.py supports it, "
                "with --shard for a large model"
            )
    path = find_file(config.engine.deepspeed_config)
    if path.name in ("zero2_ep.json", "zero3_ep.json") and not path.exists():
        raise UserError(f"--deepspeed_config: got {path}, {INSTEAD}")
    faults = (OSError, ValueError, AttributeError, TypeError)
    with reported_as(f"--deepspeed_config {path}", *faults):
        ds_config = read_json(path)
        zero = ds_config.get("zero_optimization", {})
        stage, offload = zero.get("stage"), zero.get("offload_optimizer", {}).get("device")
        if stage not in (1, 2, 3):
            raise ValueError(
                f"zero_optimization.stage: got {stage!r:.80}, expected 1, 2 or 3 (without ZeRO, "
                "use train.py)"
            )
        if offload == "nvme":
            raise ValueError("offload_optimizer.device: got nvme, expected cpu or none")
        if ds_config.get("expert_parallel", {}).get("enabled"):
            raise ValueError(f"got expert_parallel, {INSTEAD}")
        if "scheduler" in ds_config:
            raise ValueError("got a scheduler, expected none: --lr and --warmup-steps do that")
        ds_config["steps_per_print"] = 2**31  # the loop prints
        fill_in(ds_config, owned_by_flags(config, world_size, stage, offload == "cpu"))
    if config.step.compile and stage == 3:
        raise UserError("--compile: got ZeRO-3, expected ZeRO-1 or 2")
    return ds_config


def owned_by_flags(config: TrainConfig, world_size: int, stage: int, offload: bool) -> dict:
    step, optimizer, micro_batch = config.step, config.optimizer, config.engine.train_batch_size
    adam = {"lr": step.lr, "weight_decay": optimizer.weight_decay, "betas": list(optimizer.betas),
            "eps": optimizer.eps}  # fmt: skip
    # DeepSpeed's own Adam is the one that computes on the CPU; torch's needs no compiler.
    kind = {} if offload else {"torch_adam": True, "fused": True}
    return {
        "train_batch_size": micro_batch * step.accum_iter * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": step.accum_iter,
        "managed_gradient_accumulation": True,
        "gradient_clipping": step.grad_clip,
        # Broken gradients skip the step, as everywhere here.
        "bf16": {"enabled": step.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": step.precision == "fp16"},
        "optimizer": {"type": "AdamW", "params": {**adam, **kind}},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": None if stage == 1 else "fp32"},
        "zero_optimization": {
            "leaf_module": {"classes": ["moe.SparseMoEBlock"]},
            "memory_efficient_linear": False,  # it replaces torch's linear everywhere
            "compute_grad_norm": True,
        },
    }


def fill_in(config: dict, owned: dict, prefix: str = "") -> None:
    """Writes `owned` into `config`, whose values have to be missing, equal or "auto"."""
    for key, required in owned.items():
        name, got = prefix + key, config.get(key, "auto")
        if isinstance(required, dict) and isinstance(got, dict):
            fill_in(got, required, name + ".")
        elif got in ("auto", required):
            config[key] = required
        else:
            raise ValueError(
                f"{name}: got {json.dumps(got):.200}, expected {json.dumps(required)}, as set by "
                f"{FLAGS.get(name, 'the script')}, or no entry"
            )


def zero_memory(config: TrainConfig, world_size: int) -> tuple[Bytes, Bytes, str]:
    """Plans the memory of DeepSpeed.

    Master weights, AdamW's state and the EMA are sharded over the processes, and gradients too from
    ZeRO-2 on. Weights in the training precision are unsharded up to ZeRO-2.
    """
    ds_config = complete_config(config, world_size)
    # DeepSpeed uses its defaults for "auto".
    zero = {k: v for k, v in ds_config["zero_optimization"].items() if v != "auto"}
    stage, item = zero["stage"], DTYPES[config.step.precision].itemsize
    sizes = [weight.numel() for weight in planned_weights(config).values()]
    total = sum(sizes)
    share = 4 * total // world_size
    weights = {"weights": item * (total // world_size if stage == 3 else total)}
    optimizer = {
        "master weights": 0 if stage == 3 and config.step.precision == "fp32" else share,
        "AdamW": 2 * share,
        "EMA": share,
        "gradients": item * total if stage == 1 else share,
    }
    gpu: Bytes = {
        "activations": activation_bytes(config, config.engine.train_batch_size),
        "buckets": 2 * item * min(int(zero.get("reduce_bucket_size", 5e8)), total),
    }
    if stage == 3:  # at least the layer in use and the next one
        live = int(zero.get("stage3_max_live_parameters", 1e9))
        live = max(live, 2 * total // config.model.depth)
        gpu["gathered weights"] = item * min(live, total)
    copied = sum(pinned_bytes(4 * size // world_size) for size in sizes)
    host: Bytes = {"copy at a save": 4 * copied}  # EMA, master weights and AdamW's moments
    for name, parts in (("offload_param", weights), ("offload_optimizer", optimizer)):
        is_offloaded = zero.get(name, {}).get("device") == "cpu"
        (host if is_offloaded else gpu).update(parts)
    return gpu, host, f"{pluralize(world_size, 'process')} under ZeRO-{stage}"
