"""Auxiliary losses of other papers: `repa`, `sra`, `dispersive` and `contrastive`.

Shape legend: N images of a micro-batch, T tokens of D features, S tokens of F features in the
cache, C channels, h x w latent size
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Objective
from diffusion.guidance import first_channels
from diffusion.rectified_flow import RectifiedFlow
from models import DiTConfig
from options.parts import option
from training.auxiliary import AUXILIARY_LOSSES, AuxiliaryLoss, Pass, Shapes


class Repa(AuxiliaryLoss):
    """Representation alignment (Yu et al. 2024, arXiv 2410.06940, equation 8): the tokens of an
    early block predict the features that a vision network, such as DINOv2, computes for the image.

    The loss is minus the cosine similarity, averaged over images and tokens. The features, on a
    square grid, are interpolated to the model's grid. With `spatial`, as in iREPA (Singh et al.
    2025, arXiv 2512.10794), the projector is a 3 x 3 convolution, and each feature is normalised
    over the tokens of an image.
    """

    name = "repa"
    needs = ("tokens",)
    weight: float = option(
        0.5, ge=0,
        help="weight of the alignment with a vision network's cached features, arXiv 2410.06940",
    )  # fmt: skip
    depth_share: float = option(
        0.3, help="depth of the block whose tokens are aligned, as a fraction: 0.3 is 8 of 28",
        gt=0, le=1,
    )  # fmt: skip
    width: int = option(2048, help="width of the projector, three layers with SiLU", ge=1)
    spatial: bool = option(
        False,
        help="as in iREPA: project by a 3 x 3 convolution, normalise features over tokens",
    )
    gamma: float = option(1.0, help="with spatial: fraction of the mean to subtract", ge=0, le=1)

    def projector(self, model: DiTConfig, shapes: Shapes) -> nn.Module:
        features = shapes["tokens"][-1] if shapes else 768  # a plan without data assumes DINOv2-B
        if self.spatial:
            return GridConvolution(model.grid, model.hidden_size, features)
        return perceptron(model.hidden_size, self.width, self.width, features)

    def check(self, objective: Objective, shapes: Shapes) -> str | None:
        found = super().check(objective, shapes)
        if found is None and shapes and math.isqrt(shapes["tokens"][0]) ** 2 != shapes["tokens"][0]:
            return "features on a square grid of tokens"
        return found

    def target(self, forward_pass: Pass) -> Tensor:
        """Returns the features (N, S, F)."""
        features = forward_pass.batch["tokens"].float()
        if self.spatial:
            features = features - self.gamma * features.mean(1, keepdim=True)
            features = features / (features.std(1, keepdim=True) + 1e-6)
        return features

    def loss(self, forward_pass: Pass, target: Tensor) -> Tensor:
        tokens = forward_pass.tokens[self.name].float()  # (N, T, F)
        height, width = forward_pass.x.shape[2:]
        side, rows = math.isqrt(target.shape[1]), math.isqrt(tokens.shape[1] * height // width)
        size = (rows, tokens.shape[1] // rows)
        if size != (side, side):
            target = target.transpose(1, 2).unflatten(2, (side, side))  # (N, F, side, side)
            target = F.interpolate(target, size, mode="bilinear", antialias=True)
            target = target.flatten(2).transpose(1, 2)  # (N, T, F)
        return -F.cosine_similarity(tokens, target, dim=-1).mean()


class Sra(AuxiliaryLoss):
    """Self-representation alignment (Jiang et al. 2025, arXiv 2505.02831): the tokens of an early
    block at time t predict the tokens of a deeper block of the EMA at a smaller time t - k.

    k is drawn uniformly from [0, interval * noise_time], where noise_time is the time of pure
    noise, and t - k is at least 0. The loss is smooth L1. The defaults of beta and the weight come
    from the authors' code, which also lowers the weight after 150 epochs.
    """

    name = "sra"
    reads_ema = True
    weight: float = option(
        0.2, help="weight of the alignment with the EMA's deeper block, arXiv 2505.02831", ge=0
    )
    depth_share: float = option(
        0.3, help="depth of the block whose tokens are aligned, as a fraction: 0.3 is 8 of 28",
        gt=0, le=1,
    )  # fmt: skip
    teacher_share: float = option(
        0.7, help="depth of the EMA's block, as a fraction: 0.7 is 20 of 28", gt=0, le=1
    )
    interval: float = option(
        0.2, help="largest time difference, as a fraction of the time of noise", ge=0, le=1
    )
    beta: float = option(0.05, help="difference below which the loss is quadratic", gt=0)

    def projector(self, model: DiTConfig, shapes: Shapes) -> nn.Module:
        return perceptron(model.hidden_size, 2 * model.hidden_size, model.hidden_size)

    def target(self, forward_pass: Pass) -> Tensor:
        objective, t = forward_pass.objective, forward_pass.t
        k = self.interval * objective.noise_time * torch.rand(len(t), device=t.device)
        earlier = (t - k).clamp_min(0).to(t.dtype)  # (N,)
        z = objective.noised(forward_pass.x, forward_pass.noise, earlier)
        return forward_pass.ema_tokens(self.teacher_share, z, earlier)

    def loss(self, forward_pass: Pass, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(
            forward_pass.tokens[self.name].float(), target.float(), beta=self.beta
        )


class Dispersive(AuxiliaryLoss):
    """Dispersive loss (Wang and He 2025, arXiv 2506.09027, InfoNCE with squared distances): pushes
    the tokens of different images apart.

    The loss is the log of the mean over all pairs i, j of exp(-|h_i - h_j|^2 / (T D tau)), where
    h_i contains all tokens of image i after a block. As in the authors' code, the mean includes the
    pairs with i = j, and distances are divided by T D. The authors use tau 1 and the weight 0.25.
    """

    name = "dispersive"
    compares_images = True
    weight: float = option(
        0.5, help="weight of the loss that pushes tokens of images apart, arXiv 2506.09027", ge=0
    )
    temperature: float = option(0.5, help="tau, the divisor of the squared distances", gt=0)
    depth_share: float = option(
        0.25, help="depth of the block, as a fraction of all blocks", gt=0, le=1
    )

    def loss(self, forward_pass: Pass, target: None) -> Tensor:
        h = forward_pass.tokens[self.name].float().flatten(1)  # (N, T D)
        h = h - h.mean(0)  # distances stay the same, and rounding errors become small
        # On a GPU, the backward pass of torch.pdist needs a tensor (N - 1, N, T D).
        with torch.autocast(h.device.type, enabled=False):
            products = h @ h.t()  # (N, N)
        norms = products.diagonal()
        squares = (norms[:, None] + norms - 2 * products).clamp_min(0) / h.shape[1]
        squares = squares - torch.diag(squares.diagonal())  # exactly 0 for i = j
        return (-squares / self.temperature).exp().mean().log()


class Contrastive(AuxiliaryLoss):
    """Contrastive flow matching (Stoica et al. 2025, arXiv 2506.05350, equation 4): pushes the
    velocity of an image away from the target velocity of another image of the micro-batch.

    The loss is minus the mean of |v_i - (noise_j - x_j)|^2 with j = i + 1, cyclically; for other
    flows, the target velocity of j takes the place of noise_j - x_j. The authors' code draws j
    among the other images, which is equivalent, as their order is random.
    """

    name = "contrastive"
    compares_images = True
    weight: float = option(
        0.05,
        help="weight lambda of the loss that pushes velocities apart, arXiv 2506.05350",
        ge=0,
    )

    def check(self, objective: Objective, shapes: Shapes) -> str | None:
        is_flow = type(objective).losses is RectifiedFlow.losses
        return None if is_flow else "a rectified flow"

    def loss(self, forward_pass: Pass, target: None) -> Tensor:
        objective, x, noise = forward_pass.objective, forward_pass.x, forward_pass.noise
        z, t = forward_pass.z, forward_pass.t
        velocity = objective.velocity(first_channels(forward_pass.output, x), z, t)
        other = objective.target(x, noise, z, t).roll(-1, dims=0)  # (N, C, h, w)
        return -(velocity - other).square().mean()


AUXILIARY_LOSSES.update({one.name: one for one in (Repa, Sra, Dispersive, Contrastive)})


class GridConvolution(nn.Conv2d):
    """3 x 3 convolution of tokens, arranged as a grid."""

    def __init__(self, grid: tuple[int, int], inputs: int, outputs: int):
        super().__init__(inputs, outputs, kernel_size=3, padding=1)
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (N, T, D) to (N, T, F)."""
        on_grid = tokens.transpose(1, 2).unflatten(2, self.grid)  # (N, D, rows, columns)
        return super().forward(on_grid).flatten(2).transpose(1, 2)


def perceptron(*widths: int) -> nn.Sequential:
    """Creates linear layers of these widths with SiLU between them, initialised as in a DiT."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])
