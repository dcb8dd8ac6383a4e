"""What a count table says of each layer, in numbers: balance of the load, and what decides it.

    rows = layer_statistics(counts.by_class, "class")

Shape legend: R rows (classes, steps or positions), L layers, E experts
"""

import csv
import math
from pathlib import Path

import numpy as np

from runtime.errors import UserError


def load_entropy(table: np.ndarray) -> np.ndarray:
    """Entropy of each layer's load, H = -sum_e p_e log2 p_e, in bits; log2 E when balanced.

    Takes counts (R, L, E); p_e is expert e's share of the layer's assignments. Returns (L,).
    """
    p = shares(table.sum(0))  # (L, E)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def max_over_mean_load(table: np.ndarray) -> np.ndarray:
    """Load of each layer's busiest expert over the mean load, E max_e p_e: from 1 to E.

    With K experts per token it is at most E / K. Takes counts (R, L, E); returns (L,).
    """
    load = table.sum(0)  # (L, E)
    return load.max(-1) / load.mean(-1)


def mutual_information(table: np.ndarray) -> np.ndarray:
    """What the row tells of the expert of an assignment, in bits, for each layer.

    I(row; expert) = sum_re p_re log2(p_re / (p_r p_e)) = sum_r p_r information(row r)

    Takes counts (R, L, E); returns (L,), between 0 and the smaller of log2 R and log2 E.

    This is the plug-in estimate: shares stand for probabilities. It is biased upwards, since a
    row's own random deviations count as information: by (R - 1)(E - 1) / (2 n ln 2) bits for n
    independent assignments (Miller 1955). That correction is not applied. Here n is millions, but
    tokens and steps of one image are not independent, so it would be far too small. The bias falls
    as one over the number of images: compare with a run of half as many to see its size.
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


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts (..., E) as shares of their sum along the last axis; 0 where that is 0."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def layer_statistics(table: np.ndarray, row: str, layers: list[int]) -> list[dict]:
    """All of the above for some layers of counts (R, L, E); `row` says what R is, as "class"."""
    entropies, loads = load_entropy(table), max_over_mean_load(table)
    informations = mutual_information(table)
    return [
        {
            "layer": layer,
            "load_entropy_bits": float(entropies[layer]),
            "max_load_entropy_bits": math.log2(table.shape[-1]),
            "max_over_mean_load": float(loads[layer]),
            f"{row}_information_bits": float(informations[layer]),
        }
        for layer in layers
    ]


def format_table(rows: list[dict]) -> str:
    """Lays rows of `layer_statistics` out in aligned columns under their names."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes rows of `layer_statistics` under a line of their names."""
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--csv: cannot write {path} ({error.strerror})") from None
