"""A training script with trouble that a test orders: python tests/troubled.py train.py FLAGS...

TROUBLE is a list in JSON of [rank, first step, last step, kind], steps counted from 1:
    loss       the loss is infinite and its gradient is not
    gradient   the gradient is nan and the loss is not
    stall      the main thread sleeps for a minute before the step's images are read
"""

import importlib
import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from runtime.processes import run_process
from training.loop import TrainingLoop

TROUBLE = json.loads(os.environ["TROUBLE"])


def trouble_of(rank: int, step: int) -> set[str]:
    return {kind for who, first, last, kind in TROUBLE if who == rank and first <= step + 1 <= last}


def make_trouble() -> None:
    take_step, now = TrainingLoop.step, set()
    move = TrainingLoop.to_device

    def step(loop: TrainingLoop, number: int, micro_batches: list) -> dict[str, torch.Tensor]:
        now.clear()
        now.update(trouble_of(loop.dist.rank, number))
        if not hasattr(loop, "unbroken"):
            loop.unbroken = loop.objective.training_losses
            loop.objective.training_losses = lambda *args: broken(loop.unbroken(*args))
        return take_step(loop, number, micro_batches)

    def broken(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "loss" in now:
            terms["loss"] = terms["loss"] + math.inf
        if "gradient" in now:
            terms["loss"].register_hook(lambda gradient: math.nan * gradient)
        return terms

    def to_device(loop: TrainingLoop, batch: tuple) -> tuple:
        if "stall" in trouble_of(loop.dist.rank, loop.watch.step):
            time.sleep(60)
        return move(loop, batch)

    TrainingLoop.step, TrainingLoop.to_device = step, to_device


def main() -> int:
    make_trouble()
    sys.argv = sys.argv[1:]
    script = importlib.import_module(sys.argv[0].removesuffix(".py"))
    return script.main(script.parse_args())


if __name__ == "__main__":
    run_process(main)
