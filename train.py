r"""Trains a DiT-MoE on one process, one node or many, with distributed data parallelism.

    python train.py --data-path data/fashion-mnist --vae-path assets/vae-fashion-mnist \
        --image-size 32 --model DiT-Ti/2 --rf --global-batch-size 128 --max-steps 1000
    torchrun --nproc_per_node=8 train.py --model DiT-S/2 --num_experts 8 \
        --num_experts_per_tok 2 --data-path IMAGENET/train --global-batch-size 256
    python train.py --resume results/RUN

Run the same command again to go on after an interruption.
"""

from engines.flags import DDPFlags
from runtime.flags import Given
from runtime.processes import close_distributed, read_environment, run_process, setup_distributed
from training.config import parse_training


def parse_args() -> Given:
    return parse_training(DDPFlags, __doc__)


def main(given: Given) -> int:
    """Returns the exit code, see `training.loop.train`."""
    from engines.ddp import DDPEngine  # what follows takes seconds to import
    from training.loop import train
    from training.memory import print_plan

    if given.get("dry_run"):
        dist = read_environment()
        if dist.is_main:
            print_plan(given, DDPFlags, lambda config: DDPEngine, dist.world_size)
        return 0
    code = train(given, DDPFlags, lambda config: DDPEngine, setup_distributed())
    close_distributed()
    return code


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
