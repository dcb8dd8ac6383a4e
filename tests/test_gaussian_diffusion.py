"""Gaussian diffusion against the published numbers, and against what theory says of it."""

from pathlib import Path

import pytest
import torch
from conftest import needs_gpu, relative_error
from safetensors.torch import load_file

from diffusion import PerImageNoise, create_diffusion, space_timesteps

REFERENCE = load_file(Path(__file__).parent / "reference" / "gaussian_diffusion.safetensors")
ALPHAS_CUMPROD = REFERENCE["alphas_cumprod"].float()
RESPACINGS = ["", "25", "ddim50", "10,5,3"]


def reference(name, spec):
    return REFERENCE[f"{name}.{spec.replace(',', '_')}"]


def toy_eps(x, t):
    """The stand-in network of tests/reference/README.md; t is a step of the original chain."""
    noise_std = (1 - ALPHAS_CUMPROD[t.long()]).sqrt()[:, None, None, None]
    epsilon = noise_std * x + 0.1 * torch.sin(3 * x) * noise_std
    return torch.cat([epsilon, torch.tanh(x + t.float()[:, None, None, None] / 1000)], 1)


def exact(x_start):
    """A network that knows the data; of the two variances it chooses the posterior's."""

    def network(x, t):
        alpha = ALPHAS_CUMPROD[t][:, None, None, None]
        epsilon = (x - alpha.sqrt() * x_start) / (1 - alpha).sqrt()
        return torch.cat([epsilon, torch.full_like(x, -1)], 1)

    return network


def training_batch():
    return REFERENCE["x_start"], REFERENCE["t"], REFERENCE["noise"]


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "posterior_log_variance_clipped"])
def test_tables_match_the_published_ones(name):
    table = getattr(create_diffusion(), name)
    assert table.dtype == torch.float64
    assert relative_error(table, REFERENCE[name]) < 1e-10


def test_cosine_betas_and_q_sample_match_the_published_ones():
    betas = create_diffusion(noise_schedule="squaredcos_cap_v2").betas
    assert relative_error(betas, REFERENCE["betas_squaredcos"]) < 1e-10
    x_t = create_diffusion().q_sample(*training_batch())
    assert relative_error(x_t, REFERENCE["x_t"]) < 1e-6


@pytest.mark.parametrize("spec", RESPACINGS)
def test_respacing_matches_the_published_one(spec):
    diffusion = create_diffusion(spec)
    assert torch.equal(diffusion.timestep_map, reference("timesteps", spec))
    assert diffusion.num_timesteps == len(reference("timesteps", spec))
    assert relative_error(diffusion.betas, reference("betas", spec)) < 1e-10


@pytest.mark.parametrize("term", ["loss", "mse", "vb"])
def test_training_losses_match_the_published_ones(term):
    x, t, noise = training_batch()
    losses = create_diffusion().training_losses(toy_eps, x, t, noise=noise)
    want = REFERENCE["loss" if term == "loss" else f"loss_{term}"]
    assert relative_error(losses[term], want) < 1e-5


@pytest.mark.parametrize(
    ("name", "want"),
    [("mean", "p_mean"), ("log_variance", "p_log_variance"), ("pred_xstart", "pred_xstart")],
)
def test_p_mean_variance_matches_the_published_one(name, want):
    x, t, _ = training_batch()  # the published numbers are those at x = x_start
    p = create_diffusion().p_mean_variance(toy_eps, x, t, clip_denoised=False)
    assert relative_error(p[name], REFERENCE[want]) < 1e-5
    assert torch.equal(p["variance"], p["log_variance"].exp())


@pytest.mark.parametrize("spec", RESPACINGS)
def test_ddim_matches_the_published_sampler(spec):
    z = reference("z", spec)
    x = create_diffusion(spec).ddim_sample_loop(toy_eps, z.shape, z, clip_denoised=False)
    assert relative_error(x, reference("ddim", spec)) < 1e-5


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
def test_spec_keeps_these_steps(num_timesteps, spec, want):
    assert space_timesteps(num_timesteps, spec) == want


IMPOSSIBLE = [
    "ddim333", "ddim0", "ddim-5", "ddim", "ddim5,5", "1001", 1001, "500,501", -5, "10,,3", "2.5",
]  # fmt: skip


@pytest.mark.parametrize("spec", IMPOSSIBLE)
def test_impossible_spec_raises_one_line(spec):
    with pytest.raises(ValueError, match="got") as error:
        create_diffusion(spec)
    assert "\n" not in str(error.value)


def test_ddim_with_eta_one_is_ddpm_with_the_variance_of_the_posterior():
    diffusion = create_diffusion("25")
    x_start = torch.linspace(-1, 1, 2 * 4 * 6 * 6).view(2, 4, 6, 6)
    ddpm, ddim = (
        loop(exact(x_start), x_start.shape, noise_fn=PerImageNoise([1, 2]).randn_like, **options)
        for loop, options in (
            (diffusion.p_sample_loop, {}),
            (diffusion.ddim_sample_loop, {"eta": 1.0}),
        )
    )
    assert relative_error(ddim, ddpm) < 1e-5


def test_fixed_variance_is_beta_and_has_no_bound_in_the_loss():
    diffusion = create_diffusion("25", learn_sigma=False)
    model = lambda x, t: toy_eps(x, t)[:, :4]  # noqa: E731
    p = diffusion.p_mean_variance(model, torch.randn(25, 4, 2, 2), torch.arange(25))
    want = torch.cat([diffusion.posterior_variance[1:2], diffusion.betas[1:]]).float()
    torch.testing.assert_close(p["variance"], want[:, None, None, None].expand(25, 4, 2, 2))
    x, t, noise = training_batch()
    losses = create_diffusion(learn_sigma=False).training_losses(model, x, t, noise=noise)
    assert torch.equal(losses["vb"], torch.zeros(8))
    assert relative_error(losses["loss"], REFERENCE["loss_mse"]) < 1e-5


def test_clip_denoised_clamps_the_estimate_and_moves_the_mean():
    x, t = REFERENCE["x_t"], REFERENCE["t"]
    clipped, free = (
        create_diffusion().p_mean_variance(toy_eps, x, t, clip_denoised=clip)
        for clip in (True, False)
    )
    assert free["pred_xstart"].abs().max() > 1
    assert torch.equal(clipped["pred_xstart"], free["pred_xstart"].clamp(-1, 1))
    assert not torch.equal(clipped["mean"], free["mean"])


def test_bound_trains_the_variance_channels_and_the_error_the_others():
    x, t, noise = training_batch()
    diffusion = create_diffusion()
    output = toy_eps(REFERENCE["x_t"], t).requires_grad_()
    losses = diffusion.training_losses(lambda x, t: output, x, t, noise=noise)
    vb_grad, mse_grad = (
        torch.autograd.grad(losses[term].sum(), output, retain_graph=True)[0]
        for term in ("vb", "mse")
    )
    assert torch.count_nonzero(vb_grad[:, :4]) == 0
    assert (vb_grad[:, 4:].flatten(1).norm(dim=1) > 0).all()
    assert (mse_grad[:, :4].flatten(1).norm(dim=1) > 0).all()
    assert torch.count_nonzero(mse_grad[:, 4:]) == 0


@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_sampling_never_reads_a_value_back_from_the_device(sampler):
    """A meta tensor has no values: any read back, which on a GPU waits for it, would raise."""
    steps = []
    x = getattr(create_diffusion("25"), sampler)(
        lambda x, t: torch.cat([x, x], 1),
        (2, 4, 6, 6),
        device="meta",
        callback=lambda info: steps.append(info["step"]),
    )
    assert x.device.type == "meta" and x.shape == (2, 4, 6, 6)
    assert steps == list(range(25))


@needs_gpu
def test_sampling_with_per_image_noise_does_not_wait_for_the_gpu():
    diffusion, noise = create_diffusion("25"), PerImageNoise([1, 2])

    def sample():
        return diffusion.p_sample_loop(
            lambda x, t: torch.cat([x, x], 1),
            (2, 4, 6, 6),
            device="cuda",
            noise_fn=noise.randn_like,
        )

    sample()  # moves the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = sample()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


def test_per_image_noise_depends_on_the_seed_alone():
    together = PerImageNoise([3, 1, 2])
    alone = {seed: PerImageNoise([seed]) for seed in (1, 2, 3)}
    for _ in range(3):
        drawn = together.randn((4, 6, 6))
        for row, seed in zip(drawn, (3, 1, 2), strict=True):
            assert torch.equal(row, alone[seed].randn((4, 6, 6))[0])
    assert len({row.sum().item() for row in drawn}) == 3
    x = torch.empty(3, 4, 32, 32, dtype=torch.bfloat16)
    noise = together.randn_like(x)
    assert noise.shape == x.shape and noise.dtype == x.dtype
    assert noise.float().std().item() == pytest.approx(1, abs=0.05)


def test_mistakes_raise_and_name_what_was_got():
    diffusion, shape = create_diffusion("25"), (2, 4, 6, 6)
    with pytest.raises(ValueError, match="got 4, expected 8"):
        diffusion.ddim_sample_loop(lambda x, t: x, shape)
    with pytest.raises(ValueError, match="got 8, expected 4"):
        create_diffusion("25", learn_sigma=False).ddim_sample_loop(toy_eps, shape)
    with pytest.raises(ValueError, match="got noise schedule 'sqrt'"):
        create_diffusion(noise_schedule="sqrt")
    for seed in (-1, 2**32):  # the generator reads 32 bits: larger seeds would repeat images
        with pytest.raises(ValueError, match=f"got {seed}"):
            PerImageNoise([0, seed])
