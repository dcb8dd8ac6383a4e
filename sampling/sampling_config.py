"""Flags of the scripts that sample from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from diffusion import OBJECTIVES, SAMPLERS
from diffusion.objectives import objective_named
from options.parts import Size, option, options_of
from routers import ROUTERS
from runtime.errors import UserError
from runtime.flags import naming_flags
from runtime.plugins import import_plugins

# Flags that describe the model of --ckpt: fields of `DiTConfig`.
MODEL_FLAGS = ("num_experts", "num_experts_per_tok", "num_classes", "num_heads", "input_size")
CKPT_HELP = (
    "run or step folder, .safetensors, a published .pt file, diffusers' DiT folder, or a hub id, "
    "OWNER/NAME[@REVISION][:FILE]"
)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A checkpoint and sampler settings; scripts extend this class by further flags."""

    def __post_init__(self):
        with naming_flags({}):
            for name in options_of(SamplingConfig):
                value = options_of(type(self))[name].read(getattr(self, name))
                object.__setattr__(self, name, value)
            object.__setattr__(self, "objective", objective_named(self.objective, self.rf))
        import_plugins(self.plugin)
        if self.objective not in (None, *OBJECTIVES):
            known = ", ".join(OBJECTIVES)
            raise UserError(
                f"--objective: got {self.objective}, expected one of {known}, or --plugin FILE.py "
                "that defines it"
            )

    ckpt: str = option(group="checkpoint", help=CKPT_HELP)
    ema: str | None = option(
        None,
        help="EMA of the run, such as 0.999, or of a .pt file, such as model_ema2 (default: "
        "the first EMA)",
    )
    model: str | None = option(
        None, group="model (recorded in our checkpoints; pass what published files do not record)",
        help="size and patch size, such as DiT-XL/2",
    )  # fmt: skip
    num_experts: int | None = option(
        None, ge=0, help="routed experts per block; 0 for a dense model"
    )
    num_experts_per_tok: int | None = option(None, ge=1, help="experts per token")
    num_classes: int | None = option(None, ge=1, help="number of classes")
    num_heads: int | None = option(None, ge=1, help="attention heads")
    input_size: int | None = option(
        None,
        ge=1,
        help="latent height and width, for DSMoE's files (default: 32)",
    )
    router: str | None = option(
        None, table=ROUTERS,
        help="options of the model's router: prototype:choice=expert for ProMoE-EC, "
        "sigmoid:scale=X for DSMoE, or batch_pool:inference=count for DiffMoE as released, in "
        "which an image depends on its batch",
    )  # fmt: skip
    vae_path: str | None = option(
        None, help="autoencoder: a folder in diffusers' format, or a hub id"
    )
    image_size: Size | None = option(
        None, ge=1, help="pixels per side of a square, or height and width"
    )
    objective: str | None = option(
        None, help=f"objective that the model was trained for: {', '.join(OBJECTIVES)}"
    )
    rf: bool | None = option(None, help="published spelling of --objective rectified_flow")
    sampler: str | None = option(
        None, group="sampler",
        help="sampler, here with its default number of steps; the first one is the default. "
        + "; ".join(
            f"{kind}: {', '.join(f'{name} {one.default_steps}' for name, one in table.items())}"
            for kind, table in zip(("Gaussian diffusion", "flows"), SAMPLERS.values(), strict=True)
        ) + "; mean_flow: mean 4 and the samplers of flows",
    )  # fmt: skip
    num_sampling_steps: int | str | None = option(
        None,
        help="number of steps (default: see --sampler); a step calls the model once, or twice with "
        "heun. Gaussian diffusion also accepts 10,5,3 (steps in equal sections) and ddim50 (a "
        "constant stride)",
    )  # fmt: skip
    time_shift: float | None = option(
        None, gt=0,
        help="flows: values above 1 move the steps towards the noise (default: shift of the "
        "objective in training)",
    )  # fmt: skip
    cfg_scale: float | None = option(
        None,
        ge=0,
        help="guidance scale; 1 for none (default: 1.5, or 1 if the model was trained without "
        "label dropout or with guidance)",
    )
    guide_ckpt: str | None = option(
        None,
        help="guide by a weaker model, such as an early checkpoint, in place of predictions "
        "without a class: guide + scale (model - guide) (Karras et al. 2024, arXiv 2406.02507)",
    )
    guided_channels: int | str | None = option(
        None,
        help="number of leading latent channels that guidance acts on, or all (default: all, but 3 "
        "for the gaussian objective without --guide-ckpt, as published)",
    )  # fmt: skip
    guidance_interval: tuple[float, float] | None = option(
        None, metavar=("LOW", "HIGH"),
        help="interval of times in which guidance acts, from 0 (data) to 1 (noise); outside, the "
        "unconditional pass is skipped (default: 0 1, or 0.1 0.9 for flow_x)",
    )  # fmt: skip
    precision: str | None = option(
        None, choices=("fp32", "bf16", "fp16"),
        help="precision of the model (default: fp32; for XL and G fp16, as published, or bf16 on a "
        "CPU); python -m tools.benchmarks.bench_sample compares their speed",
    )  # fmt: skip
    quantize: str | None = option(
        None, choices=("int8", "int4"),
        help="quantise the experts' weights: int8 takes about half the memory of 16 bits, int4 "
        "about a third. Other weights stay in --precision",
    )  # fmt: skip
    offload: bool = option(
        False,
        help="keep the blocks in host memory (on a CPU: in the file) and copy each block while the "
        "previous one computes",
    )
    conditions: tuple[str, ...] = option(
        (), metavar="NAME=VALUES",
        help="conditions besides the class: size=1,1,0,0 for all images, or vector=FILE.npy with "
        "one row per image; after the last row, the rows repeat (default: zeros, which mean no "
        "feature, and size=1,1,0,0, an original of the training size)",
    )  # fmt: skip
    prompt: tuple[str, ...] = option(
        (), metavar="TEXT",
        help="texts, one per image, for a model with the condition text; after the last one, they "
        'repeat; "" is no text',
    )  # fmt: skip
    prompts: Path | None = option(
        None, metavar="FILE", help="file with one prompt per line, in place of --prompt"
    )
    negative_prompt: str | None = option(
        None, metavar="TEXT", help="text in place of no text in the predictions that guide"
    )
    plugin: tuple[str, ...] = option(
        (), metavar="FILE.py",
        help="Python files to import, which define components of your own, such as a router",
    )  # fmt: skip
    compile: bool = option(False, help="compile each block with torch.compile")
    seed: int = option(0, ge=0, help="the seed of image i is seed + i")
    batch_size: int = option(32, ge=1, help="images at a time")
