"""Checkpoint metadata: a typed record, stored as JSON in the metadata of the weight file.

    record = Record(config=model.config, step=50_000, objective="gaussian", class_names=names)
    record = Record.from_metadata(record.to_metadata())    # {"dit_moe": JSON}

The JSON is sorted, so equal weights and records give identical files. A field of a wrong type, or
an absurd size, raises ValueError.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from conditions import split_condition
from diffusion import OBJECTIVES
from latents.autoencoder import LatentNorm
from latents.words import Words
from models import DiTConfig
from options.parts import Size, Word, convert
from options.settings import check_names, flags_of, in_file, over, read, stored
from presets import SIZES
from runtime.files import parse_json

METADATA_KEY = "dit_moe"
MODEL_NAME = re.compile(r"\w[\w.+-]{0,99}(/\d{1,3})?", re.ASCII)  # it becomes part of file names
NOTED_SHARE = 0.05  # print a note if its first weights make up at least this fraction of an EMA


@dataclass(frozen=True, kw_only=True)
class Record:
    """The model's config and its training; fields that a file does not record are None or empty."""

    config: DiTConfig
    step: int | None = None
    model: str | None = None  # "DiT-S/2"
    objective: Word | None = None  # of `diffusion.OBJECTIVES`
    image_size: Size | None = None
    vae_path: str | None = None  # folder or hub id of the autoencoder
    vae_sha256: str | None = None  # digest of the autoencoder's weights, if latents were cached
    latents_norm: dict | None = None  # normalisation of the training latents, see `LatentNorm`
    class_names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # of the condition "text", see `latents.words`
    initialized_from: dict | None = None  # {"path", ...}: the weights that the run started from
    settings: dict = field(default_factory=dict)  # the other settings of the run, by name
    facts: dict = field(default_factory=dict)  # facts that are no settings, such as the version
    images: dict | None = None  # of the data set, see `Source.fingerprint`
    ema: str | None = None  # name of the EMA, such as 0.9999
    ema_start_share: float | None = None  # fraction of the EMA that its first weights make up

    def __post_init__(self):
        if self.objective is not None:
            objective = Word.parse(self.objective, OBJECTIVES).complete(OBJECTIVES)
            object.__setattr__(self, "objective", objective)
        for name, hint in get_type_hints(type(self)).items():
            if (value := getattr(self, name)) is not None:
                try:
                    object.__setattr__(self, name, convert(value, hint))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        if self.norm:
            self.norm.check_channels(self.config.in_channels)
        if self.class_names and len(self.class_names) != self.config.num_classes:
            got, expected = len(self.class_names), self.config.num_classes
            raise ValueError(f"class_names: got {got}, expected {expected}")
        shapes = dict(map(split_condition, self.config.conditions))
        if self.words and len(self.words) != (expected := shapes.get("text", (0, 0))[1]):
            raise ValueError(f"words: got {len(self.words)}, expected {expected}")
        if self.model and MODEL_NAME.fullmatch(self.model) is None:
            raise ValueError(f"model: got {self.model!r:.80}, expected a name such as DiT-S/2")
        if not isinstance((self.initialized_from or {"path": ""}).get("path"), str):
            raise ValueError("initialized_from: got no path, expected one")

    @property
    def vocabulary(self) -> Words | None:
        """The words of the condition "text"."""
        length, _ = dict(map(split_condition, self.config.conditions)).get("text", (0, 0))
        return Words(self.words, length) if self.words else None

    @property
    def has_text(self) -> bool:
        """Whether prompts can be encoded: as words, or by the text encoder of the latent cache."""
        return bool(self.words) or "text_encoder" in self.facts

    @property
    def norm(self) -> LatentNorm | None:
        return None if self.latents_norm is None else LatentNorm(**self.latents_norm)

    @property
    def model_name(self) -> str:
        """Returns the recorded name, the preset of this size, or depth and width."""
        c = self.config
        sizes = {(s["depth"], s["hidden_size"]): f"DiT-{name}" for name, s in SIZES.items()}
        size = sizes.get((c.depth, c.hidden_size), f"DiT-{c.depth}x{c.hidden_size}")
        return self.model or f"{size}/{c.patch_size}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the known fields. The config is without `expert_backend`, which does not affect
        the function of the model."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        known = {name: in_file(v) for name, v in values.items() if v not in (None, (), {})}
        known["config"] = {k: v for k, v in stored(self.config).items() if k != "expert_backend"}
        return known

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Builds a record from the result of `to_dict`, or from that of an earlier version."""
        if not isinstance(values.get("config"), dict):
            raise ValueError("got no config, expected the record of a DiT-MoE checkpoint")
        values = as_words(without_sections(values), "objective")
        values.pop("micro_batch", None)  # of earlier versions
        model = as_words(values.pop("config"), "router")
        config = DiTConfig(**{name: value for name, value in model.items() if value is not None})
        if unknown := values.keys() - {one.name for one in fields(cls)}:
            raise ValueError(f"{min(unknown):.80}: unknown, expected a field of a Record")
        return cls(config=config, **values)

    def to_metadata(self) -> dict[str, str]:
        return {METADATA_KEY: json.dumps(self.to_dict(), sort_keys=True, default=str)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None) -> "Record":
        """Reads the metadata of a weight file."""
        return cls.from_dict(parse_json((metadata or {}).get(METADATA_KEY, "{}")))


def without_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Translates metadata whose config has the sections of config.yaml, as until version 0.3."""
    if "model" not in values["config"]:
        return values
    sections = {name: dict(section) for name, section in values["config"].items()}
    config = sections.pop("model")
    settings = {name: value for section in sections.values() for name, value in section.items()}
    typed = {n: settings.pop(n) for n in ("image_size", "vae_path") if n in settings}
    typed |= {n: settings.pop(n) for n in [*settings] if n.startswith("objective")}
    return values | typed | {"model": config.pop("model", None), "config": config,
                             "settings": settings}  # fmt: skip


def as_words(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Translates the component `name` of an earlier version: {"router": {"sigmoid": {"scale": 2}}},
    {"router": "sigmoid", "router_options": {"scale": 2}}, or until version 0.2 {"router":
    "sigmoid", "router_scale": 2}."""
    said = {k: v for k, v in values.items() if not k.startswith(f"{name}_")}
    options = {k.removeprefix(f"{name}_"): v for k, v in values.items() if k not in said}
    options = options.get("options", options) or {}
    if isinstance(said.get(name), dict):
        ((said[name], options),) = said[name].items()
    if "aux_loss_alpha" in options:
        said["aux_loss_alpha"] = options["aux_loss_alpha"]
        options = {k: v for k, v in options.items() if k != "aux_loss_alpha"}
    if options:
        said[name] = Word(said[name], dict(options))
    return said


def with_dense_width(config: DiTConfig) -> DiTConfig:
    """Fixes the width of dense blocks between sparse ones, which follows num_experts_per_tok."""
    is_mixed = 0 < len(config.sparse_blocks) < config.depth
    return replace(config, dense_mlp_ratio=config.dense_ratio) if is_mixed else config


def with_overrides(
    fields: DiTConfig | Mapping[str, Any], overrides: Mapping[str, Any]
) -> DiTConfig:
    """Builds a config of fields and overrides; of the router, a word overrides the options that it
    says. The dense blocks of a config keep their width.

    Raises ValueError for an unknown field or another router.
    """
    check_names(overrides, DiTConfig)
    if isinstance(fields, DiTConfig):
        fields = vars(with_dense_width(fields) if overrides else fields)
    flags = flags_of(DiTConfig)
    beneath, top = read(fields, flags), read(overrides, flags)
    config = DiTConfig(**over(top, beneath))
    if "router" in beneath and config.router.name != beneath["router"].name:
        raise ValueError(f"router: got {top['router']}, expected {beneath['router'].name}")
    return config
