"""Rectified flow: training on straight paths from data (t = 0) to noise (t = 1), and sampling.

A sampler is a plain function of (denoise, z, timesteps, callback), where denoise(z, t) predicts
the velocity; `euler` is the first.

# N batch, C channels, h w latent size, S sampling steps
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import trange

from diffusion.guidance import classifier_free_guidance, prediction_and_aux_loss


class RectifiedFlow:
    """Loss and sampling of rectified flow (Liu et al. 2023) with logit-normal times.

    The network is called as model(z_t, t, y), t in [0, 1] and not scaled to 1000; it returns the
    velocity, or (velocity, aux_loss). Of 2C output channels the second C are ignored.
    """

    def training_losses(
        self,
        model: Callable[..., Tensor | tuple],
        x: Tensor,
        y: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the squared error of the predicted velocity, and the network's own aux loss.

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
        velocity = _velocity_channels(prediction, x)       # (N, C, h, w)
        loss = (noise - x - velocity).square().flatten(1).mean(1)
        return {"loss": loss, "aux_loss": aux_loss}

    def sample(
        self,
        model: Callable[..., Tensor | tuple],
        z: Tensor,
        y: Tensor,
        null_y: Tensor | None = None,
        cfg_scale: float = 1.0,
        num_steps: int = 50,
        callback: Callable[[dict], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Return z_0 (N, C, h, w), fp32, the image that noise z (N, C, h, w) flows to.

        y: (N,) labels; null_y: (N,) labels without a class, needed unless cfg_scale is 1
        cfg_scale: classifier-free guidance, on all C channels
        num_steps: equal Euler steps from t = 1 to t = 0
        callback: see `euler`; progress: show a bar

        Raises ValueError for num_steps below 1 and for a missing null_y.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        guided = classifier_free_guidance(model, y, null_y, cfg_scale)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            return _velocity_channels(guided(z, t), z)

        timesteps = torch.linspace(1, 0, num_steps + 1)    # (S + 1,)
        return euler(velocity, z.float(), timesteps, callback=callback, progress=progress)


@torch.no_grad()
def euler(
    denoise: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    timesteps: Tensor,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Follow dz/dt = denoise(z, t) along `timesteps` by Euler's method; return the last state.

    denoise: takes z (N, C, h, w) and t (N,) in [0, 1], returns the velocity (N, C, h, w)
    z: (N, C, h, w) at timesteps[0]; timesteps: (S + 1,), on the CPU so that no step waits
    callback: called after each step with "step" from 0, "t" (N,) as given to the network, "x" the
        state after the step, "pred_xstart" the end of the straight line from (z, t) to t = 0
    """
    times = timesteps.tolist()
    for step in trange(len(times) - 1, disable=not progress):
        t = z.new_full((len(z),), times[step])             # (N,)
        velocity = denoise(z, t)                           # (N, C, h, w)
        previous, z = z, z + (times[step + 1] - times[step]) * velocity
        if callback is not None:
            pred_xstart = previous - times[step] * velocity
            callback({"step": step, "t": t, "x": z, "pred_xstart": pred_xstart})
    return z


def _velocity_channels(prediction: Tensor, x: Tensor) -> Tensor:
    channels = x.shape[1]
    if prediction.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the network must predict {channels} or {2 * channels} channels, "
            f"got {prediction.shape[1]}"
        )
    return prediction[:, :channels]
