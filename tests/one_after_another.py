"""Trains several times in the same processes, which are slow to start.

    torchrun --standalone --nproc_per_node=2 --max-restarts=0 tests/one_after_another.py

COMMANDS is a list in JSON of command lines, each a list that begins with train.py or
train_deepspeed.py. The process group is that of the first to the end.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
import train_deepspeed
from runtime.processes import close_distributed, run_process


def main() -> int:
    train.close_distributed = train_deepspeed.close_distributed = lambda: None
    code = 0
    for script, *arguments in json.loads(os.environ["COMMANDS"]):
        module = importlib.import_module(script.removesuffix(".py"))
        sys.argv = [script, *arguments]
        code = code or module.main(module.parse_args())
    close_distributed()
    return code


if __name__ == "__main__":
    run_process(main)
