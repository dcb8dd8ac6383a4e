"""Rectified flow: training on straight paths from data (t = 0) to noise (t = 1), and sampling.

Shape legend: N batch, C channels, h x w latent size, S sampling steps
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.guidance import classifier_free_guidance, first_channels, prediction_and_aux_loss
from diffusion.objective import Conditions, Network, Objective
from diffusion.samplers import SAMPLERS, Predict, Sampler, Times
from options.parts import option

TIMES = ("logit-normal", "uniform")


class RectifiedFlow(Objective):
    """Rectified flow (Liu et al. 2023): the network predicts the velocity noise - data.

    It receives t in [0, 1], not scaled to 1000. Of 2C output channels, the second C are ignored.
    """

    times: str = option("logit-normal", help="distribution of the training times", choices=TIMES)
    mean: float = option(0.0, help="mean of the normal distribution, for logit-normal times")
    std: float = option(
        1.0, gt=0, help="standard deviation of the normal distribution, for logit-normal times"
    )
    shift: float = option(
        1.0, gt=0,
        help="values above 1 move times towards the noise, in training and sampling: t becomes "
        "shift t / (1 + (shift - 1) t), Esser et al. 2024, equation 23; for RAE, a representation "
        "autoencoder, sqrt(n / 4096) with n elements per latent",
    )

    samplers = SAMPLERS["rectified_flow"]

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        time = t[:, None, None, None]                      # (N, 1, 1, 1)
        return (1 - time) * x + time * noise

    def draw_times(self, num_images: int, device: torch.device) -> Tensor:
        draw = torch.rand if self.times == "uniform" else torch.randn
        return self.time_of(draw(num_images, device=device))

    def time_quantile(self, u: Tensor) -> Tensor:
        return self.time_of(u if self.times == "uniform" else torch.special.ndtri(u))

    def uniform_time(self, u: Tensor) -> Tensor:
        return u

    def time_of(self, drawn: Tensor) -> Tensor:
        """Maps random numbers (N,) to times (N,): uniform ones for uniform times, standard normal
        ones for logit-normal times."""
        t = drawn if self.times == "uniform" else (self.mean + self.std * drawn).sigmoid()
        return shifted(t, self.shift)

    def sampling_times(
        self, sampler: Sampler, steps: int | str | None = None, shift: float | None = None
    ) -> Times:
        """Returns S + 1 times from 1 to 0: S equal steps, which are then shifted.

        With `Sampler.last_step`, the last step has that size after the shift.
        """
        steps, last = sampler.default_steps if steps is None else steps, sampler.last_step
        least = 2 if last else 1                           # the last step is one of its own
        if not isinstance(steps, int) or steps < least:
            expected = f"an integer at least {least}"
            raise ValueError(f"num_sampling_steps: got {steps}, expected {expected}")
        shift = self.shift if shift is None else shift
        if last:
            times = torch.cat([torch.linspace(1, shifted(last, 1 / shift), steps), torch.zeros(1)])
        else:
            times = torch.linspace(1, 0, steps + 1)
        return Times(shifted(times, shift).tolist())

    def velocity(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Converts the network's output at z, t (N,) to a velocity (N, C, h, w)."""
        return output

    def target(self, x: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Returns the target velocity (N, C, h, w)."""
        return noise - x

    def losses(
        self, network: Network, x: Tensor, y: Conditions, t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns "loss" (N,), the mean squared error of the velocity of each image, and
        "aux_loss"; see `Objective.losses`.

        Liu et al. 2023, equation 1, with time running from data to noise.
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
        """Calls `losses`, under the name that the published scripts use."""
        return self.losses(model, x, y, t, noise)

    def denoiser(self, predict: Predict) -> Predict:
        return lambda z, t, r=None: self.velocity(first_channels(predict(z, t), z), z, t)

    def sample(
        self, model: Callable[..., Tensor | tuple], z: Tensor, y: Tensor,
        null_y: Tensor | None = None, cfg_scale: float = 1.0, num_steps: int = 50,
        callback: Callable[[dict], None] | None = None, progress: bool = False,
    ) -> Tensor:
        """Integrates the flow from noise z (N, C, h, w); returns the data z_0, fp32.

        y: (N,) labels
        null_y: (N,) labels that mean "no class", required unless cfg_scale is 1
        cfg_scale: scale of classifier-free guidance, on all C channels
        num_steps: number of equal Euler steps from t = 1 to t = 0
        callback: see `diffusion.samplers`
        progress: show a progress bar
        """
        denoise = self.denoiser(classifier_free_guidance(model, y, null_y, cfg_scale))
        euler = self.samplers["euler"]
        times = self.sampling_times(euler, num_steps)
        return euler(denoise, z, times, callback, progress=progress)


def shifted(t: Tensor | float, shift: float) -> Tensor | float:
    """Shifts times t in [0, 1]; a shift above 1 moves them towards the noise.

    A shift of 1 / s inverts a shift of s. Esser et al. 2024, arXiv 2403.03206, equation 23.
    """
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


class XPredictionFlow(RectifiedFlow):
    """Rectified flow whose network predicts the data, with the loss on the velocity (JiT, Li and He
    2025, arXiv 2511.13720, table 1: x-prediction, v-loss).

    The velocity is (z - output) / max(t, clamp), for the target too, so the loss is the squared
    error of the data divided by max(t, clamp)^2. JiT's time runs in the opposite direction.
    """

    clamp: float = option(0.05, help="lower bound of t as a denominator", gt=0, le=1)
    noise_scale: float = option(
        1.0, help="standard deviation of the noise, in training and sampling", gt=0
    )

    # The velocity's error is that of the data divided by t. Near t = 0, guidance would amplify the
    # errors of a patch, and squares would show.
    guidance_interval = (0.1, 0.9)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return super().noised(x, self.noise_scale * noise, t)

    def velocity(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return (z - output) / t.clamp_min(self.clamp)[:, None, None, None]

    def target(self, x: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, z, t)
