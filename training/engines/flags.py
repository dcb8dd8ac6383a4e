"""Flags that only one of the two training scripts has: the distribution of the work.

The method `engine_class` of a class of flags returns the engine that the flags choose. It imports
the engine's module, which takes seconds.
"""

from dataclasses import dataclass
from pathlib import Path

from options.parts import Settings, option


@dataclass(frozen=True, kw_only=True)
class DDPFlags(Settings):
    """Additional flags of train.py."""

    global_batch_size: int = option(
        256, ge=1, group="batch",
        help="images of one optimizer step, over all processes and micro-batches",
    )  # fmt: skip
    shard: bool = option(
        False, group="sharding",
        help="shard weights, optimizer state and EMAs over the processes (FSDP2)",
    )  # fmt: skip
    shard_size: int | None = option(
        None, ge=1,
        help="with --shard: number of processes that hold one copy of the model (default: the "
        "processes of a node); the number of copies follows",
    )  # fmt: skip
    reshard_after_forward: bool = option(
        True,
        help="with --shard: free a block's gathered weights after the forward pass and gather them "
        "again for the backward pass; False needs more memory and less traffic, as ZeRO-2",
    )  # fmt: skip
    expert_parallel: int = option(
        1, ge=1,
        help="with --shard: number of processes that share the experts of a layer; each process "
        "computes about the same number of experts, and receives the tokens of these experts from "
        "the other processes",
    )  # fmt: skip
    copies_precision: str = option(
        "fp32", choices=("fp32", "bf16"),
        help="with --shard: precision of the sum of gradients between copies of the model; the sum "
        "within a copy is fp32",
    )  # fmt: skip

    def engine_class(self) -> type:
        if self.shard:
            from training.engines.fsdp import FSDPEngine

            return FSDPEngine
        from training.engines.ddp import DDPEngine

        return DDPEngine


@dataclass(frozen=True, kw_only=True)
class DeepSpeedFlags(Settings):
    """Additional flags of train_deepspeed.py."""

    deepspeed_config: str = option(
        str(Path(__file__).parents[2] / "config" / "zero2.json"),
        help="JSON file with ZeRO stage, offload and so on (default: config/zero2.json)",
        group="DeepSpeed",
    )
    train_batch_size: int = option(
        32, ge=1,
        help="images per micro-step and GPU; a step has this number x --accum-iter x GPUs images",
    )  # fmt: skip

    def engine_class(self) -> type:
        from training.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine
