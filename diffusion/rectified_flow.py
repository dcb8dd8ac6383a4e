"""Rectified flow: training on straight paths from data (t = 0) to noise (t = 1), and sampling.

Shape legend: N batch, C channels, h x w latent size, S sampling steps
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.guidance import classifier_free_guidance, first_channels, prediction_and_aux_loss
from diffusion.objective import Conditions, Network, Objective
from diffusion.samplers import SAMPLERS, Denoise, Sampler, Times, euler
from parts import option

TIMES = ("logit-normal", "uniform")


class RectifiedFlow(Objective):
    """Rectified flow (Liu et al. 2023) whose network predicts the velocity noise - data.

    The network's t is in [0, 1] and not scaled to 1000. Of 2C output channels the second C are
    ignored.
    """

    times: str = option("logit-normal", help="what training draws its times from", choices=TIMES)
    mean: float = option(0.0, help="mean of the normal whose sigmoid a time is")
    std: float = option(1.0, help="its standard deviation", above=0)
    shift: float = option(
        1.0, above=0,
        help="above 1 more times are near the noise, in training and sampling: t <- shift t / (1 + "
        "(shift - 1) t), Esser et al. 2024, equation 23; RAE takes sqrt(N / 4096) for latents of N "
        "numbers",
    )

    samplers = SAMPLERS["rectified_flow"]

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        time = t[:, None, None, None]                      # (N, 1, 1, 1)
        return (1 - time) * x + time * noise

    def draw_times(self, num_images: int, device: torch.device) -> Tensor:
        draw = torch.rand if self.times == "uniform" else torch.randn
        return self.time_of(draw(num_images, device=device))

    def time_quantile(self, share: Tensor) -> Tensor:
        return self.time_of(share if self.times == "uniform" else torch.special.ndtri(share))

    def uniform_time(self, share: Tensor) -> Tensor:
        return share

    def time_of(self, drawn: Tensor) -> Tensor:
        """The times of uniform numbers, or of normal ones."""
        t = drawn if self.times == "uniform" else (self.mean + self.std * drawn).sigmoid()
        return shifted(t, self.shift)

    def sampling_times(
        self, sampler: Sampler, steps: int | str | None = None, shift: float | None = None
    ) -> Times:
        """S equal steps from 1 to 0 (the last of the sampler's own size), shifted."""
        steps, last = sampler.default_steps if steps is None else steps, sampler.last_step
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_sampling_steps: got {steps}, expected a number, at least 1")
        shift = self.shift if shift is None else shift
        if last and steps > 1:
            times = torch.cat([torch.linspace(1, shifted(last, 1 / shift), steps), torch.zeros(1)])
        else:
            times = torch.linspace(1, 0, steps + 1)
        return Times(shifted(times, shift).tolist())

    def velocity(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The velocity (N, C, h, w) that the network's output stands for at z, t (N,)."""
        return output

    def target(self, x: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The velocity (N, C, h, w) that is right."""
        return noise - x

    def losses(
        self, network: Network, x: Tensor, y: Conditions, t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns "loss" (N,), the squared error of the velocity, the mean over each image, and
        "aux_loss"; see `Objective.losses`.

        Raises ValueError unless the network gives C or 2C channels. Liu et al. 2023, equation 1,
        with time running from data to noise.
        """
        x = x.float()
        t = self.draw_times(len(x), x.device) if t is None else t.float()
        noise = torch.randn_like(x) if noise is None else noise.float()
        z_t = self.noised(x, noise, t)                     # (N, C, h, w)
        prediction, aux_loss = prediction_and_aux_loss(network(z_t, t, y))
        velocity = self.velocity(first_channels(prediction, x), z_t, t)  # (N, C, h, w)
        loss = (self.target(x, noise, z_t, t) - velocity).square().flatten(1).mean(1)
        return {"loss": loss, "aux_loss": aux_loss}

    def training_losses(
        self, model: Network, x: Tensor, y: Conditions, t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`losses` under the published scripts' name."""
        return self.losses(model, x, y, t, noise)

    def denoiser(self, predict: Denoise) -> Denoise:
        return lambda z, t, r=None: self.velocity(first_channels(predict(z, t), z), z, t)

    def sample(
        self, model: Callable[..., Tensor | tuple], z: Tensor, y: Tensor,
        null_y: Tensor | None = None, cfg_scale: float = 1.0, num_steps: int = 50,
        callback: Callable[[dict], None] | None = None, progress: bool = False,
    ) -> Tensor:
        """Returns z_0 (N, C, h, w), fp32, the image that noise z (N, C, h, w) flows to.

        y: (N,) labels; null_y: (N,) labels without a class, needed unless cfg_scale is 1
        cfg_scale: classifier-free guidance, on all C channels
        num_steps: equal Euler steps from t = 1 to t = 0
        callback: see `euler`; progress: show a bar

        Raises ValueError for num_steps below 1 and for a missing null_y.
        """
        denoise = self.denoiser(classifier_free_guidance(model, y, null_y, cfg_scale))
        times = self.sampling_times(self.samplers["euler"], num_steps)
        return euler(denoise, z, times, callback, progress=progress)


def shifted(t: Tensor | float, shift: float) -> Tensor | float:
    """The times t in [0, 1], moved towards the noise for a shift above 1 (Esser et al. 2024, arXiv
    2403.03206, equation 23). A shift of 1 / s takes a shift of s back."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


class DataFlow(RectifiedFlow):
    """Rectified flow whose network predicts the data, with the loss on the velocity (JiT, Li and He
    2025, arXiv 2511.13720, table 1: x-prediction, v-loss).

    The velocity (z - output) / t divides by t, which is clamped from below, in the target too: so
    the loss is the squared error of the data over max(t, clamp)^2. JiT's time runs the other way.
    """

    clamp: float = option(0.05, help="the least t that is divided by", above=0, most=1)

    def velocity(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return (z - output) / t.clamp_min(self.clamp)[:, None, None, None]

    def target(self, x: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, z, t)
