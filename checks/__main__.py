"""A stage of check_gpu.py, in a process of its own: python -m checks --stages kernels ..."""

from checks import environment, kernels, runs, speed
from checks.common import CheckConfig, Checks
from runtime.flags import parse_config

STAGES = {
    "environment": environment.check,
    "kernels": kernels.check,
    "speed": speed.check,
    "memory": speed.check_memory,
    "runs": runs.check,
}

if __name__ == "__main__":
    config = parse_config(CheckConfig, __doc__)
    for stage in config.stages:
        STAGES[stage](Checks(config.output / f"{stage}.jsonl"), config)
