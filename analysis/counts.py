"""Tables of how often the tokens of each class, step and patch position chose each expert.

    counts = RoutingCounts.load("results/expert_data.npz")
    share = counts.by_class / counts.by_class.sum(-1, keepdims=True)

The file is a plain .npz: the four tables, `labels`, `class_names` and `times`, and `settings`, a
JSON text of how the images were drawn. Nothing in it is pickled.

Shape legend:
    C classes, S sampling steps, T patch positions, L layers, E experts
"""

import io
import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from runtime.files import open_npz, write_durably

COUNTS_FILE = "expert_data.npz"  # the name unless another is given


@dataclass(frozen=True)
class RoutingCounts:
    """Assignments of tokens to experts in four tables."""

    by_class: np.ndarray  # (C, L, E) int64
    by_step: np.ndarray  # (S, L, E) int64
    by_position: np.ndarray  # (T, L, E) int64
    spent: np.ndarray  # (S, T, L) int64, to all experts together
    labels: np.ndarray  # (C,) int64, the class of each row of by_class
    class_names: np.ndarray  # (C,) text, its name
    times: np.ndarray  # (S,) float64, the t that the model was given at each step
    settings: dict  # model, sampler, num_steps, cfg_scale, seed, images_per_class ...

    @property
    def num_layers(self) -> int:
        return self.by_class.shape[1]

    @property
    def num_experts(self) -> int:
        return self.by_class.shape[2]

    @property
    def experts_per_token(self) -> np.ndarray:
        """Mean number of experts of a token at each step and position, (S, T, L)."""
        return self.spent / (len(self.labels) * self.settings["images_per_class"])

    def __str__(self) -> str:
        s = self.settings
        return (
            f"{s['model']}, {s['sampler']}, {s['num_steps']} steps, guidance {s['cfg_scale']:g}, "
            f"{s['images_per_class']} image{'s' * (s['images_per_class'] > 1)} a class"
        )

    def save(self, path: Path) -> None:
        """Writes the .npz, whole or not at all."""
        content = io.BytesIO()
        np.savez_compressed(content, **{**vars(self), "settings": json.dumps(self.settings)})
        write_durably(path, content.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> "RoutingCounts":
        """Reads what `save` wrote; UserError says in one line what is wrong with another file."""
        with open_npz(path, "the counts of expert_data.py") as file:
            arrays = {field.name: file[field.name] for field in fields(cls)}
            return cls(**{**arrays, "settings": json.loads(str(arrays["settings"]))})
