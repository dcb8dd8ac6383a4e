"""Samplers on data whose ideal network is known: convergence orders and moments.

Shape legend: N points as images (N, 1, 1, 2), K components
"""

import math
from functools import cache

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from diffusion import (
    OBJECTIVES,
    SAMPLERS,
    Objective,
    PerImageNoise,
    classifier_free_guidance,
    create_diffusion,
    guidance_within,
    space_timesteps,
)

ALPHAS_CUMPROD = create_diffusion().alphas_cumprod  # (1000,) float64


class GaussianMixture:
    """Three isotropic Gaussians in the plane, and the exact predictions for noisy samples."""

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
        """E[noise - data | x] for a rectified flow at t (N,) in (0, 1]."""
        time = t.double()
        return (x - self.data_mean(x, 1 - time, time)) / time[:, None, None, None]

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[noise | x] at steps t (N,) of the linear schedule with 1000 steps."""
        return self.noise_of_chain(x, ALPHAS_CUMPROD[t])

    def noise_of_chain(self, x: Tensor, alpha: Tensor) -> Tensor:
        """E[noise | x = sqrt(alpha) data + sqrt(1 - alpha) noise] for alpha (N,)."""
        data = self.data_mean(x, alpha.sqrt(), (1 - alpha).sqrt())
        rows = (slice(None), None, None, None)
        return (x - alpha.sqrt()[rows] * data) / (1 - alpha).sqrt()[rows]


MIXTURE = GaussianMixture()


COSINE = OBJECTIVES["gaussian"](schedule="squaredcos_cap_v2")


def sampler(objective: str | Objective, name: str):
    """Function sample(network, z, steps, callback, ...) at the times of the objective."""
    made = OBJECTIVES[objective]() if isinstance(objective, str) else objective
    chosen = made.samplers[name]
    return lambda network, z, steps, *callback, **options: chosen(
        network, z, made.sampling_times(chosen, steps), *callback, **options
    )


FLOW, GAUSSIAN = (
    {name: sampler(objective, name) for name in SAMPLERS[objective]}
    for objective in ("rectified_flow", "gaussian")
)


def cosine_noise(x: Tensor, t: Tensor) -> Tensor:
    return MIXTURE.noise_of_chain(x, COSINE.diffusion.alphas_cumprod[t])


def points(number: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 1, 1, 2, generator=generator, dtype=torch.float64)


def orders(errors: list[float], steps: list[int]) -> list[float]:
    """Slope of log(error) over log(1 / steps) between neighbouring numbers of steps."""
    pairs = zip(errors, errors[1:], steps, steps[1:], strict=False)
    return [math.log(e0 / e1) / math.log(s1 / s0) for e0, e1, s0, s1 in pairs]


@cache
def solution(objective: str) -> Tensor:
    """Nearly exact end points of 16 trajectories under the ideal network."""
    if objective == "gaussian":
        return GAUSSIAN["unipc"](MIXTURE.noise, points(16), 999)
    return FLOW["heun"](MIXTURE.velocity, points(16), 500)


@pytest.mark.parametrize(("objective", "name", "order", "steps"), [
    ("rectified_flow", "euler", 1, [10, 20, 40, 80]),
    ("rectified_flow", "heun", 2, [10, 20, 40, 80]),
    ("gaussian", "ddim", 1, [9, 27, 111]),
])  # fmt: skip
def test_samplers_converge_with_their_order_down_to_the_data(objective, name, order, steps):
    network = MIXTURE.noise if objective == "gaussian" else MIXTURE.velocity
    ends = [sampler(objective, name)(network, points(16), n) for n in steps]
    errors = [(end - solution(objective)).abs().mean().item() for end in ends]
    for measured in orders(errors, steps):
        assert measured == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc"])
def test_multistep_solvers_are_ten_times_more_accurate_than_first_order(name):
    for objective, network, first, steps in (
        ("rectified_flow", MIXTURE.velocity, "euler", 20),
        ("gaussian", MIXTURE.noise, "ddim", 111),
    ):
        ours, others = (
            (sampler(objective, n)(network, points(16), steps) - solution(objective)).abs()
            for n in (name, first)
        )
        assert ours.mean() < 0.1 * others.mean()
    for steps in (1, 2, 3):  # Euler in one and two steps: no solver helps there
        ours, euler = (FLOW[n](MIXTURE.velocity, points(16), steps) for n in (name, "euler"))
        assert (relative_error(ours, euler) < 1e-5) == (steps < 3)
    dpm, unipc = (FLOW[n](MIXTURE.velocity, points(16), 9) for n in ("dpm-solver++", "unipc"))
    assert not torch.equal(dpm, unipc)


SHIFTED = OBJECTIVES["rectified_flow"](shift=2.0)
MOMENTS = {
    "sde": (FLOW["sde"], MIXTURE.velocity, 125),
    "ddpm": (GAUSSIAN["ddpm"], MIXTURE.noise, 125),
    "flow unipc": (FLOW["unipc"], MIXTURE.velocity, 20),
    "flow dpm": (FLOW["dpm-solver++"], MIXTURE.velocity, 20),
    "chain unipc": (GAUSSIAN["unipc"], MIXTURE.noise, 40),
    "chain dpm": (GAUSSIAN["dpm-solver++"], MIXTURE.noise, 40),
    "cosine sections": (sampler(COSINE, "ddpm"), cosine_noise, "50,30,20"),
    "cosine unipc": (sampler(COSINE, "unipc"), cosine_noise, 40),
    "shifted unipc": (sampler(SHIFTED, "unipc"), MIXTURE.velocity, 20),
    "shifted sde": (sampler(SHIFTED, "sde"), MIXTURE.velocity, 125),
}


@pytest.mark.parametrize(("sample", "denoise", "steps"), MOMENTS.values(), ids=MOMENTS)
def test_sampled_points_have_the_mean_and_covariance_of_the_data(sample, denoise, steps):
    torch.manual_seed(0)
    x = sample(denoise, points(10_000, seed=1), steps).flatten(1).double()
    # 10,000 points determine a mean to 0.01 and a covariance to about 0.015.
    torch.testing.assert_close(x.mean(0), MIXTURE.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), MIXTURE.covariance, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", list(FLOW))
def test_sampling_a_data_prediction_equals_sampling_the_velocity(name):
    """The clamp is small enough that it does not change the last step."""
    flow, z = OBJECTIVES["flow_x"](clamp=1e-3), points(16)

    def predict_data(x: Tensor, t: Tensor) -> Tensor:
        return MIXTURE.data_mean(x, 1 - t.double(), t.double())

    noise = [PerImageNoise(range(16)).randn_like for _ in range(2)]
    want = FLOW[name](MIXTURE.velocity, z, 20, noise_fn=noise[0])
    got = FLOW[name](flow.denoiser(predict_data), z, 20, noise_fn=noise[1])
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("name", list(GAUSSIAN))
def test_sampling_a_v_prediction_equals_sampling_the_noise_prediction(name):
    objective, z = OBJECTIVES["gaussian_v"](), points(16)

    def predict_v(x: Tensor, t: Tensor) -> Tensor:
        alpha = ALPHAS_CUMPROD[t][:, None, None, None]
        return (MIXTURE.noise(x, t) - (1 - alpha).sqrt() * x) / alpha.sqrt()

    noise = [PerImageNoise(range(16)).randn_like for _ in range(2)]
    want = GAUSSIAN[name](MIXTURE.noise, z, 20, noise_fn=noise[0])
    sample = sampler("gaussian_v", name)
    got = sample(objective.denoiser(predict_v), z, 20, noise_fn=noise[1])
    assert relative_error(got, want) < 1e-5


def test_a_time_shift_applies_to_sampling_as_to_training():
    flow = OBJECTIVES["rectified_flow"](times="uniform", shift=3.0)
    euler, sde = flow.samplers["euler"], flow.samplers["sde"]
    shares = torch.linspace(1, 0, 5)
    values = flow.sampling_times(euler, 4).values
    torch.testing.assert_close(torch.tensor(values), flow.time_quantile(shares))
    assert flow.sampling_times(euler, 4, shift=1.0).values == shares.tolist()
    assert flow.sampling_times(sde, 9).values[-2:] == pytest.approx([0.04, 0])
    with pytest.raises(ValueError, match="got 1, expected an integer at least 2"):
        flow.sampling_times(sde, 1)


def test_samplers_of_the_gaussian_chain_visit_the_steps_of_a_respacing():
    objective = OBJECTIVES["gaussian"]()
    for name in ("ddim", "unipc"):
        times = objective.sampling_times(objective.samplers[name], "10,5,3")
        assert times.values == space_timesteps(1000, "10,5,3")[::-1] and times.num_steps == 18
        seen = []
        sample = sampler("gaussian", name)
        sample(MIXTURE.noise, points(2), "10,5,3", lambda state, s=seen: s.append(state["t"][0]))
        assert seen == times.values
    with pytest.raises(ValueError, match="num_sampling_steps: .*got 'ten'"):
        objective.sampling_times(objective.samplers["ddim"], "ten")


ALL = [(objective, name) for objective, named in SAMPLERS.items() for name in named]


@pytest.mark.parametrize(("objective", "name"), ALL)
def test_all_samplers_have_the_same_interface(objective, name):
    """One callback per step, fp32 output, one call per step (Heun: two), and noise per image."""
    z = PerImageNoise([3, 4]).randn((4, 6, 6))
    calls, states = [], []

    def denoise(x, t, r=None):
        calls.append(t)
        return torch.cat([0.5 * x, torch.zeros_like(x)], 1)  # C channels and C of variance

    sample, steps = sampler(objective, name), 5
    x = sample(denoise, z, steps, states.append, noise_fn=PerImageNoise([5, 6]).randn_like)
    assert x.shape == z.shape and x.dtype == torch.float32
    assert [state["step"] for state in states] == list(range(steps))
    assert torch.equal(states[-1]["x"], x)
    assert all(state["pred_xstart"].shape == z.shape for state in states)
    assert len(calls) == (2 * steps - 1 if name == "heun" else steps)
    assert all(len(t) == 2 and t.is_floating_point() == (objective != "gaussian") for t in calls)
    assert calls[0][0] == (999 if objective == "gaussian" else 1)
    one = sample(denoise, z[1:], steps, noise_fn=PerImageNoise([6]).randn_like)
    torch.testing.assert_close(one, x[1:])


class Counter:
    """Network that records the time and the labels of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((t[0].item(), y.tolist()))
        return x * (1 + y[:, None, None, None])


def test_no_unconditional_pass_is_computed_outside_the_guidance_interval():
    network, y, null_y = Counter(), torch.tensor([1, 2]), torch.tensor([9, 9])
    scale = guidance_within((0.3, 0.7), 3.0)
    denoise = classifier_free_guidance(network, y, null_y, scale)
    FLOW["euler"](denoise, torch.ones(2, 4, 2, 2), 10)
    for time, labels in network.calls:
        inside = 0.299 < time < 0.701
        assert labels == ([1, 2, 9, 9] if inside else [1, 2])
    assert sum(len(labels) == 4 for _, labels in network.calls) == 5


def test_a_guidance_interval_on_the_gaussian_chain_treats_step_999_as_time_one():
    network, labels = Counter(), torch.tensor([1])
    scale = guidance_within((0.5, 1.0), 3.0, noise_time=999)
    denoise = classifier_free_guidance(network, labels, labels + 1, scale)
    GAUSSIAN["ddim"](denoise, torch.ones(1, 4, 2, 2), 10)
    assert [len(y) for _, y in network.calls] == [2] * 5 + [1] * 5
