"""What a count table says of each layer, in numbers: balance of the load, and what decides it.

    rows = layer_statistics(counts.by_class, "class", layers=[0, 5])

Shape legend: R rows (classes, steps or positions), L layers, E experts
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.errors import UserError


def load_entropy(table: np.ndarray) -> np.ndarray:
    """Entropy of each layer's load in bits: counts (R, L, E) to (L,); log2 E when balanced."""
    p = shares(table.sum(0))  # (L, E)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def max_over_mean_load(table: np.ndarray) -> np.ndarray:
    """Load of each layer's busiest expert over the mean load, from 1 to E: (R, L, E) to (L,)."""
    load = table.sum(0)  # (L, E)
    return load.max(-1) / load.mean(-1)


def mutual_information(table: np.ndarray) -> np.ndarray:
    """What the row tells of the expert of an assignment, in bits, for each layer.

    I(row; expert) = sum_re p_re log2(p_re / (p_r p_e)) = sum_r p_r information(row r)

    Takes counts (R, L, E); returns (L,), between 0 and the smaller of log2 R and log2 E.

    Shares stand for probabilities, so this is biased upwards: by (R - 1)(E - 1) / (2 n ln 2) bits
    for n independent assignments (Miller 1955). Tokens and steps of one image are not independent,
    so the true bias is larger; it falls as one over the number of images.
    """
    sums = table.sum(-1)  # (R, L)
    return (row_information(table) * sums / sums.sum(0)).sum(0)


def row_information(table: np.ndarray) -> np.ndarray:
    """How far each row's choice of experts is from its layer's: sum_e p_e|r log2(p_e|r / p_e).

    The Kullback-Leibler divergence, in bits. Takes counts (R, L, E); returns (R, L).
    """
    given_row = shares(table)  # (R, L, E)
    overall = np.broadcast_to(shares(table.sum(0)), given_row.shape)
    ratio = np.divide(given_row, overall, out=np.ones_like(given_row), where=given_row > 0)
    return (given_row * np.log2(ratio)).sum(-1)


def similarity_order(table: np.ndarray) -> np.ndarray:
    """Orders rows along the first principal component of their shares: like next to like.

    Takes counts (R, L, E); returns (R,), a permutation.
    """
    flat = shares(table).reshape(len(table), -1)
    u, s, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    return np.argsort(u[:, 0] * s[0], kind="stable")


def choose_rows(table: np.ndarray, top: int | None, order: str) -> np.ndarray:
    """Which rows of counts (R, L, E) to show: the `top` most informative ones, or all, by their
    number or, with order "similarity", by `similarity_order`."""
    chosen = np.arange(len(table))
    if top is not None:
        information = row_information(table).sum(1)  # (R,)
        chosen = np.sort(np.argsort(-information, kind="stable")[:top])
    return chosen[similarity_order(table[chosen])] if order == "similarity" else chosen


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts (..., E) as shares of their sum along the last axis; 0 where that is 0."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def layer_statistics(table: np.ndarray, row: str, layers: Sequence[int]) -> list[dict]:
    """All of the above for some layers of counts (R, L, E); `row` says what R is, as "class"."""
    columns = {
        "load_entropy_bits": load_entropy(table),
        "max_load_entropy_bits": np.full(table.shape[1], math.log2(table.shape[-1])),
        "max_over_mean_load": max_over_mean_load(table),
        f"{row}_information_bits": mutual_information(table),
    }
    return [
        {"layer": i, **{name: float(values[i]) for name, values in columns.items()}} for i in layers
    ]


def format_table(rows: list[dict]) -> str:
    """Lays rows of `layer_statistics` out in aligned columns under their names."""
    names = list(rows[0])
    lines = ["  ".join(names)]
    for row in rows:
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("  ".join(c.rjust(len(n)) for c, n in zip(cells, names, strict=True)))
    return "\n".join(lines)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes rows of `layer_statistics` under a line of their names."""
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--csv: cannot write {path} ({error.strerror})") from None
