"""The report of expert_report.py: one HTML file with all tables and pictures, without network.

assets/report/ has the page; `report` fills in the data. A table is {"shape", "data"}: the values as
little-endian float32 in base64.

Shape legend:
    C classes, S sampling steps, T patch positions, L layers, E experts
"""

import io
import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from analysis.counts import (
    RoutingCounts,
    choose_rows,
    load_entropy,
    max_over_mean_load,
    mutual_information,
)
from analysis.gallery import surroundings
from extras.ablation import Ablation

FOLDER = Path(__file__).parent.parent / "assets" / "report"
LARGEST_SIDE = 32  # cells of a map of the image; larger grids are joined in blocks
MOST_BYTES = 18 * 2**20  # of all crops; 4/3 of that in base64
SIDES = (48, 32, 24, 16)  # sides of crops, tried in turn if they do not fit


class ReportedModel(NamedTuple):
    title: str
    counts: RoutingCounts
    ablation: list[Ablation]  # rows of expert_ablation.py, or none of them


def report(models: Sequence[ReportedModel]) -> str:
    """Returns the page about a model, or about several with the same layers side by side."""
    data = [data_of(model, MOST_BYTES // len(models)) for model in models]
    page = (FOLDER / "report.html").read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    for name, value in {
        "TITLE": escape(f"Experts of {' and '.join(model.title for model in models)}"),
        "STYLE": (FOLDER / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (FOLDER / "report.js").read_text(encoding="utf-8"),
        "DATA": text,
    }.items():
        page = page.replace(f"{{{{{name}}}}}", value)
    return page


def data_of(model: ReportedModel, most_bytes: int) -> dict:
    """Returns what the page shows of a model. most_bytes: of its crops"""
    counts, crops = model.counts, fitting_crops(model.counts, most_bytes)
    return {
        "title": model.title,
        "about": str(counts),
        "layers": counts.settings["layers"],
        "numbers": counts.layer_numbers,
        "experts": counts.num_experts,
        "perClass": counts.settings["images"] / len(counts.labels),
        "steps": len(counts.times),
        "patches": len(counts.by_position),
        "times": [float(f"{time:.4g}") for time in counts.times],
        "tables": {name: pack(table) for name, table in tables_of(counts, model.ablation).items()},
        "statistics": statistics_of(counts),
        **classes_of(counts),
        "gallery": gallery_of(counts),
        "cropEnds": np.cumsum([len(crop) for crop in crops]).tolist(),
        "crops": b64encode(b"".join(crops)).decode(),
    }


def pack(table: np.ndarray) -> dict:
    """Encodes a table; NaN stays NaN."""
    data = b64encode(np.ascontiguousarray(table, dtype="<f4").tobytes()).decode()
    return {"shape": table.shape, "data": data}


def tables_of(counts: RoutingCounts, ablation: list[Ablation]) -> dict[str, np.ndarray]:
    images, places = counts.settings["images"], on_small_grid
    rows, weights = counts.by_step.sum(0), counts.weight_by_step.sum(0)
    weight = np.divide(weights, rows, out=np.full_like(weights, np.nan), where=rows > 0)
    per_token = counts.experts_per_token
    spent = per_token if np.ptp(per_token) > 0 else per_token[:0]
    tables = {
        "byClass": counts.by_class,
        "byStep": counts.by_step,
        "byPlace": places(counts.by_position, counts.grid, np.sum),
        "weight": weight,
        "kept": counts.persistence(1),
        "keptWhere": places(counts.persistence(0), counts.grid, np.mean),
        "together": counts.together,
        "similarity": counts.similarity,
        "other": counts.other_by_step,
        "spent": places(spent.swapaxes(0, 1), counts.grid, np.mean),
        "perImage": counts.by_step.sum((0, 2)) / images,
    }
    if ablation:
        damage = np.full((3, counts.num_layers, counts.num_experts), np.nan)
        for row in ablation:
            values = row.pictures, row.loss, row.loss_error
            damage[:, row.layer, row.expert] = [np.nan if x is None else x for x in values]
        tables["damage"] = damage
    return tables


def small_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Returns the grid of the page's maps, at most LARGEST_SIDE a side."""
    block = -(-max(grid) // LARGEST_SIDE)
    return -(-grid[0] // block), -(-grid[1] // block)


def on_small_grid(table: np.ndarray, grid: tuple[int, int], join) -> np.ndarray:
    """Joins blocks of positions of a table (T, ...); returns (T', ...)."""
    block = -(-max(grid) // LARGEST_SIDE)
    if block == 1 or not table.size:
        return table
    whole = table.reshape(*grid, *table.shape[1:])
    rows = np.arange(0, grid[0], block), np.arange(0, grid[1], block)
    parts = [
        [join(whole[i : i + block, j : j + block], axis=(0, 1)) for j in rows[1]] for i in rows[0]
    ]
    return np.array(parts).reshape(-1, *table.shape[1:])


def statistics_of(counts: RoutingCounts) -> dict[str, list[float]]:
    numbers = {
        "load entropy, bits": load_entropy(counts.by_class),
        "busiest / mean": max_over_mean_load(counts.by_class),
        "class, bits": mutual_information(counts.by_class),
        "step, bits": mutual_information(counts.by_step),
        "place, bits": mutual_information(counts.by_position),
        "kept": counts.persistence(0, 1),
    }
    return {
        name: [None if np.isnan(x) else round(float(x), 4) for x in values]
        for name, values in numbers.items()
    }


def classes_of(counts: RoutingCounts) -> dict:
    """Returns the classes, their order by similarity, and the grid."""
    return {
        "classes": counts.class_names.tolist(),
        "order": choose_rows(counts.by_class, None, "similarity").tolist(),
        "grid": small_grid(counts.grid),
    }


def gallery_of(counts: RoutingCounts) -> list:
    """Returns for each layer and expert a list of [crop, weight, image, class, frame of the patch],
    see `frame_of`."""
    per_prompt = counts.settings["images_per_class"]
    groups = counts.settings.get("groups", range(len(counts.labels)))
    entries = zip(
        counts.gallery_crop.tolist(), counts.gallery_weight.tolist(),
        counts.gallery_image.tolist(), counts.gallery_place.tolist(), strict=True,
    )  # fmt: skip
    return [
        [
            [
                [
                    crop,
                    round(weight, 4),
                    image,
                    groups[image // per_prompt],
                    frame_of(place, counts.grid),
                ]
                for crop, weight, image, place in zip(*expert, strict=True)
                if image >= 0
            ]
            for expert in zip(*layer, strict=True)
        ]
        for layer in entries
    ]


def frame_of(place: int, grid: tuple[int, int]) -> list[int]:
    """Returns the distances of a patch from the edges of its crop in percent, clockwise from the
    top."""
    ends = []
    for at, seen in zip(divmod(place, grid[1]), surroundings(place, grid), strict=True):
        before, after = at - seen.start, seen.stop - 1 - at
        ends.append([round(100 * patches / len(seen), 1) for patches in (before, after)])
    (top, bottom), (left, right) = ends
    return [top, right, bottom, left]


def fitting_crops(counts: RoutingCounts, most_bytes: int) -> list[bytes]:
    """Returns the WebP crops, made smaller if together they have more bytes."""
    starts = [0, *counts.crop_ends.tolist()]
    whole = counts.crops.tobytes()
    crops = [whole[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    for side in SIDES:
        if sum(map(len, crops)) <= most_bytes:
            break
        crops = [shrink(crop, side) for crop in crops]
    return crops


def shrink(crop: bytes, side: int) -> bytes:
    """Scales a WebP picture down to a side in pixels."""
    picture, content = Image.open(io.BytesIO(crop)), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(content, "webp", quality=70)
    return content.getvalue()
