"""What a run is: the flags of train.py and train_deepspeed.py, as frozen dataclasses."""

from dataclasses import dataclass, replace
from pathlib import Path

from diffusion.rectified_flow import TIMES
from latents.loading import DataConfig
from models import DiT_models
from routers import GATINGS, ROUTERS
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.flags import changeable, flag, natural, positive_int, positive_real, real, spelling

MODEL_DEFAULTS = {
    "model": "DiT-S/2", "num_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "qk_norm": False, "router": "topk",
}  # fmt: skip
BY_DEFAULT = "(default: {}, or what --finetune's weights have)"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """What both training scripts share: all but the batch size.

    Flags that are `changeable` do not decide what a step computes: a run that goes on may have
    others. None stands for what `fill` gets from --finetune's weights or the data.
    """

    model: str | None = flag(
        None,
        choices=list(DiT_models),
        help="size and patch size " + BY_DEFAULT.format(MODEL_DEFAULTS["model"]),
        group="model",
    )
    num_experts: int | None = flag(
        None,
        type=natural,
        spelling="--num_experts",
        help="routed experts of each block, 0 for a dense model " + BY_DEFAULT.format(8),
    )
    num_experts_per_tok: int | None = flag(
        None,
        type=positive_int,
        spelling="--num_experts_per_tok",
        help="experts chosen for each token " + BY_DEFAULT.format(2),
    )
    n_shared_experts: int | None = flag(
        None,
        type=natural,
        help="width of the shared expert, in units of the model's width " + BY_DEFAULT.format(2),
    )
    mlp_type: str | None = flag(
        None,
        choices=("swiglu", "gelu"),
        help="experts, or the layers of a dense model; gelu has a bias and is DiT's (default: "
        "swiglu, but gelu for a dense model)",
    )
    mlp_ratio: float | None = flag(
        None,
        type=positive_real,
        help="width of an expert, in units of the model's width (default: the size's own, 4)",
    )
    sparse_layers: str = flag(
        "all",
        help="blocks with experts: all, every-second, shallow-half, deep-half or numbers from 0, "
        "such as 6,8,10; the others are dense, of the same active width",
    )
    router: str | None = flag(
        None,
        choices=list(ROUTERS),
        help="how tokens get experts, see routers.py " + BY_DEFAULT.format("topk"),
    )
    router_gating: str = flag(
        "softmax", choices=GATINGS, help="scores of the routers topk and expert_choice"
    )
    router_scale: float = flag(1.0, type=positive_real, help="lambda of the router sigmoid")
    router_bias_step: float = flag(1e-3, type=real, help="gamma of the router sigmoid's bias")
    router_momentum: float | None = flag(
        None, type=real, help="of the thresholds of race (default: 0.99) and batch_pool (0.95)"
    )
    aux_loss_alpha: float | None = flag(
        None,
        type=real,
        help="weight of the router's loss (default: 0.01, for batch_pool and prototype 1)",
    )
    rope: bool = flag(False, help="2-D rotary positions beside the published sin-cos ones")
    qk_norm: bool | None = flag(None, help="normalise queries and keys (the published XL and G do)")
    expert_backend: str = changeable(
        "grouped",
        choices=("grouped", "loop"),
        help="how experts are computed: fast, or one after another as a reference",
    )
    pretraining_tp: int = changeable(
        1, spelling="--pretraining_tp", help="accepted for published commands; no effect"
    )

    latents_path: str | None = flag(
        None,
        help="folder that cache_latents.py wrote, in place of --data-path: it says --image-size "
        "and --vae-path, and the autoencoder is loaded for sample grids only",
        group="data",
    )
    num_classes: int | None = flag(
        None, type=positive_int, help="number of classes (default: as many as the data has)"
    )

    rf: bool | None = flag(
        None, help="rectified flow instead of Gaussian diffusion", group="optimisation"
    )
    accum_iter: int = changeable(
        1, type=positive_int, spelling="--accum_iter", help="micro-batches of each optimizer step"
    )
    time_distribution: str = flag(
        "logit-normal", choices=TIMES, help="what rectified flow draws its training times from"
    )
    time_mean: float = flag(0.0, help="mean of the normal whose sigmoid the time is")
    time_std: float = flag(1.0, type=positive_real, help="its standard deviation")
    time_shift: float = flag(
        1.0, type=positive_real, help="above 1: more training times near the noise"
    )
    lr: float = flag(1e-4, type=real, help="AdamW learning rate")
    lr_schedule: str = flag(
        "constant",
        choices=("constant", "cosine", "linear"),
        help="after the warm-up: constant, or falling to 0 at the last step",
    )
    adam_betas: tuple[float, float] = flag(
        (0.9, 0.999), nargs=2, type=real, metavar=("BETA1", "BETA2"), help="AdamW's betas"
    )
    warmup_steps: int = flag(
        0, type=natural, help="steps over which the learning rate rises linearly to --lr"
    )
    weight_decay: float = flag(0.0, type=real, help="AdamW weight decay")
    grad_clip: float = flag(0.0, type=real, help="largest gradient norm; 0 for no clipping")
    ema_decay: float = flag(0.9999, type=real, help="decay of the weights' moving average")
    precision: str = flag(
        "bf16",
        choices=list(DTYPES),
        help="of matrix products; master weights are fp32, fp16 scales the loss",
    )
    compile: bool = changeable(False, help="compile each block with torch.compile")
    gradient_checkpointing: bool = changeable(
        False, help="recompute each block in the backward pass instead of keeping its activations"
    )

    results_dir: str = changeable("results", help="where run folders go", group="run")
    run_name: str | None = changeable(
        None, help="run folder; default: named by the model and a digest of the settings"
    )
    resume: str | None = flag(
        None,
        help="run folder to go on with, or step folder or weights (published too) to start from; "
        "not needed to go on after an interruption: run the same command again",
    )
    finetune: str | None = flag(
        None,
        metavar="WEIGHTS",
        help="weights to start from (ours, published, diffusers' DiT; a path or a hub id), which "
        "say what the model is; classes and image size may differ, and a dense model gets experts",
    )
    epochs: int = changeable(1400, type=positive_int, help="passes over the images")
    max_steps: int | None = changeable(
        None, type=positive_int, help="stop there; overrides --epochs"
    )
    global_seed: int = flag(0, type=natural, help="seed of everything drawn")
    deterministic: bool = changeable(
        False,
        help="use deterministic algorithms alone, slower on a GPU: there the same software on the "
        "same number of the same GPUs then gives the same bits; on a CPU it always does",
    )
    dry_run: bool = changeable(False, help="print model, parameters, memory and steps, and stop")

    val_path: str | None = changeable(
        None,
        help="held-out images, or latents that cache_latents.py wrote: the EMA's loss on them is "
        "logged, at fixed times and noises",
        group="held-out loss",
    )
    val_share: float = flag(
        0.0,
        type=real,
        metavar="FRACTION",
        help="in place of --val-path: the share of the images that is held out of training, always "
        "the same ones",
    )
    val_every: int = changeable(1000, type=positive_int, help="steps between held-out losses")
    val_images: int = changeable(
        1000, type=positive_int, help="how many of the held-out images to take"
    )

    log_every: int = changeable(
        100,
        type=positive_int,
        help="steps from one log line to the next",
        group="logs, checkpoints and samples",
    )
    ckpt_every: int = changeable(
        50_000,
        type=positive_int,
        help="steps between checkpoints that are kept; the last step is always saved",
    )
    keep_last: int | None = changeable(
        None,
        type=positive_int,
        metavar="N",
        help="keep the N newest of those checkpoints only (default: all)",
    )
    save_minutes: float = changeable(
        15.0,
        type=real,
        help="minutes between saves that replace each other, each with a sample grid, so that an "
        "interruption loses no more; 0 for none",
    )
    num_sample: int = changeable(16, type=natural, help="images in the sample grids; 0 for none")
    sample_every: int = changeable(10_000, type=positive_int, help="steps between sample grids")
    sample_cfg_scale: float = changeable(4.0, type=real, help="guidance scale of the sample grids")

    freeze: tuple[str, ...] = flag(
        (),
        nargs="+",
        metavar="PATTERN",
        help="parameters that stay as they are, such as 'blocks.*.attn.*' x_embedder",
        group="what is trained",
    )
    train_router_only: bool = flag(False, help="train the gates and nothing else")

    def check(self) -> None:
        """Raises UserError for flags that contradict each other."""
        if self.data_path is None and self.latents_path is None:
            raise UserError(
                "--data-path: got nothing, expected a folder of class folders, or --latents-path"
            )
        pairs = (("latents_path", "data_path"), ("finetune", "resume"), ("val_share", "val_path"))
        for one, other in pairs:
            if getattr(self, one) and getattr(self, other):
                one, other = spelling(self, one), spelling(self, other)
                raise UserError(f"{one}: got it beside {other}, expected one of them")
        for name in ("val_share", "ema_decay"):
            if (got := getattr(self, name)) >= 1:
                raise UserError(f"{spelling(self, name)}: got {got}, expected less than 1")


@dataclass(frozen=True, kw_only=True)
class DDPConfig(TrainConfig):
    """The flags of train.py."""

    global_batch_size: int = flag(
        256,
        type=positive_int,
        help="images of one optimizer step, over all processes and micro-batches",
        group="batch",
    )


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig(TrainConfig):
    """The flags of train_deepspeed.py."""

    deepspeed_config: str = changeable(
        str(Path(__file__).parent.parent / "config" / "zero2.json"),
        spelling="--deepspeed_config",
        help="JSON that says how to cut the model up: ZeRO stage, offload, expert parallelism "
        "(default: config/zero2.json)",
        group="DeepSpeed",
    )
    train_batch_size: int = changeable(
        32,
        type=positive_int,
        spelling="--train_batch_size",
        help="images of one micro-step on one GPU; a step takes this many x --accum_iter x GPUs",
    )
    deepspeed: bool = changeable(False, help="accepted for published commands; no effect")
    local_rank: int | None = changeable(
        None, spelling="--local_rank --local-rank", help="set by launchers; the environment counts"
    )
    gpus: int | None = changeable(
        None,
        type=positive_int,
        help="GPUs to plan for (default: as launched)",
        group="plan (with --dry-run)",
    )
    gpus_per_node: int | None = changeable(
        None, type=positive_int, help="of these (default: as launched, or 8)"
    )
    gpu_memory: float | None = changeable(
        None, type=positive_real, help="GiB of a GPU (default: this machine's, or 80)"
    )


def fill(config: TrainConfig, values: dict) -> TrainConfig:
    """Gives the flags that the command left out their values."""
    missing = {name: v for name, v in values.items() if getattr(config, name) is None}
    return replace(config, **missing)
