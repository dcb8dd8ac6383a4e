"""What an objective is: the loss of a network, how its times are drawn, and how it is sampled.

    objective = OBJECTIVES["rectified_flow"](mean=-0.4)
    terms = objective.losses(network, x, y)     # minimise terms["loss"].mean() + terms["aux_loss"]
    denoise = objective.denoiser(classifier_free_guidance(network, y, null_y, 2.0))
    heun = objective.samplers["heun"]
    latents = heun(denoise, z, objective.sampling_times(heun, 25))

To add one: a subclass of `Objective`, or of another one, and its name in `OBJECTIVES`
(diffusion/objectives.py). Training, held-out loss, sampling, export and upcycling ask for nothing
else.

Shape legend: N batch, C channels, h x w latent size
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from diffusion.guidance import Conditions
from diffusion.samplers import Denoise, Sampler, Times
from parts import Part

Network = Callable[[Tensor, Tensor, Conditions], Tensor | tuple[Tensor, Tensor]]


class Objective(Part, ABC):
    """What a network is trained for. The network is called as network(z, t, y) and returns its
    output (N, C or 2C, h, w), or that and the routers' loss, a scalar."""

    samplers: ClassVar[dict[str, Sampler]]  # by name, the default first
    preview_sampler = None  # that training's sample grids take; None: the default
    preview_steps = 50
    conditions: ClassVar[tuple[str, ...]] = ()  # that the model needs, beside the user's
    guides_in_training = False  # whether it learns the guided prediction: `losses` takes `none`
    uses_jvp = False  # whether it takes torch.func.jvp of the network
    noise_time = 1.0  # the t of pure noise
    guided_channels = None  # how many of the first channels guidance acts on; None: all C
    guides_in_one_batch = False  # also a network whose predictions depend on the rest of the batch

    @abstractmethod
    def losses(
        self, network: Network, x: Tensor, y: Conditions, t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns "loss" (N,), "aux_loss", a scalar that is not part of it, and whatever else shall
        be logged, (N,) or scalar, by name.

        x: (N, C, h, w) data; y: labels (N,), or the conditions by name
        t: (N,) times as the network is told, drawn when None; noise: like x, drawn when None
        """

    def draw(self, x: Tensor) -> dict[str, Tensor]:
        """All that `losses` would draw for data x (N, C, h, w), by the names of its arguments."""
        return {"t": self.draw_times(len(x), x.device), "noise": torch.randn_like(x.float())}

    @abstractmethod
    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The input of the network (N, C, h, w) for data x and noise (N, C, h, w) at times (N,)."""

    @abstractmethod
    def draw_times(self, num_images: int, device: torch.device) -> Tensor:
        """Draws training's times (N,) from torch's generator."""

    @abstractmethod
    def time_quantile(self, share: Tensor) -> Tensor:
        """The quantile function of training's times: shares (N,) in [0, 1) to times (N,)."""

    @abstractmethod
    def uniform_time(self, share: Tensor) -> Tensor:
        """The times (N,) at a share (N,) in [0, 1) of the way from data to noise."""

    @abstractmethod
    def sampling_times(
        self, sampler: Sampler, steps: int | str | None = None, shift: float | None = None
    ) -> Times:
        """The times that a sampler visits.

        steps: their number, or for a Gaussian objective a spec of `space_timesteps`; None: the
            sampler's default
        shift: of a flow's times, see `RectifiedFlow.shift`; None: that of training

        Raises ValueError, "num_sampling_steps: ..." or "time_shift: ...", for what it cannot do.
        """

    def denoiser(self, predict: Denoise) -> Denoise:
        """Turns predict(z, t), the network's (guided) output, into what the samplers take."""
        return predict
