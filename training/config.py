"""The config of a run: nested frozen dataclasses, and the functions that build it.

    said = parse_training(DDPFlags, __doc__)          # recipe and command
    known = combine(said, DDPFlags, stored=None, weights=record)    # weights of --finetune
    config = complete(known, said, DDPFlags, weights=record, data=facts)
    config.sections()                                 # the content of config.yaml
    resolve({"lr": 1e-3}, DDPFlags)                   # the config of flags alone

A later source of settings overrides an earlier one: defaults; model and objective of the weights of
--finetune, or all stored settings of --resume; recipe (--config); command. The opened data then
determine settings such as num_classes. flags.py declares the settings.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from checkpoints import Record
from conditions import CONDITIONS, spell_condition, split_condition
from diffusion import OBJECTIVES, Objective
from diffusion.objectives import objective_named
from models import DiT_models, DiTConfig, name_of_layers, select_layers
from options.parts import Size, options_of, sides
from options.settings import (
    Flags,
    Layer,
    as_tuple,
    build,
    components,
    flags_of,
    flat,
    merge,
    nested,
    read,
    spelling,
)
from runtime.errors import UserError, did_you_mean, reported_as
from runtime.files import read_yaml
from runtime.flags import Parser, naming_flags, parse_flags, read_values
from runtime.plugins import import_plugins
from training.auxiliary import AuxiliaryLoss, Shapes
from training.ema import EMA
from training.flags import EPOCHS, DataConfig, PresetConfig, RunConfig, StepConfig
from training.optimizers import Optimizer
from training.schedule import Schedule

RECIPES = Path(__file__).parent.parent / "config" / "recipes"
FIRST_FLAGS = (  # what a newcomer needs
    "data_path", "vae_path", "image_size", "model", "num_experts", "rf", "config",
    "global_batch_size", "train_batch_size", "max_steps", "resume",
)  # fmt: skip
# Fields of the model that the data determine; only the first one is a flag.
DATA_FACTS = ("num_classes", "input_size", "in_channels")
ALTERNATIVES = (  # pairs of flags of which a command gives one
    ("epochs", "max_steps"), ("latents_path", "data_path"), ("val_share", "val_path"),
)  # fmt: skip
SHARDING = ("shard_size", "reshard_after_forward", "expert_parallel", "copies_precision")
PLANNING = ("gpus", "gpu_memory")
# Fields of the model whose defaults depend on other settings.
DERIVED = ("sparse_layers", "mlp_type", "dense_mlp_ratio", "class_dropout_prob")
SPARSE = ("num_experts_per_tok", "n_shared_experts", "sparse_layers")
DENSE = "given with a dense model, expected a model with experts"


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Properties of the opened data and autoencoder."""

    num_classes: int
    input_size: Size  # latent height and width
    in_channels: int
    image_size: Size
    vae_path: str
    can_flip: bool = True
    shapes: Shapes = field(default_factory=dict)  # of one image's tensors; empty without data
    notes: tuple[str, ...] = ()  # lines for the user


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Resolved config of a run: all settings, after the flags, weights and data were combined."""

    preset: str  # such as DiT-S/2
    model: DiTConfig
    step: StepConfig
    data: DataConfig
    run: RunConfig
    engine: Any  # the flags of the engine's script
    shapes: Shapes  # shapes of one image's tensors, by name; empty without data
    # The components that `step` names:
    objective: Objective = field(init=False, compare=False)
    auxiliary: list[AuxiliaryLoss] = field(init=False, compare=False)
    optimizer: Optimizer = field(init=False, compare=False)
    lr_schedule: Schedule = field(init=False, compare=False)
    ema: list[EMA] = field(init=False, compare=False)

    def __post_init__(self):
        for name, one in options_of(StepConfig).items():
            if one.table is not None:
                parts = as_tuple(getattr(self.step, name))
                made = [one.table[part.name](**part.options) for part in parts]
                object.__setattr__(self, name, made if one.is_list else made[0])
        if self.objective.guides_in_training and not self.model.class_dropout_prob:
            raise ValueError(
                "class_dropout_prob: got 0, expected a value above 0, because guidance in training "
                "needs images without a class"
            )
        for one in self.auxiliary:
            if expected := one.check(self.objective, self.shapes):
                raise ValueError(f"auxiliary: got {one.name}, which needs {expected}")
        names = [ema.name for ema in self.ema]
        if len(set(names)) < len(names):
            raise ValueError(f"ema: got {', '.join(names)}, expected different averages")

    @property
    def name(self) -> str:
        """Name of the model with its experts, such as DiT-S/2-8E2A or DiT-S/2-dense."""
        experts = f"{self.model.num_experts}E{self.model.num_experts_per_tok}A"
        return f"{self.preset}-{experts if self.model.num_experts else 'dense'}"

    @property
    def by_section(self) -> dict[str, Any]:
        """The config of each section of a file."""
        return {name: getattr(self, name) for name in sections_of(type(self.engine))}

    def sections(self) -> dict[str, dict[str, Any]]:
        """Returns the settings as config.yaml has them, see `options.settings.nested`."""
        found = {name: nested(section) for name, section in self.by_section.items()}
        if self.preset in DiT_models:  # weights may have any size
            found["model"] = {"model": self.preset, **found["model"]}
        return found

    def total_steps(self, num_images: int, global_batch: int) -> int:
        epochs = self.run.epochs or EPOCHS
        return self.run.max_steps or max(1, epochs * num_images // global_batch)


def sections_of(engine_flags: type) -> dict[str, type]:
    """Returns the config classes of the sections of a file."""
    return {
        "model": DiTConfig, "data": DataConfig, "step": StepConfig, "engine": engine_flags,
        "run": RunConfig,
    }  # fmt: skip


def training_flags(engine_flags: type) -> Flags:
    """Returns the flags of a training script, and the fields that the data determine."""
    sections = sections_of(engine_flags)
    flags = flags_of((PresetConfig, *sections.values()))
    for name in sections:
        if name in flags and flags[name].table:
            raise TypeError(f"{name}: a mapping is either a section of a file or a component")
    return flags


def parse_training(
    engine_flags: type,
    description: str | None = None,
    arguments: Sequence[str] | Mapping[str, Any] | None = None,
) -> Layer:
    """Reads the flags of a training script; they override the files of --config.

    arguments: the words of a command, by default sys.argv, or values by name
    """
    is_mapping = isinstance(arguments, Mapping)
    if is_mapping:
        if plugins := arguments.get("plugin", ()):
            plugins = [plugins] if isinstance(plugins, str | os.PathLike) else plugins
            arguments = {**arguments, "plugin": [*map(os.fspath, plugins)]}
    else:  # the options of a component are flags only after the component was imported
        early = Parser(add_help=False, allow_abbrev=False)
        early.add_argument("--plugin", nargs="+", action="extend", default=[])
        plugins = early.parse_known_args(arguments)[0].plugin
    import_plugins(plugins)
    every = training_flags(engine_flags)
    flags = {name: flag for name, flag in every.items() if name not in DATA_FACTS[1:]}
    if is_mapping:
        command = read_values(arguments, flags)
    else:
        command = parse_flags(flags, description, arguments, FIRST_FLAGS)
    with naming_flags(flags):
        check_once(command, flags)
        files, said = [], {}
        for path in command.get("config", ()):
            with reported_as(f"--config {path}", OSError, ValueError, UserError):
                files.append(read_recipe(Path(path), flags, engine_flags))
        for layer in (*files, command):
            said = override(without_preset(said, layer.get("model"), every), layer, flags)
        return said


def read_recipe(path: Path, flags: Flags, engine_flags: type) -> Layer:
    """Reads a recipe of these flags, or the config.yaml of a run.

    Of a config.yaml, the following are ignored: the facts after the line ---, the run's name, its
    start weights, and what followed from its data (DATA_FACTS) or its other settings (`DERIVED`).
    """
    if not path.exists():
        recipes = {one.stem: os.path.relpath(one) for one in RECIPES.glob("*.yaml")}
        raise ValueError(f"no such file{did_you_mean(path.stem, recipes)}")
    values, is_of_run = parse_yaml(path)
    flags = training_flags(engine_flags) if is_of_run else flags
    sections = sections_of(engine_flags)
    for key, value in values.items():
        flag = flags.get(str(key).replace("-", "_"))
        if isinstance(value, Mapping) and key not in sections and not (flag and flag.table):
            expected = flag.expected() if flag else f"a flag or one of {', '.join(sections)}"
            raise ValueError(f"{key}: got a section, expected {expected}")
    recipe = read_values(values, flags)
    for name in ("config", "plugin"):
        if name in recipe:
            raise ValueError(f"got the key {name}, which only a command can have")
    with naming_flags(flags):
        check_once(recipe, flags)
    if not is_of_run:
        return recipe
    if recipe.get("num_experts") == 0:
        recipe = {name: value for name, value in recipe.items() if name not in SPARSE}
    if "sparse_layers" in recipe and "depth" in recipe:
        recipe["sparse_layers"] = name_of_layers(recipe["sparse_layers"], recipe["depth"])
    model = resolve(recipe, engine_flags).model
    for name in DERIVED:
        others = {key: value for key, value in recipe.items() if key != name}
        if getattr(resolve(others, engine_flags).model, name) == getattr(model, name):
            recipe = others
    ignored = ("run_name", "resume", "finetune", *DATA_FACTS)
    return {name: value for name, value in recipe.items() if name not in ignored}


def parse_yaml(path: Path) -> tuple[dict[str, Any], bool]:
    """Reads a recipe or a config.yaml.

    Returns the values, as text, and whether the file is the config.yaml of a run: such a file has a
    second YAML document, the facts.
    """
    expected = "a YAML file in UTF-8, such as a recipe or the config.yaml of a run"
    try:
        found, *facts = read_yaml(path) or [{}]  # words, as in a command
    except yaml.YAMLError as error:
        raise ValueError(f"expected {expected}: {error}") from None
    found = found or {}
    if not isinstance(found, dict):
        raise ValueError(f"got a {type(found).__name__}, expected {expected}")
    return found, bool(facts)


def check_once(said: Layer, flags: Flags) -> None:
    """Replaces rf by the objective that it names. Raises ValueError if a command or recipe says the
    same thing in two ways."""
    if (rf := said.pop("rf", None)) is not None:
        said["objective"] = objective_named(said.get("objective"), rf)
    for one, other in ALTERNATIVES:
        if said.get(one) and said.get(other):
            raise ValueError(f"{one}: cannot be combined with {spelling(other)}")


def without_preset(recipe: Layer, preset: str | None, flags: Flags) -> Layer:
    """Returns a recipe without what its preset sets, if the command names another preset.

    Raises ValueError if the recipe sets everything that the other preset would change.
    """
    before, kept = recipe.get("model", PresetConfig.model), recipe
    if not recipe or preset in (None, before):
        return recipe
    new, sizes = (read(DiT_models[name].keywords, flags) for name in (preset, before))
    if "model" in recipe:
        old = flat(DiTConfig.of(sizes))
        old = {name: value for name, value in old.items() if name not in DERIVED} | sizes
        own = {flags[n].field.name for n, value in recipe.items() if (n, value) not in old.items()}
        kept = {name: value for name, value in recipe.items() if flags[name].field.name in own}
    sizes |= recipe
    changes = {n for n, value in new.items() if sizes.get(n, flags[n].field.default) != value}
    if changes and changes <= kept.keys():
        what = ", ".join(map(spelling, sorted(changes)))
        raise ValueError(f"model: {preset} has no effect, because the recipe sets {what}")
    return kept


def override(base: Layer, top: Layer, flags: Flags) -> Layer:
    """Merges two layers; `top` also drops what it makes useless in `base`."""
    gone = {b for pair in ALTERNATIVES for a, b in (pair, pair[::-1]) if top.get(a)}
    if top.get("shard") is False:
        gone |= {*SHARDING}
    if top.get("num_experts") == 0:
        gone |= {"router", *SPARSE}  # of no use to a dense model
    kept = {name: value for name, value in base.items() if flags[name].field.name not in gone}
    before = base.get("objective", str(StepConfig.objective))
    if "conditions" in kept and top.get("objective", before) != before:
        own = OBJECTIVES[before].conditions  # inputs that only this objective needs
        kept["conditions"] = tuple(word for word in kept["conditions"] if word not in own)
    return merge(kept, top, flags)


def check_effect(said: Layer, known: Layer, flags: Flags) -> None:
    """Refuses flags without effect, before the data are opened.

    said: the recipe and the command
    known: with the other settings of the run
    """
    for name, value in said.items():
        is_default = value in ((), flags[name].field.default)  # (): the sparse layers, if dense
        if name in PLANNING and not is_default and not known.get("dry_run"):
            raise ValueError(f"{name}: has no effect without --dry-run True")
        if name in SHARDING and not is_default and not known.get("shard"):
            raise ValueError(f"{name}: has no effect without --shard True")
        is_of_experts = flags[name].field.name == "router" or name in SPARSE and not is_default
        if is_of_experts and known.get("num_experts") == 0:
            raise ValueError(f"{name}: {DENSE}")
    for choice in [flag.field for flag in flags.values() if flag.table]:
        components(choice, known, flags)  # raises ValueError for an option that none has


def resolve(
    values: Mapping[str, Any],
    engine_flags: type,
    *,
    stored: Layer | None = None,
    weights: Record | None = None,
    data: DataFacts | None = None,
) -> TrainConfig:
    """Builds the config of flags by name, see `combine` and `complete`."""
    said = read_values(values, training_flags(engine_flags))
    known = combine(said, engine_flags, stored=stored, weights=weights)
    return complete(known, said, engine_flags, weights=weights, data=data)


def combine(
    said: Layer, engine_flags: type, *, stored: Layer | None, weights: Record | None
) -> Layer:
    """Returns the settings that are known before the data are opened; refuses flags without effect.

    said: flags of the recipe and the command, which override the others
    stored: settings of the run or checkpoint that --resume names, or None
    weights: record of that checkpoint, or of the weights that the run starts from, or None
    """
    flags = training_flags(engine_flags)
    preset = said.get("model", PresetConfig.model)
    with naming_flags(flags):
        if stored is not None:
            base = stored
        elif weights is not None:
            base = settings_of_weights(weights, flags)
            if said.get("latents_path"):  # the latents name the autoencoder that made them
                base.pop("vae_path", None)
        else:
            base = read(DiT_models[preset].keywords, flags)
        known = override(base, said, flags)
        check_effect(said, known, flags)
    if stored is None:  # the sizes of weights were compared with --model
        known["model"] = preset if weights is None else weights.model_name
    return known


def complete(
    known: Layer, said: Layer, engine_flags: type, *, weights: Record | None = None,
    data: DataFacts | None = None,
) -> TrainConfig:  # fmt: skip
    """Builds the config of the known settings and what the data determine, see `combine`.

    data: facts of the opened data, or None
    """
    flags = training_flags(engine_flags)
    with naming_flags(flags):
        channels = known.get("in_channels")
        if weights is None and data and channels not in (None, data.in_channels):
            raise ValueError(
                f"model: got {known['model']}, which is made for {channels} channels, but the "
                f"latents have {data.in_channels}; JiT models take pixels (--vae-path pixels)"
            )
        if data:
            known = known | data_settings(known, said, data)
        known = with_defaults(known, said, weights)
        sections = sections_of(engine_flags).items()
        made = {name: build(kind, known, flags) for name, kind in sections}
        return TrainConfig(preset=known["model"], shapes=data.shapes if data else {}, **made)


def settings_of_weights(weights: Record, flags: Flags) -> Layer:
    """Returns the model, the objective and the autoencoder of weights, except what the data
    determine."""
    before = weights.config
    values = {name: value for name, value in nested(before).items() if name not in DATA_FACTS}
    if before.class_dropout_prob == default_dropout(before.conditions, before.num_classes):
        del values["class_dropout_prob"]
    if weights.objective is not None:
        values["objective"] = {weights.objective: weights.objective_options}
    return read(values | {"vae_path": weights.vae_path or None}, flags)


def with_defaults(known: Layer, said: Layer, weights: Record | None) -> Layer:
    """Adds the settings of a new run whose defaults depend on several others."""
    model = {name: one.default for name, one in options_of(DiTConfig).items()} | known
    objective = OBJECTIVES[known.get("objective", str(StepConfig.objective))]
    words = tuple(dict.fromkeys(model["conditions"] + objective.conditions))
    dropout = default_dropout(words, model["num_classes"])
    before = weights and weights.config
    if before and dropout < default_dropout(before.conditions, before.num_classes):
        # Nothing is left to drop, so the probability of the weights does not apply.
        known = known | {"class_dropout_prob": said.get("class_dropout_prob", dropout)}
    known = {"class_dropout_prob": dropout} | known | {"conditions": words}
    layers = select_layers(model["sparse_layers"] or "all", model["depth"])
    if weights is None and model["num_experts"] and len(layers) < model["depth"]:
        # A dense block is as wide as the experts that a token activates in a sparse block.
        active = model["num_experts_per_tok"] * model["mlp_ratio"] + model["n_shared_experts"]
        known.setdefault("dense_mlp_ratio", active)
    return known


def default_dropout(conditions: Sequence[str], num_classes: int) -> float:
    """Returns the default of class_dropout_prob: 0 if guidance can drop no condition, neither the
    label of several classes nor one with a width, such as vector:768.
    """
    names = [split_condition(word)[0] for word in conditions]
    has_labels = "label" in names and num_classes > 1
    can_drop = has_labels or any(CONDITIONS[name].axes for name in names)
    return DiTConfig.class_dropout_prob if can_drop else 0.0


def data_settings(known: Layer, said: Layer, data: DataFacts) -> Layer:
    """Returns what the opened data determine, such as the width of "vector:768"; checks flags."""
    for name in ("num_classes", "image_size"):
        if (got := known.get(name)) not in (None, has := getattr(data, name)):
            origin = "" if name in said else " from the run"
            if said.get("config") and not origin:
                origin = f" from the command or {' '.join(said['config'])}"
            raise ValueError(f"{name}: got {got}{origin}, expected {has}, as in the data")
    if known.get("flip") and not data.can_flip:
        raise ValueError(
            "flip: got True, expected False: the latents were cached without mirroring"
        )
    words = []
    for word in known.get("conditions", DiTConfig.conditions):
        (name, shape), shapes = split_condition(word), data.shapes
        if shapes and CONDITIONS[name].in_batch and name not in shapes:
            has = ", ".join(sorted(shapes.keys() & CONDITIONS.keys()))
            raise ValueError(f"conditions: got {name}, but the data have only {has}")
        fitted = spell_condition(name, shapes[name]) if shapes and CONDITIONS[name].axes else word
        if shape and word != fitted:
            raise ValueError(f"conditions: got {word}, expected {fitted} as in the data")
        words.append(fitted)
    patch = known["patch_size"]
    if any(side % patch for side in sides(data.input_size)):
        factor = sides(data.image_size)[0] // sides(data.input_size)[0]
        raise ValueError(
            f"image_size: got {data.image_size}, expected a multiple of {factor * patch}, the "
            f"autoencoder's factor {factor} x the model's patches of {patch}"
        )
    found = {name: getattr(data, name) for name in (*DATA_FACTS, "image_size", "vae_path")}
    flip = known.get("flip", DataConfig.flip) and data.can_flip
    return found | {"flip": flip, "conditions": tuple(words)}
