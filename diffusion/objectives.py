"""Gaussian objectives, and all objectives by the name that --objective and checkpoints use.

Shape legend: N batch, C channels, h x w latent size
"""

from functools import cached_property

import torch
from torch import Tensor

from diffusion.gaussian_diffusion import GaussianDiffusion, create_diffusion
from diffusion.guidance import prediction_and_aux_loss
from diffusion.objective import Conditions, Network, Objective
from diffusion.rectified_flow import RectifiedFlow, XPredictionFlow
from diffusion.samplers import SAMPLERS, Predict, Sampler, Times
from diffusion.schedule import space_timesteps
from options.parts import Registry, option


class Gaussian(Objective):
    """Noise prediction on DDPM's chain of 1000 steps (Ho et al. 2020).

    The variance is learnt if the network has channels for it (Nichol and Dhariwal 2021). See
    `GaussianDiffusion.training_losses`.
    """

    schedule: str = option(
        "linear", choices=("linear", "squaredcos_cap_v2"),
        help="noise schedule; squaredcos_cap_v2 is Nichol and Dhariwal's cosine schedule",
    )

    samplers = SAMPLERS["gaussian"]
    preview_sampler = "ddim"
    noise_time = 999.0
    guided_channels = 3  # as in the published sampler
    guides_in_one_batch = True  # as in DiffMoE's code for DDPM, unlike its code for flows

    @cached_property
    def diffusion(self) -> GaussianDiffusion:
        return create_diffusion(noise_schedule=self.schedule, learn_sigma=None)

    def losses(
        self, network: Network, x: Tensor, y: Conditions, t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        t = self.draw_times(len(x), x.device) if t is None else t
        return self.diffusion.training_losses(network, x, t, {"y": y}, noise)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.diffusion.q_sample(x, t, noise)

    def draw_times(self, num_images: int, device: torch.device) -> Tensor:
        return torch.randint(self.diffusion.num_timesteps, (num_images,), device=device)

    def time_quantile(self, u: Tensor) -> Tensor:
        return (u * self.diffusion.num_timesteps).long()

    uniform_time = time_quantile

    def sampling_times(
        self, sampler: Sampler, steps: int | str | None = None, shift: float | None = None
    ) -> Times:
        """Returns steps of the chain, largest first.

        A number of steps is spread evenly; for a spec see `space_timesteps`.
        """
        if shift is not None:
            raise ValueError("time_shift: has no effect on a Gaussian objective, only on a flow")
        steps = sampler.default_steps if steps is None else steps
        most = self.diffusion.num_timesteps - sampler.ends_above_zero
        if isinstance(steps, int) and not 1 <= steps <= most:
            raise ValueError(f"num_sampling_steps: got {steps}, expected 1 to {most}")
        if isinstance(steps, int) and sampler.ends_above_zero:
            kept = torch.linspace(999, 0, steps + 1, dtype=torch.float64)[:-1].round().long()
            return Times(kept.tolist(), self.diffusion)
        try:
            kept = space_timesteps(self.diffusion.num_timesteps, steps)
        except ValueError as error:
            raise ValueError(f"num_sampling_steps: {error}") from None
        return Times(kept[::-1], self.diffusion)


class GaussianV(Gaussian):
    """Prediction of v = sqrt(a) noise - sqrt(1 - a) x on DDPM's chain (Salimans and Ho 2022, arXiv
    2202.00512, appendix D).

    a is `alphas_cumprod` at t. The loss is the squared error of v.
    """

    guided_channels = None

    def losses(
        self, network: Network, x: Tensor, y: Conditions, t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        x, channels = x.float(), x.shape[1]
        t = self.draw_times(len(x), x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise.float()
        x_t = self.noised(x, noise, t)                     # (N, C, h, w)
        v, aux_loss = prediction_and_aux_loss(network(x_t, t, y))  # (N, C or 2C, h, w)
        # The term "vb" of the noise objective trains the variance. It has no gradient to the mean.
        terms = super().losses(lambda *_, **__: (self.epsilon(v, x_t, t), aux_loss), x, y, t, noise)
        # The target sqrt(a) noise - sqrt(1 - a) x is `noised` with noise as data and -x as noise.
        mse = (self.noised(noise, -x, t) - v[:, :channels]).square().flatten(1).mean(1)  # (N,)
        return {**terms, "mse": mse, "loss": mse + terms["vb"]}

    def denoiser(self, predict: Predict) -> Predict:
        return lambda x, t, r=None: self.epsilon(predict(x, t), x, t)

    def epsilon(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Converts a network's output v (N, C or 2C, h, w) at x, t (N,) to the noise."""
        noise = self.noised(v[:, : x.shape[1]], x, t)      # sqrt(a) v + sqrt(1 - a) x
        return torch.cat([noise, v[:, x.shape[1] :]], dim=1)


OBJECTIVES = Registry({
    "gaussian": Gaussian,
    "gaussian_v": GaussianV,
    "rectified_flow": RectifiedFlow,
    "flow_x": XPredictionFlow,
}, elsewhere={"mean_flow": "extras.mean_flow"})  # fmt: skip


def objective_named(objective: str | None, rf: bool | None) -> str | None:
    """Returns the objective that --objective or the published flag --rf names."""
    chosen = {None: objective, True: "rectified_flow", False: "gaussian"}[rf]
    if objective not in (None, chosen):
        raise ValueError(f"objective: {objective} contradicts rf {rf}; pass one of them")
    return chosen
