"""The objective `mean_flow`: the network predicts the mean velocity between two times, and one step
can suffice.

u(z_t, r, t) is the mean over [r, t] of the velocity along the flow's path through z_t at t. The
mean satisfies u = v - (t - r) du/dt, where v is the velocity at t and du/dt is the derivative along
that path (Geng et al. 2025, arXiv 2505.13447, equation 6). Training fits u + (t - r) du/dt to v,
without a gradient through du/dt. For r = t, training fits u to v, as in rectified flow.

Shape legend: N batch, M images with r < t, C channels, h x w latent size
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from conditions import (
    CONDITIONS,
    WAVES,
    Condition,
    EmbedderConfig,
    ZeroLinear,
    sinusoids,
    two_layers,
)
from diffusion.guidance import Conditions, first_channels, prediction_and_aux_loss, with_span
from diffusion.objective import Network
from diffusion.objectives import OBJECTIVES
from diffusion.rectified_flow import RectifiedFlow
from diffusion.samplers import SAMPLERS, Moved, NoiseFn, Predict, Sampler, integrate, velocity_at
from options.parts import option


def mean_velocity(denoise: Predict, z: Tensor, t: float, r: float, noise_fn: NoiseFn) -> Moved:
    """Steps from time t to the next time r by the mean velocity denoise(z, t, r).

    One evaluation per step. With an exact network, any number of steps gives the exact result.
    Geng et al. 2025, arXiv 2505.13447, equation 12.
    """
    velocity = velocity_at(denoise, z, t, r)
    return z + (r - t) * velocity, velocity


class MeanFlow(RectifiedFlow):
    """Mean flow (arXiv 2505.13447) and improved mean flow (Geng et al. 2025, arXiv 2512.02012,
    algorithm 1). The options `span_share` and `tangent` choose between the two.

    The condition `span` gives t - r to the network. The pass for du/dt has only the M images with
    r < t: `race` and `batch_pool` see a smaller pool there.
    """

    mean: float = option(-0.4, help="mean of the normal distribution, for logit-normal times")
    span_share: float = option(
        0.5,
        ge=0,
        le=1,
        help="fraction of images with r < t; mean flow uses 0.25, improved mean flow 0.5",
    )
    tangent: str = option(
        "network",
        choices=("network", "data"),
        help="velocity along which du/dt is computed: network, the network's velocity at r = t "
        "(improved mean flow); data, the target velocity (mean flow), which saves one pass unless "
        "omega or kappa is set",
    )
    weight_power: float = option(
        1.0,
        ge=0,
        help="exponent p: the squared error e of an image, summed over its elements, is divided by "
        "(e + 0.01)^p",
    )
    omega: float = option(
        1.0,
        gt=0,
        help="train on guided velocities of the guidance scale omega / (1 - kappa): the target "
        "velocity v = noise - data becomes omega v + kappa u(class) + (1 - omega - kappa) "
        "u(no class), where u is the network's velocity at r = t",
    )
    kappa: float = option(
        0.0, ge=0, lt=1,
        help="see omega; omega 1 and kappa 0.5 (the authors' choice) give a guidance scale of 2",
    )  # fmt: skip

    # Without r (r = t), a mean flow is a rectified flow, so the flow's samplers work too.
    samplers = {"mean": Sampler(partial(integrate, mean_velocity), 4)} | SAMPLERS["rectified_flow"]
    conditions = ("span",)
    uses_jvp = True

    @property
    def guides_in_training(self) -> bool:
        return (self.omega, self.kappa) != (1, 0)

    def time_quantile(self, u: Tensor) -> Tensor:
        return super().time_quantile(u.sqrt())  # t is the larger of two draws

    def draw(self, x: Tensor) -> dict[str, Tensor | int]:
        """Draws times t >= r (N,) and noise. The first `num_spans` = M images have r < t.

        M is span_share * N, rounded up or down at random. The random number is drawn on the CPU, so
        that the host does not wait for a GPU.
        """
        times = [RectifiedFlow.draw_times(self, len(x), x.device) for _ in range(2)]
        t, r = torch.maximum(*times), torch.minimum(*times)
        num_spans = int(self.span_share * len(x) + torch.rand((), device="cpu").item())  # M
        r = torch.cat([r[:num_spans], t[num_spans:]])
        return {"t": t, "r": r, "num_spans": num_spans, "noise": torch.randn_like(x.float())}

    def losses(
        self,
        network: Network,
        x: Tensor,
        y: Conditions,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        r: Tensor | None = None,
        num_spans: int | None = None,
        null_y: Conditions | None = None,
    ) -> dict[str, Tensor]:
        """Returns the losses; for the other arguments see `Objective.losses`.

        r: (N,) in [0, t]. If t is given and r is not, as for the held-out loss, r = t and the loss
            is the loss of rectified flow.
        num_spans: number of leading images with r < t; None: all
        null_y: conditions of images without a class, for guidance within training

        Returns
            loss        (N,) squared error of the velocity, weighted, see `weight_power`
            mse         (N,) mean squared error of the velocity
            aux_loss    scalar
        """
        if t is None:
            drawn = self.draw(x)
            t, r, num_spans = drawn["t"], drawn["r"], drawn["num_spans"]
            noise = drawn["noise"] if noise is None else noise
        elif r is None:
            return super().losses(network, x, y, t, noise)
        x, t, r = x.float(), t.float(), r.float()
        noise = torch.randn_like(x) if noise is None else noise.float()
        z_t = x.lerp(noise, t[:, None, None, None])  # (N, C, h, w)
        # At least one image per process, else FSDP hangs.
        leading = slice(0, max(1, len(x) if num_spans is None else num_spans))
        target, direction = self.velocities(network, z_t, t, y, noise - x, null_y, leading)
        du_dt = self.time_derivative(
            network, z_t[leading], t[leading], r[leading], images_of(y, leading), direction
        )
        prediction, aux_loss = prediction_and_aux_loss(network(z_t, t, with_span(y, t, r)))
        velocity = first_channels(prediction, x)  # (N, C, h, w)
        moved = velocity[leading] + (t - r)[leading, None, None, None] * du_dt
        velocity = torch.cat([moved, velocity[len(moved) :]])
        error = (velocity - target).square().flatten(1)  # (N, C*h*w)
        total = error.sum(1)  # (N,)
        loss = total / (total.detach() + 0.01) ** self.weight_power
        return {"loss": loss, "mse": error.mean(1), "aux_loss": aux_loss}

    @torch.no_grad()
    def velocities(
        self,
        network: Network,
        z: Tensor,
        t: Tensor,
        y: Conditions,
        velocity: Tensor,
        null_y: Conditions | None,
        leading: slice,
    ) -> tuple[Tensor, Tensor]:
        """Returns the target velocity (N, C, h, w), and dz/dt (M, C, h, w) for `time_derivative`.

        velocity: noise - data (N, C, h, w)
        leading: the M images with r < t
        """

        def now(y: Conditions, part: slice) -> Tensor:  # u at r = t
            output = network(z[part], t[part], images_of(y, part))
            return first_channels(prediction_and_aux_loss(output)[0], z)

        if not self.guides_in_training:
            return velocity, now(y, leading) if self.tangent == "network" else velocity[leading]
        if null_y is None:
            raise ValueError(
                "omega: guidance within training requires `null_y`, the conditions of "
                "images without a class"
            )
        everything = slice(0, len(z))
        cond, uncond = now(y, everything), now(null_y, everything)
        target = self.omega * velocity + self.kappa * cond
        target = target + (1 - self.omega - self.kappa) * uncond
        # Images whose conditions were dropped train the velocity without guidance.
        same = [(y[name] == null_y[name]).view(len(z), -1).all(1) for name in null_y]
        dropped = torch.stack(same).all(0)  # (N,)
        target = velocity.where(dropped[:, None, None, None], target)
        return target, (cond if self.tangent == "network" else target)[leading]

    @torch.no_grad()
    def time_derivative(
        self, network: Network, z: Tensor, t: Tensor, r: Tensor, y: Conditions, direction: Tensor
    ) -> Tensor:
        """Returns du/dt (M, C, h, w) along dz/dt = `direction`, with r constant."""

        def average(z: Tensor, t: Tensor) -> Tensor:
            output = network(z, t, with_span(y, t, r))
            return first_channels(prediction_and_aux_loss(output)[0], z)

        return torch.func.jvp(average, (z, t), (direction, torch.ones_like(t)))[1]

    def denoiser(self, predict: Predict) -> Predict:
        return lambda z, t, r=None: first_channels(predict(z, t, r), z)


def images_of(y: Conditions, part: slice) -> Conditions:
    """Returns the conditions of the images in the slice `part`."""
    return {name: v[part] for name, v in y.items()} if isinstance(y, Mapping) else y[part]


class SpanEmbedder(Condition):
    """Embeds the time span t - r (N,) of a step (MeanFlow, Geng et al. 2025, arXiv 2505.13447).

    The objective provides the span; the default is 0. The last layer starts at zero, so adding this
    condition to a model that was trained without spans does not change its predictions at first.
    """

    in_batch = False

    def __init__(self, config: EmbedderConfig):
        super().__init__(config)
        self.time_scale = config.time_scale
        self.mlp = two_layers(WAVES, config.hidden_size, last=ZeroLinear)

    def default(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, device=device)

    def forward(self, span: Tensor) -> Tensor:
        waves = sinusoids(span * self.time_scale, WAVES)  # (N, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # (N, D)


OBJECTIVES["mean_flow"], CONDITIONS["span"] = MeanFlow, SpanEmbedder
