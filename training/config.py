"""The config of a run: nested frozen dataclasses, which are always whole.

    command, said = parse_training("train.py", __doc__)      # recipes and command
    base = TrainConfig.default()                             # or of_record, or of_weights
    config = base.fitted(said, dataset)                      # with what follows from the data
    config.sections()                                        # the content of config.yaml

Settings are dicts by field name. A recipe changes the base, the command changes both.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from checkpoints import Record
from checkpoints.record import with_dense_width
from conditions import CONDITIONS, spell_condition, split_condition
from diffusion import OBJECTIVES, Objective
from diffusion.objectives import objective_named
from latents.autoencoder import DEFAULT_VAE
from latents.sources import Source
from models import DiTConfig
from options.parts import Word, options_of, sides
from options.settings import Flags, Settings, changed, flags_of, over, read, spelling, stored
from presets import PRESETS
from runtime.errors import UserError, did_you_mean, reported_as
from runtime.files import read_yaml
from runtime.flags import Parser, naming_flags, parse_flags, read_values, refuse_idle
from runtime.plugins import import_plugins
from training.auxiliary import AUXILIARY_LOSSES, AuxiliaryLoss, Shapes
from training.ema import EMA, EMAS
from training.lr_schedule import SCHEDULES, Schedule
from training.optimizers import OPTIMIZERS, Optimizer
from training.sections import (
    DEEPSPEED,
    EPOCHS,
    TRAIN,
    ZERO2,
    CommandFlags,
    DataConfig,
    EngineConfig,
    RunConfig,
    Shorthands,
    StepConfig,
)

SECTIONS = {  # of a config.yaml
    "model": DiTConfig, "data": DataConfig, "step": StepConfig, "engine": EngineConfig,
    "run": RunConfig,
}  # fmt: skip
RECIPES = Path(__file__).parent.parent / "config" / "recipes"
FIRST_FLAGS = (  # what a newcomer needs
    "config", "data_path", "vae_path", "image_size", "model", "num_experts", "router", "rf",
    "global_batch_size", "train_batch_size", "lr", "epochs", "max_steps", "run_name", "resume",
)  # fmt: skip
OF_DATA = ("num_classes", "input_size", "in_channels")  # fields of the model that the data set
TYPED = ("objective", "image_size", "vae_path")  # settings that are fields of a Record
NEEDS = {  # settings without effect unless another one is set
    "num_experts": (
        "router", "aux_loss_alpha", "num_experts_per_tok", "sparse_layers", "n_shared_experts",
    ),
    "shard": ("shard_size", "reshard_after_forward", "expert_parallel"),
}  # fmt: skip
ALTERNATIVES = (  # pairs of flags of which a command gives one
    ("epochs", "max_steps"), ("latents_path", "data_path"), ("val_share", "val_path"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run."""

    preset: str  # such as DiT-S/2
    model: DiTConfig
    data: DataConfig
    step: StepConfig
    engine: EngineConfig
    run: RunConfig
    # Shapes of one image's tensors, by name; empty without data
    shapes: Shapes = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if self.objective.guides_in_training and not self.model.dropout:
            raise ValueError(
                "class_dropout_prob: got 0, expected a value above 0, because guidance in training "
                "needs images without a class"
            )
        for one in self.auxiliary:
            if expected := one.check(self.objective, self.shapes):
                raise ValueError(f"auxiliary: got {one.name}, which needs {expected}")
            if one.reads_ema and not self.ema:
                raise ValueError(f"auxiliary: got {one.name} with --ema none, expected an EMA")
        names = [ema.name for ema in self.ema]
        if len(set(names)) < len(names):
            raise ValueError(f"ema: got {', '.join(names)}, expected different averages")

    @cached_property
    def objective(self) -> Objective:
        return self.step.objective.make(OBJECTIVES)

    @cached_property
    def auxiliary(self) -> list[AuxiliaryLoss]:
        return [word.make(AUXILIARY_LOSSES) for word in self.step.auxiliary]

    @cached_property
    def optimizer(self) -> Optimizer:
        return self.step.optimizer.make(OPTIMIZERS)

    @cached_property
    def lr_schedule(self) -> Schedule:
        return self.step.lr_schedule.make(SCHEDULES)

    @cached_property
    def ema(self) -> list[EMA]:
        return [word.make(EMAS) for word in self.step.ema]

    @classmethod
    def default(cls, script: str = TRAIN) -> "TrainConfig":
        config = cls(preset=Shorthands().model, **{name: kind() for name, kind in SECTIONS.items()})
        engine = {"deepspeed_config": ZERO2} if script == DEEPSPEED else {}
        return config.changed({**sizes_of(config.preset), **engine})

    @classmethod
    def of_record(cls, record: Record, script: str = TRAIN) -> "TrainConfig":
        """Returns the settings of a checkpoint; those that this version lacks are left out."""
        typed = {name: v for name in TYPED if (v := getattr(record, name)) is not None}
        known = record.settings | typed
        base = replace(cls.default(script), preset=record.model_name, model=record.config)
        return base.changed({name: known[name] for name in known.keys() & setting_names()})

    @classmethod
    def of_weights(cls, record: Record, script: str = TRAIN) -> "TrainConfig":
        """Returns the model, objective and autoencoder of weights, and otherwise the defaults."""
        # A probability that follows from the classes of the weights follows from those of the data.
        model = replace(record.config, class_dropout_prob=None)
        model = with_dense_width(model if model.dropout == record.config.dropout else record.config)
        return cls.of_record(replace(record, config=model, settings={}, image_size=None), script)

    def record(self, **others: Any) -> Record:
        """Returns a record of these settings, for `of_record`, with other fields."""
        of_model = options_of(DiTConfig).keys() - {"expert_backend"}
        settings = {name: v for name, v in self.stored().items() if name not in of_model}
        typed = {name: settings.pop(name, None) for name in TYPED}
        return Record(config=self.model, model=self.preset, settings=settings, **typed | others)

    def fitted(self, said: Settings, dataset: Source) -> "TrainConfig":
        """Returns the config of a run: changed by what is said, and by what follows from the data
        and the objective.

        Raises ValueError if they contradict each other, or if a setting has no effect.
        """
        values = self.with_sizes(said)
        kept = None if said.get("latents_path") else self.data.vae_path
        vae_path = said.get("vae_path") or kept or dataset.vae_path or DEFAULT_VAE
        input_size, channels = dataset.geometry(vae_path)
        found = {
            "num_classes": len(dataset.classes), "input_size": input_size, "in_channels": channels,
            "image_size": dataset.image_size, "vae_path": vae_path,
        } | ({} if dataset.can_flip else {"flip": False})  # fmt: skip
        check_data(found, {"patch_size": self.model.patch_size, **values})
        found["conditions"] = fitted_conditions(self, values, dataset.shapes)
        config = self.changed(values | found, shapes=dataset.shapes)
        refuse_idle_settings(config, said)
        return config

    def changed(self, values: Mapping[str, Any], **fields: Any) -> "TrainConfig":
        """Returns the config with these values by name; another preset sets its sizes.

        Raises ValueError for an unknown name or a wrong value.
        """
        if unknown := values.keys() - setting_names():
            raise ValueError(f"{min(unknown):.80}: unknown, expected a setting of training")
        values, sections = self.with_sizes(values), {}
        for name, section in self.by_section.items():
            own = {key: values[key] for key in options_of(type(section)) if key in values}
            sections[name] = changed(section, own)
        return replace(self, preset=values.get("model", self.preset), **sections, **fields)

    def with_sizes(self, values: Mapping[str, Any]) -> Settings:
        """Adds the sizes of the preset that the values name, if it is another one."""
        preset = values.get("model", self.preset)
        return {**values} if preset == self.preset else over(values, sizes_of(preset))

    @property
    def name(self) -> str:
        """Name of the model with its experts, such as DiT-S/2-8E2A or DiT-S/2-dense."""
        experts = f"{self.model.num_experts}E{self.model.num_experts_per_tok}A"
        return f"{self.preset}-{experts if self.model.num_experts else 'dense'}"

    @property
    def by_section(self) -> dict[str, Any]:
        """The config of each section of a file."""
        return {name: getattr(self, name) for name in SECTIONS}

    def stored(self) -> Settings:
        """Returns all settings by name, as a file has them; None only over a preset's value."""
        sizes = PRESETS.get(self.preset, {})  # weights may have any size
        unset = {name: "None" for name in sizes if getattr(self.model, name) is None}
        return {k: v for one in self.by_section.values() for k, v in stored(one).items()} | unset

    def sections(self) -> dict[str, Settings]:
        """Returns the settings as a file has them, without those that have no effect."""
        now = self.stored()
        idle = {name for needed, names in NEEDS.items() if not now[needed] for name in names}
        found = {
            name: {key: now[key] for key in options_of(kind) if key in now and key not in idle}
            for name, kind in SECTIONS.items()
        }
        if self.preset in PRESETS:
            found["model"] = {"model": self.preset, **found["model"]}
        return found

    def total_steps(self, num_images: int, global_batch: int) -> int:
        epochs = self.run.epochs or EPOCHS
        return self.run.max_steps or max(1, epochs * num_images // global_batch)


def setting_names() -> set[str]:
    """Returns the names of all settings."""
    return {"model"}.union(*map(options_of, SECTIONS.values()))


def training_flags() -> Flags:
    """Returns the flags of the training scripts."""
    flags = flags_of(Shorthands, *SECTIONS.values(), CommandFlags)
    return {name: flag for name, flag in flags.items() if name not in OF_DATA[1:]}


def parse_training(
    script: str, description: str | None = None,
    arguments: Sequence[str] | Mapping[str, Any] | None = None,
) -> tuple[CommandFlags, Settings]:  # fmt: skip
    """Reads the command of a training script; its flags override the files of --config.

        --config wide.yaml --model DiT-S/2 --depth 6     sizes of DiT-S/2 with 6 blocks, and what
                                                         else wide.yaml says

    arguments: the words of a command, by default sys.argv, or values by name
    """
    is_mapping = isinstance(arguments, Mapping)
    if is_mapping:
        early = read_values({"plugin": arguments.get("plugin")}, flags_of(CommandFlags))
        plugins = early.get("plugin", ())
    else:  # a component can be named only after it was imported
        early = Parser(add_help=False, allow_abbrev=False)
        early.add_argument("--plugin", nargs="+", action="extend", default=[])
        plugins = early.parse_known_args(arguments)[0].plugin
    import_plugins(plugins)
    flags = training_flags()
    if is_mapping:
        given = read_values(arguments, flags)
    else:
        hidden = [name for name, flag in flags.items() if flag.script not in (None, script)]
        given = parse_flags(flags, description, arguments, FIRST_FLAGS, hidden)
    of_command = options_of(CommandFlags)
    with naming_flags(flags):
        of_this = {name: value for name, value in given.items() if name in of_command}
        command = CommandFlags(script=script, **of_this)
        layers = [read_recipe(Path(path)) for path in command.config]
        layers.append(resolved({n: v for n, v in given.items() if n not in of_command}, flags))
        said: Settings = {}
        for layer in layers:
            said = over(layer, kept_beneath(layer, said))
        if not command.dry_run:
            refuse_idle(command, ("gpus", "gpu_memory"), "without --dry-run")
        for name, flag in flags.items():  # a recipe may say the other script's defaults
            is_said = name in given or said.get(name, flag.default) != flag.default
            if flag.script not in (None, script) and is_said:
                raise ValueError(f"{name}: is a flag of {flag.script}, not of {script}")
    return command, said


def sizes_of(preset: str) -> Settings:
    return read(PRESETS[preset], flags_of(DiTConfig))


def kept_beneath(layer: Settings, said: Settings) -> Settings:
    """Drops what a recipe or command replaces without saying it."""
    replaced: set[str] = set()
    if "model" in layer:  # replaces its sizes, and what the preset beneath has set
        old = sizes_of(said["model"]) if "model" in said else {}
        unchanged = over(old, said)
        replaced |= sizes_of(layer["model"]).keys()
        replaced |= {name for name in old if said.get(name) == unchanged[name]}
    for needed, names in NEEDS.items():
        if not layer.get(needed, True):
            replaced |= {*names}
    return {name: value for name, value in said.items() if name not in replaced}


def read_recipe(path: Path) -> Settings:
    """Reads a recipe, or the config.yaml of a run."""
    flags = training_flags()
    with reported_as(f"--config {path}", OSError, ValueError, UserError):
        if not path.exists():
            recipes = {one.stem: os.path.relpath(one) for one in RECIPES.glob("*.yaml")}
            raise ValueError(f"no such file{did_you_mean(path.stem, recipes)}")
        expected = "a YAML file in UTF-8, such as a recipe or the config.yaml of a run"
        try:
            values, *_ = read_yaml(path) or [{}]  # words, as in a command; then other inputs
        except yaml.YAMLError as error:
            raise ValueError(f"expected {expected}: {error}") from None
        if not isinstance(values := values or {}, dict):
            raise ValueError(f"got a {type(values).__name__}, expected {expected}")
        recipe = read_values(values, flags)
        for name in recipe.keys() & options_of(CommandFlags).keys():
            raise ValueError(f"got the key {name}, which only a command can have")
        return resolved(recipe, flags)


def resolved(layer: Settings, flags: Flags) -> Settings:
    """Replaces rf by the objective that it names, and ends the alternatives of what is said.

    Raises ValueError if a command or recipe says the same thing in two ways.
    """
    layer = dict(layer)
    if (rf := layer.pop("rf", None)) is not None:
        named = layer.get("objective")
        word = objective_named(named and named.name, rf)
        layer["objective"] = named or Word.parse(word, OBJECTIVES)
    for pair in ALTERNATIVES:
        for one, other in (pair, pair[::-1]):
            if layer.get(one) and layer.get(other):
                raise ValueError(f"{one}: cannot be combined with {spelling(other)}")
            if layer.get(one):
                layer[other] = flags[other].default
    return layer


def check_data(found: Settings, said: Settings) -> None:
    """Raises ValueError if settings contradict those found in the data."""
    channels, size = found["in_channels"], found["image_size"]
    if said.get("in_channels", channels) != channels:
        raise ValueError(
            f"model: got {said.get('model')}, made for {said['in_channels']} channels, but "
            f"the latents have {channels}; JiT models take pixels (--vae-path pixels)"
        )
    for name in ("num_classes", "image_size"):
        if said.get(name) not in (None, found[name]):
            raise ValueError(f"{name}: got {said[name]}, expected {found[name]}, as in the data")
    if said.get("flip") and not found.get("flip", True):
        raise ValueError("flip: got True, but the latents were cached without mirrored images")
    side, patch = sides(found["input_size"])[0], said["patch_size"]
    if any(length % patch for length in sides(found["input_size"])):
        factor, why = sides(size)[0] // side, f"the model's patches of {patch}"
        if factor > 1:
            why = f"the autoencoder's factor {factor} x {why}"
        expected = f"a multiple of {factor * patch}, {why}"
        raise ValueError(f"image_size: got {size}, expected {expected}")


def fitted_conditions(base: TrainConfig, said: Settings, shapes: Shapes) -> tuple[str, ...]:
    """Returns the conditions with the widths of the data, and with those of the objective."""
    objective = OBJECTIVES[said.get("objective", base.step.objective).name]
    words = []
    for word in said.get("conditions", base.model.conditions):
        (name, shape) = split_condition(word)
        if shapes and CONDITIONS[name].in_batch and name not in shapes:
            has = ", ".join(sorted(shapes.keys() & CONDITIONS.keys()))
            raise ValueError(f"conditions: got {name}, but the data have only {has}")
        fitted = spell_condition(name, shapes[name]) if shapes and CONDITIONS[name].axes else word
        if shape and word != fitted:
            raise ValueError(f"conditions: got {word}, expected {fitted} as in the data")
        words += [fitted] if CONDITIONS[name].in_batch or word in objective.conditions else []
    return (*words, *(word for word in objective.conditions if word not in words))


def refuse_idle_settings(config: TrainConfig, said: Settings) -> None:
    """Refuses settings without effect that users meet."""
    now, default = config.stored(), TrainConfig.default().stored()
    for needed, names in NEEDS.items():
        flag = spelling(needed)
        why = f"with {flag} 0" if needed == "num_experts" else f"without {flag}"
        for name in names:
            if not now[needed] and name in said and now.get(name) != default.get(name):
                raise ValueError(f"{name}: has no effect {why}")
