"""Reconstructs power-function EMAs of any length after training, from snapshots of tracked ones.

    weights, record, distance = rebuild(snapshots_of(run), 50_000, 0.07)

Karras et al. 2024 (arXiv 2312.02696), section 3.2 and appendix C. The profile of an EMA is the
weight that each training step has in the average. The requested EMA is approximated by the linear
combination of snapshots whose profile is closest to the requested profile in least squares.

Shape legend: S snapshots
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from checkpoints import Record, read_record, step_folders
from checkpoints.meta import meta_model
from checkpoints.weights import read_tensors
from runtime.errors import UserError
from training.ema import gamma_of
from training.saving import SNAPSHOTS

PREFIX = "power-"  # names of power-function EMAs begin with this


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
