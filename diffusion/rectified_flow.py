"""Rectified flow: training on straight paths from data (t = 0) to noise (t = 1), and sampling.

`RectifiedFlow.sample` is Euler's method; `diffusion.samplers` has it and the others.

Shape legend: N batch, C channels, h x w latent size, S sampling steps
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.guidance import classifier_free_guidance, prediction_and_aux_loss
from diffusion.samplers import euler, first_channels


class RectifiedFlow:
    """Loss and sampling of rectified flow (Liu et al. 2023) with logit-normal times.

    The network is called as model(z_t, t, y), t in [0, 1] and not scaled to 1000; it returns the
    velocity, or (velocity, aux_loss). Of 2C output channels the second C are ignored.
    """

    def time_at(self, share: Tensor) -> Tensor:
        """Returns the time (N,) below which that share (N,) in [0, 1) of training's times lie."""
        return torch.special.ndtri(share).sigmoid()

    def training_losses(
        self, model: Callable[..., Tensor | tuple], x: Tensor, y: Tensor,
        t: Tensor | None = None, noise: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Returns the squared error of the predicted velocity, and the network's own aux loss.

        x: (N, C, h, w) data; y: (N,) labels
        t: (N,) in [0, 1]; when None, the sigmoid of a normal draw (Esser et al. 2024, 3.1)
        noise: (N, C, h, w), drawn when None

        Returns "loss" (N,), the mean over each image, and "aux_loss", a scalar that is not part
        of it: minimise loss.mean() + aux_loss. Raises ValueError unless the model gives C or 2C
        channels. Liu et al. 2023, equation 1, with time running from data to noise.
        """
        x = x.float()
        t = torch.randn(len(x), device=x.device).sigmoid() if t is None else t.float()
        noise = torch.randn_like(x) if noise is None else noise.float()
        time = t[:, None, None, None]                      # (N, 1, 1, 1)
        z_t = (1 - time) * x + time * noise                # (N, C, h, w)
        prediction, aux_loss = prediction_and_aux_loss(model(z_t, t, y))
        velocity = first_channels(prediction, x)           # (N, C, h, w)
        loss = (noise - x - velocity).square().flatten(1).mean(1)
        return {"loss": loss, "aux_loss": aux_loss}

    def sample(
        self, model: Callable[..., Tensor | tuple], z: Tensor, y: Tensor,
        null_y: Tensor | None = None, cfg_scale: float = 1.0, num_steps: int = 50,
        callback: Callable[[dict], None] | None = None, progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """Returns z_0 (N, C, h, w), fp32, the image that noise z (N, C, h, w) flows to.

        y: (N,) labels; null_y: (N,) labels without a class, needed unless cfg_scale is 1
        cfg_scale: classifier-free guidance, on all C channels
        num_steps: equal Euler steps from t = 1 to t = 0
        callback: see `euler`; progress: show a bar

        Raises ValueError for num_steps below 1 and for a missing null_y.
        """
        denoise = classifier_free_guidance(model, y, null_y, cfg_scale)
        return euler(denoise, z, num_steps, callback, progress=progress)
