"""Counts of expert assignments by class, sampling step and patch position, and their statistics:
the balance of the load, and how much class, step and position determine it.

    counts = RoutingCounts.load("results/expert_data.npz")
    print(to_csv(layer_statistics(counts.by_class, "class"), [0, 5], counts.layer_numbers))

The file is a plain .npz without pickles, with one array for each field of `RoutingCounts`; the
settings are a JSON text.

Shape legend:
    C classes, S sampling steps, T patch positions, R rows of a table (C, S or T), L layers,
    E experts, M entries of the gallery
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from runtime.errors import pluralize
from runtime.files import open_npz, write_durably

COUNTS_FILE = "expert_data.npz"  # default file name
FORMAT = 3  # of the file; increased when an older one can no longer be read


@dataclass(frozen=True, kw_only=True)
class RoutingCounts:
    """Assignments of patches to experts, and the patches that each expert weighs most.

    An integer table counts assignments; a table of weights sums their weights.
    """

    by_class: np.ndarray  # (C, L, E) int64
    by_step: np.ndarray  # (S, L, E) int64
    by_position: np.ndarray  # (T, L, E) int64
    weight_by_class: np.ndarray  # (C, L, E) float64
    weight_by_step: np.ndarray  # (S, L, E) float64
    weight_by_position: np.ndarray  # (T, L, E) float64
    by_step_and_position: np.ndarray  # (S, T, L) int64, summed over all experts
    kept: np.ndarray  # (S, T, L) int64, those of a step that the next step has too; 0 in the last
    together: np.ndarray  # (L - 1, E, E) int64, pairs of a patch's experts in layers l and l + 1
    other_by_step: np.ndarray  # (S, L, E) int64, of text or class tokens, not of patches
    similarity: np.ndarray  # (L, E, E) float32, cosine of the experts' weights
    gallery_weight: np.ndarray  # (L, E, M) float32, mean weight at the place over the steps
    gallery_image: np.ndarray  # (L, E, M) int64, number of the image, -1 for none
    gallery_place: np.ndarray  # (L, E, M) int64, number of the patch in the image
    gallery_crop: np.ndarray  # (L, E, M) int32, number of the crop, -1 for none
    crops: np.ndarray  # uint8, WebP files of the surroundings, one after another
    crop_ends: np.ndarray  # int64, end of each file in `crops`
    labels: np.ndarray  # (C,) int64, class of each row of by_class
    class_names: np.ndarray  # (C,) text, name of each row's class
    times: np.ndarray  # (S,) float64, the t passed to the model at each step
    settings: dict  # model, run, router, step, sampler, num_steps, cfg_scale, seed, images ...

    @property
    def num_layers(self) -> int:
        return self.by_class.shape[1]

    @property
    def layer_numbers(self) -> list[int]:
        """Numbers of the layers' blocks, or 0, 1, ... if several share a number, as in a model with
        two kinds of blocks."""
        numbers = [int(re.search(r"\d+", name)[0]) for name in self.settings["layers"]]
        return numbers if len(set(numbers)) == len(numbers) else list(range(self.num_layers))

    @property
    def num_experts(self) -> int:
        return self.by_class.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches per column and per row."""
        return tuple(self.settings["grid"])

    @property
    def experts_per_token(self) -> np.ndarray:
        """Mean number of experts per token at each step and position, (S, T, L)."""
        return self.by_step_and_position / self.settings["images"]

    def persistence(self, *axes: int) -> np.ndarray:
        """Returns the share of the experts of a position that it keeps at the next step, (S - 1, T,
        L) without the axes over which the assignments are summed; NaN without assignments.
        """
        with np.errstate(invalid="ignore"):
            return self.kept[:-1].sum(axes) / self.by_step_and_position[:-1].sum(axes)

    def __str__(self) -> str:
        s = self.settings
        router = f", router {s['router']}" if "router" in s else ""
        step = f", step {s['step']:,}" if s.get("step") else ""
        return (
            f"{s['model']}{router}{step}, {s['sampler']}, {s['num_steps']} steps, "
            f"guidance {s['cfg_scale']:g}, "
            f"{pluralize(s['images'], 'image')} of {pluralize(len(self.labels), 'class')}"
        )

    def save(self, path: Path) -> None:
        """Writes the .npz file atomically."""
        content = io.BytesIO()
        arrays = vars(self) | {"settings": json.dumps(self.settings), "format": FORMAT}
        np.savez_compressed(content, **arrays)
        write_durably(path, content.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> "RoutingCounts":
        """Reads a file that `save` wrote."""
        with open_npz(path, "the counts of expert_data.py") as file:
            found = int(file["format"]) if "format" in file else 1
            if found != FORMAT:
                raise ValueError(f"got format {found}, expected {FORMAT}: run expert_data.py again")
            arrays = {field.name: file[field.name] for field in fields(cls)}
            return cls(**{**arrays, "settings": json.loads(str(arrays["settings"]))})


def counts_file(data: Path) -> Path:
    """Returns the file of counts that --data names, itself or by its folder."""
    return data / COUNTS_FILE if data.is_dir() else data


def run_names(names: Sequence[str]) -> list[str]:
    """Shortens names of runs for a figure: drops a "-SEED" suffix that several names share."""
    endings = {re.search(r"(-\d+)?$", name)[0] for name in names}
    shared = endings.pop() if len(endings) == 1 < len(names) else ""
    return [name.removesuffix(shared) for name in names]


def load_entropy(table: np.ndarray) -> np.ndarray:
    """Returns the entropy of each layer's load in bits, (L,); it is log2 E for a balanced load.

    table: counts (R, L, E)
    """
    p = shares(table.sum(0))  # (L, E)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def max_over_mean_load(table: np.ndarray) -> np.ndarray:
    """Returns the load of each layer's busiest expert divided by the mean load, (L,), from 1 to E.

    table: counts (R, L, E)
    """
    load = table.sum(0)  # (L, E)
    return load.max(-1) / load.mean(-1)


def mutual_information(table: np.ndarray) -> np.ndarray:
    """Returns the mutual information between row and expert of an assignment, in bits, (L,).

    table: counts (R, L, E)

    I(row; expert) = sum_re p_re log2(p_re / (p_r p_e)) = sum_r p_r information(row r)

    The estimate is biased upwards: by (R - 1)(E - 1) / (2 n ln 2) bits for n independent
    assignments (Miller 1955), and by more if they are tokens and steps of few images.
    """
    sums = table.sum(-1)  # (R, L)
    return (row_information(table) * sums / sums.sum(0)).sum(0)


def row_information(table: np.ndarray) -> np.ndarray:
    """Returns the Kullback-Leibler divergence of each row's expert use from the layer's, (R, L), in
    bits: sum_e p_e|r log2(p_e|r / p_e).

    table: counts (R, L, E)
    """
    given_row = shares(table)  # (R, L, E)
    overall = np.broadcast_to(shares(table.sum(0)), given_row.shape)
    ratio = np.divide(given_row, overall, out=np.ones_like(given_row), where=given_row > 0)
    return (given_row * np.log2(ratio)).sum(-1)


def choose_rows(table: np.ndarray, top: int | None, order: str) -> np.ndarray:
    """Selects rows of counts (R, L, E) to show: the `top` most informative rows, or all of them.

    Rows are sorted by number or, with order "similarity", along the first principal component of
    their shares, which puts similar rows next to each other.
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
    """Divides counts (..., E) by their sum along the last axis; 0 where that sum is 0."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def layer_statistics(table: np.ndarray, row: str) -> dict[str, np.ndarray]:
    """Returns the statistics above for each layer, (L,), by name.

    table: counts (R, L, E)
    row: kind of the rows, such as "class", for the names
    """
    return {
        "load_entropy_bits": load_entropy(table),
        "max_over_mean_load": max_over_mean_load(table),
        f"{row}_information_bits": mutual_information(table),
    }


def experts_per_token_statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    """Returns mean, and minimum and maximum over steps and over positions, of experts per token
    (S, T, L), for each layer, (L,), by name.
    """
    columns = {"experts_per_token": values.mean((0, 1))}
    for name, means in (("step", values.mean(1)), ("position", values.mean(0))):
        columns |= {f"least_of_a_{name}": means.min(0), f"most_of_a_{name}": means.max(0)}
    return columns


def to_csv(columns: dict[str, np.ndarray], layers: Sequence[int], numbers: Sequence[int]) -> str:
    """Formats columns (L,) as CSV, one line for each of the given layers.

    numbers: (L,) shown in place of 0 to L - 1, see `RoutingCounts.layer_numbers`
    """
    lines = [["layer", *columns]]
    lines += [
        [str(numbers[i]), *(f"{values[i]:.4f}" for values in columns.values())] for i in layers
    ]
    return "".join(",".join(line) + "\n" for line in lines)
