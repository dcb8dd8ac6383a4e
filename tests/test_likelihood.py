"""Bits per dimension against data whose entropy is known, and as evaluate.py reports them."""

import json
import math

import pytest
import torch
from conftest import call_main
from test_sampling import randomised_preset

from checkpoints import Record, save_model
from diffusion import create_diffusion
from diffusion.gaussian_diffusion import _bin_log_likelihood
from runtime.errors import UserError


def ideal_network(diffusion, std: float):
    """Noise and variance that are exact for data N(0, std^2): the reverse step is Gaussian."""

    def network(x, t):
        rows = (slice(None), None, None, None)
        alpha = diffusion.alphas_cumprod[t][rows]
        previous, beta = diffusion.alphas_cumprod_prev[t][rows], diffusion.betas[t][rows]
        noise = (1 - alpha).sqrt() / (alpha * std**2 + 1 - alpha) * x
        # Var(x_{t-1} | x_t) for Gaussian data, as a share between the two fixed variances
        before = previous * std**2 + 1 - previous
        variance = before * beta / (before * (1 - beta) + beta)
        smallest = diffusion.posterior_log_variance_clipped[t][rows]
        share = (variance.log() - smallest) / (beta.log() - smallest).clamp(min=1e-9)
        return torch.cat([noise.expand_as(x), (2 * share - 1).expand_as(x)], 1)

    return network


def test_bound_of_the_ideal_network_is_the_entropy_of_the_data():
    std, diffusion = 0.6, create_diffusion()
    x = std * torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    bits = diffusion.bits_per_dimension(ideal_network(diffusion, std), x)
    nats = 0.5 * math.log(2 * math.pi * std**2) + (x**2).mean().item() / (2 * std**2)
    entropy = nats / math.log(2) - math.log2(2 / 255)
    assert bits["total"].mean().item() == pytest.approx(entropy, abs=0.06)
    assert bits["vb"].shape == (8, 1000)
    assert (bits["prior"] + bits["vb"].sum(1) - bits["total"]).abs().max() < 1e-4


@pytest.mark.parametrize("respacing", ["", 50])
def test_a_worse_network_needs_more_bits(respacing):
    std, diffusion = 0.6, create_diffusion(respacing)
    x = std * torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    totals = []
    for believed in (std, 0.9):
        network = ideal_network(diffusion, believed)

        def respaced(x, t, network=network):
            return network(x, torch.searchsorted(diffusion.timestep_map, t))

        torch.manual_seed(1)
        totals.append(diffusion.bits_per_dimension(respaced, x)["total"].mean().item())
    assert totals[0] + 0.05 < totals[1]


@pytest.mark.parametrize("std", [0.003, 0.05, 2.0])
def test_bins_hold_all_the_mass(std):
    """The bins of width 2/255 around k * 2/255 share out a Gaussian, beyond [-1, 1] too."""
    centres = torch.arange(-3000, 3001) * (2 / 255)
    mean, log_std = torch.tensor(1.234), torch.tensor(std).log()
    mass = _bin_log_likelihood(centres, mean, log_std).exp().double().sum()
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_bpd_flag_reports_held_out_images(tiny_vae, image_tree, tmp_path):
    model, path = randomised_preset(), tmp_path / "model.safetensors"
    info = {
        "image_size": 16, "vae_path": str(tiny_vae), "objective": "gaussian",
        "class_names": [f"class-{label}" for label in range(4)],
    }  # fmt: skip
    save_model(path, model.state_dict(), Record(config=model.config, **info))
    common = (
        "--ckpt", path, "--bpd", "--data-path", image_tree, "--num-images", 6,
        "--num-sampling-steps", 10,
    )  # fmt: skip
    values = []
    for batch_size in (6, 4):
        call_main("evaluate.py", *common, "--batch-size", batch_size, "--output", tmp_path / "out")
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        values.append(results["metrics"]["bits_per_dimension"])
    assert results["measurement"]["chain_steps"] == 10
    assert values[0] == pytest.approx(values[1], rel=1e-4) and values[0] > 0
    with pytest.raises(UserError, match="--data-path"):
        call_main("evaluate.py", *common[:4], tmp_path, "--num-images", 6)
