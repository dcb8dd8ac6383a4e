"""Base class of objectives: the training loss, the distribution of times, and sampling.

    objective = OBJECTIVES["rectified_flow"](mean=-0.4)
    terms = objective.losses(network, x, y)     # minimise terms["loss"].mean() + terms["aux_loss"]
    denoise = objective.denoiser(classifier_free_guidance(network, y, null_y, 2.0))
    heun = objective.samplers["heun"]
    latents = heun(denoise, z, objective.sampling_times(heun, 25))

To add an objective, write a subclass of `Objective`, or of an existing one, and add it to
`OBJECTIVES` (diffusion/objectives.py). All other code uses only the methods and attributes below.

Shape legend: N batch, C channels, h x w latent size
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from diffusion.guidance import Conditions
from diffusion.samplers import Predict, Sampler, Times
from options.parts import Component

Network = Callable[[Tensor, Tensor, Conditions], Tensor | tuple[Tensor, Tensor]]


class Objective(Component, ABC):
    """Base class of training objectives.

    The network is called as network(z, t, y). It returns its output (N, C or 2C, h, w), or the
    output and the auxiliary loss, a scalar.
    """

    samplers: ClassVar[dict[str, Sampler]]  # by name, the default first
    preview_sampler = None  # sampler of the sample grids of training; None: the default
    conditions: ClassVar[tuple[str, ...]] = ()  # conditions that the model needs for this objective
    # Whether the network learns guided predictions. `losses` then also takes `null_y`, the
    # conditions of images without a class.
    guides_in_training = False
    uses_jvp = False  # whether the loss applies torch.func.jvp to the network
    noise_time = 1.0  # t of pure noise
    noise_scale = 1.0  # factor of the standard normal noise that sampling starts from and adds
    guided_channels = None  # number of leading channels that guidance acts on; None: all C
    guidance_interval = (0.0, 1.0)  # times in which guidance acts, see `guidance_within`
    # Whether guidance puts the conditional and the unconditional half into one batch even if a
    # prediction depends on the other images of the batch.
    guides_in_one_batch = False

    @abstractmethod
    def losses(
        self, network: Network, x: Tensor, y: Conditions, t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns "loss" (N,), "aux_loss" (a separate scalar) and values to log, (N,) or scalar.

        x: (N, C, h, w) data
        y: labels (N,), or conditions by name
        t: (N,) times as the network receives them; drawn if None
        noise: like x; drawn if None
        """

    def draw(self, x: Tensor) -> dict[str, Tensor | int]:
        """Draws the random arguments of `losses` for data x (N, C, h, w); returns them by name."""
        return {"t": self.draw_times(len(x), x.device), "noise": torch.randn_like(x.float())}

    @abstractmethod
    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the network's input (N, C, h, w) for data x and noise, at times t (N,)."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "time_quantile" in vars(cls) and "draw_times" not in vars(cls):
            cls.draw_times = Objective.draw_times  # not those of a base class with other times

    def draw_times(self, num_images: int, device: torch.device) -> Tensor:
        """Draws training times (N,) from torch's generator, by `time_quantile`."""
        return self.time_quantile(torch.rand(num_images, device=device))

    @abstractmethod
    def time_quantile(self, u: Tensor) -> Tensor:
        """Quantile function of the training times: maps u (N,) in [0, 1) to times (N,)."""

    @abstractmethod
    def uniform_time(self, u: Tensor) -> Tensor:
        """Maps u (N,) in [0, 1) to times (N,), linearly from data to noise."""

    @abstractmethod
    def sampling_times(
        self, sampler: Sampler, steps: int | str | None = None, shift: float | None = None
    ) -> Times:
        """Returns the times that a sampler visits.

        steps: number of steps or, for a Gaussian objective, a spec of `space_timesteps`; None: the
            sampler's default
        shift: shift of a flow's times, see `RectifiedFlow.shift`; None: the shift of training

        A ValueError begins with the flag's name: "num_sampling_steps: ..." or "time_shift: ...".
        """

    def denoiser(self, predict: Predict) -> Predict:
        """Converts the network's (guided) output predict(z, t, r=None) to a sampler's `denoise`."""
        return predict
