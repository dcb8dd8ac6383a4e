"""train_deepspeed.py, watched by a test: rank R writes the images that it reads to READS-R.

With COMMANDS set, it trains as those say, see one_after_another.py.

With FP16_ON_CPU set, DeepSpeed takes fp16 on a CPU that has no instructions for it (PyTorch
computes it all the same, slowly), and each overflowed step is checked to have changed nothing.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import one_after_another
import torch

import train_deepspeed
from latents.sources import ImageTree
from runtime.processes import run_process


def watch_reads(file) -> None:
    read = ImageTree.__getitem__

    def watched(dataset: ImageTree, key: tuple[int, bool]):
        print(os.fsdecode(dataset.paths[key[0]]), file=file, flush=True)
        return read(dataset, key)

    ImageTree.__getitem__ = watched


def watch_overflows() -> None:
    step = train_deepspeed.DeepSpeedEngine.train_step

    def state_of(engine: train_deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
        optimizer = engine.engine.optimizer.optimizer
        entries = [entry for state in optimizer.state.values() for entry in state.values()]
        return [value.clone() for value in (*engine.shards.masters, *engine.ema, *entries)]

    def watched(engine: train_deepspeed.DeepSpeedEngine, *arguments):
        before = state_of(engine)
        metrics = step(engine, *arguments)
        if metrics is None:
            same = map(torch.equal, state_of(engine), before)
            print(f"overflow: {'nothing changed' if all(same) else 'SOMETHING CHANGED'}")
        return metrics

    train_deepspeed.DeepSpeedEngine.train_step = watched


def main() -> int:
    if "FP16_ON_CPU" in os.environ:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
        watch_overflows()
    if "READS" in os.environ:
        watch_reads(open(f"{os.environ['READS']}-{os.environ['RANK']}", "w"))  # noqa: SIM115
    if "COMMANDS" in os.environ:
        return one_after_another.main()
    return train_deepspeed.main(train_deepspeed.parse_args())


if __name__ == "__main__":
    run_process(main)
