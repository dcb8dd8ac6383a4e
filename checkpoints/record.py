"""What a checkpoint says of itself: a typed record, JSON in the metadata of its weights' file.

    record = Record(config=model.config, step=50_000, objective="gaussian", class_names=names)
    metadata = record.to_metadata()        # {"dit_moe": JSON}
    record = Record.from_metadata(metadata)

There is one metadata key and its JSON is sorted, so equal weights and facts are byte-equal files.
Files come from strangers too: a field of the wrong type or of an absurd size is a ValueError, one
line with what was got and expected, before anything is built from it.
"""

import json
import re
import types
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from models import DiTConfig

METADATA_KEY = "dit_moe"
MODEL_NAME = re.compile(r"\w[\w.+-]{0,99}(/\d{1,3})?", re.ASCII)  # it becomes part of file names
LARGEST = {"depth": 512, "num_experts": 2**16}
LARGEST_SIZE = 2**20  # of any other whole number in a config
LARGEST_REAL = 1024.0
LARGEST_COUNT = 2**53


@dataclass(frozen=True, kw_only=True)
class Record:
    """The model's config and how it was trained; None and empty where a file does not say."""

    config: DiTConfig
    step: int | None = None
    model: str | None = None  # "DiT-S/2"
    objective: Literal["gaussian", "rectified_flow"] | None = None
    image_size: int | None = None
    vae_path: str | None = None  # folder or hub id of the autoencoder
    vae_sha256: str | None = None  # of its weights, where latents were cached
    class_names: tuple[str, ...] = ()
    flip: bool | None = None  # whether images were mirrored at random
    initialized_from: dict | None = None  # {"path", ...}: the weights that the run started from
    settings: dict = field(default_factory=dict)  # fields of TrainConfig that decide the result
    micro_batch: int | None = None  # images of one rank's micro-step
    images: dict | None = None  # the dataset's `listing`

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON knows them, those that are not known left out.

        How fast experts are computed is no fact of the weights, so `expert_backend` is left out.
        """
        config = {k: v for k, v in asdict(self.config).items() if k != "expert_backend"}
        facts = {f.name: getattr(self, f.name) for f in fields(self)}
        facts["class_names"] = list(self.class_names)
        known = {name: value for name, value in facts.items() if value not in (None, [], {})}
        return {**known, "config": config}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Checks and takes what `to_dict` gives; ValueError with the field that is wrong."""
        if not isinstance(values, dict) or "config" not in values:
            raise ValueError("got no config, expected the record of a DiT-MoE checkpoint")
        config = values["config"]
        config = config if isinstance(config, DiTConfig) else parse_config(config)
        facts = {name: value for name, value in values.items() if name != "config"}
        check_types(cls, facts)
        names = tuple(facts.pop("class_names", ()))
        if names and len(names) != config.num_classes:
            raise ValueError(f"class_names: got {len(names)}, expected {config.num_classes}")
        if MODEL_NAME.fullmatch(facts.get("model") or "DiT") is None:
            raise ValueError(f"model: got {facts['model']!r:.80}, expected a name such as DiT-S/2")
        origin = facts.get("initialized_from") or {"path": ""}
        if not isinstance(origin.get("path"), str):
            raise ValueError("initialized_from: got no path, expected one")
        return cls(config=config, class_names=names, **facts)

    def to_metadata(self) -> dict[str, str]:
        return {METADATA_KEY: json.dumps(self.to_dict(), sort_keys=True, default=str)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None) -> "Record":
        """Reads the metadata of a weight file; ValueError where they are not a record."""
        text = (metadata or {}).get(METADATA_KEY)
        if text is None:
            raise ValueError(f"got no {METADATA_KEY} in its metadata, expected a record")
        try:
            return cls.from_dict(json.loads(text))
        except RecursionError:
            raise ValueError("got deeply nested JSON, expected a record") from None


def parse_config(values: dict[str, Any]) -> DiTConfig:
    """Makes the DiTConfig of stored fields; ValueError for one that no model of use has."""
    if not isinstance(values, dict):
        raise ValueError(f"config: got a {type(values).__name__}, expected the fields of a model")
    check_types(DiTConfig, values)
    for name, value in values.items():
        largest = LARGEST_REAL if type(value) is float else LARGEST.get(name, LARGEST_SIZE)
        if type(value) in (int, float) and value > largest:
            raise ValueError(f"{name}: got {value}, expected at most {largest:g}")
    return DiTConfig(**values)


def check_types(kind: type, values: dict[str, Any]) -> None:
    """Raises ValueError unless values are fields of a dataclass and of the types it annotates."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"got {name!r:.80}, expected fields of {kind.__name__}")
        if not is_of_type(value, hints[name]):
            hint = getattr(hints[name], "__name__", None) or str(hints[name])
            raise ValueError(f"{name}: got {value!r:.80}, expected {hint.replace('typing.', '')}")


def is_of_type(value: object, hint: Any) -> bool:
    """Whether a value fits an annotation; numbers are finite and not negative, lists are tuples."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is not None:
        parts = get_args(hint)
        if get_origin(hint) is Literal:
            return value in parts
        if get_origin(hint) is tuple:
            is_list = isinstance(value, list | tuple)
            return is_list and all(is_of_type(item, parts[0]) for item in value)
        return any(is_of_type(value, part) for part in parts)
    if hint in (int, float):
        return type(value) in {int, hint} and 0 <= value <= LARGEST_COUNT  # so not nan
    return type(value) is hint
