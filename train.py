r"""Trains a DiT-MoE on one process, one node or many nodes.

Every process holds the complete model (distributed data parallelism) or, with --shard, a shard.

    python train.py --data-path data/fashion-mnist --vae-path assets/vae-fashion-mnist \
        --image-size 32 --config config/recipes/stable.yaml --model DiT-Ti/2 --rf \
        --global-batch-size 64 --lr 1e-3 --max-steps 1000
    torchrun --nproc_per_node=8 train.py --model DiT-S/2 --num_experts 8 \
        --num_experts_per_tok 2 --data-path IMAGENET/train --global-batch-size 256
    torchrun --nproc_per_node=8 train.py --shard --model DiT-XL/2 --rf --data-path IMAGENET/train
    python train.py --resume results/RUN

A run without --run-name gets the next number. The same command with --run-name goes on with the run
of this name, if it has saved a checkpoint.
"""

import signal
from contextlib import suppress
from typing import Any

import runtime  # isort: skip  # noqa: F401  # before torch
import torch
from torch.utils.data import Dataset

from latents.sources import GivenImages
from options.settings import Settings
from runtime.errors import UserError
from runtime.processes import close_distributed, run_process
from runtime.signals import SIGNALS
from training.config import parse_training
from training.sections import INTERRUPTED, TRAIN, CommandFlags


def parse_args() -> tuple[CommandFlags, Settings]:
    return parse_training(TRAIN, __doc__)


def run(data: Dataset | None = None, **flags: Any) -> int:
    """Trains like the command with these flags: `run(model="DiT-S/2", rf=True, ...)`.

    data: map-style dataset of (image, label) in place of data_path, see `GivenImages`
    flags: flags by name; a flag with the value None is ignored

    Call this function from the main thread. During training, Ctrl-C saves and stops. Training
    changes PyTorch's global seed. Returns the exit code, see `training.loop.TrainingLoop.run`. A
    mistake of the user raises UserError.
    """
    if data is not None:
        if flags.get("data_path") is not None:
            raise UserError("data: cannot be combined with data_path")
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            expected = "a map-style dataset, with __len__ and __getitem__"
            raise UserError(f"data: got {type(data).__name__}, expected {expected}")
        flags["data_path"] = "python:data"
        GivenImages.datasets["python:data"] = data
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    precision = torch.get_float32_matmul_precision()
    allow_tf32 = None
    with suppress(RuntimeError):  # PyTorch refuses where the new names of these settings were used
        allow_tf32 = torch.backends.cudnn.allow_tf32
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        said = {name: value for name, value in flags.items() if value is not None}
        return main(parse_training(TRAIN, arguments=said))
    finally:
        GivenImages.datasets.pop("python:data", None)
        close_distributed()
        torch.set_float32_matmul_precision(precision)
        if allow_tf32 is not None:
            torch.backends.cudnn.allow_tf32 = allow_tf32
        torch.use_deterministic_algorithms(is_deterministic)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(parsed: tuple[CommandFlags, Settings]) -> int:
    """Returns the exit code, see `training.loop.TrainingLoop.run`."""
    from training.start import run_command  # imported here: takes seconds

    return run_command(*parsed)


if __name__ == "__main__":
    run_process(lambda: main(parse_args()), INTERRUPTED)
