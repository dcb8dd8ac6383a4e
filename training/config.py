"""The config of a run: nested frozen dataclasses, and the one function that builds it.

    user_flags = parse_training(DDPFlags, __doc__)    # recipe and command
    # record: metadata of the opened weights; facts: properties of the opened data
    config = resolve(user_flags, DDPFlags, weights=record, data=facts)
    config.sections()                                 # the content of config.yaml

Settings come from four sources: the defaults, the weights that a run starts from, the recipe file
(--config) and the command. With --resume RUN, the stored settings of the run take the place of the
first two. Each source overrides the sources before it. The opened data then determine settings
such as num_classes. `DiTConfig` declares the fields of the model.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from checkpoints import Record
from checkpoints.record import settings_of
from conditions import CONDITIONS, split_condition
from diffusion import OBJECTIVES, Objective
from diffusion.objectives import objective_named
from latents.config import ImagesConfig
from models import DiT_models, DiTConfig
from parts import Option, Size, make_component, options_of, sides
from runtime.devices import DTYPES
from runtime.errors import UserError, did_you_mean, reported_as
from runtime.files import open_untrusted, read_yaml
from runtime.flags import (
    Flags,
    FlagValues,
    flag,
    flags_of,
    free,
    layered,
    naming_flags,
    of_command,
    parse_flags,
    read_values,
    spelling,
    with_effect,
)
from runtime.plugins import import_plugins, named_plugins
from training.auxiliary import AUXILIARY_LOSSES, AuxiliaryLoss, Shapes
from training.ema import EMA, EMAS, make_emas
from training.optimizers import OPTIMIZERS, Optimizer

RECIPES = Path(__file__).parent.parent / "config" / "recipes"
# Fields of the model that the data determine; only the first one is a flag.
DATA_FACTS = ("num_classes", "input_size", "in_channels")


@dataclass(frozen=True, kw_only=True)
class PresetConfig:
    model: str = flag("DiT-S/2", choices=tuple(DiT_models), help="preset: size and patch size",
                      group="model")  # fmt: skip
    pretraining_tp: int = of_command(1, help="has no effect; published commands pass it")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Settings of an optimizer step."""

    objective: str = flag("gaussian", table=OBJECTIVES, help="training objective",
                          binds="branch", group="optimisation")  # fmt: skip
    rf: bool | None = of_command(None, help="published spelling of --objective rectified_flow")
    auxiliary: tuple[str, ...] = flag(
        (),
        table=AUXILIARY_LOSSES,
        by_component=True,
        help="auxiliary losses, which are added to the loss of the objective",
    )
    optimizer: str = flag("adamw", table=OPTIMIZERS, binds="branch", help="optimizer")
    lr: float = flag(1e-4, ge=0, help="learning rate")
    lr_schedule: str = flag(
        "constant",
        choices=("constant", "cosine", "linear", "trapezoid"),
        help="schedule after the warm-up: constant; cosine or linear, which decay to --lr-floor; "
        "or trapezoid, which is constant and decays over the last --decay-share of the steps",
    )
    decay_share: float = flag(
        0.2, gt=0, le=1, needs=("lr_schedule", "trapezoid"),
        help="fraction of the steps over which the trapezoid schedule decays",
    )  # fmt: skip
    lr_floor: float = flag(
        0.0, ge=0, lt=1, metavar="FRACTION",
        needs=("lr_schedule", "cosine", "linear", "trapezoid"),
        help="final learning rate of a decaying schedule, as a fraction of --lr",
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
    ema: tuple[str, ...] = flag(
        ("exponential",), table=EMAS,
        help="moving averages of the weights; samples use the first one",
    )  # fmt: skip
    accum_iter: int = free(1, ge=1, help="micro-batches per optimizer step")
    precision: str = flag(
        "bf16",
        choices=tuple(DTYPES),
        help="precision of matrix products; master weights are fp32, and fp16 uses loss scaling",
    )
    tf32: bool = flag(
        False,
        help="compute fp32 matrix products on a GPU in TF32, faster but with 10 mantissa bits",
    )
    compile: bool = free(False, help="compile each block with torch.compile")
    gradient_checkpointing: bool = free(
        False, help="recompute each block in the backward pass instead of storing its activations"
    )
    selective_checkpointing: bool = free(
        False, help="as --gradient-checkpointing, but store the outputs of attention and of experts"
    )
    freeze: tuple[str, ...] = flag(
        (), metavar="PATTERN", binds="branch",
        help="parameters or modules to freeze, such as 'blocks.*.attn.*' x_embedder",
    )  # fmt: skip
    train_router_only: bool = flag(False, binds="branch", help="train only the routers")

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

    latents_path: str | None = free(
        None,
        needs=("data_path", None),
        help="folder of cached latents from cache_latents.py, in place of --data-path; the cache "
        "determines --image-size, and the autoencoder is used only for sample grids and for "
        "images of --val-path",
    )
    latents_norm: str = flag(
        "autoencoder", choices=("autoencoder", "data"),
        help="normalisation of latents: autoencoder, as the autoencoder defines it; or data, mean "
        "0 and standard deviation 1 per channel over the cache of --latents-path",
    )  # fmt: skip
    val_path: str | None = free(
        None,
        help="held-out images, or latents from cache_latents.py, on which the loss of the EMAs is "
        "logged, with fixed times and noise",
        group="held-out loss",
    )
    val_share: float = flag(
        0.0, ge=0, lt=1, metavar="FRACTION", needs=("val_path", None),
        help="in place of --val-path: fraction of the training images to hold out; the choice "
        "depends only on the images",
    )  # fmt: skip
    val_images: int = free(1000, ge=1, help="number of held-out images to use")
    val_times: str = free(
        "uniform", choices=("uniform", "training"),
        help="distribution of the fixed times of the held-out loss: uniform, which makes runs "
        "comparable, or training, the distribution of the times in training",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Location, start, length and output of a run."""

    config: str | None = of_command(
        None, metavar="RECIPE", group="run",
        help="YAML file whose keys are flags, such as a run's config.yaml; flags of the command "
        "override the file",
    )  # fmt: skip
    plugin: tuple[str, ...] = of_command(
        (), metavar="FILE.py",
        help="Python files to import, which define components of your own, such as a router; a "
        "recipe cannot name them",
    )  # fmt: skip
    results_dir: str = free("results", help="folder of the run folders")
    run_name: str | None = free(
        None,
        help="name of the run folder (default: model, objective and a digest of settings and data)",
    )
    resume: str | None = free(
        None,
        needs=("finetune", None),
        help="run folder to resume; no other flag is needed. A checkpoint (RUN/checkpoints/STEP) "
        "starts a new run, a branch, from its weights, step and optimizer state",
    )
    finetune: str | None = free(
        None, metavar="WEIGHTS",
        help="path or hub id of the weights to start from: weights that this code saved, published "
        "weights, or a DiT in diffusers' format. The weights determine the model, but classes, "
        "conditions and image size may change",
    )  # fmt: skip
    epochs: int = free(1400, ge=1, needs=("max_steps", None), help="passes over the images")
    max_steps: int | None = free(None, ge=1, le=10**12, help="number of steps; excludes --epochs")
    global_seed: int = flag(0, ge=0, help="seed of the random numbers in training")
    deterministic: bool = free(
        False,
        help="use only deterministic algorithms, which are slower on a GPU; runs on the same "
        "number and kind of GPUs are then bit-identical (on a CPU, runs always are)",
    )
    dry_run: bool = of_command(False, help="print model, parameters, memory and steps, and stop")
    gpus: int | None = of_command(
        None,
        ge=1,
        needs=("dry_run", True),
        help="with --dry-run: number of GPUs to plan for (default: as launched)",
    )
    gpus_per_node: int | None = free(
        None,
        ge=1,
        help="GPUs per node, for sharding (default: the launcher's value; without "
        "one, the number of processes, at most 8)",
    )
    gpu_memory: float | None = of_command(
        None,
        gt=0,
        needs=("dry_run", True),
        help="with --dry-run: GiB of memory per GPU (default: this machine's GPU, or 80)",
    )
    log_every: int | None = free(
        None, ge=1,
        help="steps between log lines (default: the largest round number of steps that take at "
        "most ten seconds)",
        group="logs, checkpoints and samples",
    )  # fmt: skip
    profile: int | None = free(
        None, ge=1, metavar="STEPS",
        help="write a torch.profiler trace of STEPS steps, after the first three, to profile/ in "
        "the run folder, for Perfetto or chrome://tracing",
    )  # fmt: skip
    val_every: int = free(1000, ge=1, help="steps between held-out losses")
    ckpt_every: int = free(
        50_000, ge=1,
        help="steps between checkpoints that are kept; the last step is always saved",
    )  # fmt: skip
    keep_last: int | None = free(
        None, ge=1, metavar="N",
        help="keep only the N newest checkpoints of --ckpt-every (default: all)",
    )  # fmt: skip
    save_minutes: float = free(
        15.0, ge=0,
        help="minutes between rolling checkpoints, each with a sample grid (0: no rolling "
        "checkpoints); each save replaces the previous rolling checkpoint; a crash loses at most "
        "about this much training",
    )  # fmt: skip
    num_sample: int = free(16, ge=0, help="largest number of images in a sample grid; 0 for none")
    sample_every: int = free(10_000, ge=1, help="steps between sample grids")
    sample_cfg_scale: float = free(
        4.0, ge=0,
        help="guidance scale of the sample grids; always 1 if the objective trains with guidance, "
        "or if --class-dropout-prob is 0",
    )  # fmt: skip
    wandb: str | None = free(
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
    objective: Objective
    optimizer: Optimizer
    emas: list[EMA]
    auxiliary: tuple[AuxiliaryLoss, ...]
    shapes: Shapes  # shapes of one image's tensors, by name; empty without data
    step: StepConfig
    data: DataConfig
    run: RunConfig
    engine: Any  # the flags of the engine's script

    @property
    def name(self) -> str:
        """Name of the model with its experts, such as DiT-S/2-8E2A or DiT-S/2-dense."""
        experts = f"{self.model.num_experts}E{self.model.num_experts_per_tok}A"
        return f"{self.preset}-{experts if self.model.num_experts else 'dense'}"

    def sections(self) -> dict[str, dict[str, Any]]:
        """Returns the settings by section and flag: the content of config.yaml.

        Four kinds of flags are omitted: router flags of a dense model (see `DiTConfig.flat`); flags
        without effect (see `Option.needs`); flags without a value; and flags that apply to one
        command.
        """
        parts = {"objective": self.objective, "optimizer": self.optimizer}
        parts |= {f"auxiliary_{one.name}": one for one in self.auxiliary}
        options: dict[str, Any] = {}
        for kind, part in parts.items():
            options |= {f"{kind}_{name}": value for name, value in part.option_values().items()}
        for ema in self.emas:  # there is one EMA for each combination of values
            for name, value in ema.option_values().items():
                values = options.setdefault(f"ema_{name}", [])
                values += [value] if value not in values else []
        preset = self.preset if self.preset in DiT_models else None  # weights may have any size
        found = {
            "model": {"model": preset, **self.model.flat()}, "data": vars(self.data),
            "step": vars(self.step) | options, "engine": vars(self.engine), "run": vars(self.run),
        }  # fmt: skip
        flags = training_flags(type(self.engine))
        stored = {
            name for name, value in with_effect(settings_of(found), flags).items()
            if value is not None and flags[name].binds != "command"
        }  # fmt: skip
        return {
            section: {name: value for name, value in values.items() if name in stored}
            for section, values in found.items()
        }

    def total_steps(self, num_images: int, global_batch: int) -> int:
        return self.run.max_steps or max(1, self.run.epochs * num_images // global_batch)


def training_flags(engine_flags: type) -> dict[str, Option]:
    """Returns the flags of a training script.

    The help text of a flag that the preset sets, such as --depth, shows the value in the default
    preset.
    """
    kinds = (PresetConfig, DiTConfig, DataConfig, StepConfig, engine_flags, RunConfig)
    flags, preset = flags_of(kinds), PresetConfig.model
    for name, size in DiT_models[preset].keywords.items():
        text = flags[name].help.partition(" (default")[0]
        help = f"{text} (default: the preset's, {size} for {preset})"
        flags[name] = replace(flags[name], help=help)
    return flags


def parse_training(
    engine_flags: type,
    description: str | None = None,
    arguments: Sequence[str] | Mapping[str, Any] | None = None,
) -> FlagValues:
    """Reads the flags of a training script; they override the recipe that --config names.

    If the recipe is the config.yaml of a run, the following are ignored: the facts after the line
    ---, the run's name, its start weights, and the fields that its data determined (DATA_FACTS).

    arguments: the words of a command, by default sys.argv, or values by name
    """
    is_mapping = isinstance(arguments, Mapping)
    import_plugins(arguments.get("plugin", ()) if is_mapping else named_plugins(arguments))
    flags = {k: v for k, v in training_flags(engine_flags).items() if k not in DATA_FACTS[1:]}
    if is_mapping:
        user_flags = read_values(arguments, flags)
    else:
        user_flags = parse_flags(flags, description, arguments)
    base: FlagValues = {}
    if path := user_flags.get("config"):
        with reported_as(f"--config {path}", OSError, ValueError, UserError):
            if not Path(path).exists():
                recipes = {one.stem: os.path.relpath(one) for one in RECIPES.glob("*.yaml")}
                raise ValueError(f"no such file{did_you_mean(Path(path).stem, recipes)}")
            with open_untrusted(path) as file:
                recipe, is_of_run = parse_yaml(file)
            for name in ("config", "plugin"):
                if name in recipe:
                    raise ValueError(f"got the key {name}, which only a command can have")
            ignored = ("run_name", "resume", "finetune", *DATA_FACTS) if is_of_run else ()
            base = read_values({k: v for k, v in recipe.items() if k not in ignored}, flags)
            if is_of_run:  # older versions also stored flags without effect
                base = with_effect(base, flags)
    base = dense_or_sparse(base, user_flags, flags)
    with naming_flags(flags):
        for values in (user_flags, base):
            if "rf" in values:
                values["objective"] = objective_named(values.get("objective"), values.pop("rf"))
    return layered(base, user_flags, flags)


def dense_or_sparse(base: FlagValues, top: FlagValues, flags: Flags) -> FlagValues:
    """Returns the settings of a recipe or a run that still apply if `top` removes or adds experts.

    A dense model has no router. The config.yaml of a dense run states that no block is sparse.
    """
    if top.get("num_experts") == 0:
        return {k: v for k, v in base.items() if "router" not in (k, flags[k].belongs_to)}
    if top.get("num_experts") and base.get("num_experts") == 0:
        return {k: v for k, v in base.items() if k != "sparse_layers" or v}
    return base


def parse_yaml(file: BinaryIO) -> tuple[dict[str, Any], bool]:
    """Reads a recipe or a config.yaml.

    Returns the values by flag, as text, and whether the file is the config.yaml of a run. The flags
    may be sorted into sections. A config.yaml has a second YAML document, the facts (see
    `start.facts_of`). Raises ValueError for other content.
    """
    expected = "a YAML file in UTF-8, such as a recipe or the config.yaml of a run"
    try:
        found, *facts = read_yaml(file) or [{}]  # words, as in a command
    except yaml.YAMLError as error:
        raise ValueError(f"expected {expected}: {error}") from None
    found = found or {}
    if not isinstance(found, dict):
        raise ValueError(f"got a {type(found).__name__}, expected {expected}")
    sections = {k: v if isinstance(v, dict) else {k: v} for k, v in found.items()}
    return settings_of(sections), bool(facts)


def check_together(user_flags: FlagValues, known: FlagValues, flags: Flags) -> None:
    """Raises UserError if the known settings of the run make a flag useless.

    A flag that has its default value is accepted, except for options of components.
    """
    values = {name: one.default for name, one in flags.items()} | known
    for name, value in user_flags.items():
        one = flags[name]
        if one.is_idle(values) and (one.belongs_to or value != one.default):
            needed, *wanted = one.needs
            why = f"cannot be combined with {spelling(needed)}"
            if wanted != [None]:
                why = f"has no effect without {spelling(needed)} {' or '.join(map(str, wanted))}"
            if isinstance(chosen := values[needed], str) and one.belongs_to:
                has = [
                    k for k, o in flags.items() if o.belongs_to == needed and not o.is_idle(values)
                ]
                why += f"; {needed} {chosen} has {', '.join(map(spelling, has)) or 'no options'}"
            raise UserError(f"{spelling(name)}: {why}")


def resolve(
    user_flags: FlagValues,
    engine_flags: type,
    *,
    weights: Record | None = None,
    data: DataFacts | None = None,
) -> TrainConfig:
    """Builds the config from the flags of recipe and command.

    The config starts from the preset or the weights, which the flags override. The data determine
    the settings in `data_settings`.

    weights: record of the weights that the run starts from, or None
    data: facts of the opened data, or None
    Raises UserError, with a message that names the flag, if two flags contradict each other, or if
    a flag contradicts the weights or the data.
    """
    flags = training_flags(engine_flags)
    base: FlagValues = {"model": user_flags.get("model", PresetConfig.model)}
    with naming_flags(flags):
        if weights is None:
            base |= DiT_models[base["model"]].keywords
        else:
            before = weights.config
            base |= {name: value for name, value in before.flat().items() if name not in DATA_FACTS}
            if before.class_dropout_prob == default_dropout(before.conditions, before.num_classes):
                del base["class_dropout_prob"]
            if weights.objective is not None:
                options = weights.objective_options.items()
                base |= {"objective": weights.objective} | {f"objective_{k}": v for k, v in options}
        known = layered(base, user_flags, flags)
        routing = [name for name in user_flags if "router" in (name, flags[name].belongs_to)]
        if routing and not known.get("num_experts", DiTConfig.num_experts):
            raise ValueError(
                f"{routing[0]}: given with a dense model, expected a model with experts"
            )
        check_together(user_flags, known, flags)
        known |= data_settings(known, data) if data else {}
        words = known.get("conditions", DiTConfig.conditions)
        words += OBJECTIVES[known.get("objective", StepConfig.objective)].conditions
        known["conditions"] = words = tuple(dict.fromkeys(words))
        dropout = default_dropout(words, known.get("num_classes", DiTConfig.num_classes))
        if weights and dropout < default_dropout(before.conditions, before.num_classes):
            # The new model has nothing to drop, so the probability of the weights does not apply.
            known["class_dropout_prob"] = user_flags.get("class_dropout_prob", dropout)
        known.setdefault("class_dropout_prob", dropout)

        fields = {name: value for name, value in known.items() if flags[name].owner is DiTConfig}
        model = DiTConfig.from_flat(fields)
        if weights is None and 0 < len(model.sparse_layers) < model.depth:
            # A dense block is as wide as the experts that a token activates in a sparse block.
            active = model.num_experts_per_tok * model.mlp_ratio + model.n_shared_experts
            model = replace(model, dense_mlp_ratio=fields.get("dense_mlp_ratio", active))

        step, images, run, engine = (
            cls(**{name: known[name] for name in options_of(cls) if name in known})
            for cls in (StepConfig, DataConfig, RunConfig, engine_flags)
        )
        chosen: dict[str | None, FlagValues] = defaultdict(dict)  # options, such as chosen["ema"]
        for name, value in known.items():
            kind = flags[name].belongs_to
            chosen[kind][name.removeprefix(f"{kind}_")] = value
        objective = make_component(OBJECTIVES, "objective", step.objective, chosen["objective"])
        if objective.guides_in_training and not model.class_dropout_prob:
            raise ValueError(
                "class_dropout_prob: got 0, expected a value above 0, because guidance in training "
                "needs images without a class"
            )
        auxiliary = tuple(
            make_component(AUXILIARY_LOSSES, kind := f"auxiliary_{name}", name, chosen[kind])
            for name in dict.fromkeys(step.auxiliary)
        )
        for one in auxiliary:
            if expected := one.check(objective, data and data.shapes):
                raise ValueError(f"auxiliary: got {one.name}, which needs {expected}")
        return TrainConfig(
            preset=weights.model_name if weights else known["model"],
            model=model,
            objective=objective,
            auxiliary=auxiliary,
            shapes=data and data.shapes or {},
            optimizer=make_component(OPTIMIZERS, "optimizer", step.optimizer, chosen["optimizer"]),
            emas=make_emas(step.ema, chosen["ema"]),
            step=step,
            data=images,
            run=run,
            engine=engine,
        )


def default_dropout(conditions: Sequence[str], num_classes: int) -> float:
    """Returns the default of class_dropout_prob, which is 0 if guidance can drop no condition.

    Guidance can drop the label, if there are several classes, and a condition with a width, such as
    vector:768.
    """
    names = [split_condition(word)[0] for word in conditions]
    has_labels = "label" in names and num_classes > 1
    can_drop = has_labels or any(CONDITIONS[name].has_width for name in names)
    return DiTConfig.class_dropout_prob if can_drop else 0.0


def data_settings(known: FlagValues, data: DataFacts) -> FlagValues:
    """Returns the settings that the opened data determine, such as the width of the condition
    "vector:768". Raises ValueError if flags differ.
    """
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
