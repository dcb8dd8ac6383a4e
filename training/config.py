"""The config of a run: nested frozen dataclasses, and the one function that builds it.

    said = parse_training(DDPFlags, __doc__)          # recipe and command
    # weights: record of the opened weights; data: properties of the opened data
    config = resolve(said, DDPFlags, weights=record, data=facts)
    config.sections()                                 # the content of config.yaml

A later source of settings overrides an earlier one: defaults; model and objective of the weights of
--finetune, or all stored settings of --resume; recipe (--config); command. The opened data then
determine settings such as num_classes.

What a resumed run may change follows from the class of a field, see `options.settings.change_of`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import yaml

from checkpoints import Record
from conditions import CONDITIONS, split_condition
from diffusion import OBJECTIVES, Objective
from diffusion.objectives import objective_named
from latents.config import ImagesConfig
from models import DiT_models, DiTConfig
from options.parts import Part, Size, make_component, sides
from options.settings import (
    Flags,
    Layer,
    build,
    chosen,
    flags_of,
    flattened,
    merge,
    nested,
    read,
    spelling,
)
from runtime.devices import DTYPES
from runtime.errors import UserError, did_you_mean, reported_as
from runtime.files import open_untrusted, read_yaml
from runtime.flags import flag, naming_flags, parse_flags, read_values
from runtime.plugins import import_plugins, named_plugins
from training.auxiliary import AUXILIARY_LOSSES, AuxiliaryLoss, Shapes
from training.ema import EMA, EMAS
from training.optimizers import OPTIMIZERS, Optimizer
from training.schedule import SCHEDULES, Schedule

RECIPES = Path(__file__).parent.parent / "config" / "recipes"
FIRST_FLAGS = (  # what a newcomer needs
    "data_path", "vae_path", "image_size", "model", "num_experts", "rf", "config",
    "global_batch_size", "train_batch_size", "max_steps", "resume",
)  # fmt: skip
# Fields of the model that the data determine; only the first one is a flag.
DATA_FACTS = ("num_classes", "input_size", "in_channels")
EPOCHS = 1400  # without --epochs and --max-steps
ALTERNATIVES = (  # pairs of flags of which a command gives one
    ("epochs", "max_steps"), ("latents_path", "data_path"), ("val_share", "val_path"),
)  # fmt: skip
SHARDING = ("shard_size", "reshard_after_forward", "expert_parallel", "copies_precision")
PLANNING = ("gpus", "gpu_memory")


@dataclass(frozen=True, kw_only=True)
class PresetConfig:
    change: ClassVar = "state"

    model: str = flag("DiT-S/2", choices=tuple(DiT_models), help="preset: size and patch size",
                      group="model")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Settings of an optimizer step, which decide the result."""

    change: ClassVar = "result"

    objective: Part = flag(Part("gaussian"), table=OBJECTIVES, help="training objective",
                           change="state", group="optimisation")  # fmt: skip
    auxiliary: tuple[Part, ...] = flag(
        (),
        table=AUXILIARY_LOSSES,
        by_component=True,
        help="auxiliary losses, which are added to the loss of the objective",
    )
    optimizer: Part = flag(Part("adamw"), table=OPTIMIZERS, change="state", help="optimizer")
    lr: float = flag(1e-4, ge=0, help="learning rate")
    lr_schedule: Part = flag(
        Part("constant"), table=SCHEDULES,
        help="schedule after the warm-up: constant; cosine or linear, which decay to --lr-floor; "
        "or trapezoid, which is constant and decays over the last --decay-share of the steps",
    )  # fmt: skip
    warmup_steps: int = flag(
        0, ge=0, help="steps over which the learning rate rises linearly to --lr"
    )
    grad_clip: float = flag(0.0, ge=0, help="largest gradient norm; 0 for no clipping")
    grad_skip: float = flag(
        0.0, ge=0, metavar="FACTOR",
        help="skip a step whose gradient norm exceeds FACTOR times the mean of about the last 100 "
        "steps; 0 for never",
    )  # fmt: skip
    ema: tuple[Part, ...] = flag(
        (Part("exponential"),), table=EMAS,
        help="moving averages of the weights; samples use the first one",
    )  # fmt: skip
    accum_iter: int = flag(1, ge=1, change="how", help="micro-batches per optimizer step")
    precision: str = flag(
        "bf16",
        choices=tuple(DTYPES),
        help="precision of matrix products; master weights are fp32, and fp16 uses loss scaling",
    )
    tf32: bool = flag(
        False,
        help="compute fp32 matrix products on a GPU in TF32, faster but with 10 mantissa bits",
    )
    compile: bool = flag(False, change="how", help="compile each block with torch.compile")
    gradient_checkpointing: bool = flag(
        False, change="how",
        help="recompute each block in the backward pass instead of storing its activations",
    )  # fmt: skip
    selective_checkpointing: bool = flag(
        False, change="how",
        help="as --gradient-checkpointing, but store the outputs of attention and of experts",
    )  # fmt: skip
    freeze: tuple[str, ...] = flag(
        (), metavar="PATTERN", change="state",
        help="parameters or modules to freeze, such as 'blocks.*.attn.*' x_embedder",
    )  # fmt: skip
    train_router_only: bool = flag(False, change="state", help="train only the routers")

    @property
    def recomputed(self) -> str:
        """What the backward pass computes again: "nothing", "selective" or "all"."""
        selective = "selective" if self.selective_checkpointing else "nothing"
        return "all" if self.gradient_checkpointing and selective == "nothing" else selective

    @property
    def freezes(self) -> bool:
        return bool(self.freeze) or self.train_router_only


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """Training images or latents, and held-out images."""

    latents_path: str | None = flag(
        None,
        help="folder of cached latents from cache_latents.py, in place of --data-path, with their "
        "--image-size; the autoencoder is then used only for sample grids and images of --val-path",
    )
    latents_norm: str = flag(
        "autoencoder", choices=("autoencoder", "data"), change="result",
        help="normalisation of latents: autoencoder, as the autoencoder defines it; or data, mean "
        "0 and standard deviation 1 per channel over the cache of --latents-path",
    )  # fmt: skip
    val_path: str | None = flag(
        None,
        help="held-out images, or latents from cache_latents.py, on which the loss of the EMAs is "
        "logged, with fixed times and noise",
        group="held-out loss",
    )
    val_share: float = flag(
        0.0, ge=0, lt=1, metavar="FRACTION", change="result",
        help="in place of --val-path: fraction of the training images to hold out, the same ones "
        "in all runs on these images",
    )  # fmt: skip
    val_images: int = flag(1000, ge=1, help="number of held-out images to use")
    val_times: str = flag(
        "uniform", choices=("uniform", "training"),
        help="distribution of the fixed times: uniform, which makes runs comparable, or training, "
        "as in training",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Location, start, length and output of a run: how and where it trains."""

    change: ClassVar = "how"

    config: str | None = flag(
        None, metavar="RECIPE", group="run", change="command",
        help="YAML file of flags, such as config/recipes/stable.yaml or a run's config.yaml; the "
        "other flags of the command override the file",
    )  # fmt: skip
    plugin: tuple[str, ...] = flag(
        (), metavar="FILE.py", change="command",
        help="Python files to import, which define components of your own, such as a router; a "
        "recipe cannot name them",
    )  # fmt: skip
    results_dir: str = flag("results", help="folder of the run folders")
    run_name: str | None = flag(
        None,
        help="name of the run folder (default: model, objective and a digest of settings and data)",
    )
    rf: bool | None = flag(
        None, change="command",
        help="train a rectified flow: published spelling of --objective rectified_flow",
    )  # fmt: skip
    pretraining_tp: int = flag(
        1, change="command", help="has no effect; published commands pass it"
    )
    resume: str | None = flag(
        None, metavar="RUN",
        help="run folder to resume with its stored settings; other flags change settings. With "
        "RUN/checkpoints/STEP and --run-name NEW: start a branch, a new run from that checkpoint",
    )  # fmt: skip
    finetune: str | None = flag(
        None, metavar="WEIGHTS",
        help="path or hub id of weights to start from: ours, published ones, or a DiT in "
        "diffusers' format. They determine the model, but classes, conditions, objective and "
        "image size may change",
    )  # fmt: skip
    epochs: int | None = flag(
        None, ge=1, help=f"passes over the images (default: {EPOCHS}, without --max-steps)"
    )
    max_steps: int | None = flag(
        None, ge=1, le=10**12, help="number of optimizer steps, in place of --epochs"
    )
    global_seed: int = flag(0, ge=0, change="result", help="seed of the random numbers in training")
    deterministic: bool = flag(
        False,
        help="make runs on the same number and kind of GPUs bit-identical, by slower algorithms "
        "(on a CPU, they always are)",
    )
    dry_run: bool = flag(
        False, change="command", help="print model, parameters, memory and steps, and stop"
    )
    gpus: int | None = flag(
        None,
        ge=1,
        change="command",
        help="with --dry-run: number of GPUs to plan for (default: as launched)",
    )
    gpus_per_node: int | None = flag(
        None,
        ge=1,
        help="GPUs per node, for sharding (default: the launcher's value, or the number of "
        "processes, at most 8)",
    )
    gpu_memory: float | None = flag(
        None,
        gt=0,
        change="command",
        help="with --dry-run: GiB of memory per GPU (default: this machine's GPU, or 80)",
    )
    log_every: int | None = flag(
        None, ge=1,
        help="steps between log lines (default: the largest round number of steps that take at "
        "most ten seconds)",
        group="logs, checkpoints and samples",
    )  # fmt: skip
    profile: int | None = flag(
        None, ge=1, metavar="STEPS",
        help="write a torch.profiler trace of STEPS steps, after the first three, to profile/ in "
        "the run folder, for Perfetto or chrome://tracing",
    )  # fmt: skip
    val_every: int = flag(1000, ge=1, help="steps between held-out losses")
    ckpt_every: int = flag(
        50_000, ge=1,
        help="steps between checkpoints that are kept; the last step is always saved",
    )  # fmt: skip
    keep_last: int | None = flag(
        None, ge=1, metavar="N",
        help="keep only the N newest checkpoints of --ckpt-every (default: all)",
    )  # fmt: skip
    save_minutes: float = flag(
        15.0, ge=0,
        help="minutes between rolling checkpoints, each with a sample grid, of which only the "
        "newest is kept; a crash loses at most about this much training; 0 for none",
    )  # fmt: skip
    num_sample: int = flag(16, ge=0, help="largest number of images in a sample grid; 0 for none")
    sample_every: int = flag(10_000, ge=1, help="steps between sample grids")
    sample_cfg_scale: float = flag(
        4.0, ge=0,
        help="guidance scale of the sample grids; always 1 if the objective trains with guidance, "
        "or if --class-dropout-prob is 0",
    )  # fmt: skip
    wandb: str | None = flag(
        None, metavar="PROJECT", help="also log to this project of Weights & Biases"
    )


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Properties of the opened data and autoencoder."""

    num_classes: int
    input_size: Size  # latent height and width
    in_channels: int
    image_size: Size
    vae_path: str
    can_flip: bool = True
    shapes: Shapes | None = None  # shapes of one image's tensors, by name
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

    @cached_property
    def objective(self) -> Objective:
        chosen = self.step.objective
        return make_component(OBJECTIVES, "objective", chosen.name, chosen.options)

    @cached_property
    def optimizer(self) -> Optimizer:
        chosen = self.step.optimizer
        return make_component(OPTIMIZERS, "optimizer", chosen.name, chosen.options)

    @cached_property
    def schedule(self) -> Schedule:
        chosen = self.step.lr_schedule
        return make_component(SCHEDULES, "lr_schedule", chosen.name, chosen.options)

    @cached_property
    def emas(self) -> list[EMA]:
        return [make_component(EMAS, "ema", one.name, one.options) for one in self.step.ema]

    @cached_property
    def auxiliary(self) -> tuple[AuxiliaryLoss, ...]:
        return tuple(
            make_component(AUXILIARY_LOSSES, f"auxiliary_{one.name}", one.name, one.options)
            for one in self.step.auxiliary
        )

    @property
    def name(self) -> str:
        """Name of the model with its experts, such as DiT-S/2-8E2A or DiT-S/2-dense."""
        experts = f"{self.model.num_experts}E{self.model.num_experts_per_tok}A"
        return f"{self.preset}-{experts if self.model.num_experts else 'dense'}"

    @property
    def parts(self) -> dict[str, Any]:
        """The config of each section of a file. Their names differ from the fields that name
        components, because a mapping under such a field is a component."""
        return {"model": self.model, "data": self.data, "step": self.step, "engine": self.engine,
                "run": self.run}  # fmt: skip

    def sections(self) -> dict[str, dict[str, Any]]:
        """Returns the settings as config.yaml has them, see `options.settings.nested`."""
        found = {name: nested(part) for name, part in self.parts.items()}
        if self.preset in DiT_models:  # weights may have any size
            found["model"] = {"model": self.preset, **found["model"]}
        return found

    def total_steps(self, num_images: int, global_batch: int) -> int:
        epochs = self.run.epochs or EPOCHS
        return self.run.max_steps or max(1, epochs * num_images // global_batch)


def training_flags(engine_flags: type) -> Flags:
    kinds = (PresetConfig, DiTConfig, DataConfig, StepConfig, engine_flags, RunConfig)
    return flags_of(kinds)


def help_flags(engine_flags: type) -> Flags:
    """Returns the flags of a command.

    The help text of a flag that the preset sets, such as --depth, shows the value in the default
    preset.
    """
    flags, preset = dict(training_flags(engine_flags)), PresetConfig.model
    for name, size in DiT_models[preset].keywords.items():
        one = flags[name].field
        text = one.help.partition(" (default")[0]
        help = f"{text} (default: the preset's, {size} for {preset})"
        flags[name] = replace(flags[name], field=replace(one, help=help))
    return {name: flag for name, flag in flags.items() if name not in DATA_FACTS[1:]}


def parse_training(
    engine_flags: type,
    description: str | None = None,
    arguments: Sequence[str] | Mapping[str, Any] | None = None,
) -> Layer:
    """Reads the flags of a training script; they override the recipe that --config names.

    If the recipe is the config.yaml of a run, the following are ignored: the facts after the line
    ---, the run's name, its start weights, and the fields that its data determined (DATA_FACTS).

    arguments: the words of a command, by default sys.argv, or values by name
    """
    is_mapping = isinstance(arguments, Mapping)
    plugins = arguments.get("plugin", ()) if is_mapping else named_plugins(arguments)
    import_plugins([plugins] if isinstance(plugins, str | os.PathLike) else plugins)
    flags = help_flags(engine_flags)
    if is_mapping:
        command = read_values(arguments, flags)
    else:
        command = parse_flags(flags, description, arguments, FIRST_FLAGS)
    recipe: Layer = {}
    if path := command.get("config"):
        with reported_as(f"--config {path}", OSError, ValueError, UserError):
            if not Path(path).exists():
                recipes = {one.stem: os.path.relpath(one) for one in RECIPES.glob("*.yaml")}
                raise ValueError(f"no such file{did_you_mean(Path(path).stem, recipes)}")
            with open_untrusted(path) as file:
                values, is_of_run = parse_yaml(file)
            values = flattened(values, flags)
            for name in ("config", "plugin"):
                if name in values:
                    raise ValueError(f"got the key {name}, which only a command can have")
            ignored = ("run_name", "resume", "finetune", *DATA_FACTS) if is_of_run else ()
            recipe = read_values({k: v for k, v in values.items() if k not in ignored}, flags)
            with naming_flags(flags):
                check_alternatives(recipe)
    with naming_flags(flags):
        for layer in (command, recipe):
            if (rf := layer.pop("rf", None)) is not None:
                named = layer.get("objective")
                name = objective_named(named and named.name, rf)
                layer["objective"] = named or Part(name)
        check_alternatives(command)
        return override(recipe, command, flags)


def parse_yaml(file: BinaryIO) -> tuple[dict[str, Any], bool]:
    """Reads a recipe or a config.yaml.

    Returns the values, as text, and whether the file is the config.yaml of a run: such a file has a
    second YAML document, the facts.
    """
    expected = "a YAML file in UTF-8, such as a recipe or the config.yaml of a run"
    try:
        found, *facts = read_yaml(file) or [{}]  # words, as in a command
    except yaml.YAMLError as error:
        raise ValueError(f"expected {expected}: {error}") from None
    found = found or {}
    if not isinstance(found, dict):
        raise ValueError(f"got a {type(found).__name__}, expected {expected}")
    return found, bool(facts)


def override(base: Layer, top: Layer, flags: Flags) -> Layer:
    """Merges two layers; `top` also drops what it makes useless in `base`."""
    gone = {b for pair in ALTERNATIVES for a, b in (pair, pair[::-1]) if a in top}
    if top.get("shard") is False:
        gone |= {*SHARDING}
    if top.get("num_experts") == 0:  # a dense model has no router
        gone |= {"router"}
    kept = {name: value for name, value in base.items() if flags[name].field.name not in gone}
    return merge(kept, top, flags)


def check_alternatives(said: Layer) -> None:
    """Refuses two flags of `ALTERNATIVES`."""
    for one, other in ALTERNATIVES:
        if said.get(one) and said.get(other):
            raise ValueError(f"{one}: cannot be combined with {spelling(other)}")


def check_effect(said: Layer, known: Layer, flags: Flags) -> None:
    """Refuses flags without effect; `options.settings.build` does so for options of components.

    said: the recipe and the command
    known: with the other settings of the run
    """
    for name, value in said.items():
        is_default = value == flags[name].field.default
        if name in PLANNING and not is_default and not known.get("dry_run"):
            raise ValueError(f"{name}: has no effect without --dry-run True")
        if name in SHARDING and not is_default and not known.get("shard"):
            raise ValueError(f"{name}: has no effect without --shard True")
        if flags[name].field.name == "router" and known.get("num_experts") == 0:
            raise ValueError(f"{name}: given with a dense model, expected a model with experts")


def resolve(
    said: Mapping[str, Any],
    engine_flags: type,
    *,
    stored: Layer | None = None,
    weights: Record | None = None,
    data: DataFacts | None = None,
) -> TrainConfig:
    """Builds the config from the flags of recipe and command, and what they override.

    said: flags of the recipe and the command
    stored: settings of the run or checkpoint that --resume names, or None
    weights: record of that checkpoint, or of the weights that the run starts from, or None
    data: facts of the opened data, or None
    """
    flags = training_flags(engine_flags)
    said = read_values(said, flags)
    with naming_flags(flags):
        preset = said.get("model", PresetConfig.model)
        if stored is not None:
            base = stored
            preset = said.get("model", weights.model_name)
        elif weights is not None:
            base, preset = settings_of_weights(weights, flags), weights.model_name
        else:
            base = read(DiT_models[preset].keywords, flags)
        known = override(base, said, flags)
        check_effect(said, known, flags)
        channels = known.get("in_channels")
        if stored is None and data and channels not in (None, data.in_channels):
            raise ValueError(
                f"model: got {preset}, which is made for {channels} channels, but the latents have "
                f"{data.in_channels}; JiT models take pixels (--vae-path pixels)"
            )
        known |= data_settings(known, data) if data else {}
        if stored is None:
            known = derived(known, weights, said, flags)
        config = configure(known, engine_flags, preset, data and data.shapes or {})
        check_components(config, data)
        return config


def settings_of_weights(weights: Record, flags: Flags) -> Layer:
    """Returns the model and the objective of weights, except what the data determine."""
    before = weights.config
    values = {name: value for name, value in nested(before).items() if name not in DATA_FACTS}
    if before.class_dropout_prob == default_dropout(before.conditions, before.num_classes):
        del values["class_dropout_prob"]
    if weights.objective is not None:
        values["objective"] = {weights.objective: weights.objective_options}
    return read(values, flags)


def derived(known: Layer, weights: Record | None, said: Layer, flags: Flags) -> Layer:
    """Adds the settings of a new run whose defaults depend on several others."""
    ((objective,), _) = chosen("objective", known, flags)
    words = known.get("conditions", DiTConfig.conditions) + OBJECTIVES[objective.name].conditions
    words = tuple(dict.fromkeys(words))
    dropout = default_dropout(words, known.get("num_classes", DiTConfig.num_classes))
    before = weights and weights.config
    if before and dropout < default_dropout(before.conditions, before.num_classes):
        # Nothing is left to drop, so the probability of the weights does not apply.
        known["class_dropout_prob"] = said.get("class_dropout_prob", dropout)
    known = {"class_dropout_prob": dropout} | known | {"conditions": words}
    model = build(DiTConfig, without_router(known, flags), flags)
    if weights is None and 0 < len(model.sparse_layers) < model.depth:
        # A dense block is as wide as the experts that a token activates in a sparse block.
        active = model.num_experts_per_tok * model.mlp_ratio + model.n_shared_experts
        known.setdefault("dense_mlp_ratio", active)
    return known


def without_router(known: Layer, flags: Flags) -> Layer:
    """Returns the settings of a dense model without those of a router."""
    if known.get("num_experts") != 0:
        return known
    return {name: value for name, value in known.items() if flags[name].field.name != "router"}


def configure(known: Layer, engine_flags: type, preset: str, shapes: Shapes) -> TrainConfig:
    """Builds the config of complete settings."""
    flags = training_flags(engine_flags)
    known = without_router(known, flags)
    kinds = {"model": DiTConfig, "step": StepConfig, "data": DataConfig, "run": RunConfig,
             "engine": engine_flags}  # fmt: skip
    sections = {name: build(kind, known, flags) for name, kind in kinds.items()}
    return TrainConfig(preset=preset, shapes=shapes, **sections)


def check_components(config: TrainConfig, data: DataFacts | None) -> None:
    """Checks that components fit each other, the model and the data."""
    if config.objective.guides_in_training and not config.model.class_dropout_prob:
        raise ValueError(
            "class_dropout_prob: got 0, expected a value above 0, because guidance in training "
            "needs images without a class"
        )
    for one in config.auxiliary:
        if expected := one.check(config.objective, data and data.shapes):
            raise ValueError(f"auxiliary: got {one.name}, which needs {expected}")
    names = [ema.name for ema in config.emas]
    if len(set(names)) < len(names):
        raise ValueError(f"ema: got {', '.join(names)}, expected different averages")


def default_dropout(conditions: Sequence[str], num_classes: int) -> float:
    """Returns the default of class_dropout_prob: 0 if guidance can drop no condition, neither the
    label of several classes nor one with a width, such as vector:768.
    """
    names = [split_condition(word)[0] for word in conditions]
    has_labels = "label" in names and num_classes > 1
    can_drop = has_labels or any(CONDITIONS[name].has_width for name in names)
    return DiTConfig.class_dropout_prob if can_drop else 0.0


def data_settings(known: Layer, data: DataFacts) -> Layer:
    """Returns what the opened data determine, such as the width of "vector:768"; checks flags."""
    for name in ("num_classes", "image_size"):
        if (got := known.get(name)) not in (None, has := getattr(data, name)):
            raise ValueError(f"{name}: got {got}, expected {has}, as in the data")
    if known.get("flip") and not data.can_flip:
        raise ValueError(
            "flip: got True, expected False: the latents were cached without mirroring"
        )
    words = []
    for word in known.get("conditions", DiTConfig.conditions):
        (name, width), shapes = split_condition(word), data.shapes
        if shapes and CONDITIONS[name].in_batch and name not in shapes:
            has = ", ".join(sorted(shapes.keys() & CONDITIONS.keys()))
            raise ValueError(f"conditions: got {name}, but the data have only {has}")
        fitted = f"{name}:{shapes[name][-1]}" if shapes and CONDITIONS[name].has_width else word
        if width is not None and word != fitted:
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
