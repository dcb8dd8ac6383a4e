r"""Trains a DiT-MoE on one process, one node or many, with distributed data parallelism.

    python train.py --data-path data/fashion-mnist --vae-path assets/vae-fashion-mnist \
        --image-size 32 --model DiT-Ti/2 --rf --global-batch-size 128 --max-steps 1000
    torchrun --nproc_per_node=8 train.py --model DiT-S/2 --num_experts 8 \
        --num_experts_per_tok 2 --data-path IMAGENET/train --global-batch-size 256

Run the same command again to go on after an interruption.
"""

from functools import partial

from runtime.errors import UserError
from runtime.flags import parse_config
from runtime.processes import close_distributed, read_environment, run_process, setup_distributed
from training.config import DDPConfig


def parse_args() -> DDPConfig:
    return parse_config(DDPConfig, __doc__)


def main(config: DDPConfig) -> int:
    """Returns the exit code, see `training.loop.train`."""
    from training.ddp import DDPEngine  # what follows takes seconds to import
    from training.loop import train
    from training.plan import print_plan

    dist = read_environment() if config.dry_run else setup_distributed()
    parts = dist.world_size * config.accum_iter
    if config.global_batch_size % parts:
        raise UserError(
            f"--global-batch-size: got {config.global_batch_size}, expected a multiple of "
            f"{dist.world_size} processes x {config.accum_iter} micro-batches (--accum_iter)"
        )
    micro_batch = config.global_batch_size // parts
    if config.dry_run:
        if dist.is_main:
            print_plan(config, dist.world_size, micro_batch)
        return 0
    code = train(config, dist, micro_batch=micro_batch, make_engine=partial(DDPEngine, dist))
    close_distributed()
    return code


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
