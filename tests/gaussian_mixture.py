"""A data distribution whose ideal network is known in closed form, to hold samplers to.

    mixture = GaussianMixture()
    x = SAMPLERS["rectified_flow"]["heun"](mixture.velocity, z, 20)

Shape legend: N points as images (N, 1, 1, 2), K components
"""

import torch
from torch import Tensor

from diffusion import create_diffusion

ALPHAS_CUMPROD = create_diffusion().alphas_cumprod  # (1000,) float64


class GaussianMixture:
    """Three isotropic Gaussians in the plane, and what a network without error predicts of them."""

    def __init__(self):
        self.weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # (K,)
        self.means = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)
        self.stds = torch.tensor([0.3, 0.5, 0.4], dtype=torch.float64)  # (K,)

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means  # (2,)

    @property
    def covariance(self) -> Tensor:
        centred = self.means - self.mean
        within = (self.weights * self.stds**2).sum() * torch.eye(2, dtype=torch.float64)
        return within + (self.weights[:, None] * centred).T @ centred  # (2, 2)

    def data_mean(self, x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """E[data | x = signal * data + noise * noise] for x (N, 1, 1, 2), signal, noise (N,)."""
        points, signal, noise = x.flatten(1).double()[:, None], signal[:, None], noise[:, None]
        variance = signal**2 * self.stds**2 + noise**2  # (N, K)
        centred = points - signal[..., None] * self.means  # (N, K, 2)
        log_share = self.weights.log() - variance.log() - centred.square().sum(-1) / variance / 2
        gain = signal * self.stds**2 / variance  # (N, K)
        means = self.means + gain[..., None] * centred  # (N, K, 2)
        return (log_share.softmax(-1)[..., None] * means).sum(1).view_as(x)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[noise - data | x] of the flow at t (N,) in (0, 1]."""
        time = t.double()
        return (x - self.data_mean(x, 1 - time, time)) / time[:, None, None, None]

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[noise | x] at steps t (N,) of the linear chain of 1000."""
        alpha = ALPHAS_CUMPROD[t]
        data = self.data_mean(x, alpha.sqrt(), (1 - alpha).sqrt())
        rows = (slice(None), None, None, None)
        return (x - alpha.sqrt()[rows] * data) / (1 - alpha).sqrt()[rows]
