"""Gaussian diffusion compared with the published implementation and with theory."""

import pytest
import torch
from helpers import ROOT, needs_gpu, relative_error
from safetensors.torch import load_file

from diffusion import OBJECTIVES, PerImageNoise, create_diffusion, space_timesteps

REFERENCE = load_file(ROOT / "tests" / "reference" / "gaussian_diffusion.safetensors")
ALPHAS_CUMPROD = REFERENCE["alphas_cumprod"].float()


def reference(name, spec):
    return REFERENCE[f"{name}.{spec.replace(',', '_')}"]


def toy_eps(x, t):
    """Toy network of tests/reference/README.md. t is a step of the original chain."""
    noise_std = (1 - ALPHAS_CUMPROD[t.long()]).sqrt()[:, None, None, None]
    epsilon = noise_std * x + 0.1 * torch.sin(3 * x) * noise_std
    return torch.cat([epsilon, torch.tanh(x + t.float()[:, None, None, None] / 1000)], 1)


def training_batch():
    return REFERENCE["x_start"], REFERENCE["t"], REFERENCE["noise"]


def test_gaussian_tables_and_q_sample_match_the_published_ones():
    diffusion = create_diffusion()
    for name in ("betas", "alphas_cumprod", "posterior_log_variance_clipped"):
        assert getattr(diffusion, name).dtype == torch.float64
        assert relative_error(getattr(diffusion, name), REFERENCE[name]) < 1e-10
    betas = create_diffusion(noise_schedule="squaredcos_cap_v2").betas
    assert relative_error(betas, REFERENCE["betas_squaredcos"]) < 1e-10
    assert relative_error(diffusion.q_sample(*training_batch()), REFERENCE["x_t"]) < 1e-6


@pytest.mark.parametrize("spec", ["", "25", "ddim50", "10,5,3"])
def test_respacing_and_ddim_match_the_published_ones(spec):
    diffusion, z = create_diffusion(spec), reference("z", spec)
    assert torch.equal(diffusion.timestep_map, reference("timesteps", spec))
    assert diffusion.num_timesteps == len(reference("timesteps", spec))
    assert relative_error(diffusion.betas, reference("betas", spec)) < 1e-10
    x = diffusion.ddim_sample_loop(toy_eps, z.shape, z, clip_denoised=False)
    assert relative_error(x, reference("ddim", spec)) < 1e-5


def test_training_losses_and_p_mean_variance_match_the_published_ones():
    x, t, noise = training_batch()
    losses = create_diffusion().training_losses(toy_eps, x, t, noise=noise)
    for term, want in {"loss": "loss", "mse": "loss_mse", "vb": "loss_vb"}.items():
        assert relative_error(losses[term], REFERENCE[want]) < 1e-5
    p = create_diffusion().p_mean_variance(toy_eps, x, t, clip_denoised=False)  # at x = x_start
    for name in ("mean", "log_variance", "pred_xstart"):
        want = REFERENCE[name if name == "pred_xstart" else f"p_{name}"]
        assert relative_error(p[name], want) < 1e-5
    assert torch.equal(p["variance"], p["log_variance"].exp())


@pytest.mark.parametrize("spec", ["25", "10,5,3"])
def test_ddpm_matches_the_published_sampler(spec):
    z, rows = reference("z", spec), iter(reference("ddpm_noise", spec))
    x = create_diffusion(spec).p_sample_loop(
        toy_eps, z.shape, z, clip_denoised=False, noise_fn=lambda x: next(rows)
    )
    assert relative_error(x, reference("ddpm", spec)) < 1e-5
    assert next(rows, None) is None, "the published sampler draws noise at every step"


@pytest.mark.parametrize(
    ("num_timesteps", "spec", "want"),
    [
        (10, "10", list(range(10))),
        (10, "5", [0, 2, 4, 7, 9]),
        (10, "1,2", [0, 5, 9]),
        (10, "0, 2", [5, 9]),
        (10, "ddim5", [0, 2, 4, 6, 8]),
        (10, "ddim4", [0, 3, 6, 9]),
        (10, 3, [0, 4, 9]),
        (10, None, list(range(10))),
        # Step 10 of 21 lies at 499.5; the published running sum of strides is just below.
        (1000, "21", [round(49.95 * i - 1e-9) for i in range(21)]),
    ],
)
def test_space_timesteps_selects_the_expected_steps(num_timesteps, spec, want):
    assert space_timesteps(num_timesteps, spec) == want


IMPOSSIBLE = [
    "ddim333", "ddim0", "ddim-5", "ddim", "ddim5,5", "1001", 1001, "500,501", -5, "10,,3", "2.5",
]  # fmt: skip


@pytest.mark.parametrize("spec", IMPOSSIBLE)
def test_an_impossible_respacing_is_a_one_line_error(spec):
    with pytest.raises(ValueError, match=r"^[^\n]*got[^\n]*\Z"):
        create_diffusion(spec)


def test_ddim_with_eta_one_equals_ddpm_with_the_posterior_variance():
    diffusion, shape = create_diffusion("25"), (2, 4, 6, 6)
    x_start = torch.linspace(-1, 1, 2 * 4 * 6 * 6).view(shape)

    def network(x, t):  # predicts the exact noise and selects the posterior variance
        alpha = ALPHAS_CUMPROD[t][:, None, None, None]
        epsilon = (x - alpha.sqrt() * x_start) / (1 - alpha).sqrt()
        return torch.cat([epsilon, torch.full_like(x, -1)], 1)

    noise = [PerImageNoise([1, 2]).randn_like for _ in range(2)]
    ddpm = diffusion.p_sample_loop(network, shape, noise_fn=noise[0])
    ddim = diffusion.ddim_sample_loop(network, shape, noise_fn=noise[1], eta=1.0)
    assert relative_error(ddim, ddpm) < 1e-5


def test_without_learn_sigma_the_variance_is_beta_and_the_loss_has_no_vb_term():
    diffusion = create_diffusion("25", learn_sigma=False)
    model = lambda x, t: toy_eps(x, t)[:, :4]  # noqa: E731
    p = diffusion.p_mean_variance(model, torch.randn(25, 4, 2, 2), torch.arange(25))
    want = torch.cat([diffusion.posterior_variance[1:2], diffusion.betas[1:]]).float()
    torch.testing.assert_close(p["variance"], want[:, None, None, None].expand(25, 4, 2, 2))
    x, t, noise = training_batch()
    losses = create_diffusion(learn_sigma=False).training_losses(model, x, t, noise=noise)
    assert torch.equal(losses["vb"], torch.zeros(8))
    assert relative_error(losses["loss"], REFERENCE["loss_mse"]) < 1e-5


def test_clip_denoised_clamps_the_predicted_data_and_changes_the_mean():
    diffusion, arguments = create_diffusion(), (toy_eps, REFERENCE["x_t"], REFERENCE["t"])
    clipped, free = (diffusion.p_mean_variance(*arguments, clip_denoised=c) for c in (True, False))
    assert free["pred_xstart"].abs().max() > 1
    assert torch.equal(clipped["pred_xstart"], free["pred_xstart"].clamp(-1, 1))
    assert not torch.equal(clipped["mean"], free["mean"])


def test_vb_trains_only_the_variance_channels_and_mse_only_the_noise_channels():
    x, t, noise = training_batch()
    diffusion = create_diffusion()
    output = toy_eps(REFERENCE["x_t"], t).requires_grad_()
    losses = diffusion.training_losses(lambda x, t: output, x, t, noise=noise)
    for term, trained, other in (("vb", slice(4, 8), slice(4)), ("mse", slice(4), slice(4, 8))):
        (grad,) = torch.autograd.grad(losses[term].sum(), output, retain_graph=True)
        assert grad[:, trained].flatten(1).any(1).all()
        assert not grad[:, other].any()


@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_gaussian_sampling_never_reads_a_value_from_the_device(sampler):
    """A meta tensor has no values, so reading one, which on a GPU would wait, raises an error."""
    sample, infos, shape = getattr(create_diffusion("25"), sampler), [], (2, 4, 6, 6)
    x = sample(lambda x, t: torch.cat([x, x], 1), shape, device="meta", callback=infos.append)
    assert x.device.type == "meta" and x.shape == shape
    assert [info["step"] for info in infos] == list(range(25))


@needs_gpu
def test_sampling_with_per_image_noise_does_not_wait_for_the_gpu():
    diffusion, noise = create_diffusion("25"), PerImageNoise([1, 2])

    def sample():
        network, options = lambda x, t: torch.cat([x, x], 1), dict(noise_fn=noise.randn_like)
        return diffusion.p_sample_loop(network, (2, 4, 6, 6), device="cuda", **options)

    sample()  # moves the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = sample()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


def test_per_image_noise_depends_only_on_the_seed_of_the_image():
    batch, single = PerImageNoise([3, 1, 2]), [PerImageNoise([seed]) for seed in (3, 1, 2)]
    for _ in range(3):
        drawn = batch.randn((4, 6, 6))
        assert torch.equal(drawn, torch.cat([noise.randn((4, 6, 6)) for noise in single]))
    assert len({row.sum().item() for row in drawn}) == 3
    x = torch.empty(3, 4, 32, 32, dtype=torch.bfloat16)
    noise = batch.randn_like(x)
    assert noise.shape == x.shape and noise.dtype == x.dtype
    assert noise.float().std().item() == pytest.approx(1, abs=0.05)


def test_wrong_sampling_arguments_raise_with_the_value_they_got():
    diffusion, shape = create_diffusion("25"), (2, 4, 6, 6)
    with pytest.raises(ValueError, match="got 4, expected 8"):
        diffusion.ddim_sample_loop(lambda x, t: x, shape)
    with pytest.raises(ValueError, match="got 8, expected 4"):
        create_diffusion("25", learn_sigma=False).ddim_sample_loop(toy_eps, shape)
    with pytest.raises(ValueError, match="noise_schedule: got 'sqrt'"):
        create_diffusion(noise_schedule="sqrt")
    for seed in (-1, 2**32):  # the generator reads 32 bits: larger seeds would repeat images
        with pytest.raises(ValueError, match=f"got {seed}"):
            PerImageNoise([0, seed])


def test_the_v_loss_is_the_noise_loss_divided_by_alpha_bar():
    """The v-network makes the same noise prediction; the variance term is the same."""
    x, t, noise = training_batch()
    alpha = ALPHAS_CUMPROD[t][:, None, None, None]

    def predict_v(x_t, t, y):
        epsilon, variance = toy_eps(x_t, t).chunk(2, dim=1)
        return torch.cat([(epsilon - (1 - alpha).sqrt() * x_t) / alpha.sqrt(), variance], 1)

    got = OBJECTIVES["gaussian_v"]().losses(predict_v, x, None, t, noise)
    want = create_diffusion().training_losses(toy_eps, x, t, noise=noise)
    assert relative_error(got["mse"], want["mse"] / alpha.flatten()) < 1e-4
    assert relative_error(got["vb"], want["vb"]) < 1e-3
    assert torch.equal(got["loss"], got["mse"] + got["vb"])
