"""Training losses and samplers for diffusion and rectified flow, independent of the network.

    diffusion = create_diffusion("250")
    denoise = classifier_free_guidance(model, y, null_y, 4.0, channels=3)
    latents = diffusion.p_sample_loop(denoise, z.shape, z, clip_denoised=False)
    unipc = SAMPLERS["gaussian"]["unipc"]
    latents = unipc(denoise, z, OBJECTIVES["gaussian"]().sampling_times(unipc, 20))
"""

from diffusion.gaussian_diffusion import GaussianDiffusion, create_diffusion
from diffusion.guidance import classifier_free_guidance, guidance_within
from diffusion.noise import PerImageNoise
from diffusion.objective import Objective
from diffusion.objectives import OBJECTIVES
from diffusion.rectified_flow import RectifiedFlow
from diffusion.samplers import SAMPLERS, Sampler, Times
from diffusion.schedule import space_timesteps
