r"""Trains a DiT-MoE that data parallelism cannot hold: DeepSpeed's ZeRO and expert parallelism.

    torchrun --nproc_per_node=8 train_deepspeed.py --deepspeed_config config/zero2.json \
        --model DiT-XL/2 --num_experts 8 --num_experts_per_tok 2 --data-path IMAGENET/train \
        --train_batch_size 32
    python train_deepspeed.py --dry-run --gpus 32 --deepspeed_config config/zero3_ep.json \
        --model DiT-G/2 --num_experts 16 --train_batch_size 8 --gradient-checkpointing

Run the same command again to go on after an interruption.
"""

import os
from functools import partial

from runtime.flags import parse_config
from runtime.processes import close_distributed, read_environment, run_process, setup_distributed
from training.config import DeepSpeedConfig


def parse_args() -> DeepSpeedConfig:
    return parse_config(DeepSpeedConfig, __doc__)


def main(config: DeepSpeedConfig) -> int:
    """Returns the exit code, see `training.loop.train`."""
    from training.plan import print_plan  # what follows takes seconds to import
    from training.zero_config import complete_config, is_expert_parallel

    if config.dry_run:
        dist = read_environment()
        if dist.is_main:
            print_plan(config, config.gpus or dist.world_size, config.train_batch_size)
        return 0
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed would warn that it takes it
    from training.deepspeed_engine import DeepSpeedEngine, check_precision, stand_alone
    from training.loop import train

    stand_alone()
    dist = setup_distributed()
    check_precision(config.precision)
    ds_config = complete_config(config, dist.world_size)
    settings = {
        "global_batch_size": ds_config["train_batch_size"],
        "zero_stage": ds_config["zero_optimization"]["stage"],
        "expert_parallel": is_expert_parallel(ds_config),
    }
    make_engine, micro_batch = partial(DeepSpeedEngine, dist, ds_config), config.train_batch_size
    code = train(
        config, dist, micro_batch=micro_batch, make_engine=make_engine, engine_settings=settings
    )
    close_distributed()
    return code


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
