"""From labels and seeds to latents: what sampling, evaluation and analysis all call.

latents = generate(model, labels=[207], seeds=[0], objective="gaussian", num_steps=250)
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from diffusion import SAMPLERS, PerImageNoise, classifier_free_guidance, guidance_schedule
from models import DiT
from runtime.errors import UserError

DEFAULT_STEPS = {
    "ddpm": 250, "ddim": 50, "euler": 50, "heun": 25, "sde": 250, "dpm-solver++": 25, "unipc": 25,
}  # fmt: skip
MOST_STEPS = {"ddpm": 1000, "ddim": 1000, "dpm-solver++": 999, "unipc": 999}  # of the chain


def choose_sampler(objective: str, sampler: str | None, num_steps: int | None) -> tuple[str, int]:
    """Fills in the default sampler and step count of an objective; UserError for a wrong pair."""
    if objective not in SAMPLERS:
        raise UserError(f"objective: got {objective!r}, expected one of {sorted(SAMPLERS)}")
    sampler = sampler or next(iter(SAMPLERS[objective]))
    if sampler not in SAMPLERS[objective]:
        raise UserError(
            f"--sampler: got {sampler}, expected one of {', '.join(SAMPLERS[objective])} for a "
            f"model trained with {objective}"
        )
    num_steps = num_steps or DEFAULT_STEPS[sampler]
    if objective == "gaussian" and num_steps > MOST_STEPS[sampler]:
        raise UserError(
            f"--num-sampling-steps: got {num_steps}, expected at most {MOST_STEPS[sampler]}"
        )
    return sampler, num_steps


def check_images(model: DiT, labels: Sequence[int], seeds: Sequence[int]) -> None:
    """Raises UserError for a seed or a label that is out of range."""
    num_classes = model.config.num_classes
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise UserError(f"--seed: got an image seed of {wrong[0]}, expected 0 to {2**32 - 1}")
    if wrong := [label for label in labels if not 0 <= label < num_classes]:
        raise UserError(f"labels: got {wrong[0]}, expected 0 to {num_classes - 1}")


def check_guidance(model: DiT, cfg_scale: float, guided_channels: int | None) -> None:
    """Raises UserError for guidance that a model cannot be given."""
    config = model.config
    if cfg_scale != 1 and config.class_dropout_prob == 0:
        raise UserError(
            f"--cfg-scale: got {cfg_scale}, expected 1: the model was trained without label dropout"
        )
    if guided_channels is not None and not 1 <= guided_channels <= config.in_channels:
        raise UserError(
            f"--guided-channels: got {guided_channels}, expected 1 to {config.in_channels}, or all"
        )
    if not math.isfinite(cfg_scale):
        raise UserError(f"--cfg-scale: got {cfg_scale}, expected a number")


@torch.inference_mode()
def generate(
    model: DiT,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    objective: str,
    sampler: str | None = None,
    num_steps: int | None = None,
    cfg_scale: float = 1.0,
    guided_channels: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_shape: str = "constant",
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Samples one latent for each (label, seed); returns (N, C, h, w) fp32.

    Every draw for an image comes from its own seed, so the image does not depend on what else is
    in the batch. The sampler's state is fp32 whatever the model's precision. Guidance acts on the
    first `guided_channels` channels, or on all with None; with cfg_scale 1 there is none, and else
    the model sees [conditional; unconditional]. Interval and shape make the scale depend on the
    time, 0 for data to 1 for noise: see `guidance_schedule`. `callback` is the sampler's.

    Raises UserError for a sampler that does not fit the objective, labels, seeds or channels out of
    range, a wrong interval, and guidance of a model without a "no class" label.
    """
    sampler, num_steps = choose_sampler(objective, sampler, num_steps)
    config = model.config
    check_images(model, labels, seeds)
    check_guidance(model, cfg_scale, guided_channels)
    try:
        scale = guidance_schedule(
            cfg_scale,
            guidance_interval,
            guidance_shape,
            time_scale=999 if objective == "gaussian" else 1,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    device = next(model.parameters()).device
    y = torch.tensor(labels, device=device)  # (N,)
    null_y = torch.full_like(y, config.num_classes) if cfg_scale != 1 else None
    noise = PerImageNoise(seeds)
    z = noise.randn((config.in_channels, config.input_size, config.input_size), device)
    sample = SAMPLERS[objective][sampler]
    if sampler in ("ddpm", "ddim"):
        sample = partial(sample, learn_sigma=config.learn_sigma)
    return sample(
        classifier_free_guidance(model, y, null_y, scale, channels=guided_channels),
        z,
        num_steps,
        callback,
        noise_fn=noise.randn_like,
        progress=progress,
    )
