"""The flags of scripts that sample from a checkpoint."""

import difflib
import inspect
import os
from dataclasses import dataclass
from typing import Any

from diffusion import OBJECTIVES, SAMPLERS
from diffusion.objectives import objective_named
from parts import Size, options_of
from runtime.errors import UserError
from runtime.flags import flag, naming_flags

# The flags that say what the model of --ckpt is: fields of `DiTConfig`, and options of its router.
MODEL_FLAGS = ("num_experts", "num_experts_per_tok", "num_classes", "num_heads", "input_size")
ROUTER_FLAGS = ("router_choice", "router_scale", "router_inference")


class CheckedCall(type):
    """A class for which wrong names of arguments are a UserError."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        signature = inspect.signature(cls.__init__)
        try:
            signature.bind(None, *args, **values)
        except TypeError as error:
            unknown = values.keys() - signature.parameters.keys()
            close = difflib.get_close_matches(min(unknown, default=""), signature.parameters, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{cls.__name__}: {error}{hint}") from None
        return super().__call__(*args, **values)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(metaclass=CheckedCall):
    """Which checkpoint and how to sample; scripts extend this by flags of their own.

    Raises UserError for an unknown field and for a value of the wrong type or out of its range.
    """

    def __post_init__(self):
        with naming_flags({}):
            for name in options_of(SamplingConfig):
                value = getattr(self, name)
                if isinstance(value, os.PathLike):
                    object.__setattr__(self, name, value := os.fspath(value))
                options_of(type(self))[name].check(value)
            object.__setattr__(self, "objective", objective_named(self.objective, self.rf))

    ckpt: str = flag(
        group="model (read from the checkpoint; for published weights say what they do not)",
        help="run or step folder, .safetensors, a published .pt file, diffusers' DiT folder, or a "
        "hub id, OWNER/NAME[@REVISION][:FILE]",
    )
    ema: str | None = flag(
        None, help="which of a run's moving averages, such as 0.999 (default: its first)"
    )
    model: str | None = flag(None, help="size and patch size, such as DiT-XL/2")
    num_experts: int | None = flag(None, least=0, help="routed experts of a block; 0: dense")
    num_experts_per_tok: int | None = flag(None, least=1, help="experts of each token")
    num_classes: int | None = flag(None, least=1, help="number of classes")
    num_heads: int | None = flag(None, least=1, help="attention heads")
    input_size: int | None = flag(
        None,
        least=1,
        help="latent height and width, which a DSMoE's file does not say (default: 32)",
    )
    router_choice: str | None = flag(
        None, choices=("token", "expert"), help="expert for a ProMoE-EC, whose file does not say so"
    )
    router_scale: float | None = flag(None, above=0, help="of a DSMoE's expert weights")
    router_inference: str | None = flag(
        None, choices=("threshold", "count"),
        help="for a DiffMoE: count chooses as its code, where an image depends on its batch",
    )  # fmt: skip
    vae_path: str | None = flag(
        None, help="autoencoder: a folder in diffusers' format, or a hub id"
    )
    image_size: Size | None = flag(
        None, least=1, help="pixels a side of a square, or height and width"
    )
    objective: str | None = flag(
        None, choices=tuple(OBJECTIVES), help="what the model was trained for"
    )
    rf: bool | None = flag(None, help="published spelling of --objective rectified_flow")
    sampler: str | None = flag(
        None, group="sampler",
        help="; ".join(
            f"for {kind} {', '.join(f'{name} {one.default_steps}' for name, one in table.items())}"
            for kind, table in zip(("Gaussian diffusion", "flows"), SAMPLERS.values(), strict=False)
        ) + "; for mean_flow mean 4 and those of flows (with the default steps; the first is the "
        "default)",
    )  # fmt: skip
    num_sampling_steps: int | str | None = flag(
        None,
        help="default: the sampler's own; a step calls the model once, with heun twice. Gaussian "
        "diffusion also takes 10,5,3 (steps of equal sections) and ddim50 (a constant stride)",
    )  # fmt: skip
    time_shift: float | None = flag(
        None, above=0,
        help="of a flow: above 1 more of the steps are near the noise (default: that of training, "
        "--objective-shift)",
    )  # fmt: skip
    cfg_scale: float | None = flag(
        None,
        least=0,
        help="guidance; default: 1.5, or 1 (none) without label dropout or with guidance within "
        "training",
    )
    guide_ckpt: str | None = flag(
        None,
        help="a lesser model, such as an early checkpoint, to guide by in place of no class: guide "
        "+ scale (model - guide) (Karras et al. 2024, 2406.02507)",
    )
    guided_channels: int | str | None = flag(
        None,
        help="latent channels that guidance acts on, a number or 'all'; default: as published, 3 "
        "for Gaussian diffusion and all for flow; with --guide-ckpt all",
    )  # fmt: skip
    guidance_interval: tuple[float, float] = flag(
        (0.0, 1.0), metavar=("LOW", "HIGH"),
        help="times between which guidance acts, 0 for data to 1 for noise; outside it the "
        "unconditional pass is not computed (default: 0 1)",
    )  # fmt: skip
    precision: str | None = flag(
        None, choices=("fp32", "bf16", "fp16"),
        help="of the model; default: fp32, but for XL and G fp16 as published (on a CPU bf16); "
        "bf16 is the fast choice; python -m benchmarks.bench_sample measures them side by side",
    )  # fmt: skip
    quantize: str | None = flag(
        None, choices=("int8", "int4"),
        help="quantise the experts' weights: int8 needs about half of 16 bits, int4 about a third; "
        "the other weights stay in --precision",
    )  # fmt: skip
    offload: bool = flag(
        False,
        help="keep the blocks in host memory, or on a CPU in their file: each is copied while the "
        "block before it computes",
    )
    compile: bool = flag(False, help="compile each block with torch.compile")
    seed: int = flag(0, least=0, help="image i is drawn from seed + i")
    batch_size: int = flag(32, least=1, help="images at a time")
