"""The objectives by name, as --objective and checkpoints have it, and Gaussian diffusion's.

Shape legend: N batch, C channels, h x w latent size
"""

from functools import cached_property

import torch
from torch import Tensor

from diffusion.gaussian_diffusion import GaussianDiffusion, create_diffusion
from diffusion.objective import Network, Objective
from diffusion.rectified_flow import DataFlow, RectifiedFlow
from diffusion.samplers import SAMPLERS


class Gaussian(Objective):
    """DDPM's chain of 1000 steps (Ho et al. 2020), with a learnt variance if the network has the
    channels for it (Nichol and Dhariwal 2021); see `GaussianDiffusion.training_losses`."""

    samplers = SAMPLERS["gaussian"]
    preview_sampler = "ddim"
    noise_time = 999.0
    guided_channels = 3  # as in the published sampler
    guides_in_one_batch = True  # as DiffMoE's DDPM does, and its flow does not

    @cached_property
    def chain(self) -> GaussianDiffusion:
        return create_diffusion(learn_sigma=None)

    def losses(
        self, network: Network, x: Tensor, y: Tensor, t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        t = self.draw_times(len(x), x.device) if t is None else t
        return self.chain.training_losses(network, x, t, {"y": y}, noise)

    def draw_times(self, num_images: int, device: torch.device) -> Tensor:
        return torch.randint(self.chain.num_timesteps, (num_images,), device=device)

    def time_quantile(self, share: Tensor) -> Tensor:
        return (share * self.chain.num_timesteps).long()

    uniform_time = time_quantile


OBJECTIVES: dict[str, type[Objective]] = {
    "gaussian": Gaussian,
    "rectified_flow": RectifiedFlow,
    "flow_x": DataFlow,
}


def objective_named(objective: str | None, rf: bool | None) -> str | None:
    """The objective that --objective or the published --rf names; ValueError if they differ."""
    published = {None: objective, True: "rectified_flow", False: "gaussian"}[rf]
    if objective not in (None, published):
        raise ValueError(f"objective: got {objective} beside rf {rf}, expected one of them")
    return published
