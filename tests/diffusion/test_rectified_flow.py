"""Rectified flow compared with published numbers and theory, and losses of all objectives."""

import pytest
import torch
from helpers import ROOT, relative_error
from safetensors.torch import load_file

from diffusion import OBJECTIVES, RectifiedFlow
from diffusion.rectified_flow import XPredictionFlow

REFERENCE = load_file(ROOT / "tests" / "reference" / "rectified_flow.safetensors")


def toy_flow(x, t, y):
    """Toy network of tests/reference/README.md, with additional channels that must be ignored."""
    y = y["label"] if isinstance(y, dict) else y  # mean_flow passes a dict with label and span
    u = (t * 1000 + y)[:, None, None, None]
    velocity = 0.7 * x * torch.cos(u / 300) + 0.1 * torch.sin(3 * x)
    return torch.cat([velocity, torch.tanh(x + u / 1000)], 1)


def losses_of(model):
    return RectifiedFlow().training_losses(
        model, *(REFERENCE[name] for name in ("x_start", "y", "t", "noise"))
    )


def test_the_rectified_flow_loss_matches_the_published_one():
    losses = losses_of(toy_flow)
    assert relative_error(losses["loss"], REFERENCE["loss_per_sample"]) < 1e-5


@pytest.mark.parametrize(("scale", "name"), [(1.0, "euler_nocfg"), (3.0, "euler_cfg")])
def test_euler_sampling_matches_the_published_sampler_at_every_step(scale, name):
    infos = []
    z, y, null_y = REFERENCE["z"], REFERENCE["cond"], REFERENCE["null_cond"]
    x = RectifiedFlow().sample(toy_flow, z, y, null_y, scale, 8, infos.append)
    states = torch.stack([z, *(info["x"] for info in infos)])
    assert relative_error(states, REFERENCE[name]) < 1e-5
    if scale != 1:
        x_start = torch.stack([info["pred_xstart"] for info in infos])
        assert relative_error(x_start, REFERENCE["euler_cfg_x0"]) < 1e-5
    assert torch.equal(infos[-1]["x"], x)
    times = torch.stack([info["t"] for info in infos])
    assert torch.equal(times, torch.arange(8, 0, -1)[:, None].expand(8, 3) / 8)


def test_the_exact_velocity_has_zero_loss_and_reaches_the_data_in_one_step():
    """The network has C output channels; the published tests above use 2C."""
    x, y, noise = (REFERENCE[name] for name in ("x_start", "y", "noise"))
    assert not losses_of(lambda z, t, y: noise - x)["loss"].any()
    for scale in (1.0, 3.0):
        exact = lambda z, t, y: (noise - x).repeat(len(z) // len(x), 1, 1, 1)  # noqa: E731
        landed = RectifiedFlow().sample(exact, noise, y, y, scale, num_steps=1)
        torch.testing.assert_close(landed, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "times, mean, std, shift",
    [("uniform", 0, 1, 1), ("uniform", 0, 1, 3), ("logit-normal", -0.5, 0.7, 1),
     ("logit-normal", 0.4, 1.2, 0.4)],
)  # fmt: skip
def test_training_times_have_the_distribution_set_by_the_flags(times, mean, std, shift):
    """Kolmogorov-Smirnov distance of the empirical distribution from the closed form."""
    flow = RectifiedFlow(times=times, mean=mean, std=std, shift=shift)
    torch.manual_seed(0)
    t = flow.draw_times(50_000, torch.device("cpu")).double().sort().values
    unshifted = t / (shift - (shift - 1) * t)
    normal = torch.distributions.Normal(mean, std)
    below = unshifted if times == "uniform" else normal.cdf(unshifted.logit())
    assert (below - torch.linspace(0, 1, len(t))).abs().max() < 1.63 / len(t) ** 0.5
    torch.testing.assert_close(flow.time_quantile(below[::5000]), t[::5000], rtol=1e-5, atol=1e-6)


class EarlyFlow(RectifiedFlow):
    """Defines only the quantile function of its times."""

    def time_quantile(self, u: torch.Tensor) -> torch.Tensor:
        return u**3


@pytest.mark.parametrize("kind", [*OBJECTIVES.values(), EarlyFlow], ids=[*OBJECTIVES, "early"])
def test_the_drawn_times_of_an_objective_have_its_quantiles(kind):
    torch.manual_seed(0)
    drawn = kind().draw_times(50_000, torch.device("cpu")).sort().values
    shares = torch.arange(0.05, 1, 0.1)
    got = torch.searchsorted(drawn, kind().time_quantile(shares)) / len(drawn)
    assert (got - shares).abs().max() < 1.63 / len(drawn) ** 0.5


def test_the_flow_x_loss_is_the_data_error_divided_by_the_clamped_time():
    """JiT's loss (arXiv 2511.13720) with reversed time. The network has 2C output channels."""
    x, noise, t = (REFERENCE[name] for name in ("x_start", "noise", "t"))
    t = torch.cat([torch.tensor([0.0, 0.01]), t[2:]])
    got = XPredictionFlow(clamp=0.05).losses(toy_flow, x, REFERENCE["y"], t, noise)["loss"]
    time = t[:, None, None, None]
    output = toy_flow((1 - time) * x + time * noise, t, REFERENCE["y"])[:, : x.shape[1]]
    want = ((x - output) / time.clamp_min(0.05)).square().flatten(1).mean(1)
    torch.testing.assert_close(got, want)


def losses_under(objective: str, network, dtype: torch.dtype = torch.float32) -> dict:
    """Losses of an objective at random times, which are the same in every call."""
    torch.manual_seed(0)
    x, noise = (REFERENCE[name].to(dtype) for name in ("x_start", "noise"))
    return OBJECTIVES[objective]().losses(network, x, REFERENCE["y"], noise=noise)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_return_the_aux_loss_with_its_gradient_outside_the_loss(objective):
    weight = torch.tensor(2.0, requires_grad=True)
    with_aux = losses_under(objective, lambda z, t, y: (toy_flow(z, t, y), 3 * weight))
    without = losses_under(objective, toy_flow)
    with_aux["aux_loss"].backward()
    assert (with_aux["aux_loss"].item(), weight.grad.item()) == (6, 3)
    assert torch.equal(with_aux["loss"], without["loss"])
    assert without["aux_loss"].shape == () and without["aux_loss"].item() == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_objective_losses_are_fp32_for_any_input_and_output_dtype(dtype, objective):
    def model(z, t, y):
        assert z.dtype == torch.float32
        return toy_flow(z, t, y).to(dtype)

    losses = losses_under(objective, model, dtype)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert relative_error(losses["loss"], losses_under(objective, toy_flow)["loss"]) < 5e-2


def test_wrong_sampling_arguments_raise_with_the_value_they_got():
    flow, z, y = RectifiedFlow(), REFERENCE["z"], REFERENCE["cond"]
    with pytest.raises(ValueError, match="steps: got 0"):
        flow.sample(toy_flow, z, y, num_steps=0)
    with pytest.raises(ValueError, match="got 3, expected 4 or 8"):
        flow.sample(lambda x, t, y: x[:, :3], z, y)
