"""The DeepSpeed config of a run: the user's JSON, what the flags own, and the memory it takes.

The JSON says how to cut the model up (ZeRO stage, offload, expert parallelism, buckets). Batch
size, accumulation, precision, clipping, learning rate and what the experts are come from the flags;
a JSON that says otherwise is refused, "auto" or nothing is filled in. DeepSpeed checks the rest.
"""

import json
import math

from moe import width_of
from runtime.devices import DTYPES
from runtime.errors import UserError, counted, reported_as
from runtime.files import read_json
from training.config import TrainConfig
from training.engine import Bytes, node_size
from training.memory import activation_bytes, planned_model
from training.optimizers import AdamW

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
    "optimizer.params.betas": "--optimizer-betas",
    "optimizer.params.weight_decay": "--optimizer-weight-decay",
    "optimizer.params.eps": "--optimizer-eps",
    "expert_parallel.top_k": "--num_experts_per_tok",
}


def is_expert_parallel(ds_config: dict) -> bool:
    return bool(ds_config.get("expert_parallel", {}).get("enabled"))


def complete_config(config: TrainConfig, world_size: int) -> dict:
    """Fills the flags into --deepspeed_config; UserError where the two contradict each other."""
    if not isinstance(config.optimizer, AdamW):
        raise UserError(
            f"--optimizer: got {config.step.optimizer}, expected adamw, which DeepSpeed "
            "runs here (train.py has the others)"
        )
    if not config.optimizer.decay_vectors:
        raise UserError(
            "--optimizer-decay-vectors: got False under DeepSpeed, expected True (train.py has it)"
        )
    if len(config.emas) > 1:
        raise UserError(
            f"--ema: got {len(config.emas)} averages, expected one under DeepSpeed (train.py keeps "
            "several)"
        )
    if config.step.precision == "fp16":
        raise UserError("--precision: got fp16 under DeepSpeed, expected bf16 or fp32")
    if config.step.freezes:
        flags = "--freeze or --train-router-only"
        raise UserError(f"{flags}: given under DeepSpeed, expected train.py, with --shard if large")
    faults = (OSError, ValueError, AttributeError, TypeError)
    with reported_as(f"--deepspeed_config {config.engine.deepspeed_config}", *faults):
        ds_config = read_json(config.engine.deepspeed_config)
        zero = ds_config.get("zero_optimization", {})
        stage, offload = zero.get("stage"), zero.get("offload_optimizer", {}).get("device")
        if stage not in (1, 2, 3):
            raise ValueError(
                f"zero_optimization.stage: got {stage!r:.80}, expected 1, 2 or 3 (without ZeRO, "
                "use train.py)"
            )
        if offload == "nvme":
            raise ValueError("offload_optimizer.device: got nvme, expected cpu or none")
        if "scheduler" in ds_config:
            raise ValueError("got a scheduler, expected none: --lr and --warmup-steps do that")
        fill_in(ds_config, owned_by_flags(config, world_size, stage, offload == "cpu"))
        add_experts(ds_config, config, world_size)
    if config.step.compile and (stage == 3 or is_expert_parallel(ds_config)):
        raise UserError("--compile: got ZeRO-3 or expert parallelism, expected ZeRO-1 or 2 without")
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
        "gradient_clipping": step.grad_clip,
        # Broken gradients skip the step, as everywhere here.
        "bf16": {"enabled": step.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {**adam, **kind}},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": None if stage == 1 else "fp32"},
        "steps_per_print": 2**31,
        "zero_optimization": {
            "leaf_module": {"classes": LEAF_MODULES},
            "memory_efficient_linear": False,  # it replaces torch's linear everywhere
        },
    }


def fill_in(config: dict, owned: dict, prefix: str = "") -> None:
    """Writes `owned` into `config`; ValueError if that says something else, and not "auto"."""
    for key, wanted in owned.items():
        name, got = prefix + key, config.get(key, "auto")
        if isinstance(wanted, dict) and isinstance(got, dict):
            fill_in(got, wanted, name + ".")
        elif got in ("auto", wanted):
            config[key] = wanted
        else:
            raise ValueError(
                f"{name}: got {json.dumps(got):.200}, expected {json.dumps(wanted)} as "
                f"{FLAGS.get(name, 'the script')} says (or leave it out)"
            )


def add_experts(ds_config: dict, config: TrainConfig, world_size: int) -> None:
    """Tells DeepSpeed's AutoEP, if the JSON enables it, what moe.SparseMoEBlock is; ValueError for
    what it cannot spread.

    The experts of a layer are spread over "autoep_size" processes: "auto" is the most of one node
    that the experts can be divided among, so that tokens do not travel between nodes.
    """
    if not is_expert_parallel(ds_config):
        return
    model = config.model
    num_experts, kind = model.num_experts, model.mlp_type
    experts = ds_config["expert_parallel"]
    size = experts.get("autoep_size", "auto")
    if size == "auto":
        node = node_size(config, world_size)
        size = experts["autoep_size"] = math.gcd(num_experts, node, world_size)
    owned = {
        "moe_layer_pattern": r"blocks\.\d+\.moe",
        "expert_pattern": "experts",
        "router_pattern": "gate",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "top_k": model.num_experts_per_tok,
        "score_func": "softmax",  # unused: our router chooses, and the weights come after
        "score_apply": "post",
        "load_balance_coeff": None,
        "has_shared_experts": model.n_shared_experts > 0,
        "shared_experts_pattern": "shared_experts",
    }
    if num_experts == 0 or kind != "swiglu" or model.router not in AUTOEP_ROUTERS:
        raise ValueError(
            f"expert_parallel: got {num_experts} {kind} experts and the router "
            f"{model.router}, expected swiglu experts and {' or '.join(AUTOEP_ROUTERS)}"
        )
    if (seen := model.router_options["input"]) == "normalised_time":
        raise ValueError(f"router_input: got {seen}, expected another one with expert_parallel")
    if type(size) is not int or size < 1 or world_size % size or num_experts % size:
        raise ValueError(
            f"expert_parallel.autoep_size: got {size!s:.80}, expected a divisor of "
            f"{num_experts} experts and of {world_size} processes"
        )
    fill_in(ds_config, {"expert_parallel": owned})


def zero_memory(config: TrainConfig, world_size: int, micro_batch: int) -> tuple[Bytes, Bytes, str]:
    """What DeepSpeed keeps: master weights, AdamW and EMA cut over the processes, gradients from
    ZeRO-2 on, and weights in the training precision, whole up to ZeRO-2."""
    ds_config = complete_config(config, world_size)
    model = planned_model(config)
    zero = ds_config["zero_optimization"]
    spread = ds_config["expert_parallel"]["autoep_size"] if is_expert_parallel(ds_config) else 0
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
    gpu: Bytes = {
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
    host: Bytes = {  # the first process also gathers the EMA
        "copy at a save": 3 * share, "EMA at a save on the first process": 2 * 4 * total
    }  # fmt: skip
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
