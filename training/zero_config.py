"""The DeepSpeed config of a run: the user's JSON, and what the flags own.

The JSON says how to cut the model up (ZeRO stage, offload, expert parallelism, buckets). Batch
size, accumulation, precision, clipping, learning rate and what the experts are come from the flags;
a JSON that says otherwise is refused, "auto" or nothing is filled in. DeepSpeed checks the rest.
"""

import json
import math
import os
from dataclasses import dataclass

from models import DiTConfig
from runtime.errors import UserError
from runtime.files import read_json
from training.config import DeepSpeedConfig

AUTOEP_ROUTERS = ("topk", "sigmoid")  # those that give each token K experts and no more
LEAF_MODULES = ["moe.SparseMoEBlock", "deepspeed.module_inject.auto_ep_layer.AutoEPMoELayer"]
FLAGS = {
    "train_micro_batch_size_per_gpu": "--train_batch_size",
    "train_batch_size": "--train_batch_size x --accum_iter x processes",
    "gradient_accumulation_steps": "--accum_iter",
    "gradient_clipping": "--grad-clip",
    "bf16.enabled": "--precision",
    "fp16.enabled": "--precision",
    "optimizer.params.lr": "--lr",
    "optimizer.params.weight_decay": "--weight-decay",
    "expert_parallel.top_k": "--num_experts_per_tok",
}


@dataclass(frozen=True)
class Layout:
    """How a model is cut up; DeepSpeed's state goes on only with the layout it was saved by."""

    world_size: int
    zero_stage: int
    expert_parallel_size: int  # 0: not DeepSpeed's layers but ours

    def __str__(self) -> str:
        experts = f", experts over {self.expert_parallel_size}" if self.expert_parallel_size else ""
        return f"{self.world_size} processes under ZeRO-{self.zero_stage}{experts}"

    def can_take(self, other: "Layout") -> bool:
        """Whether a converted checkpoint of the other layout can be loaded."""
        same_layers = bool(self.expert_parallel_size) == bool(other.expert_parallel_size)
        return self.zero_stage == other.zero_stage and same_layers


def layout_of(ds_config: dict, world_size: int) -> Layout:
    size = ds_config["expert_parallel"]["autoep_size"] if is_expert_parallel(ds_config) else 0
    return Layout(world_size, ds_config["zero_optimization"]["stage"], size)


def is_expert_parallel(ds_config: dict) -> bool:
    return bool(ds_config.get("expert_parallel", {}).get("enabled"))


def complete_config(config: DeepSpeedConfig, world_size: int) -> dict:
    """Fills the flags into --deepspeed_config; UserError where the two contradict each other.

    What AutoEP has to know of the experts is for `add_experts`, once the model's config is known.
    """
    path = config.deepspeed_config
    try:
        ds_config = read_json(path)
        zero = ds_config["zero_optimization"]
        stage, offload = zero["stage"], zero.get("offload_optimizer", {}).get("device")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"--deepspeed_config {path}: expected JSON with zero_optimization.stage ({error})"
        ) from None
    if stage not in (1, 2, 3):
        raise UserError(
            f"--deepspeed_config {path}: zero_optimization.stage: got {stage!r:.80}, expected 1, 2 "
            "or 3 (without ZeRO, use train.py)"
        )
    if offload == "nvme":
        raise UserError(
            f"--deepspeed_config {path}: offload_optimizer.device: got nvme, expected cpu or none"
        )
    if "scheduler" in ds_config:
        raise UserError(
            f"--deepspeed_config {path}: got a scheduler, expected none: --lr and --warmup-steps "
            "say the learning rate"
        )
    if config.compile and (stage == 3 or is_expert_parallel(ds_config)):
        raise UserError("--compile: got ZeRO-3 or expert parallelism, expected ZeRO-1 or 2 without")
    adam = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": [0.9, 0.999]}
    # DeepSpeed's own Adam is the one that computes on the CPU; torch's needs no compiler.
    kind = {} if offload == "cpu" else {"torch_adam": True, "fused": True}
    owned = {
        "train_batch_size": config.train_batch_size * config.accum_iter * world_size,
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_accumulation_steps": config.accum_iter,
        "gradient_clipping": config.grad_clip,
        # Broken gradients skip the step, as everywhere here.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": config.precision == "fp16"},
        "optimizer": {"type": "AdamW", "params": {**adam, "eps": 1e-8, **kind}},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": None if stage == 1 else "fp32"},
        "steps_per_print": 2**31,
        "zero_optimization": {
            "leaf_module": {"classes": LEAF_MODULES},
            "memory_efficient_linear": False,  # it replaces torch's linear everywhere
        },
    }
    fill_in(ds_config, owned, path)
    return ds_config


def fill_in(config: dict, owned: dict, path: str, prefix: str = "") -> None:
    """Writes `owned` into `config`, whose own values have to be the same, "auto" or absent."""
    for key, wanted in owned.items():
        name, got = prefix + key, config.get(key, "auto")
        if isinstance(wanted, dict) and isinstance(got, dict):
            fill_in(got, wanted, path, name + ".")
        elif got in ("auto", wanted):
            config[key] = wanted
        else:
            raise UserError(
                f"--deepspeed_config {path}: {name}: got {json.dumps(got):.200}, expected "
                f"{json.dumps(wanted)} as {FLAGS.get(name, 'the script')} says (or leave it out)"
            )


def add_experts(
    ds_config: dict, model_config: DiTConfig, config: DeepSpeedConfig, world_size: int
) -> None:
    """Tells DeepSpeed's AutoEP, if the JSON enables it, what moe.SparseMoEBlock is.

    The experts of a layer are spread over "autoep_size" processes: "auto" is the most of one node
    that the experts can be divided among, so that tokens do not travel between nodes.
    """
    if not is_expert_parallel(ds_config):
        return
    path, num_experts = config.deepspeed_config, model_config.num_experts
    kind, router = model_config.mlp_type, model_config.router
    if num_experts == 0 or kind != "swiglu" or router not in AUTOEP_ROUTERS:
        raise UserError(
            f"--deepspeed_config {path}: expert_parallel: got {num_experts} {kind} experts and the "
            f"router {router}, expected swiglu experts and one of {', '.join(AUTOEP_ROUTERS)}, "
            "which DeepSpeed's AutoEP can compute"
        )
    size = ds_config["expert_parallel"].get("autoep_size", "auto")
    if size == "auto":
        node = config.gpus_per_node or gpus_of_node() or min(8, world_size)
        size = math.gcd(num_experts, node, world_size)
    elif type(size) is not int or size < 1 or world_size % size or num_experts % size:
        raise UserError(
            f"--deepspeed_config {path}: expert_parallel.autoep_size: got {size!s:.80}, expected "
            f"a divisor of {num_experts} experts and of {world_size} processes"
        )
    ds_config["expert_parallel"]["autoep_size"] = size
    owned = {
        "moe_layer_pattern": r"blocks\.\d+\.moe",
        "expert_pattern": "experts",
        "router_pattern": "gate",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "top_k": model_config.num_experts_per_tok,
        "score_func": "softmax",  # unused: our router chooses, and the weights come after
        "score_apply": "post",
        "load_balance_coeff": None,
        "has_shared_experts": model_config.n_shared_experts > 0,
        "shared_experts_pattern": "shared_experts",
    }
    fill_in(ds_config, {"expert_parallel": owned}, path)


def gpus_of_node() -> int:
    """Processes of this node, by torchrun's or the deepspeed launcher's environment; 0 for none."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 0)))
