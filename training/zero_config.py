"""The DeepSpeed config of a run: the user's JSON, and what the flags of the script own.

The JSON says how to cut the model up (ZeRO stage, offload, expert parallelism, buckets). Batch
size, accumulation, precision, clipping, learning rate and what the experts are come from the flags;
a JSON that says otherwise is refused, "auto" or nothing is filled in.
"""

import argparse
import json
import math
from dataclasses import dataclass

from models import DiTConfig
from training.errors import UserError


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
        """Whether a universal checkpoint of the other layout can be loaded."""
        same_layers = bool(self.expert_parallel_size) == bool(other.expert_parallel_size)
        return self.zero_stage == other.zero_stage and same_layers


LEAF_MODULES = ["moe.SparseMoEBlock", "deepspeed.module_inject.auto_ep_layer.AutoEPMoELayer"]


def read_config(path: str) -> dict:
    try:
        with open(path) as file:
            config = json.load(file)
    except OSError as error:
        raise UserError(f"--deepspeed_config: cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--deepspeed_config: {path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(
            f"--deepspeed_config: got a {type(config).__name__} in {path}, expected {{}}"
        )
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"--deepspeed_config {path}: zero_optimization.stage: got {stage}, expected 1, 2 or 3 "
            "(without ZeRO, use train.py)"
        )
    if "scheduler" in config:
        raise UserError(
            f"--deepspeed_config {path}: got a scheduler, expected none (--lr and --warmup-steps "
            "are what there is)"
        )
    for writer in ("checkpoint.writer", "datastates_ckpt"):
        section, _, key = writer.partition(".")
        if config.get(section) and (not key or config[section].get(key)):
            raise UserError(
                f"--deepspeed_config {path}: got {writer}, expected none: checkpoints are written "
                "and verified by the script"
            )
    for name in ("offload_optimizer", "offload_param"):
        device = zero.get(name, {}).get("device", "none")
        if device not in ("cpu", "none"):
            raise UserError(
                f"--deepspeed_config {path}: zero_optimization.{name}.device: got {device}, "
                "expected cpu or none: the EMA is kept in memory"
            )
    return config


def complete_config(args: argparse.Namespace, world_size: int) -> dict:
    """Fills the flags into --deepspeed_config; UserError where the two contradict each other.

    What AutoEP has to know of the experts is for `add_experts`, once the model's config is known.
    """
    ds_config = read_config(args.deepspeed_config)
    stage = ds_config["zero_optimization"]["stage"]
    offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu"
    adam = {"lr": args.lr, "weight_decay": args.weight_decay, "betas": [0.9, 0.999], "eps": 1e-8}
    owned = {
        "train_batch_size": args.train_batch_size * args.accum_iter * world_size,
        "train_micro_batch_size_per_gpu": args.train_batch_size,
        "gradient_accumulation_steps": args.accum_iter,
        "gradient_clipping": args.grad_clip,
        "bf16": {"enabled": args.precision == "bf16"},
        "fp16": {"enabled": args.precision == "fp16"},
        # DeepSpeed's own Adam is the one that computes on the CPU; torch's needs no compiler.
        "optimizer": {
            "type": "AdamW",
            "params": adam if offload else {**adam, "torch_adam": True, "fused": True},
        },
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": None if stage == 1 else "fp32"},
        "steps_per_print": 2**31,
        "zero_optimization": {"leaf_module": {"classes": LEAF_MODULES}},
    }
    fill_in(ds_config, owned, args.deepspeed_config)
    return ds_config


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


def fill_in(config: dict, owned: dict, path: str, prefix: str = "") -> None:
    """Writes `owned` into `config`, whose own values have to be the same, "auto" or absent."""
    for key, wanted in owned.items():
        name = prefix + key
        got = config.get(key, "auto")
        if isinstance(wanted, dict) and isinstance(got, dict):
            fill_in(got, wanted, path, name + ".")
        elif got == "auto":
            config[key] = wanted
        elif got != wanted:
            owner = FLAGS.get(name, "the script")
            raise UserError(
                f"--deepspeed_config {path}: {name}: got {json.dumps(got)}, expected "
                f"{json.dumps(wanted)} as {owner} says (or leave it out)"
            )


def is_expert_parallel(ds_config: dict) -> bool:
    return bool(ds_config.get("expert_parallel", {}).get("enabled"))


def add_experts(
    ds_config: dict, config: DiTConfig, path: str, *, world_size: int, gpus_per_node: int
) -> None:
    """Tells DeepSpeed's AutoEP, if the JSON at `path` enables it, what moe.SparseMoEBlock is.

    The experts of a layer are spread over "autoep_size" processes: "auto" is the most of one node
    that the experts can be divided among, so that tokens do not travel between nodes.
    """
    if not is_expert_parallel(ds_config):
        return
    if config.mlp_type != "swiglu" or config.num_experts == 0:
        raise UserError(
            f"--deepspeed_config {path}: expert_parallel: got a model with {config.num_experts} "
            f"{config.mlp_type} experts, expected swiglu experts, the only ones that DeepSpeed's "
            "AutoEP computes"
        )
    size = ds_config["expert_parallel"].get("autoep_size", "auto")
    if size == "auto":
        size = math.gcd(config.num_experts, gpus_per_node, world_size)
    elif not isinstance(size, int) or size < 1 or world_size % size or config.num_experts % size:
        raise UserError(
            f"--deepspeed_config {path}: expert_parallel.autoep_size: got {size}, expected a "
            f"divisor of {config.num_experts} experts and of {world_size} processes"
        )
    ds_config["expert_parallel"]["autoep_size"] = size
    owned = {
        "moe_layer_pattern": r"blocks\.\d+\.moe",
        "expert_pattern": "experts",
        "router_pattern": "gate",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "top_k": config.num_experts_per_tok,
        "score_func": "softmax",
        "score_apply": "post",
        "route_norm": config.renormalize_top_k,
        "has_shared_experts": config.n_shared_experts > 0,
        "shared_experts_pattern": "shared_experts",
    }
    fill_in(ds_config, {"expert_parallel": owned}, path)


def layout_of(ds_config: dict, world_size: int) -> Layout:
    size = ds_config["expert_parallel"]["autoep_size"] if is_expert_parallel(ds_config) else 0
    return Layout(world_size, ds_config["zero_optimization"]["stage"], size)
