"""What a count table says of each layer, in numbers: balance of the load, and what decides it.

    print(to_csv(layer_statistics(counts.by_class, "class"), layers=[0, 5]))

Shape legend: R rows (classes, steps or positions), L layers, E experts, S steps, T positions
"""

import re
from collections.abc import Sequence

import numpy as np


def run_names(names: Sequence[str]) -> list[str]:
    """Names of runs for a picture: of several, without the "-SEED" that all of them end with."""
    endings = {re.search(r"(-\d+)?$", name)[0] for name in names}
    shared = endings.pop() if len(endings) == 1 < len(names) else ""
    return [name.removesuffix(shared) for name in names]


def load_entropy(table: np.ndarray) -> np.ndarray:
    """Entropy of each layer's load in bits: counts (R, L, E) to (L,); log2 E when balanced."""
    p = shares(table.sum(0))  # (L, E)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def max_over_mean_load(table: np.ndarray) -> np.ndarray:
    """Load of each layer's busiest expert over the mean load, from 1 to E: (R, L, E) to (L,)."""
    load = table.sum(0)  # (L, E)
    return load.max(-1) / load.mean(-1)


def mutual_information(table: np.ndarray) -> np.ndarray:
    """What the row tells of the expert of an assignment, in bits: counts (R, L, E) to (L,).

    I(row; expert) = sum_re p_re log2(p_re / (p_r p_e)) = sum_r p_r information(row r)

    Biased upwards, by (R - 1)(E - 1) / (2 n ln 2) bits for n independent assignments (Miller 1955);
    by more where they are tokens and steps of few images.
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


def choose_rows(table: np.ndarray, top: int | None, order: str) -> np.ndarray:
    """Which rows of counts (R, L, E) to show: the `top` most informative ones, or all.

    They come by number or, with order "similarity", along the first principal component of their
    shares: like next to like.
    """
    chosen = np.arange(len(table))
    if top is not None:
        information = row_information(table).sum(1)  # (R,)
        chosen = np.sort(np.argsort(-information, kind="stable")[:top])
    if order == "similarity":
        flat = shares(table[chosen]).reshape(len(chosen), -1)
        component = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[0][:, 0]
        chosen = chosen[np.argsort(component, kind="stable")]
    return chosen


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts (..., E) as shares of their sum along the last axis; 0 where that is 0."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def layer_statistics(table: np.ndarray, row: str) -> dict[str, np.ndarray]:
    """All of the above for each layer of counts (R, L, E), (L,) by name; `row` says what R is."""
    return {
        "load_entropy_bits": load_entropy(table),
        "max_over_mean_load": max_over_mean_load(table),
        f"{row}_information_bits": mutual_information(table),
    }


def spending_statistics(spent: np.ndarray) -> dict[str, np.ndarray]:
    """How many experts a token has in each layer of experts_per_token (S, T, L), (L,) by name.

    The mean, and the least and the most over steps and over positions.
    """
    columns = {"experts_per_token": spent.mean((0, 1))}
    for name, means in (("step", spent.mean(1)), ("position", spent.mean(0))):
        columns |= {f"least_of_a_{name}": means.min(0), f"most_of_a_{name}": means.max(0)}
    return columns


def to_csv(columns: dict[str, np.ndarray], layers: Sequence[int]) -> str:
    """A line for each of some layers; columns are (L,) by name."""
    lines = [["layer", *columns]]
    lines += [[str(i), *(f"{values[i]:.4f}" for values in columns.values())] for i in layers]
    return "".join(",".join(line) + "\n" for line in lines)
