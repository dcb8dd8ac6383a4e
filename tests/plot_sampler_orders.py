"""Draws how the error of each sampler falls with its evaluations of the network.

    python tests/plot_sampler_orders.py --output docs/images/sampler_orders.png

The data are a Gaussian mixture in the plane, whose ideal network is known, so the error is the
sampler's own: the mean distance to the exact end point of the probability flow, or for the
stochastic samplers the largest error of the mean and covariance of 200,000 points.
"""

import argparse
from functools import partial

import matplotlib
import torch
from gaussian_mixture import GaussianMixture

from diffusion import SAMPLERS, function_evaluations

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from test_samplers import chain_steps, even_in_log_snr  # noqa: E402

MIXTURE = GaussianMixture()
FLOW, GAUSSIAN = SAMPLERS["rectified_flow"], SAMPLERS["gaussian"]
COLORS = {
    "euler": "C0", "ddim": "C0", "heun": "C1", "dpm-solver++": "C2", "unipc": "C3",
    "sde": "C4", "ddpm": "C5",
}  # fmt: skip


def curve(panel, name: str, steps: list[int], errors: list[float]) -> None:
    evaluations = [function_evaluations(name, number) for number in steps]
    panel.loglog(evaluations, errors, "o-", label=name, color=COLORS[name], markersize=4)


def slope(panel, order: int, first: tuple[float, float], decades: float = 0.9) -> None:
    """A dashed line of the given order from the point `first`, labelled at its end."""
    x, y = first
    ends = (x, x * 10**decades), (y, y * 10 ** (-order * decades))
    panel.loglog(*ends, "k--", linewidth=0.8)
    panel.annotate(f"order {order}", (ends[0][1], ends[1][1]), fontsize=8)


def plot_flow(panel, z: torch.Tensor) -> None:
    reference, steps = FLOW["heun"](MIXTURE.velocity, z, even_in_log_snr(4000)), [5, 10, 20, 40, 80]
    for name in ("euler", "heun", "dpm-solver++", "unipc"):
        ends = [FLOW[name](MIXTURE.velocity, z, even_in_log_snr(number)) for number in steps]
        curve(panel, name, steps, [(end - reference).abs().mean().item() for end in ends])
    for order, start in ((1, 2e-1), (2, 6e-2), (3, 2.5e-2)):
        slope(panel, order, (12, start))
    panel.set_title("rectified flow, t from 0.95 to 0.05")


def plot_chain(panel, z: torch.Tensor) -> None:
    steps = [12, 24, 48, 96, 192]
    for name in ("dpm-solver++", "unipc"):
        reference = GAUSSIAN[name](MIXTURE.noise, z, chain_steps(960))
        ends = [GAUSSIAN[name](MIXTURE.noise, z, chain_steps(number)) for number in steps]
        curve(panel, name, steps, [(end - reference).abs().mean().item() for end in ends])
    reference, steps = GAUSSIAN["unipc"](MIXTURE.noise, z, 999), [9, 27, 37, 111, 333]
    ends = [GAUSSIAN["ddim"](MIXTURE.noise, z, number, learn_sigma=False) for number in steps]
    curve(panel, "ddim", steps, [(end - reference).abs().mean().item() for end in ends])
    for order, start in ((1, 1e-1), (2, 1.2e-2), (3, 3e-3)):
        slope(panel, order, (60, start), decades=0.6)
    panel.set_title("Gaussian chain, step 990 to 30 (ddim: to 0)")


def plot_moments(panel, number: int = 200_000) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(number, 1, 1, 2, generator=generator, dtype=torch.float64)
    noise_fn, steps = partial(torch.randn, generator=generator), [10, 25, 50, 100, 250]
    for name, sampler, denoise in (
        ("sde", FLOW["sde"], MIXTURE.velocity),
        ("ddpm", partial(GAUSSIAN["ddpm"], learn_sigma=False), MIXTURE.noise),
    ):
        errors = []
        for count in steps:
            draw = lambda x: noise_fn(x.shape, dtype=x.dtype)  # noqa: E731
            x = sampler(denoise, z, count, noise_fn=draw).flatten(1).double()
            error = (x.T.cov() - MIXTURE.covariance).abs().max()
            errors.append(max(error.item(), (x.mean(0) - MIXTURE.mean).abs().max().item()))
        curve(panel, name, steps, errors)
    slope(panel, 1, (40, 6e-2), decades=0.6)
    panel.set_title("error of mean and covariance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="sampler_orders.png", help="the plot, a PNG")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(256, 1, 1, 2, generator=generator, dtype=torch.float64)
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    plot_flow(panels[0], z)
    plot_chain(panels[1], z)
    plot_moments(panels[2])
    for panel in panels:
        panel.set_xlabel("evaluations of the network")
        panel.grid(True, which="both", alpha=0.2)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("error")
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
