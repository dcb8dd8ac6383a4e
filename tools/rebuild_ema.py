"""Reconstructs a power-function EMA of a length that a run did not track.

    python train.py ... --ema power:length=0.05 power:length=0.1 --ckpt-every 5000 --keep-last 1
    python -m tools.rebuild_ema results/RUN --length 0.07 --output results/power-0.07.safetensors
    python sample.py --ckpt results/power-0.07.safetensors

The length of an EMA is the standard deviation of its averaging window, relative to the length of
the run. The EMA is reconstructed from snapshots: the power-function EMAs in the checkpoints that
the run kept. (--keep-last deletes old checkpoints except for these snapshots.) More snapshots give
a closer result; the script prints how close.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from runtime.plugins import import_plugins


@dataclass(frozen=True, kw_only=True)
class RebuildConfig:
    run: Path = option(positional=True, help="run folder")
    length: float = option(help="relative length of the new EMA", gt=0, lt=0.28)
    step: int | None = option(
        None, ge=1, help="step of the new EMA (default: the step of the newest snapshot)"
    )
    output: Path = option(suffixes=(".safetensors",), help="file to write the weights to")
    plugin: tuple[str, ...] = option(
        (), metavar="FILE.py", help="Python files that define components of the model"
    )


def parse_args() -> RebuildConfig:
    return parse_config(RebuildConfig, __doc__)


def main(config: RebuildConfig) -> None:
    prepare_output("--output", config.output)
    import_plugins(config.plugin)
    from checkpoints import save_model  # imported here: takes seconds
    from tools.rebuilding import rebuild, snapshots_of
    from training.ema import PowerEMA

    snapshots = snapshots_of(config.run)
    steps = sorted({step for step, _ in snapshots})
    step = config.step or steps[-1]
    if step not in steps:
        raise UserError(f"--step: got {step}, expected one of {', '.join(map(str, steps))}")
    weights, record, distance = rebuild(snapshots, step, config.length)
    count = sum(at <= step for at, _ in snapshots)
    name = PowerEMA(length=config.length).name
    save_model(config.output, weights, replace(record, ema=name, ema_start_share=0.0))
    print(
        f"{config.output}: {name} after step {step}, from {count} snapshots; its profile "
        f"differs from the requested one by {distance:.2%}"
    )


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
