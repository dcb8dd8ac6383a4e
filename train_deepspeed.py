r"""Trains a DiT-MoE with DeepSpeed's ZeRO, for models that are too large for data parallelism.

    torchrun --nproc_per_node=8 train_deepspeed.py --deepspeed_config config/zero2.json \
        --model DiT-XL/2 --num_experts 8 --num_experts_per_tok 2 --data-path IMAGENET/train \
        --train_batch_size 32
    python train_deepspeed.py --dry-run --gpus 32 --deepspeed_config config/zero3.json \
        --model DiT-G/2 --num_experts 16 --train_batch_size 8 --gradient-checkpointing

After an interruption, run the same command again to resume.
"""

import os

from options.settings import Layer
from runtime.processes import close_distributed, run_process, setup_distributed
from training.config import parse_training
from training.engines.flags import DeepSpeedFlags


def parse_args() -> Layer:
    return parse_training(DeepSpeedFlags, __doc__)


def main(said: Layer) -> int:
    """Returns the exit code, see `training.loop.train`."""
    import torch  # imported here: takes seconds

    from training.loop import train
    from training.plan import print_plan

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # without it, DeepSpeed warns that it chooses the CPU
    from training.engines.zero_config import asks_for_fp16

    if "precision" not in said and asks_for_fp16(said.get("deepspeed_config", "")):
        said = {**said, "precision": "fp16"}
    if said.get("dry_run"):
        print_plan(said, DeepSpeedFlags)
        return 0
    dist = setup_distributed(always_group=True)
    code = train(said, DeepSpeedFlags, dist)
    close_distributed()
    return code


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
