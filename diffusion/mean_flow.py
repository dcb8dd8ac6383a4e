"""Mean flow: the network predicts the average velocity between two times, so one step can span all.

u(z_t, r, t) is the mean over [r, t] of the velocity along the flow's path through z_t at t. The
mean obeys u = v - (t - r) du/dt, where v is the velocity at t and du/dt the derivative along that
path (Geng et al. 2025, arXiv 2505.13447, equation 6). Training regresses u + (t - r) du/dt onto v,
with du/dt held fixed; at r = t that is rectified flow.

Shape legend: N batch, M images with a span, C channels, h x w latent size
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion.guidance import Conditions, first_channels, prediction_and_aux_loss, with_span
from diffusion.objective import Network
from diffusion.rectified_flow import RectifiedFlow
from diffusion.samplers import SAMPLERS, Denoise
from parts import option


class MeanFlow(RectifiedFlow):
    """Mean flow (arXiv 2505.13447), with the loss and the tangent of improved mean flow (Geng et
    al. 2025, arXiv 2512.02012, algorithm 1) as options.

    The condition `span` tells the network t - r. A router that compares the tokens of a micro-batch
    chooses by itself for the M images of du/dt.
    """

    mean: float = option(-0.4, help="mean of the normal whose sigmoid a time is")
    span_share: float = option(
        0.5, least=0, most=1,
        help="share of images with r < t; the first paper has 0.25, the second 0.5",
    )
    tangent: str = option(
        "network", choices=("network", "data"),
        help="velocity along which du/dt is taken: the network's at r = t, as the second paper, or "
        "noise - data, as the first, which saves a pass",
    )
    weight_power: float = option(
        1.0, least=0, help="p: the squared error e of an image is divided by (e + 0.01)^p"
    )
    omega: float = option(
        1.0, above=0,
        help="guidance within training, of scale omega / (1 - kappa): omega v + kappa u(class) + "
        "(1 - omega - kappa) u(no class) replaces v",
    )
    kappa: float = option(0.0, least=0, below=1, help="see omega; 0.5 is a scale of 2")

    samplers = SAMPLERS["mean_flow"]
    preview_steps = 4
    conditions = ("span",)
    uses_jvp = True

    @property
    def guides_in_training(self) -> bool:
        return (self.omega, self.kappa) != (1, 0)

    def draw(self, x: Tensor) -> dict[str, Tensor | int]:
        """Draws times t >= r (N,) and noise. The first M images, `spans`, have r < t.

        M is the share of N, rounded up or down at random, on the host: a GPU is not waited for.
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
        """Returns "loss" (N,), the weighted squared error of the velocity; "mse" (N,), the mean of
        that error over each image; and "aux_loss"; see `Objective.losses`.

        r: (N,) in [0, t]; with t but without r, as for the held-out loss, r = t, and the loss is
            that of rectified flow
        spans: how many of the first images have r < t; None: all
        none: conditions of images without a class, for guidance within training
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
        some = slice(0, max(1, len(x) if spans is None else spans))  # ranks call alike
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
        """The target (N, C, h, w), and the direction of du/dt (M, C, h, w)."""

        def now(y: Conditions, part: slice) -> Tensor:     # u at r = t
            output = network(z[part], t[part], first(y, part))
            return first_channels(prediction_and_aux_loss(output)[0], z)

        if not self.guides_in_training:
            return velocity, now(y, some) if self.tangent == "network" else velocity[some]
        if none is None:
            raise ValueError("omega: guidance within training needs the conditions of no class")
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
        """du/dt (M, C, h, w), along dz/dt = direction with r held fixed."""

        def average(z: Tensor, t: Tensor) -> Tensor:
            output = network(z, t, with_span(y, t, r))
            return first_channels(prediction_and_aux_loss(output)[0], z)

        return torch.func.jvp(average, (z, t), (direction, torch.ones_like(t)))[1]

    def denoiser(self, predict: Denoise) -> Denoise:
        return lambda z, t, r=None: first_channels(predict(z, t, r), z)


def first(y: Conditions, some: slice) -> Conditions:
    """The conditions of some images."""
    return {name: v[some] for name, v in y.items()} if isinstance(y, Mapping) else y[some]
