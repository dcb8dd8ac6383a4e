"""Values of --conditions: numbers for all images, or a file with one row per image; and of prompts.

    rows = read_conditions(("size=1,1,0,0", "vector=captions.npy"), model)
    conditions = rows_for(rows, seeds=[5, 6], first_seed=5)      # {"size": (2, 4), ...}

Shape legend: N images, M rows, F width of a feature
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from models import DiT
from runtime.errors import UserError, reported_as
from sampling.sampling_config import SamplingConfig


def read_conditions(words: Sequence[str], model: DiT) -> dict[str, Tensor]:
    """Reads words and returns the rows (M, ...) of each condition.

    words: NAME=NUMBERS, NAME=FILE.npy, or NAME=FILE.npz with an array called NAME
    """
    known = {name: one for name, one in model.conditions.items() if one.in_batch}
    for given_by_another_flag in ("label", "text"):
        known.pop(given_by_another_flag, None)
    found: dict[str, Tensor] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known or name in found:
            raise UserError(
                f"--conditions: got {word:.80}, expected NAME=NUMBERS or NAME=FILE.npy, once for "
                f"each of the model's conditions: {', '.join(known) or 'none besides the class'}"
            )
        shape = tuple(known[name].default(1, torch.device("cpu")).shape[1:])
        with reported_as(  # NumPy and zipfile each raise exceptions of their own
            f"--conditions: got {word:.80}, expected numbers and commas, or an array in a .npy or "
            ".npz file", Exception,
        ):  # fmt: skip
            rows = read_rows(name, text)
        rows = rows[None] if rows.shape == shape else rows  # (M, ...)
        if rows.shape[1:] != shape or not len(rows):
            expected = " x ".join(map(str, shape))
            raise UserError(
                f"--conditions: got {name} with shape {tuple(rows.shape)}, expected {expected} "
                f"numbers, or {expected} numbers per image"
            )
        if not rows.isfinite().all():
            raise UserError(f"--conditions: got {name} with inf or nan, expected finite numbers")
        found[name] = rows
    return found


def read_prompts(config: SamplingConfig, has_text: bool) -> list[str]:
    """Returns the prompts of --prompt or --prompts, if any; only for a model that has text."""
    given = {f"--{name.replace('_', '-')}": getattr(config, name)
             for name in ("prompt", "prompts", "negative_prompt")}  # fmt: skip
    said = [flag for flag, value in given.items() if value not in (None, ())]
    if said and not has_text:
        raise UserError(
            f"{said[0]}: the model has no condition text, expected --class-labels; to add text, "
            "train with --finetune and --conditions label text"
        )
    if config.prompt and config.prompts:
        raise UserError("--prompts: cannot be combined with --prompt")
    prompts = list(config.prompt)
    if path := config.prompts:
        with reported_as(f"--prompts: cannot read {path}", OSError, UnicodeDecodeError):
            lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompts: {path} has no prompts, expected one a line")
    return prompts


def read_rows(name: str, text: str) -> Tensor:
    if not text.endswith((".npy", ".npz")):
        return torch.tensor([float(number) for number in text.split(",")])
    with open(text, "rb") as file:
        stored = np.load(file, allow_pickle=False)
        array = stored[name] if text.endswith(".npz") else stored
        return torch.from_numpy(array.astype(np.float32))


def rows_for(
    rows: Mapping[str, Tensor], seeds: Sequence[int], first_seed: int
) -> dict[str, Tensor]:
    """Returns the conditions (N, ...) of images with the given seeds.

    The image with the seed first_seed + i gets row i; after the last row, the rows repeat.
    """
    return {
        name: values[[(seed - first_seed) % len(values) for seed in seeds]]
        for name, values in rows.items()
    }
