"""Checkpoint metadata: a typed record, stored as JSON in the metadata of the weight file.

    record = Record(config=model.config, step=50_000, objective="gaussian", class_names=names)
    record = Record.from_metadata(record.to_metadata())    # {"dit_moe": JSON}

The JSON is sorted, so equal weights and facts give identical files. A field of a wrong type, or an
absurd size, raises ValueError.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from diffusion import OBJECTIVES
from latents.autoencoder import LatentNorm
from models import DiTConfig
from options.parts import Part, Size, convert
from options.settings import check_names, flags_of, over, read, stored
from presets import SIZES
from runtime.files import parse_json

METADATA_KEY = "dit_moe"
MODEL_NAME = re.compile(r"\w[\w.+-]{0,99}(/\d{1,3})?", re.ASCII)  # it becomes part of file names
TYPED = {  # the settings that are fields of a Record, and their sections
    "model": "model", "objective": "step", "image_size": "data", "vae_path": "data",
}  # fmt: skip
NOTED_SHARE = 0.05  # print a note if its first weights make up at least this fraction of an EMA


@dataclass(frozen=True, kw_only=True)
class Record:
    """The model's config and its training; fields that a file does not record are None or empty."""

    config: DiTConfig
    step: int | None = None
    model: str | None = None  # "DiT-S/2"
    objective: str | None = None  # a name of `diffusion.OBJECTIVES`
    objective_options: dict = field(default_factory=dict)  # and its options
    image_size: Size | None = None
    vae_path: str | None = None  # folder or hub id of the autoencoder
    vae_sha256: str | None = None  # digest of the autoencoder's weights, if latents were cached
    latents_norm: dict | None = None  # normalisation of the training latents, see `LatentNorm`
    class_names: tuple[str, ...] = ()
    initialized_from: dict | None = None  # {"path", ...}: the weights that the run started from
    settings: dict = field(default_factory=dict)  # the rest of config.yaml, by section
    facts: dict = field(default_factory=dict)  # facts that are no flags, such as the script
    micro_batch: int | None = None  # images per micro-step and rank
    images: dict | None = None  # of the data set, see `Source.fingerprint`
    ema: str | None = None  # name of the EMA, such as 0.9999
    ema_start_share: float | None = None  # fraction of the EMA that its first weights make up

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

    def sections(self) -> dict[str, dict[str, Any]]:
        """Returns all settings, as in config.yaml; of weights from other code, few but the model's.

        `expert_backend` is omitted, because it does not affect the function of the model.
        """
        model = {k: v for k, v in stored(self.config).items() if k != "expert_backend"}
        objective = self.objective and str(Part(self.objective, self.objective_options))
        typed = {
            "model": {"model": self.model, **model},
            "data": {"image_size": self.image_size, "vae_path": self.vae_path},
            "step": {"objective": objective},
        }
        joined = {name: typed.get(name, {}) | self.settings.get(name, {})
                  for name in (typed | self.settings)}  # fmt: skip
        known = {k: {n: v for n, v in s.items() if v is not None} for k, s in joined.items()}
        return {name: section for name, section in known.items() if section}

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as "config", and the known facts."""
        names = {f.name for f in fields(self)} - {"config", "settings", *TYPED, "objective_options"}
        facts = {name: getattr(self, name) for name in names}
        facts["class_names"] = list(self.class_names)
        known = {name: value for name, value in facts.items() if value not in (None, [], {})}
        return known | {"config": self.sections()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """Builds a record from the result of `to_dict`."""
        sections = values.get("config") if isinstance(values, dict) else None
        if not isinstance(sections, dict) or not isinstance(sections.get("model"), dict):
            raise ValueError("got no config, expected the record of a DiT-MoE checkpoint")
        if not all(isinstance(section, dict) for section in sections.values()):
            raise ValueError("config: got no sections, expected the sections of a config.yaml")
        settings, facts = {k: dict(s) for k, s in sections.items()}, dict(values)
        facts |= {name: settings[section].pop(name, None)
                  for name, section in TYPED.items() if section in settings}  # fmt: skip
        model = as_words(settings.pop("model"), "router")
        step = {"objective": facts.get("objective"), **settings.get("step", {})}
        settings["step"] = as_words(step, "objective")
        facts["objective"] = settings["step"].pop("objective")
        facts["settings"] = {name: section for name, section in settings.items() if section}
        return cls.of_weights(model, {k: v for k, v in facts.items() if k != "config"})

    @classmethod
    def of_weights(cls, fields: dict[str, Any] | DiTConfig, facts: dict[str, Any]) -> "Record":
        """Builds a record from the fields of the model, nested or flat, and known facts."""
        if isinstance(fields, DiTConfig):
            config = fields
        else:
            config = DiTConfig(**{n: value for n, value in fields.items() if value is not None})
        facts = {name: value for name, value in facts.items() if value is not None}
        hints = get_type_hints(cls)
        for name, value in facts.items():
            try:
                facts[name] = value if isinstance(value, Part) else convert(value, hints[name])
            except (KeyError, ValueError):
                expected = "a fact of a Record"
                raise ValueError(f"{name!s:.80}: got {value!r:.80}, expected {expected}") from None
        if (word := facts.get("objective")) is not None:
            options = facts.get("objective_options")
            objective = Part.parse(Part(word, options) if options else word, OBJECTIVES)
            objective = objective.complete(OBJECTIVES)
            facts |= {"objective": objective.name, "objective_options": objective.options}
        if (norm := facts.get("latents_norm")) is not None:
            LatentNorm(**norm).check_channels(config.in_channels)  # ValueError or TypeError
        if (names := facts.get("class_names")) and len(names) != config.num_classes:
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
        """Reads the metadata of a weight file."""
        return cls.from_dict(parse_json((metadata or {}).get(METADATA_KEY, "{}")))


def as_words(section: dict[str, Any], name: str) -> dict[str, Any]:
    """Translates the component `name` of an earlier version: {"router": {"sigmoid": {"scale": 2}}},
    or until version 0.2 {"router": "sigmoid", "router_scale": 2}."""
    said = {k: v for k, v in section.items() if not k.startswith(f"{name}_")}
    options = {k.removeprefix(f"{name}_"): v for k, v in section.items() if k not in said}
    value = said.get(name)
    if isinstance(value, dict) and len(value) == 1:
        ((value, options),) = value.items()
    if isinstance(options, dict) and "aux_loss_alpha" in options:
        options = dict(options)
        said["aux_loss_alpha"] = options.pop("aux_loss_alpha")
    if isinstance(value, str) and options:
        said[name] = Part(value, options)
    elif isinstance(value, str):
        said[name] = value
    return said


def with_overrides(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> DiTConfig:
    """Builds a config of fields and overrides; of the router, a word overrides the options that it
    says.

    Raises ValueError for an unknown field or another router.
    """
    check_names(overrides, DiTConfig)
    flags = flags_of(DiTConfig)
    beneath, top = read(fields, flags), read(overrides, flags)
    config = DiTConfig(**over(top, beneath))
    if "router" in beneath and config.router.name != beneath["router"].name:
        raise ValueError(f"router: got {top['router']}, expected {beneath['router'].name}")
    return config
