"""What a run is: nested frozen dataclasses, and the one function that resolves them.

    given = parse_training(DDPFlags, __doc__)                      # what the command said
    config = resolve(given, DDPFlags)
    config = resolve(given, DDPFlags, weights=record, data=facts)  # when these are open

The order is: defaults, the weights that a run starts from, the recipe file (--config), the command.
Here stands no field of the model: `DiTConfig` is a part of the config as it is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from checkpoints import Record, config_of
from checkpoints.adapting import upcycled_config
from diffusion import OBJECTIVES, Objective
from diffusion.objectives import objective_named
from latents.config import ImagesConfig
from models import DiT_models, DiTConfig
from parts import make_part, options_of
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.flags import Flag, Given, flag, flags_of, free, layered, parse_flags, spelling
from training.ema import EMA, EMAS, make_emas
from training.optimizers import OPTIMIZERS, Optimizer

DATA_FACTS = ("input_size", "in_channels")  # fields of DiTConfig that the data and autoencoder say
EXCLUSIVE = (("latents_path", "data_path"), ("finetune", "resume"), ("val_share", "val_path"))
READ_WITH = {  # flags that count only where another one has a value
    "decay_share": ("lr_schedule", "trapezoid"),
    "gpus": ("dry_run", True), "gpu_memory": ("dry_run", True),
}  # fmt: skip
RENAMED = {
    "time-distribution": "--objective-times", "time-mean": "--objective-mean",
    "time-std": "--objective-std", "time-shift": "--objective-shift",
    "adam-betas": "--optimizer-betas", "weight-decay": "--optimizer-weight-decay",
    "shared-mlp-ratio": "--n-shared-experts",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PresetConfig:
    model: str = flag("DiT-S/2", choices=tuple(DiT_models), help="preset: size and patch size",
                      group="model")  # fmt: skip
    pretraining_tp: int = free(1, help="accepted for published commands; no effect")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What an optimizer step computes."""

    objective: str = flag("gaussian", table=OBJECTIVES, help="what the network learns",
                          group="optimisation")  # fmt: skip
    rf: bool | None = free(
        None, help="published spelling of --objective rectified_flow",
        same_as=("objective", {True: "rectified_flow", False: "gaussian"}),
    )  # fmt: skip
    optimizer: str = flag("adamw", table=OPTIMIZERS, help="how weights follow their gradients")
    lr: float = flag(1e-4, least=0, help="learning rate")
    lr_schedule: str = flag(
        "constant",
        choices=("constant", "cosine", "linear", "trapezoid"),
        help="after the warm-up: constant; cosine or linear, falling to 0 at the last step; "
        "trapezoid, constant and then falling over --decay-share",
    )
    decay_share: float = flag(
        0.2, above=0, most=1, help="the share of the steps over which a trapezoid falls"
    )
    lr_floor: float = flag(
        0.0, least=0, below=1, metavar="FRACTION",
        help="the fraction of --lr at which a schedule that falls ends",
    )  # fmt: skip
    warmup_steps: int = flag(0, least=0, help="steps over which the rate rises linearly to --lr")
    grad_clip: float = flag(0.0, least=0, help="largest gradient norm; 0 for no clipping")
    ema: tuple[str, ...] = flag(
        ("exponential",), table=EMAS,
        help="moving averages of the weights; the first is what is sampled",
    )  # fmt: skip
    accum_iter: int = free(1, least=1, help="micro-batches of each optimizer step")
    precision: str = flag(
        "bf16",
        choices=tuple(DTYPES),
        help="precision of matrix products; master weights are fp32, fp16 scales the loss",
    )
    tf32: bool = flag(
        False, help="multiply what is fp32 in TF32 on a GPU: faster, with 10 bits of mantissa"
    )
    compile: bool = free(False, help="compile each block with torch.compile")
    gradient_checkpointing: bool = free(
        False, help="recompute each block in the backward pass instead of keeping its activations"
    )
    freeze: tuple[str, ...] = flag(
        (), metavar="PATTERN",
        help="parameters that stay as they are, such as 'blocks.*.attn.*' x_embedder",
    )  # fmt: skip
    train_router_only: bool = flag(False, help="train the gates and nothing else")

    @property
    def freezes(self) -> bool:
        return bool(self.freeze) or self.train_router_only


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """The images, or their latents, to train on and to hold out."""

    latents_path: str | None = free(
        None,
        help="folder that cache_latents.py wrote, in place of --data-path: it says --image-size, "
        "and the autoencoder is loaded for sample grids only",
    )
    latents_norm: str = flag(
        "autoencoder", choices=("autoencoder", "data"),
        help="normalisation of latents: the autoencoder's, or, with --latents-path, to mean 0 and "
        "standard deviation 1 of each channel over the images of the cache",
    )  # fmt: skip
    num_classes: int | None = free(
        None, least=1, help="number of classes (default: as many as the data has)"
    )
    val_path: str | None = free(
        None,
        help="held-out images, or latents that cache_latents.py wrote: the EMA's loss on them is "
        "logged, at fixed times and noises",
        group="held-out loss",
    )
    val_share: float = flag(
        0.0, least=0, below=1, metavar="FRACTION",
        help="in place of --val-path: the share of the images that is held out of training, always "
        "the same ones",
    )  # fmt: skip
    val_images: int = free(1000, least=1, help="how many of the held-out images to take")
    val_times: str = free(
        "uniform", choices=("uniform", "training"),
        help="times of the held-out loss: the same for all runs, or as training draws them",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run is, where it starts, how long it is and what it writes."""

    config: str | None = free(
        None, metavar="RECIPE", group="run",
        help="YAML file whose keys are flags; those of the command win",
    )  # fmt: skip
    results_dir: str = free("results", help="where run folders go")
    run_name: str | None = free(
        None, help="run folder; default: named by the model and a digest of the settings"
    )
    resume: str | None = free(
        None,
        help="run folder to go on with, which needs no other flag; or step folder or weights "
        "(published too) to start another run from",
    )
    finetune: str | None = free(
        None, metavar="WEIGHTS",
        help="weights to start from (ours, published, diffusers' DiT; a path or a hub id), which "
        "say what the model is; classes and image size may differ, and a dense model gets experts",
    )  # fmt: skip
    epochs: int = free(1400, least=1, help="passes over the images")
    max_steps: int | None = free(None, least=1, most=10**12, help="stop there; overrides --epochs")
    global_seed: int = flag(0, least=0, help="seed of everything drawn")
    deterministic: bool = free(
        False,
        help="use deterministic algorithms only, slower on a GPU: there the same software on the "
        "same number of the same GPUs then gives the same bits; on a CPU it always does",
    )
    dry_run: bool = free(False, help="print model, parameters, memory and steps, and stop")
    gpus: int | None = free(
        None, least=1, help="with --dry-run: GPUs to plan for (default: as launched)"
    )
    gpus_per_node: int | None = free(
        None, least=1, help="GPUs of a node, to cut a model over (default: as launched, or 8)"
    )
    gpu_memory: float | None = free(
        None, above=0, help="with --dry-run: GiB of a GPU (default: this machine's, or 80)"
    )
    log_every: int | None = free(
        None, least=1,
        help="steps from one log line to the next (default: a round number that takes about ten "
        "seconds)",
        group="logs, checkpoints and samples",
    )  # fmt: skip
    profile: int | None = free(
        None, least=1, metavar="STEPS",
        help="write a torch.profiler trace of that many steps, after three others, to profile/ in "
        "the run folder, for Perfetto or chrome://tracing",
    )  # fmt: skip
    val_every: int = free(1000, least=1, help="steps between held-out losses")
    ckpt_every: int = free(
        50_000, least=1,
        help="steps between checkpoints that are kept; the last step is always saved",
    )  # fmt: skip
    keep_last: int | None = free(
        None, least=1, metavar="N",
        help="keep the N newest of those checkpoints only (default: all)",
    )  # fmt: skip
    save_minutes: float = free(
        15.0, least=0,
        help="minutes between saves that replace each other, each with a sample grid, so that an "
        "interruption loses no more; 0 for none",
    )  # fmt: skip
    num_sample: int = free(16, least=0, help="images in the sample grids; 0 for none")
    sample_every: int = free(10_000, least=1, help="steps between sample grids")
    sample_cfg_scale: float = free(4.0, least=0, help="guidance scale of the sample grids")
    wandb: str | None = free(
        None, metavar="PROJECT", help="send what TensorBoard shows to a project of Weights & Biases"
    )


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the opened data and autoencoder say."""

    num_classes: int
    input_size: int  # latent height and width
    in_channels: int
    image_size: int
    vae_path: str
    can_flip: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run, resolved: what it says is what is computed."""

    preset: str  # such as DiT-S/2
    model: DiTConfig
    objective: Objective
    optimizer: Optimizer
    emas: list[EMA]
    step: StepConfig
    data: DataConfig
    run: RunConfig
    engine: Any  # the flags of the engine's script
    given: Given = field(default_factory=dict)  # what recipe and command said

    def settings(self) -> dict[str, Any]:
        """What decides the result, flat and as JSON has it; images and weights come beside it."""
        groups = (self.step, self.data, self.run, self.engine)
        values = {
            name: getattr(group, name)
            for group in groups
            for name, one in options_of(type(group)).items()
            if one.metadata["binds"] not in ("free", "command")
        }
        left_out = ("expert_backend", "num_classes", *DATA_FACTS)  # the data's are the images'
        model = {k: v for k, v in self.model.flat().items() if k not in left_out}
        options = {f"objective_{k}": v for k, v in self.objective.option_values().items()}
        options |= {f"optimizer_{k}": v for k, v in self.optimizer.option_values().items()}
        for ema in self.emas:
            for name, value in ema.option_values().items():
                values_so_far = options.setdefault(f"ema_{name}", [])
                if value not in values_so_far:  # averages are of all combinations of values
                    values_so_far.append(value)
        return json.loads(json.dumps({"model": self.preset, **model, **values, **options}))

    def total_steps(self, num_images: int, global_batch: int) -> int:
        return self.run.max_steps or max(1, self.run.epochs * num_images // global_batch)


@cache
def training_flags(engine_flags: type) -> dict[str, Flag]:
    """The flags of a training script."""
    kinds = (PresetConfig, DiTConfig, DataConfig, StepConfig, engine_flags, RunConfig)
    return flags_of(kinds, left_out=DATA_FACTS)


def parse_training(
    engine_flags: type, description: str | None, arguments: Sequence[str] | None = None
) -> Given:
    """What a training script's command, and the recipe that it names, say; see `parse_flags`."""
    return parse_flags(training_flags(engine_flags), description, arguments, RENAMED)


def resolve(
    given: Given,
    engine_flags: type,
    *,
    weights: Record | None = None,
    data: DataFacts | None = None,
) -> TrainConfig:
    """The config of what recipe and command said, and of what is known of weights and data.

    Raises UserError, one line with the flag, for values that contradict each other, the weights or
    the data.
    """
    flags = training_flags(engine_flags)
    try:
        objective = objective_named(given.get("objective"), given.get("rf"))
        given = {**given, "objective": objective} if objective else dict(given)
        given.pop("rf", None)
        trained_as: Given = {}  # the weights
        if weights is not None and weights.objective is not None:
            options = {f"objective_{k}": v for k, v in weights.objective_options.items()}
            trained_as = {"objective": weights.objective, **options}
        known = layered(trained_as, given, flags)
        preset, model = resolved_model(given, weights, data)
        step, run, engine = (pick(kind, known) for kind in (StepConfig, RunConfig, engine_flags))
        config = TrainConfig(
            preset=preset, model=model, step=step, data=resolved_data(known, data), run=run,
            engine=engine, given=given,
            objective=make_part(OBJECTIVES, "objective", step.objective,
                                part_options("objective", known)),
            optimizer=make_part(OPTIMIZERS, "optimizer", step.optimizer,
                                part_options("optimizer", known)),
            emas=make_emas(step.ema, part_options("ema", known)),
        )  # fmt: skip
        values = {**vars(step), **vars(config.data), **vars(run)}
        for one, other in EXCLUSIVE:
            if values[one] and values[other]:
                raise ValueError(f"{one}: given beside {spelling(other)}, expected one of them")
        if step.lr_floor and step.lr_schedule == "constant":
            raise ValueError(
                "lr_floor: nothing reads it, expected --lr-schedule other than constant"
            )
        for name, (other, wanted) in READ_WITH.items():
            if name in given and values[other] != wanted:
                raise ValueError(
                    f"{name}: nothing reads it, expected {spelling(other)} {wanted} too"
                )
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise UserError(f"{spelling(name) if name in flags else name}{colon}{rest}") from None
    return config


def pick(kind: type, values: Mapping[str, Any]) -> Any:
    """The dataclass of that kind with those of the values that are its fields."""
    return kind(**{name: values[name] for name in options_of(kind) if name in values})


def part_options(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{kind}_"
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def resolved_data(values: Mapping[str, Any], data: DataFacts | None) -> DataConfig:
    config = pick(DataConfig, values)
    if data is None:
        return config
    for name, has in (("num_classes", data.num_classes), ("image_size", data.image_size)):
        if (got := getattr(config, name)) not in (None, has):
            raise ValueError(f"{name}: got {got}, expected {has}, as the data has it")
    if values.get("flip") and not data.can_flip:
        raise ValueError(
            "flip: got True, expected False: the latents were cached without mirroring"
        )
    flip = config.flip and data.can_flip
    return replace(config, image_size=data.image_size, vae_path=data.vae_path, flip=flip)


def resolved_model(
    given: Given, weights: Record | None, data: DataFacts | None
) -> tuple[str, DiTConfig]:
    """The preset's name and the model's config: the preset or the weights, then what was said."""
    said: Given = {}  # of weights that are not read yet: they say what the flags change
    if weights is not None or not (given.get("finetune") or given.get("resume")):
        names = options_of(DiTConfig).keys() - {"num_classes"}
        said = {k: v for k, v in given.items() if k in names or k.startswith("router_")}
    facts: dict[str, Any] = {"num_classes": given.get("num_classes", 1000)}
    if data is not None:
        facts = {name: getattr(data, name) for name in ("num_classes", *DATA_FACTS)}
    if weights is None:
        preset = given.get("model", PresetConfig.model)
        base, dropout = config_of(preset).flat(), DiTConfig.class_dropout_prob
    else:
        preset, before = weights.model_name, weights.config
        if before.num_experts == 0 and said.get("num_experts"):
            names = ("num_experts", "num_experts_per_tok", "n_shared_experts")
            counts = {name: said[name] for name in names if name in said}
            before = upcycled_config(before, layers=said.get("sparse_layers", "all"), **counts)
        base, dropout = before.flat(), before.class_dropout_prob
        if before.num_classes == 1:  # which left nothing to drop
            dropout = dropout or DiTConfig.class_dropout_prob
    patch = said.get("patch_size", base["patch_size"])
    if data is not None and data.input_size % patch:
        factor = data.image_size // data.input_size
        raise ValueError(
            f"image_size: got {data.image_size}, expected a multiple of {factor * patch}, the "
            f"autoencoder's factor {factor} x the model's patches of {patch}"
        )
    # One class leaves nothing to drop, unless there is a feature too.
    words = said.get("conditions", base["conditions"])
    can_drop = facts["num_classes"] > 1 or any(word.startswith("vector") for word in words)
    base["class_dropout_prob"] = dropout if can_drop else 0.0
    if said.get("router", base["router"]) != base["router"]:
        base = {k: v for k, v in base.items() if not k.startswith("router_")}
        base.pop("aux_loss_alpha")
    if weights is None:  # these follow from what the command says of the others
        names = ("mlp_type", "dense_mlp_type", "dense_mlp_ratio")
        base |= {**dict.fromkeys(names), "sparse_layers": "all"}
    model = DiTConfig.from_flat({**base, **facts, **said})
    routing = [name for name in said if name.startswith("router")]
    if routing and not model.num_experts:
        raise ValueError(f"{routing[0]}: given with a dense model, expected one with experts")
    if weights is None and 0 < len(model.sparse_layers) < model.depth:
        # Dense blocks are as wide as what a token activates in a sparse one.
        active = model.num_experts_per_tok * model.mlp_ratio + model.n_shared_experts
        model = replace(model, dense_mlp_ratio=said.get("dense_mlp_ratio", active))
    return preset, model
