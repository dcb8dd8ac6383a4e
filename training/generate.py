"""From labels and seeds to latents: what sampling, evaluation and analysis all call.

latents = generate(model, labels=[207], seeds=[0], objective="gaussian", num_steps=250)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion import PerImageNoise, RectifiedFlow, classifier_free_guidance, create_diffusion
from models import DiT
from training.errors import UserError

SAMPLERS = {"gaussian": ("ddpm", "ddim"), "rectified_flow": ("euler",)}
DEFAULT_STEPS = {"ddpm": 250, "ddim": 50, "euler": 50}


def choose_sampler(objective: str, sampler: str | None, num_steps: int | None) -> tuple[str, int]:
    """Fills in the default sampler and step count of an objective; UserError for a wrong pair."""
    if objective not in SAMPLERS:
        raise UserError(f"objective: got {objective!r}, expected one of {sorted(SAMPLERS)}")
    sampler = sampler or SAMPLERS[objective][0]
    if sampler not in SAMPLERS[objective]:
        raise UserError(
            f"--sampler: got {sampler}, expected one of {', '.join(SAMPLERS[objective])} for a "
            f"model trained with {objective}"
        )
    num_steps = num_steps or DEFAULT_STEPS[sampler]
    if objective == "gaussian" and num_steps > 1000:
        raise UserError(f"--num-sampling-steps: got {num_steps}, expected at most 1000")
    return sampler, num_steps


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
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Samples one latent for each (label, seed); returns (N, C, h, w) fp32.

    Every draw for an image comes from its own seed, so the image does not depend on what else is
    in the batch. The sampler's state is fp32 whatever the model's precision. Guidance acts on the
    first `guided_channels` channels, or on all with None; with cfg_scale 1 there is none, and else
    the model sees [conditional; unconditional]. `callback` is the sampler's.

    Raises UserError for a sampler that does not fit the objective, and for guidance of a model
    without a "no class" label.
    """
    sampler, num_steps = choose_sampler(objective, sampler, num_steps)
    config = model.config
    if cfg_scale != 1 and config.class_dropout_prob == 0:
        raise UserError(
            f"--cfg-scale: got {cfg_scale}, expected 1: the model was trained without label dropout"
        )
    device = next(model.parameters()).device
    y = torch.tensor(labels, device=device)  # (N,)
    null_y = torch.full_like(y, config.num_classes) if cfg_scale != 1 else None
    noise = PerImageNoise(seeds)
    z = noise.randn((config.in_channels, config.input_size, config.input_size), device)
    if objective == "rectified_flow":
        return RectifiedFlow().sample(
            model, z, y, null_y, cfg_scale=cfg_scale, num_steps=num_steps, callback=callback,
            progress=progress,
        )  # fmt: skip
    diffusion = create_diffusion(str(num_steps), learn_sigma=config.learn_sigma)
    sample = diffusion.p_sample_loop if sampler == "ddpm" else diffusion.ddim_sample_loop
    return sample(
        classifier_free_guidance(model, y, null_y, cfg_scale, channels=guided_channels),
        z.shape,
        z,
        clip_denoised=False,
        noise_fn=noise.randn_like,
        callback=callback,
        progress=progress,
    )
