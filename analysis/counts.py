"""Tables of how often the tokens of each class, step and patch position chose each expert.

    counts = RoutingCounts.load("results/expert_data.npz")
    share = counts.by_class / counts.by_class.sum(-1, keepdims=True)

The file is a plain .npz: the three tables, `labels`, `class_names` and `times`, and `settings`, a
JSON text of how the images were drawn. Nothing in it is pickled.

Shape legend:
    C classes, S sampling steps, T patch positions, L layers, E experts
"""

import json
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from runtime.errors import UserError


@dataclass(frozen=True)
class RoutingCounts:
    """Assignments of tokens to experts in three tables; ValueError where they do not agree."""

    by_class: np.ndarray  # (C, L, E) int64
    by_step: np.ndarray  # (S, L, E) int64
    by_position: np.ndarray  # (T, L, E) int64
    labels: np.ndarray  # (C,) int64, the class of each row of by_class
    class_names: np.ndarray  # (C,) text, its name
    times: np.ndarray  # (S,) float64, the t that the model was given at each step
    settings: dict  # model, sampler, num_steps, cfg_scale, seed, images_per_class ...

    def __post_init__(self):
        total = self.by_class.sum(0)  # (L, E)
        for name in ("by_step", "by_position"):  # every table counts the same assignments
            if not np.array_equal(getattr(self, name).sum(0), total):
                raise ValueError(f"{name}: got other totals of the experts than in by_class")
        for name, rows in (
            ("labels", self.by_class), ("class_names", self.by_class), ("times", self.by_step),
        ):  # fmt: skip
            if (got := getattr(self, name).shape) != (len(rows),):
                raise ValueError(f"{name}: got shape {got}, expected ({len(rows)},)")

    @property
    def num_layers(self) -> int:
        return self.by_class.shape[1]

    @property
    def num_experts(self) -> int:
        return self.by_class.shape[2]

    def __str__(self) -> str:
        s = self.settings
        return (
            f"{s['model']}, {s['sampler']} {s['num_steps']} steps, guidance {s['cfg_scale']:g}, "
            f"{s['images_per_class']} images a class"
        )

    def save(self, path: Path) -> None:
        """Writes the .npz under a temporary name and renames it, so that it is whole or absent."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays["settings"] = json.dumps(self.settings)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror})") from None
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> "RoutingCounts":
        """Reads what `save` wrote; UserError says in one line what is wrong with another file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {field.name: file[field.name] for field in fields(cls)}
            return cls(**{**arrays, "settings": json.loads(str(arrays["settings"]))})
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, expected what expert_data.py writes") from None
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror or error})") from None
        except (LookupError, TypeError, ValueError, AttributeError, EOFError) as error:
            raise UserError(f"{path}: not the counts of expert_data.py ({error})") from None
        except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise UserError(f"{path}: damaged ({error})") from None
