"""The flags of each training script beside those that both have: how it shares out the work."""

from dataclasses import dataclass
from pathlib import Path

from runtime.flags import flag, free, of_command


@dataclass(frozen=True, kw_only=True)
class DDPFlags:
    """The flags of train.py beside those of both scripts."""

    global_batch_size: int = flag(
        256, least=1, group="batch",
        help="images of one optimizer step, over all processes and micro-batches",
    )  # fmt: skip
    shard: bool = free(
        False, group="sharding",
        help="cut weights, optimizer state and EMAs up over the processes (FSDP2)",
    )  # fmt: skip
    shard_size: int | None = free(
        None, least=1, needs=("shard", True),
        help="with --shard: processes that share a copy of the model; there are as many copies as "
        "that leaves (default: those of a node)",
    )  # fmt: skip
    reshard_after_forward: bool = free(
        True, needs=("shard", True),
        help="with --shard: drop a block's gathered weights after its forward pass and gather them "
        "again for the backward pass; False takes more memory and less traffic, as ZeRO-2",
    )  # fmt: skip
    expert_parallel: int = free(
        1, least=1, needs=("shard", True),
        help="with --shard: processes that share the experts of a layer; each holds an equal part "
        "of the experts unsharded and receives the tokens that chose them",
    )  # fmt: skip
    copies_precision: str = free(
        "fp32", choices=("fp32", "bf16"), needs=("shard", True),
        help="with --shard: precision in which gradients are summed between copies of the model; "
        "within a copy it is fp32",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DeepSpeedFlags:
    """The flags of train_deepspeed.py beside those of both scripts."""

    deepspeed_config: str = free(
        str(Path(__file__).parent.parent / "config" / "zero2.json"),
        help="JSON that says how to shard the model: ZeRO stage, offload (default: "
        "config/zero2.json)",
        group="DeepSpeed",
    )
    train_batch_size: int = free(
        32, least=1,
        help="images of one micro-step on one GPU; a step takes this many x --accum-iter x GPUs",
    )  # fmt: skip
    deepspeed: bool = of_command(False, help="accepted for published commands; no effect")
    local_rank: int | None = of_command(None, help="set by launchers; the environment counts")
