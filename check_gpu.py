r"""Checks that a machine with GPUs computes, trains and is as fast as it should be.

    python check_gpu.py --output gpu_report
    python check_gpu.py --gpus 4 --quick --stages kernels speed --output gpu_report
    python check_gpu.py --device cpu --quick --output gpu_report    # what a CPU can check, small

It takes 15 minutes at most. The stages environment, kernels, speed, memory and runs go on after a
failure. report.md and report.json say the commit, the versions, the GPUs and, of every check, the
measured value, its threshold and whether it passed. The exit code is 0 if all passed, 1 if one did
not, and 2 for a mistake in the command.
"""

from checks.common import CheckConfig, run_checks
from runtime.flags import parse_config
from runtime.processes import run_process


def parse_args() -> CheckConfig:
    return parse_config(CheckConfig, __doc__)


def main(config: CheckConfig) -> int:
    return run_checks(config)


if __name__ == "__main__":
    run_process(lambda: main(parse_args()))
