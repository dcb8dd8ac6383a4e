"""Reconstructs a power-function EMA of a length that a run did not track.

    python train.py ... --ema power:length=0.05 power:length=0.1 --ckpt-every 5000 --keep-last 1
    python -m tools.rebuild_ema results/RUN --length 0.07 --output results/power-0.07.safetensors
    python sample.py --ckpt results/power-0.07.safetensors

The length of an EMA is the standard deviation of its averaging window, relative to the length of
the run. The EMA is reconstructed from snapshots: the power-function EMAs in the checkpoints that
the run kept. (--keep-last deletes old checkpoints except for these snapshots.) More snapshots give
a closer result; the script prints how close.

Karras et al. 2024 (arXiv 2312.02696), section 3.2 and appendix C. The profile of an EMA is the
weight that each training step has in the average. The requested EMA is approximated by the linear
combination of snapshots whose profile is closest to the requested profile in least squares.

Shape legend: S snapshots
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from checkpoints import Record, read_record, save_model, step_folders
from checkpoints.meta import meta_model
from checkpoints.weights import read_tensors
from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from runtime.plugins import import_plugins
from training.ema import PowerEMA, gamma_of
from training.saving import SNAPSHOTS

PREFIX = "power-"  # names of power-function EMAs begin with this


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


def snapshots_of(run: Path) -> dict[tuple[int, float], Path]:
    """Finds all snapshots in the checkpoints of a run: {(step, length): file}, sorted."""
    found: dict[tuple[int, float], Path] = {}
    kept = [*(run / "checkpoints" / SNAPSHOTS).glob("*.safetensors")]
    for path in [*kept, *(f for folder in step_folders(run) for f in folder.glob("*.safetensors"))]:
        record = read_record(path)
        if record.step and (record.ema or "").startswith(PREFIX):
            found[record.step, float(record.ema.removeprefix(PREFIX))] = path
    if len(found) < 2:
        raise UserError(
            f"{run}: got {len(found)} snapshots of power-function EMAs, expected at least two; "
            "train with --ema power:length=0.05 power:length=0.1"
        )
    return dict(sorted(found.items()))


def coefficients(
    steps: np.ndarray, gammas: np.ndarray, step: int, gamma: float
) -> tuple[np.ndarray, float]:
    """Coefficients (S,) of the snapshots in the EMA of exponent gamma after a step.

    steps, gammas: steps and exponents (S,) of the snapshots
    Also returns the distance between the two profiles, relative to the norm of the requested one.
    """
    count = len(steps)
    gram = profile_product(steps[:, None], gammas[:, None], steps, gammas)  # (S, S)
    target = profile_product(steps, gammas, step, gamma)  # (S,)
    # Differs from the paper: the coefficients sum to 1, so weights that never change are kept.
    bordered = np.ones((count + 1, count + 1))
    bordered[:count, :count], bordered[count, count] = gram, 0
    parts = np.linalg.solve(bordered, np.append(target, 1))[:count]
    norm = profile_product(step, gamma, step, gamma)
    square = (parts @ gram @ parts - 2 * target @ parts) / norm + 1
    return parts, max(0.0, square.item()) ** 0.5


def profile_product(step_a, gamma_a, step_b, gamma_b) -> np.ndarray:
    """Inner product of two profiles (gamma + 1) t^gamma / step^(gamma + 1) for t in [0, step]."""
    step_a, step_b = np.float64(step_a), np.float64(step_b)
    exponent = np.where(step_a < step_b, gamma_b, -gamma_a)
    product = (gamma_a + 1) * (gamma_b + 1) * (step_a / step_b) ** exponent
    return product / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))


def rebuild(
    snapshots: dict[tuple[int, float], Path], step: int, length: float
) -> tuple[dict[str, Tensor], Record, float]:
    """Reconstructs the EMA of a length after a step. Returns its fp32 weights, the record of the
    last snapshot used, and the distance between the profiles.

    Snapshots are read one at a time. Buffers are taken from the last snapshot.
    """
    used = {key: path for key, path in snapshots.items() if key[0] <= step}
    steps, gammas = np.array([(at, gamma_of(of_file)) for at, of_file in used]).T
    parts, distance = coefficients(steps, gammas, step, gamma_of(length))
    record = read_record(list(used.values())[-1])
    names = dict(meta_model(record.config).named_parameters())
    total: dict[str, Tensor] = {}
    for path, part in zip(used.values(), parts, strict=True):
        weights, _ = read_tensors(path)
        for name in names:
            scaled = weights.pop(name).double() * part
            total[name] = total[name].add_(scaled) if name in total else scaled
    return {**weights, **{name: value.float() for name, value in total.items()}}, record, distance


def parse_args() -> RebuildConfig:
    return parse_config(RebuildConfig, __doc__)


def main(config: RebuildConfig) -> None:
    prepare_output("--output", config.output)
    import_plugins(config.plugin)
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
