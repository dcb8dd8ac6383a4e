"""What a checkpoint says of itself: a typed record, JSON in the metadata of its weights' file.

    record = Record(config=model.config, step=50_000, objective="gaussian", class_names=names)
    record = Record.from_metadata(record.to_metadata())    # {"dit_moe": JSON}

There is one metadata key and its JSON is sorted, so equal weights and facts are byte-equal files.
A field of the wrong type or of an absurd size is a ValueError with what was got and expected.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from models import SIZES, DiTConfig

METADATA_KEY = "dit_moe"
MODEL_NAME = re.compile(r"\w[\w.+-]{0,99}(/\d{1,3})?", re.ASCII)  # it becomes part of file names
LARGEST, LARGEST_INPUT = 2**20, 1024  # number in a config, and latent size


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

    @property
    def model_name(self) -> str:
        """The recorded name, or else the preset of this size, or else depth and width."""
        c = self.config
        sizes = {(s["depth"], s["hidden_size"]): f"DiT-{name}" for name, s in SIZES.items()}
        size = sizes.get((c.depth, c.hidden_size), f"DiT-{c.depth}x{c.hidden_size}")
        return self.model or f"{size}/{c.patch_size}"

    def to_dict(self) -> dict[str, Any]:
        """The facts that are known, as JSON has them; `expert_backend` is none of the weights'."""
        facts = {f.name: getattr(self, f.name) for f in fields(self)}
        facts["class_names"] = list(self.class_names)
        facts["config"] = {k: v for k, v in asdict(self.config).items() if k != "expert_backend"}
        return {name: value for name, value in facts.items() if value not in (None, [], {})}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Takes what `to_dict` gives; ValueError with the field that is wrong."""
        if not isinstance(values, dict) or "config" not in values:
            raise ValueError("got no config, expected the record of a DiT-MoE checkpoint")
        config = values["config"]
        config = config if isinstance(config, DiTConfig) else parse_config(config)
        facts = {name: value for name, value in values.items() if name != "config"}
        check_types(cls, facts)
        facts["class_names"] = names = tuple(facts.get("class_names", ()))
        if names and len(names) != config.num_classes:
            raise ValueError(f"class_names: got {len(names)}, expected {config.num_classes}")
        if MODEL_NAME.fullmatch(facts.get("model") or "DiT") is None:
            raise ValueError(f"model: got {facts['model']!r:.80}, expected a name such as DiT-S/2")
        if not isinstance((facts.get("initialized_from") or {"path": ""}).get("path"), str):
            raise ValueError("initialized_from: got no path, expected one")
        return cls(config=config, **facts)

    def to_metadata(self) -> dict[str, str]:
        return {METADATA_KEY: json.dumps(self.to_dict(), sort_keys=True, default=str)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None) -> "Record":
        """Reads the metadata of a weight file; ValueError where they are not a record."""
        return cls.from_dict(json.loads((metadata or {}).get(METADATA_KEY, "{}")))


def parse_config(values: dict[str, Any]) -> DiTConfig:
    """Makes the DiTConfig of stored fields; ValueError for one that no model of use has."""
    if not isinstance(values, dict):
        raise ValueError(f"config: got a {type(values).__name__}, expected the fields of a model")
    check_types(DiTConfig, values)
    for name, value in values.items():
        largest = LARGEST_INPUT if name == "input_size" else LARGEST
        if type(value) in (int, float) and value > largest:
            raise ValueError(f"{name}: got {value}, expected at most {largest}")
    return DiTConfig(**values)


def check_types(kind: type, values: dict[str, Any]) -> None:
    """Raises ValueError unless values are fields of a dataclass and of the types it annotates."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"got {name!r:.80}, expected fields of {kind.__name__}")
        if not is_of_type(value, hints[name]):
            hint = hints[name] if get_args(hints[name]) else hints[name].__name__
            raise ValueError(f"{name}: got {value!r:.80}, expected {hint}")


def is_of_type(value: object, hint: Any) -> bool:
    """Whether a value fits an annotation; numbers are finite and not negative, lists are tuples."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(is_of_type(v, parts[0]) for v in value)
    if parts:
        return any(is_of_type(value, part) for part in parts)
    if hint in (int, float):
        return type(value) in {int, hint} and 0 <= value <= 2**53  # so not nan
    return type(value) is hint
