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
from runtime.errors import UserError
from runtime.files import read_json


@dataclass(frozen=True)
class Layout:
    """How a model is cut up; DeepSpeed's state goes on only with the layout it was saved by."""

    world_size: int
    zero_stage: int
    expert_parallel_size: int  # 0: not DeepSpeed's layers but ours

    def __post_init__(self) -> None:
        if not all(type(value) is int for value in vars(self).values()):
            raise ValueError(f"got a layout of {vars(self)!s:.80}, expected whole numbers")

    def __str__(self) -> str:
        experts = f", experts over {self.expert_parallel_size}" if self.expert_parallel_size else ""
        return f"{self.world_size} processes under ZeRO-{self.zero_stage}{experts}"

    def can_take(self, other: "Layout") -> bool:
        """Whether a universal checkpoint of the other layout can be loaded."""
        same_layers = bool(self.expert_parallel_size) == bool(other.expert_parallel_size)
        return self.zero_stage == other.zero_stage and same_layers


LEAF_MODULES = ["moe.SparseMoEBlock", "deepspeed.module_inject.auto_ep_layer.AutoEPMoELayer"]


# What the JSON may say besides what the script owns. Other parts of DeepSpeed write files of their
# own, reach the network, or import what the JSON names.
SECTIONS = {
    "zero_optimization", "expert_parallel", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "wall_clock_breakdown", "memory_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
OBJECTS = {
    "zero_optimization", "expert_parallel", "optimizer", "bf16", "fp16", "torch_autocast",
    "data_types",
}  # fmt: skip
OWNED = OBJECTS | {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "steps_per_print",
}  # fmt: skip
MAX_BUCKET = 1e10  # numbers; DeepSpeed allocates them at once


def read_config(path: str) -> dict:
    """Reads a DeepSpeed JSON; UserError for what is none, or asks for what there is not here."""
    try:
        config = read_json(path)
    except OSError as error:
        raise UserError(f"--deepspeed_config: cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--deepspeed_config: {path} is not JSON ({error})") from None
    try:
        check_sections(config)
        check_zero(config.get("zero_optimization", {}))
        check_experts(config.get("expert_parallel", {}))
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path}: {error}") from None
    return config


def check_sections(config: object) -> None:
    """Raises ValueError unless the JSON has known sections, and objects where they have to be."""
    check_object("it", config)
    if "scheduler" in config:
        raise ValueError(
            "got a scheduler, expected none (--lr and --warmup-steps are what there is)"
        )
    for name, value in config.items():
        if name not in SECTIONS | OWNED:
            raise ValueError(f"got {name[:80]}, expected one of {', '.join(sorted(SECTIONS))}")
        if name in OBJECTS and (value != "auto" or name in SECTIONS):
            check_object(name, value)


def check_object(name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: got a {type(value).__name__}, expected {{}}")


def check_zero(zero: dict) -> None:
    """Raises ValueError for a ZeRO that does not exist here, or buckets that no memory holds."""
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage: got {stage!r:.80}, expected 1, 2 or 3 (without ZeRO, use "
            "train.py)"
        )
    for name in ("offload_optimizer", "offload_param"):
        check_object(f"zero_optimization.{name}", zero.get(name, {}))
        device = zero.get(name, {}).get("device", "none")
        if device not in ("cpu", "none"):
            raise ValueError(
                f"zero_optimization.{name}.device: got {device!s:.80}, expected cpu or none: the "
                "EMA is kept in memory"
            )
    for name, value in zero.items():
        if name.endswith("bucket_size") and value != "auto":
            number = type(value) in (int, float)
            if not number or not 0 <= value <= MAX_BUCKET:
                raise ValueError(
                    f"zero_optimization.{name[:80]}: got {value!r:.80}, expected at most "
                    f"{MAX_BUCKET:g} numbers"
                )


def check_experts(experts: dict) -> None:
    if type(experts.get("enabled", False)) is not bool:
        raise ValueError(
            f"expert_parallel.enabled: got {experts['enabled']!r:.80}, expected true or false"
        )


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
        elif got in ("auto", wanted):
            config[key] = wanted
        else:
            owner = FLAGS.get(name, "the script")
            raise UserError(
                f"--deepspeed_config {path}: {name}: got {json.dumps(got):.200}, expected "
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
    elif type(size) is not int or size < 1 or world_size % size or config.num_experts % size:
        raise UserError(
            f"--deepspeed_config {path}: expert_parallel.autoep_size: got {size!s:.80}, expected "
            f"a divisor of {config.num_experts} experts and of {world_size} processes"
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
