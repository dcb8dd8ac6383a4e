"""Gaussian diffusion against the published numbers, and against what theory says of it."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file

from diffusion import GaussianDiffusion, PerImageNoise, create_diffusion, space_timesteps

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


def toy_without_sigma(x, t):
    return toy_eps(x, t)[:, :4]


def training_batch():
    return REFERENCE["x_start"], REFERENCE["t"], REFERENCE["noise"]


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "posterior_log_variance_clipped"])
def test_tables_match_the_published_ones(name):
    table = getattr(create_diffusion(), name)
    assert table.dtype == torch.float64
    assert relative_error(table, REFERENCE[name]) < 1e-10


def test_cosine_betas_match_the_published_ones():
    betas = create_diffusion(noise_schedule="squaredcos_cap_v2").betas
    assert relative_error(betas, REFERENCE["betas_squaredcos"]) < 1e-10


@pytest.mark.parametrize("spec", RESPACINGS)
def test_respacing_matches_the_published_one(spec):
    diffusion = create_diffusion(spec)
    assert torch.equal(diffusion.timestep_map, reference("timesteps", spec))
    assert diffusion.num_timesteps == len(reference("timesteps", spec))
    assert relative_error(diffusion.betas, reference("betas", spec)) < 1e-10


def test_q_sample_matches_the_published_one():
    x_t = create_diffusion().q_sample(*training_batch())
    assert relative_error(x_t, REFERENCE["x_t"]) < 1e-6


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
    ("spec", "want"),
    [
        ("10", list(range(10))),
        ("5", [0, 2, 4, 7, 9]),
        ("1,2", [0, 5, 9]),
        ("0,2", [5, 9]),
        ("ddim5", [0, 2, 4, 6, 8]),
        ("ddim4", [0, 3, 6, 9]),
        ("ddim1", [0]),
        (3, [0, 4, 9]),
        (None, list(range(10))),
    ],
)
def test_spec_keeps_these_steps_of_ten(spec, want):
    assert space_timesteps(10, spec) == want


def test_position_on_a_half_rounds_as_the_published_running_sum_does():
    """Step 10 of 21 lies at 499.5, which alone would round to 500; the sum of strides is below."""
    assert space_timesteps(1000, "21")[10] == 499


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ddim333", "ddim333"),
        ("ddim0", "ddim0"),
        ("ddim-5", "ddim-5"),
        ("ddim", "ddim"),
        ("1001", "1001"),
        (1001, "1001"),
        ("500,501", "501"),
        ("-5", "-5"),
        (-5, "-5"),
        ("0", "0"),
        ("10,,3", "10,,3"),
        ("ten", "ten"),
        ("2.5", "2.5"),
        (",".join(["1"] * 1001), "1001"),
    ],
)
def test_impossible_spec_raises_one_line_that_names_it(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        create_diffusion(spec)
    assert "\n" not in str(error.value)


def test_network_is_told_the_step_of_the_original_chain():
    diffusion, told = create_diffusion("10,5,3"), []

    def model(x, t):
        told.append(t)
        return toy_eps(x, t)

    seen = []
    diffusion.ddim_sample_loop(model, (2, 4, 6, 6), callback=lambda info: seen.append(info["t"]))
    want = diffusion.timestep_map.flip(0)[:, None].expand(-1, 2)
    assert torch.equal(torch.stack(told), want)
    assert torch.equal(torch.stack(seen), want)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_x_start_and_epsilon_prediction_give_the_same_samples(eta):
    by_epsilon = create_diffusion("25", learn_sigma=False)
    by_x_start = create_diffusion("25", learn_sigma=False, predict_xstart=True)

    def x_start_of_toy(x, t):
        alpha = ALPHAS_CUMPROD[t][:, None, None, None]
        return (x - (1 - alpha).sqrt() * toy_without_sigma(x, t)) / alpha.sqrt()

    samples = []
    for diffusion, model in ((by_epsilon, toy_without_sigma), (by_x_start, x_start_of_toy)):
        noise = PerImageNoise([1, 2])
        samples.append(
            diffusion.ddim_sample_loop(
                model, (2, 4, 6, 6), clip_denoised=False, noise_fn=noise.randn_like, eta=eta
            )
        )
    assert relative_error(samples[1], samples[0]) < 1e-4


def test_ddim_with_the_exact_x_start_walks_the_line_to_it():
    diffusion = create_diffusion("25", learn_sigma=False, predict_xstart=True)
    generator = torch.Generator().manual_seed(0)
    x_start = torch.randn(2, 4, 6, 6, generator=generator)
    noise = torch.randn(2, 4, 6, 6, generator=generator)
    states = []
    x = diffusion.ddim_sample_loop(
        lambda x, t: x_start,
        x_start.shape,
        diffusion.q_sample(x_start, torch.full((2,), 24), noise),
        clip_denoised=False,
        callback=lambda info: states.append(info["x"]),
    )
    assert torch.equal(x, x_start)
    assert len(states) == 25
    for step, state in enumerate(states[:-1]):
        want = diffusion.q_sample(x_start, torch.full((2,), 23 - step), noise)
        assert relative_error(state, want) < 1e-5


def test_ddim_with_eta_one_has_the_variance_of_the_posterior():
    """x_0 is known, so DDIM at eta 1 and DDPM with the posterior variance are one sampler."""
    diffusion = create_diffusion("25", learn_sigma=False, predict_xstart=True, sigma_small=True)
    x_start = torch.linspace(-1, 1, 2 * 4 * 6 * 6).view(2, 4, 6, 6)
    ddpm, ddim = (
        loop(lambda x, t: x_start + 0.1 * x, x_start.shape, noise_fn=noise.randn_like, **options)
        for loop, noise, options in (
            (diffusion.p_sample_loop, PerImageNoise([1, 2]), {}),
            (diffusion.ddim_sample_loop, PerImageNoise([1, 2]), {"eta": 1.0}),
        )
    )
    assert relative_error(ddim, ddpm) < 1e-5


def test_ddim_draws_eta_of_the_posterior_deviation_anew():
    diffusion = create_diffusion("25", learn_sigma=False, predict_xstart=True)
    z = torch.randn(2, 4, 6, 6)
    with_noise, without = [], []
    for states, noise_fn in ((with_noise, torch.ones_like), (without, torch.zeros_like)):
        diffusion.ddim_sample_loop(
            lambda x, t: torch.zeros_like(x),
            z.shape,
            z,
            noise_fn=noise_fn,
            eta=0.5,
            callback=lambda info, states=states: states.append(info["x"]),
        )
    want = 0.5 * diffusion.posterior_variance[24].sqrt().float().expand_as(z)
    torch.testing.assert_close(with_noise[0] - without[0], want)


def test_x_start_prediction_is_trained_towards_x_start():
    diffusion = create_diffusion(predict_xstart=True, learn_sigma=False)
    x, t, noise = training_batch()
    losses = diffusion.training_losses(lambda x_t, t: x + 0.5, x, t, noise=noise)
    torch.testing.assert_close(losses["mse"], torch.full((8,), 0.25))


@pytest.mark.parametrize("sigma_small", [False, True])
def test_fixed_variance_is_that_of_the_table(sigma_small):
    diffusion = create_diffusion("25", learn_sigma=False, sigma_small=sigma_small)
    p = diffusion.p_mean_variance(toy_without_sigma, torch.randn(25, 4, 2, 2), torch.arange(25))
    posterior = diffusion.posterior_variance
    logged = torch.cat([posterior[1:2], posterior[1:] if sigma_small else diffusion.betas[1:]])
    variance = posterior if sigma_small else logged
    for name, table in (("variance", variance), ("log_variance", logged.log())):
        want = table.float()[:, None, None, None].expand(25, 4, 2, 2)
        torch.testing.assert_close(p[name], want)


def test_fixed_variance_has_no_bound_in_the_loss():
    x, t, noise = training_batch()
    losses = create_diffusion(learn_sigma=False).training_losses(
        toy_without_sigma, x, t, noise=noise
    )
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


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 4), (False, 8)])
def test_wrong_number_of_predicted_channels_raises(learn_sigma, channels):
    x, t, noise = training_batch()
    diffusion = create_diffusion(learn_sigma=learn_sigma)
    with pytest.raises(ValueError, match=f"got {channels}"):
        diffusion.training_losses(lambda x, t: toy_eps(x, t)[:, :channels], x, t, noise=noise)


@pytest.mark.parametrize(
    "options", [{"noise_schedule": "sqrt"}, {"diffusion_steps": 0}, {"diffusion_steps": 20}]
)
def test_impossible_schedule_raises(options):
    with pytest.raises(ValueError, match="got"):
        create_diffusion(**options)


@pytest.mark.parametrize("options", [{"prediction": "v"}, {"variance": "learned"}])
def test_unknown_prediction_or_variance_raises(options):
    with pytest.raises(ValueError, match="must be one of"):
        GaussianDiffusion(torch.full((10,), 0.1), **options)


def test_one_step_chain_has_finite_tables():
    diffusion = create_diffusion("1")
    x = diffusion.p_sample_loop(toy_eps, (2, 4, 6, 6), clip_denoised=False)
    assert x.isfinite().all()
    assert diffusion.posterior_log_variance_clipped.isfinite().all()


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


def test_aux_loss_passes_through_with_its_gradient_and_outside_the_loss():
    x, t, noise = training_batch()
    weight = torch.tensor(2.0, requires_grad=True)
    diffusion = create_diffusion()
    with_aux = diffusion.training_losses(
        lambda x, t: (toy_eps(x, t), 3 * weight), x, t, noise=noise
    )
    without = diffusion.training_losses(toy_eps, x, t, noise=noise)
    with_aux["aux_loss"].backward()
    assert with_aux["aux_loss"].item() == 6
    assert weight.grad.item() == 3
    assert torch.equal(with_aux["loss"], without["loss"])
    assert without["aux_loss"].shape == () and without["aux_loss"].item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_half_precision_output_leaves_the_state_fp32(sampler, dtype):
    seen = []

    def half(x, t):
        seen.append(x)
        return toy_eps(x, t).to(dtype), torch.zeros((), dtype=dtype)

    def same_values_in_fp32(x, t):
        return toy_eps(x, t).to(dtype).float()

    samples = [
        getattr(create_diffusion("25"), sampler)(
            model,
            (2, 4, 6, 6),
            reference("z", "25").to(dtype),
            noise_fn=PerImageNoise([1, 2]).randn_like,
            callback=lambda info: seen.append(info["x"]),
        )
        for model in (half, same_values_in_fp32)
    ]
    assert {x.dtype for x in seen} == {torch.float32}
    assert torch.equal(*samples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_are_fp32_whatever_the_data_noise_and_output_are(dtype):
    x, t, noise = training_batch()

    def model(x_t, t):
        assert x_t.dtype == torch.float32
        return toy_eps(x_t, t).to(dtype)

    losses = create_diffusion().training_losses(model, x.to(dtype), t, noise=noise.to(dtype))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert relative_error(losses["mse"], REFERENCE["loss_mse"]) < 2e-2


def test_noise_is_drawn_in_fp32_for_half_precision_data():
    x, t, _ = training_batch()
    drawn = []
    for data in (x.bfloat16(), x.bfloat16().float()):
        torch.manual_seed(0)
        drawn.append(create_diffusion().training_losses(toy_eps, data, t)["mse"])
    assert torch.equal(*drawn)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: host synchronisation")
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


@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_callback_sees_every_state_and_progress_changes_nothing(sampler, capsys):
    infos = []
    loop = getattr(create_diffusion("25"), sampler)
    z, noise = torch.randn(2, 4, 6, 6), (PerImageNoise([1, 2]), PerImageNoise([1, 2]))
    x = loop(toy_eps, z.shape, z, noise_fn=noise[0].randn_like, callback=infos.append)
    assert [info["step"] for info in infos] == list(range(25))
    assert torch.equal(infos[-1]["x"], x)
    assert torch.equal(infos[-1]["pred_xstart"], x), "the last step goes to the estimate of x_0"
    assert all(not torch.equal(a["x"], b["x"]) for a, b in pairwise(infos))
    assert "/25 [" not in capsys.readouterr().err
    again = loop(toy_eps, z.shape, z, noise_fn=noise[1].randn_like, progress=True)
    assert torch.equal(again, x)
    assert "/25 [" in capsys.readouterr().err


def test_noise_of_another_shape_raises():
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 6\).*\(1, 4, 6, 6\)"):
        create_diffusion("25").p_sample_loop(toy_eps, (2, 4, 6, 6), torch.randn(1, 4, 6, 6))


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_outside_zero_to_one_raises(eta):
    with pytest.raises(ValueError, match="eta"):
        create_diffusion("25").ddim_sample_loop(toy_eps, (2, 4, 6, 6), eta=eta)


def ideal_epsilon(x, t, mean, std):
    """The conditional expectation of the noise when the data are N(mean, std^2)."""
    alpha = ALPHAS_CUMPROD[t][:, None, None, None]
    return (1 - alpha).sqrt() * (x - alpha.sqrt() * mean) / (alpha * std**2 + 1 - alpha)


@pytest.mark.parametrize(
    ("sampler", "spec", "sigma_small"),
    [
        ("p_sample_loop", "", False),
        ("p_sample_loop", "", True),
        ("p_sample_loop", "250", True),
        ("ddim_sample_loop", "ddim250", False),
    ],
)
def test_the_ideal_network_samples_the_data_distribution(sampler, spec, sigma_small):
    mean, std = 0.8, 0.5
    diffusion = create_diffusion(spec, learn_sigma=False, sigma_small=sigma_small)
    x = getattr(diffusion, sampler)(
        lambda x, t: ideal_epsilon(x, t, mean, std),
        (2, 4, 32, 32),
        clip_denoised=False,
        noise_fn=PerImageNoise([0, 1]).randn_like,
    )
    assert x.mean().item() == pytest.approx(mean, abs=0.03)
    assert x.std().item() == pytest.approx(std, rel=0.05)


def test_bound_is_least_where_the_learned_variance_is_the_right_one():
    """With the ideal noise estimate, x_{t-1} given x_t has a known variance; vb must prefer it."""
    mean, std, index = 0.0, 0.5, 300
    diffusion = create_diffusion()
    alpha, alpha_prev = diffusion.alphas_cumprod[index], diffusion.alphas_cumprod_prev[index]
    left_in_x_start = std**2 * (1 - alpha) / (alpha * std**2 + 1 - alpha)
    right = diffusion.posterior_variance[index]
    right = right + diffusion.posterior_mean_coef1[index] ** 2 * left_in_x_start
    lowest = diffusion.posterior_log_variance_clipped[index]
    share = (right.log() - lowest) / (diffusion.betas[index].log() - lowest)
    assert 0 < share < 1 and alpha_prev > alpha

    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 64, 4, 32, 32, generator=generator)
    t = torch.full((64,), index)
    bound = {}
    for offset in (-0.2, 0.0, 0.2):

        def model(x, t, value=2 * (share + offset) - 1):
            epsilon = ideal_epsilon(x, t, mean, std)
            return torch.cat([epsilon, torch.full_like(x, value)], 1)

        losses = diffusion.training_losses(model, std * x, t, noise=noise)
        bound[offset] = losses["vb"].double().mean().item()
    assert bound[0.0] < bound[-0.2] and bound[0.0] < bound[0.2]


def test_bound_at_the_first_step_is_the_likelihood_of_the_bins():
    """Of 256 bins over [-1, 1], those at -1 and 1 are open to their outer side."""
    diffusion = create_diffusion()
    x = torch.tensor([-1.0, 1 / 255, 1.0]).view(1, 3, 1, 1)  # centres of bins 0, 128 and 255
    t, noise = torch.zeros(1, dtype=torch.long), torch.zeros_like(x)

    def bits(error):
        def model(x_t, t):
            signal = ALPHAS_CUMPROD[0].sqrt()
            epsilon = (x_t - signal * (x + error)) / (1 - ALPHAS_CUMPROD[0]).sqrt()
            return torch.cat([epsilon, torch.full_like(x, -1.0)], 1)

        return diffusion.training_losses(model, x, t, noise=noise)["vb"].item()

    std = math.exp(0.5 * diffusion.posterior_log_variance_clipped[0].item())
    inside = math.erf(1 / 255 / std / math.sqrt(2))
    one_side = (1 + inside) / 2
    want = -(2 * math.log2(one_side) + math.log2(inside)) / 3
    assert bits(0.0) == pytest.approx(want, abs=2e-3)
    assert bits(10.0) == pytest.approx(-2 / 3 * math.log2(1e-12), rel=1e-4)


def test_per_image_noise_depends_on_the_seed_alone():
    together = PerImageNoise([3, 1, 2])
    alone = {seed: PerImageNoise([seed]) for seed in (1, 2, 3)}
    for _ in range(3):
        drawn = together.randn((4, 6, 6))
        for row, seed in zip(drawn, (3, 1, 2), strict=True):
            assert torch.equal(row, alone[seed].randn((4, 6, 6))[0])
    assert len({row.sum().item() for row in drawn}) == 3


def test_a_sample_does_not_depend_on_its_batch():
    def sample(seeds):
        noise = PerImageNoise(seeds)
        return create_diffusion("25").p_sample_loop(
            toy_eps, (len(seeds), 4, 6, 6), noise_fn=noise.randn_like
        )

    whole = sample([5, 6, 7, 8])
    parts = torch.cat([sample([8, 6]), sample([5]), sample([7])])
    torch.testing.assert_close(whole[[3, 1, 0, 2]], parts, rtol=0, atol=1e-6)


def test_per_image_noise_is_standard_normal_and_like_its_argument():
    x = torch.empty(4, 4, 32, 32, dtype=torch.bfloat16)
    noise = PerImageNoise(range(4)).randn_like(x)
    assert noise.shape == x.shape and noise.dtype == x.dtype
    assert abs(noise.float().mean().item()) < 0.05
    assert noise.float().std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("rows", [1, 3])
def test_per_image_noise_needs_a_row_per_seed(rows):
    with pytest.raises(ValueError, match=f"got {rows} rows, expected 2"):
        PerImageNoise([1, 2]).randn_like(torch.empty(rows, 4, 6, 6))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_that_would_repeat_another_image_raises(seed):
    with pytest.raises(ValueError, match=str(seed)):
        PerImageNoise([0, seed])
