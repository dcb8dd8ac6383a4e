"""Mean flow: the network predicts the mean velocity between two times, so one step can suffice.

u(z_t, r, t) is the mean over [r, t] of the velocity along the flow's path through z_t at t. The
mean satisfies u = v - (t - r) du/dt, where v is the velocity at t and du/dt is the derivative along
that path (Geng et al. 2025, arXiv 2505.13447, equation 6). Training fits u + (t - r) du/dt to v,
without a gradient through du/dt. For r = t this loss is the loss of rectified flow.

Shape legend: N batch, M images with r < t, C channels, h x w latent size
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion.guidance import Conditions, first_channels, prediction_and_aux_loss, with_span
from diffusion.objective import Network
from diffusion.rectified_flow import RectifiedFlow
from diffusion.samplers import SAMPLERS, Predict
from parts import option


class MeanFlow(RectifiedFlow):
    """Mean flow (arXiv 2505.13447) and improved mean flow (Geng et al. 2025, arXiv 2512.02012,
    algorithm 1). The options `span_share` and `tangent` choose between the two.

    The condition `span` gives t - r to the network. In the pass that computes du/dt, a router that
    compares all tokens of a micro-batch compares only the tokens of the M images.
    """

    mean: float = option(-0.4, help="mean of the normal distribution, for logit-normal times")
    span_share: float = option(
        0.5, ge=0, le=1,
        help="fraction of images with r < t; mean flow uses 0.25, improved mean flow 0.5",
    )
    tangent: str = option(
        "network", choices=("network", "data"),
        help="velocity along which du/dt is computed: the network's at r = t (improved mean flow), "
        "or noise - data (mean flow), which saves one pass",
    )
    weight_power: float = option(
        1.0, ge=0, help="exponent p: the squared error e of an image is divided by (e + 0.01)^p"
    )
    omega: float = option(
        1.0, gt=0,
        help="train on guided velocities with scale omega / (1 - kappa): replaces v by "
        "(1 - omega - kappa) u(no class) + kappa u(class) + omega v",
    )
    kappa: float = option(
        0.0, ge=0, lt=1,
        help="see omega; with omega 1, kappa 0.5 (the authors' choice) is a guidance scale of 2",
    )  # fmt: skip

    samplers = SAMPLERS["mean_flow"]
    preview_steps = 4
    conditions = ("span",)
    uses_jvp = True

    @property
    def guides_in_training(self) -> bool:
        return (self.omega, self.kappa) != (1, 0)

    def draw(self, x: Tensor) -> dict[str, Tensor | int]:
        """Draws times t >= r (N,) and noise. The first `spans` = M images have r < t.

        M is span_share * N, rounded up or down at random. The random number is drawn on the CPU, so
        that the host does not wait for a GPU.
        """
        times = [self.draw_times(len(x), x.device) for _ in range(2)]
        t, r = torch.maximum(*times), torch.minimum(*times)
        spans = int(self.span_share * len(x) + torch.rand((), device="cpu").item())  # M
        r = torch.cat([r[:spans], t[spans:]])
        return {"t": t, "r": r, "spans": spans, "noise": torch.randn_like(x.float())}

    def losses(
        self, network: Network, x: Tensor, y: Conditions, t: Tensor | None = None,
        noise: Tensor | None = None, *, r: Tensor | None = None, spans: int | None = None,
        none: Conditions | None = None,
    ) -> dict[str, Tensor]:
        """Returns the losses; for the other arguments see `Objective.losses`.

        r: (N,) in [0, t]. If t is given and r is not, as for the held-out loss, r = t and the loss
            is the loss of rectified flow.
        spans: number of leading images with r < t; None: all
        none: conditions of images without a class, for guidance within training

        Returns
            loss        (N,) weighted squared error of the velocity
            mse         (N,) mean squared error of the velocity
            aux_loss    scalar
        """
        if t is None:
            drawn = self.draw(x)
            t, r, spans = drawn["t"], drawn["r"], drawn["spans"]
            noise = drawn["noise"] if noise is None else noise
        elif r is None:
            return super().losses(network, x, y, t, noise)
        x, t, r = x.float(), t.float(), r.float()
        noise = torch.randn_like(x) if noise is None else noise.float()
        z_t = x.lerp(noise, t[:, None, None, None])        # (N, C, h, w)
        # Every process differentiates at least one image, so that collectives match.
        some = slice(0, max(1, len(x) if spans is None else spans))
        target, direction = self.velocities(network, z_t, t, y, noise - x, none, some)
        change = self.change(network, z_t[some], t[some], r[some], first(y, some), direction)
        prediction, aux_loss = prediction_and_aux_loss(network(z_t, t, with_span(y, t, r)))
        velocity = first_channels(prediction, x)           # (N, C, h, w)
        moved = velocity[some] + (t - r)[some, None, None, None] * change
        velocity = torch.cat([moved, velocity[len(moved) :]])
        error = (velocity - target).square().flatten(1)    # (N, C*h*w)
        total = error.sum(1)                               # (N,)
        loss = total / (total.detach() + 0.01) ** self.weight_power
        return {"loss": loss, "mse": error.mean(1), "aux_loss": aux_loss}

    @torch.no_grad()
    def velocities(
        self, network: Network, z: Tensor, t: Tensor, y: Conditions, velocity: Tensor,
        none: Conditions | None, some: slice,
    ) -> tuple[Tensor, Tensor]:
        """Returns the target (N, C, h, w) and the direction dz/dt of du/dt (M, C, h, w)."""

        def now(y: Conditions, part: slice) -> Tensor:     # u at r = t
            output = network(z[part], t[part], first(y, part))
            return first_channels(prediction_and_aux_loss(output)[0], z)

        if not self.guides_in_training:
            return velocity, now(y, some) if self.tangent == "network" else velocity[some]
        if none is None:
            raise ValueError("omega: guidance within training requires `none`, the conditions of "
                             "images without a class")
        everything = slice(0, len(z))
        with_class, without = now(y, everything), now(none, everything)
        target = self.omega * velocity + self.kappa * with_class
        target = target + (1 - self.omega - self.kappa) * without
        same = [(y[name] == none[name]).view(len(z), -1).all(1) for name in none]
        dropped = torch.stack(same).all(0)                 # (N,)
        target = velocity.where(dropped[:, None, None, None], target)
        return target, (with_class if self.tangent == "network" else target)[some]

    @torch.no_grad()
    def change(
        self, network: Network, z: Tensor, t: Tensor, r: Tensor, y: Conditions, direction: Tensor
    ) -> Tensor:
        """Returns du/dt (M, C, h, w) along dz/dt = direction, with r constant."""

        def average(z: Tensor, t: Tensor) -> Tensor:
            output = network(z, t, with_span(y, t, r))
            return first_channels(prediction_and_aux_loss(output)[0], z)

        return torch.func.jvp(average, (z, t), (direction, torch.ones_like(t)))[1]

    def denoiser(self, predict: Predict) -> Predict:
        return lambda z, t, r=None: first_channels(predict(z, t, r), z)


def first(y: Conditions, some: slice) -> Conditions:
    """Returns the conditions of the images in the slice `some`."""
    return {name: v[some] for name, v in y.items()} if isinstance(y, Mapping) else y[some]
