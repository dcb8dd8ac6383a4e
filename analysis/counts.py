"""Tables of how often the tokens of each class, step and patch position chose each expert.

    counts = RoutingCounts.load("results/expert_data.npz")
    share = counts.by_class / counts.by_class.sum(-1, keepdims=True)

The file is a plain .npz: the three tables, `labels`, `class_names` and `times`, and `settings`, a
JSON text of everything else. Nothing in it is pickled.

Shape legend:
    C classes, S sampling steps, T patch positions, L layers, E experts
"""

import json
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from runtime.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What was sampled, and how."""

    model: str
    objective: str
    sampler: str
    num_steps: int
    cfg_scale: float
    seed: int
    images_per_class: int
    grid_size: int  # patches a side, T = grid_size^2
    num_experts: int
    num_experts_per_tok: int  # a mean where the router gives tokens different numbers

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.sampler} {self.num_steps} steps, guidance {self.cfg_scale:g}, "
            f"{self.images_per_class} images a class"
        )


@dataclass(frozen=True)
class RoutingCounts:
    """Assignments of tokens to experts in three tables; ValueError where they do not agree."""

    by_class: np.ndarray  # (C, L, E) int64
    by_step: np.ndarray  # (S, L, E) int64
    by_position: np.ndarray  # (T, L, E) int64
    labels: np.ndarray  # (C,) int64, the class of each row of by_class
    class_names: np.ndarray  # (C,) text, its name
    times: np.ndarray  # (S,) float64, the t that the model was given at each step
    settings: Settings

    def __post_init__(self):
        s, (classes, layers, experts) = self.settings, self.by_class.shape
        for name, shape in {
            "by_step": (s.num_steps, layers, experts),
            "by_position": (s.grid_size**2, layers, experts),
            "labels": (classes,),
            "class_names": (classes,),
            "times": (s.num_steps,),
        }.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: got {getattr(self, name).shape}, expected {shape}")
        for name in ("by_step", "by_position"):  # every table counts the same assignments
            if (getattr(self, name).sum(0) != self.by_class.sum(0)).any():
                raise ValueError(f"{name}: got other totals of the experts than in by_class")

    @property
    def num_layers(self) -> int:
        return self.by_class.shape[1]

    def save(self, path: Path) -> None:
        """Writes the .npz under a temporary name and renames it, so that it is whole or absent."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays, settings=json.dumps(asdict(self.settings)))
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
            settings = Settings(**json.loads(str(arrays.pop("settings"))))
            return cls(**arrays, settings=settings)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, expected what expert_data.py writes") from None
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror or error})") from None
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            EOFError,
            zipfile.BadZipFile,
        ) as error:
            raise UserError(f"{path}: not the counts of expert_data.py: {error}") from None
