"""Tables of how often the tokens of each class, step and patch position chose each expert.

    counts = RoutingCounts.load("expert_data.npz")
    share = counts.by_class / counts.by_class.sum(-1, keepdims=True)

The file is a plain .npz: the three tables, `labels`, `class_names` and `times`, and `settings`, a
JSON text of everything else. Nothing in it is pickled.

Shape legend:
    C classes, S sampling steps, T patch positions, L layers, E experts, K experts per token
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.untrusted import parse_json, read_npz

MAX_BYTES = 2**29  # of a file's arrays; the tables of DiT-G on ImageNet need 5 million


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
    num_experts_per_tok: int

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.sampler} {self.num_steps} steps, guidance {self.cfg_scale:g}, "
            f"{self.images_per_class} images a class"
        )


@dataclass(frozen=True)
class RoutingCounts:
    """Assignments of tokens to experts, K for each token of each layer, in three tables.

    ValueError for arrays that do not belong together; see `check`.
    """

    by_class: np.ndarray  # (C, L, E) int64
    by_step: np.ndarray  # (S, L, E) int64
    by_position: np.ndarray  # (T, L, E) int64
    labels: np.ndarray  # (C,) int64, the class of each row of by_class
    class_names: np.ndarray  # (C,) text, its name
    times: np.ndarray  # (S,) float64, the t that the model was given at each step
    settings: Settings

    def __post_init__(self):
        self.check()

    @property
    def num_layers(self) -> int:
        return self.by_class.shape[1]

    @property
    def total(self) -> int:
        """All assignments: images x steps x tokens x K x layers."""
        return int(self.by_class.sum())

    def check(self) -> None:
        """Raises ValueError unless the tables have the shapes and the sums that they must have.

        Every token is counted once in each table, so each row's sum is known in advance, and the
        tables agree on how often each layer chose each expert.
        """
        s = self.settings
        if self.by_class.ndim != 3 or 0 in self.by_class.shape:
            raise ValueError(f"by_class: got shape {self.by_class.shape}, expected (C, L, E)")
        classes, layers, _ = self.by_class.shape
        steps, positions = s.num_steps, s.grid_size**2
        per_token = s.images_per_class * s.num_experts_per_tok
        for name, rows, row_sum in (
            ("by_class", classes, steps * positions * per_token),
            ("by_step", steps, classes * positions * per_token),
            ("by_position", positions, classes * steps * per_token),
        ):
            table = getattr(self, name)
            check_array(name, table, (rows, layers, s.num_experts), np.int64)
            if table.min() < 0:
                raise ValueError(f"{name}: got a count of {table.min()}, expected none below 0")
            sums = table.sum(-1)
            if (sums != row_sum).any() or table.max() > row_sum:  # a sum of large ones can wrap
                wrong = [*sums[sums != row_sum], table.max()][0]
                raise ValueError(f"{name}: got a row of {wrong} assignments, expected {row_sum}")
        for name in ("by_step", "by_position"):
            if (getattr(self, name).sum(0) != self.by_class.sum(0)).any():
                raise ValueError(f"{name}: got other totals of the experts than in by_class")
        check_array("labels", self.labels, (classes,), np.int64)
        check_array("class_names", self.class_names, (classes,), np.str_)
        check_array("times", self.times, (steps,), np.float64)
        if not np.isfinite(self.times).all():
            raise ValueError(
                "times: got a value that is not finite, expected the time of each step"
            )

    def save(self, path: Path) -> None:
        """Writes the .npz under a temporary name and renames it, so that it is whole or absent.

        UserError when it cannot be written.
        """
        arrays = {name: getattr(self, name) for name in ARRAYS}
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays, settings=json.dumps(asdict(self.settings)))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror or error})") from None
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> "RoutingCounts":
        """Reads what `save` wrote; UserError says in one line what is wrong with another file."""
        try:
            arrays = read_npz(Path(path), {*ARRAYS, "settings"}, MAX_BYTES)
            settings = read_settings(arrays.pop("settings"))
            return cls(**arrays, settings=settings)
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror or error})") from None
        except ValueError as error:
            raise UserError(f"{path}: not the counts of expert_data.py: {error}") from None


ARRAYS = [field.name for field in fields(RoutingCounts) if field.name != "settings"]


def check_array(name: str, array: np.ndarray, shape: tuple[int, ...], kind: type) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    if not np.issubdtype(array.dtype, kind):
        raise ValueError(f"{name}: got {array.dtype}, expected {np.dtype(kind).name}")


MAX_NUMBER = 2**53


def read_settings(text: np.ndarray) -> Settings:
    """Reads the JSON of `Settings`; ValueError for a missing field or one of the wrong type."""
    if text.shape != () or text.dtype.kind != "U":
        raise ValueError(f"settings: got {text.dtype} {text.shape}, expected a JSON text")
    try:
        values = parse_json(str(text))
    except ValueError as error:
        raise ValueError(f"settings: not JSON ({error})") from None
    names = {field.name for field in fields(Settings)}
    if not isinstance(values, dict) or set(values) != names:
        got = sorted(values)[:12] if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"settings: got {str(got)[:200]}, expected {sorted(names)}")
    for field in fields(Settings):
        value = values[field.name]
        if field.type is float and type(value) is int and abs(value) <= MAX_NUMBER:
            values[field.name] = value = float(value)
        if type(value) is not field.type or (field.type is str and not value.isprintable()):
            raise ValueError(
                f"settings: got {field.name} {value!r:.80}, expected {field.type.__name__}"
            )
        lowest = 0 if field.name == "seed" else 1
        if field.type is int and not lowest <= value <= MAX_NUMBER:
            raise ValueError(
                f"settings: got {field.name} {value!s:.80}, expected {lowest} to {MAX_NUMBER}"
            )
    return Settings(**values)
