r"""Trains a DiT-MoE with DeepSpeed's ZeRO, for models that are too large for data parallelism.

    torchrun --nproc_per_node=8 train_deepspeed.py --deepspeed_config config/zero2.json \
        --model DiT-XL/2 --num_experts 8 --num_experts_per_tok 2 --data-path IMAGENET/train \
        --train_batch_size 32
    python train_deepspeed.py --dry-run --gpus 32 --deepspeed_config config/zero3.json \
        --model DiT-G/2 --num_experts 16 --train_batch_size 8 --gradient-checkpointing

The same command with --run-name goes on with the run of this name, if it has saved a checkpoint.
"""

import os

from options.settings import Settings
from runtime.processes import run_process
from training.config import parse_training
from training.sections import DEEPSPEED, INTERRUPTED, ZERO2, CommandFlags


def parse_args() -> tuple[CommandFlags, Settings]:
    return parse_training(DEEPSPEED, __doc__)


def main(parsed: tuple[CommandFlags, Settings]) -> int:
    """Returns the exit code, see `training.loop.TrainingLoop.run`."""
    command, said = parsed
    import torch  # imported here: takes seconds

    from training.start import run_command

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # without it, DeepSpeed warns that it chooses the CPU
    from training.engines.zero_config import asks_for_fp16

    if "precision" not in said and asks_for_fp16(said.get("deepspeed_config", ZERO2)):
        said = {**said, "precision": "fp16"}
    return run_command(command, said)


if __name__ == "__main__":
    run_process(lambda: main(parse_args()), INTERRUPTED)
