"""Training losses and samplers for diffusion and rectified flow; knows nothing of the network.

diffusion = create_diffusion("250")
denoise = classifier_free_guidance(model, y, null_y, 4.0, channels=3)
latents = diffusion.p_sample_loop(denoise, z.shape, z, clip_denoised=False)
"""

from diffusion.gaussian_diffusion import GaussianDiffusion, noise_schedule_betas
from diffusion.guidance import classifier_free_guidance
from diffusion.noise import PerImageNoise
from diffusion.rectified_flow import RectifiedFlow
from diffusion.respace import respaced_betas, space_timesteps

__all__ = [
    "GaussianDiffusion",
    "PerImageNoise",
    "RectifiedFlow",
    "classifier_free_guidance",
    "create_diffusion",
    "space_timesteps",
]


def create_diffusion(
    timestep_respacing: str | int | None = "",
    noise_schedule: str = "linear",
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    sigma_small: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """Return the diffusion chain that a DiT trains on, or a shorter one to sample with.

    timestep_respacing: "" for the whole chain (training), else see `space_timesteps`
    noise_schedule: "linear" or "squaredcos_cap_v2"
    predict_xstart: the network predicts x at t = 0 instead of the noise
    learn_sigma: the network has 2C output channels, the second C of which choose the variance
    sigma_small: without learn_sigma, the posterior variance instead of beta
    diffusion_steps: length of the chain before respacing

    Raises ValueError for an unknown schedule or a respacing that the chain does not allow.
    """
    timesteps = space_timesteps(diffusion_steps, timestep_respacing)
    betas = respaced_betas(noise_schedule_betas(noise_schedule, diffusion_steps), timesteps)
    fixed_variance = "fixed_small" if sigma_small else "fixed_large"
    return GaussianDiffusion(
        betas,
        timestep_map=timesteps,
        prediction="x_start" if predict_xstart else "epsilon",
        variance="learned_range" if learn_sigma else fixed_variance,
    )
