"""Flags of the training scripts, by section of config.yaml; `DiTConfig` declares the model's.

A `TrainConfig` has the sections, and a checkpoint stores them. `CommandFlags` hold for one command.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusion import OBJECTIVES
from latents.images_config import ImagesConfig
from options.parts import Config, Word, option
from presets import PRESETS
from runtime.devices import DTYPES
from training.auxiliary import AUXILIARY_LOSSES
from training.ema import EMAS
from training.lr_schedule import SCHEDULES
from training.optimizers import OPTIMIZERS

EPOCHS = 1400  # without --epochs and --max-steps
TRAIN, DEEPSPEED = "train.py", "train_deepspeed.py"
ZERO2 = "config/zero2.json"
INTERRUPTED = "interrupted; --resume RUN goes on with a run that has a checkpoint"


def find_file(path: str) -> Path:
    """Finds a file in the working directory or in the project, such as ZERO2."""
    return Path(path) if Path(path).exists() else Path(__file__).parents[1] / path


@dataclass(frozen=True, kw_only=True)
class Shorthands(Config):
    """Flags that stand for other settings."""

    model: str = option("DiT-S/2", choices=tuple(PRESETS), help="preset: size and patch size",
                      group="model")  # fmt: skip
    rf: bool | None = option(
        None, help="train a rectified flow: published spelling of --objective rectified_flow",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepConfig(Config):
    """Settings of an optimizer step, which decide the result."""

    objective: Word = option(
        "gaussian", table=OBJECTIVES, help="training objective", group="optimisation"
    )
    auxiliary: tuple[Word, ...] = option(
        (),
        table=AUXILIARY_LOSSES,
        each_once=True,
        help="auxiliary losses, which are added to the loss of the objective",
    )
    optimizer: Word = option("adamw", table=OPTIMIZERS, help="optimizer")
    lr: float = option(1e-4, ge=0, help="learning rate")
    lr_schedule: Word = option(
        "constant", table=SCHEDULES,
        help="schedule after the warm-up: constant; cosine or linear, which decay to lr_floor; "
        "or trapezoid, which is constant and decays over the last decay_share of the steps",
    )  # fmt: skip
    warmup_steps: int = option(
        0, ge=0, help="steps over which the learning rate rises linearly to --lr"
    )
    grad_clip: float = option(0.0, ge=0, help="largest gradient norm; 0 for no clipping")
    grad_skip: float = option(
        0.0, ge=0, metavar="FACTOR",
        help="skip a step whose gradient norm exceeds FACTOR times the mean of about the last 100 "
        "steps; 0 for never",
    )  # fmt: skip
    ema: tuple[Word, ...] = option(
        ("exponential",), table=EMAS,
        help="moving averages of the weights; samples use the first one, or with none the weights "
        "themselves",
    )  # fmt: skip
    accum_iter: int = option(1, ge=1, help="micro-batches per optimizer step")
    precision: str = option(
        "bf16", choices=tuple(DTYPES),
        help="precision of matrix products; master weights are fp32, and fp16 uses loss scaling",
    )  # fmt: skip
    tf32: bool = option(
        False, help="compute fp32 products and convolutions on a GPU in TF32, with 10 mantissa bits"
    )
    compile: bool = option(False, help="compile each block with torch.compile")
    gradient_checkpointing: bool = option(
        False, help="recompute each block in the backward pass instead of storing its activations"
    )
    selective_checkpointing: bool = option(
        False, help="as --gradient-checkpointing, but store the outputs of attention and of experts"
    )
    freeze: tuple[str, ...] = option(
        (), metavar="PATTERN",
        help="parameters or modules to freeze, such as 'blocks.*.attn.*' x_embedder",
    )  # fmt: skip
    train_router_only: bool = option(False, help="train only the routers")

    @property
    def recomputed(self) -> str:
        """What the backward pass computes again: "nothing", "selective" or "all"."""
        selective = "selective" if self.selective_checkpointing else "nothing"
        return "all" if self.gradient_checkpointing and selective == "nothing" else selective


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """Training images or latents, and held-out images."""

    latents_path: str | None = option(
        None,
        help="folder of cached latents from cache_latents.py, in place of --data-path, with their "
        "--image-size; the autoencoder is then used only for sample grids and images of --val-path",
    )
    latents_norm: str = option(
        "autoencoder", choices=("autoencoder", "data"),
        help="normalisation of latents: autoencoder, as the autoencoder defines it; or data, mean "
        "0 and standard deviation 1 per channel over the cache of --latents-path",
    )  # fmt: skip
    val_path: str | None = option(
        None, group="held-out loss",
        help="held-out images, or latents from cache_latents.py, on which the loss of the EMAs is "
        "logged, with fixed times and noise",
    )  # fmt: skip
    val_share: float = option(
        0.0, ge=0, lt=1, metavar="FRACTION",
        help="in place of --val-path: fraction of the training images to hold out, the same ones "
        "in all runs on these images",
    )  # fmt: skip
    val_images: int = option(1000, ge=20, help="number of held-out images to use")
    val_times: str = option(
        "uniform", choices=("uniform", "training"),
        help="distribution of the fixed times: uniform, which makes runs comparable, or training, "
        "as in training",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Config):
    """The distribution of the work: by train.py, or by DeepSpeed if `deepspeed_config` is set."""

    global_batch_size: int = option(
        256, ge=1, group="batch", script=TRAIN,
        help="images of one optimizer step, over all processes and micro-batches",
    )  # fmt: skip
    train_batch_size: int = option(
        32, ge=1, script=DEEPSPEED,
        help="images per micro-step and GPU; a step has this number x --accum-iter x GPUs images",
    )  # fmt: skip
    shard: bool = option(
        False, group="sharding", script=TRAIN,
        help="shard weights, optimizer state and EMAs over the processes (FSDP2)",
    )  # fmt: skip
    shard_size: int | None = option(
        None, ge=1, script=TRAIN,
        help="with --shard: number of processes that hold one copy of the model (default: the "
        "processes of a node); the number of copies follows",
    )  # fmt: skip
    reshard_after_forward: bool = option(
        True, script=TRAIN,
        help="with --shard: free a block's gathered weights after the forward pass and gather them "
        "again for the backward pass; False needs more memory and less traffic, as ZeRO-2",
    )  # fmt: skip
    expert_parallel: int = option(
        1, ge=1, script=TRAIN,
        help="with --shard: number of processes that share the experts of a layer; each process "
        "computes about the same number of experts, and receives the tokens of these experts from "
        "the other processes",
    )  # fmt: skip
    deepspeed_config: str | None = option(
        None, group="DeepSpeed", script=DEEPSPEED,
        help="JSON file with ZeRO stage, offload and so on (default: config/zero2.json)",
    )  # fmt: skip

    @property
    def script(self) -> str:
        return DEEPSPEED if self.deepspeed_config else TRAIN


@dataclass(frozen=True, kw_only=True)
class CommandFlags(Config):
    """What holds for one command and is not stored."""

    script: str = TRAIN
    config: tuple[str, ...] = option(
        (), metavar="RECIPE", group="run",
        help="YAML files of flags, such as config/recipes/stable.yaml or a run's config.yaml; a "
        "file overrides those before it, and the other flags of the command override all of them",
    )  # fmt: skip
    plugin: tuple[str, ...] = option(
        (), metavar="FILE.py",
        help="Python files to import, which define components of your own, such as a router; a "
        "recipe cannot name them",
    )  # fmt: skip
    results_dir: str | None = option(
        None, help="folder of the run folders (default: results, or that of the run of a branch)"
    )
    run_name: str | None = option(
        None,
        help="name of the run folder (default: number, model and objective); a run of this "
        "name that has a checkpoint goes on",
    )
    resume: str | None = option(
        None, metavar="RUN",
        help="run folder to go on in, with its stored settings, which other flags change; "
        "RUN/checkpoints/STEP: a new run from there, see also --run-name",
    )  # fmt: skip
    finetune: str | None = option(
        None, metavar="WEIGHTS",
        help="path or hub id of weights to start from: ours, published ones, or a DiT in "
        "diffusers' format. They determine the model, but classes, conditions, objective and "
        "image size may change",
    )  # fmt: skip
    dry_run: bool = option(False, help="print model, parameters, memory and steps, and stop")
    gpus: int | None = option(
        None, ge=1, help="with --dry-run: number of GPUs to plan for (default: as launched)"
    )
    gpu_memory: float | None = option(
        None, gt=0,
        help="with --dry-run: GiB of memory per GPU (default: this machine's GPU, or 80)",
    )  # fmt: skip
    pretraining_tp: int = option(1, help="has no effect; published commands pass it")
    deepspeed: bool = option(False, help="has no effect; published commands pass it")
    local_rank: int | None = option(None, help="has no effect; launchers pass it")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Length, seed and output of a run."""

    epochs: int | None = option(
        None, group="run", ge=1,
        help=f"passes over the images (default: {EPOCHS}, without --max-steps)",
    )  # fmt: skip
    max_steps: int | None = option(
        None, ge=1, le=10**12, help="number of optimizer steps, in place of --epochs"
    )
    global_seed: int = option(0, ge=0, help="seed of the random numbers in training")
    deterministic: bool = option(
        False,
        help="make runs on the same number and kind of GPUs bit-identical, by slower algorithms "
        "(on a CPU, they always are)",
    )
    gpus_per_node: int | None = option(
        None, ge=1,
        help="GPUs per node, for sharding (default: the launcher's value, or the number of "
        "processes, at most 8)",
    )  # fmt: skip
    log_every: int | None = option(
        None, ge=1, group="logs, checkpoints and samples",
        help="steps between log lines (default: the largest round number of steps that take at "
        "most ten seconds)",
    )  # fmt: skip
    profile: int | None = option(
        None, ge=1, metavar="STEPS",
        help="write a torch.profiler trace of STEPS steps, after the first three, to profile/ in "
        "the run folder, for Perfetto or chrome://tracing",
    )  # fmt: skip
    val_every: int = option(1000, ge=1, help="steps between held-out losses")
    ckpt_every: int = option(
        50_000, ge=1,
        help="steps between checkpoints that are kept; the last step is always saved",
    )  # fmt: skip
    keep_last: int | None = option(
        None, ge=1, metavar="N",
        help="keep only the N newest checkpoints of --ckpt-every (default: all)",
    )  # fmt: skip
    save_minutes: float = option(
        15.0, ge=0,
        help="minutes between rolling checkpoints, each with a sample grid, of which only the "
        "newest is kept; a crash loses at most about this much training; 0 for none",
    )  # fmt: skip
    num_sample: int = option(16, ge=0, help="largest number of images in a sample grid; 0 for none")
    sample_every: int = option(10_000, ge=1, help="steps between sample grids")
    sample_cfg_scale: float = option(
        4.0, ge=0,
        help="guidance scale of the sample grids; always 1 if the objective trains with guidance, "
        "or if --class-dropout-prob is 0",
    )  # fmt: skip
    wandb: str | None = option(
        None, metavar="PROJECT", help="also log to this project of Weights & Biases"
    )
