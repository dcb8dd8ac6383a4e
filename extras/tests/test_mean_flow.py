"""Mean flow: the loss on data whose average velocity is known, the sampler, and fine-tuning.

The data are normal with mean 0 and standard deviation STD. The flow therefore maps z_t to
z_r = z_t s(r) / s(t), with s(t)^2 = (1 - t)^2 STD^2 + t^2.
"""

import json

import pytest
import torch
from helpers import call_main, expect_error, relative_error
from torch import Tensor

from checkpoints import load_model
from diffusion import OBJECTIVES, classifier_free_guidance
from models import DiT
from sampling.generate import SamplerSettings, generate, resolve_settings
from wrappers import wrap_blocks

STD = 0.5
LABELS, NONE = torch.tensor([0, 1, 4, 3]), torch.full((4,), 4)


def deviation(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | z] at t (N,)."""
    time = t[:, None, None, None]
    return z * (time - (1 - time) * STD**2) / deviation(time) ** 2


def average(z: Tensor, t: Tensor, y: dict | Tensor) -> Tensor:
    """Exact average velocity over the span y["span"]. At span 0 this is the velocity."""
    span = y["span"] if isinstance(y, dict) and "span" in y else torch.zeros_like(t)
    start, time = (t - span)[:, None, None, None], t[:, None, None, None]
    step = torch.where(span > 0, span, 1.0)[:, None, None, None]
    mean = z * (1 - deviation(start) / deviation(time)) / step
    return torch.where((span > 0)[:, None, None, None], mean, velocity(z, t))


def batch(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    x, noise = STD * torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    t, r = torch.tensor([0.9, 0.7, 0.6, 0.4]), torch.tensor([0.1, 0.5, 0.6, 0.4])
    return {"x": x, "noise": noise, "t": t, "r": r, "num_spans": 2}


def test_mean_flow_with_the_exact_average_velocity_has_the_loss_of_the_flow():
    """Equation 6: u + (t - r) du/dt = v, at every t and r."""
    drawn = batch()
    flow = OBJECTIVES["mean_flow"](weight_power=0.0)
    want = OBJECTIVES["rectified_flow"]().losses(
        lambda z, t, y: velocity(z, t), drawn["x"], LABELS, drawn["t"], drawn["noise"]
    )
    got = flow.losses(average, y=LABELS, **drawn)
    assert relative_error(got["mse"], want["loss"]) < 1e-5
    assert relative_error(got["loss"], 18 * got["mse"]) < 1e-6
    held_out = flow.losses(average, drawn["x"], LABELS, drawn["t"], drawn["noise"])
    assert relative_error(held_out["loss"], want["loss"]) < 1e-6


def test_the_mean_flow_loss_depends_on_the_tangent_of_the_jvp():
    """With the tangent noise - data the identity holds only on average, so the loss of a single
    image differs."""
    drawn = batch()
    network, data = (
        OBJECTIVES["mean_flow"](tangent=name).losses(average, y=LABELS, **drawn)["mse"]
        for name in ("network", "data")
    )
    assert relative_error(data[:2], network[:2]) > 1e-2
    assert torch.equal(data[2:], network[2:])  # without a span there is no tangent


def test_the_mean_flow_loss_weight_follows_the_paper_and_has_no_gradient():
    drawn, scale = batch(), torch.tensor(2.0, requires_grad=True)

    def network(z: Tensor, t: Tensor, y: dict) -> Tensor:
        return scale * average(z, t, y)

    plain = OBJECTIVES["mean_flow"](weight_power=0.0).losses(network, y=LABELS, **drawn)["loss"]
    weighted = OBJECTIVES["mean_flow"](weight_power=0.5).losses(network, y=LABELS, **drawn)["loss"]
    assert relative_error(weighted, plain / (plain + 0.01).sqrt()) < 1e-5
    weight = (plain.detach() + 0.01).rsqrt()
    (want,) = torch.autograd.grad((weight * plain).sum(), scale)
    (got,) = torch.autograd.grad(weighted.sum(), scale)
    assert relative_error(got, want) < 1e-5


def test_mean_flow_guidance_in_training_changes_the_target_of_images_with_a_class():
    drawn, flow = batch(), OBJECTIVES["mean_flow"](omega=0.8, kappa=0.5)

    def network(z: Tensor, t: Tensor, y: dict) -> Tensor:  # a different velocity for each class
        return z * (1 + y["label"])[:, None, None, None]

    z = torch.randn(4, 2, 3, 3)
    data = torch.randn_like(z)
    target, direction = flow.velocities(
        network, z, drawn["t"], {"label": LABELS}, data, {"label": NONE}, slice(0, 2)
    )
    with_class = z * (1 + LABELS)[:, None, None, None]
    want = 0.8 * data + 0.5 * with_class - 0.3 * 5 * z
    want[2] = data[2]  # label 4: no class
    assert relative_error(target, want) < 1e-6
    assert torch.equal(direction, with_class[:2])
    with pytest.raises(ValueError, match="without a class"):
        flow.losses(network, y={"label": LABELS}, **drawn)


def test_mean_flow_draws_a_span_for_the_requested_fraction_of_images():
    flow = OBJECTIVES["mean_flow"](span_share=0.3)
    counts = []
    for seed in range(200):
        torch.manual_seed(seed)
        drawn = flow.draw(torch.zeros(5, 1, 1, 1))
        spans = drawn["t"] - drawn["r"]
        assert (spans[: drawn["num_spans"]] > 0).all() and (spans[drawn["num_spans"] :] == 0).all()
        counts.append(drawn["num_spans"])
    assert set(counts) == {1, 2} and sum(counts) / 200 == pytest.approx(1.5, abs=0.15)


@pytest.mark.parametrize("options", [{"times": "uniform"}, {"mean": -0.4, "std": 0.8}])
def test_the_quantiles_of_mean_flow_are_those_of_its_times(options):
    flow = OBJECTIVES["mean_flow"](**options)
    torch.manual_seed(0)
    drawn = flow.draw(torch.zeros(50_000, 1, 1, 1))["t"].sort().values
    shares = torch.arange(0.05, 1, 0.1)
    got = torch.searchsorted(drawn, flow.time_quantile(shares)) / len(drawn)
    assert (got - shares).abs().max() < 1.63 / len(drawn) ** 0.5


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_mean_sampler_reaches_the_data_in_any_number_of_steps(steps):
    flow, z = OBJECTIVES["mean_flow"](), torch.randn(4, 2, 3, 3)
    denoise = flow.denoiser(classifier_free_guidance(average, LABELS, NONE, 3.0))
    mean, states = flow.samplers["mean"], []
    got = mean(denoise, z, flow.sampling_times(mean, steps), states.append)
    assert relative_error(got, STD * z) < 1e-5
    assert len(states) == steps


def model_of(**fields) -> DiT:
    torch.manual_seed(0)
    model = DiT(
        input_size=8, hidden_size=32, depth=2, num_heads=2, num_experts=4, num_classes=4,
        conditions=("label", "span"), **fields,
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def test_a_mean_flow_model_with_euler_is_sampled_like_a_rectified_flow():
    model = model_of()
    mean_flow, flow = (
        generate(model, [1, 2], [0, 1], SamplerSettings(name, "euler", 3, 2.0))
        for name in ("mean_flow", "rectified_flow")
    )
    assert torch.equal(mean_flow, flow)
    means = generate(model, [1, 2], [0, 1], SamplerSettings("mean_flow", None, 3, 2.0))
    assert relative_error(means, flow) > 1e-3
    for objective, scale in (("mean_flow:kappa=0.5", 1), ("mean_flow", 1.5)):
        assert resolve_settings(SamplerSettings(objective), model.config).cfg_scale == scale


def test_compiled_blocks_give_the_loss_gradients_and_samples_of_mean_flow(monkeypatch):
    """Under torch.func.jvp the blocks run uncompiled, in every other pass compiled."""
    calls, compile = [], torch.compile

    def traced(function):
        compiled = compile(function, backend="eager")
        return lambda *arguments: calls.append(1) or compiled(*arguments)

    monkeypatch.setattr(torch, "compile", traced)
    flow, x = OBJECTIVES["mean_flow"](omega=0.8, kappa=0.5), torch.randn(4, 4, 8, 8)
    torch.manual_seed(3)
    drawn = {**flow.draw(x), "null_y": {"label": NONE}}
    losses, gradients, images = [], [], []
    for is_compiled in (False, True):
        model = model_of().train()
        wrap_blocks(model, compiled=is_compiled)
        loss = flow.losses(model, x, {"label": LABELS}, **drawn)["loss"].sum()
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        settings = SamplerSettings("mean_flow", None, 2, 1.0)
        images.append(generate(model.eval(), [1, 2], [0, 1], settings))
    # Two blocks in five passes: with a class, without a class, with gradients, and two to sample.
    assert len(calls) == 2 * (3 + 2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for got, want in zip(*reversed(gradients), strict=True):
        assert (got is None) == (want is None)
        assert got is None or want.norm() < 1e-6 or relative_error(got, want) < 1e-4
    assert relative_error(images[1], images[0]) < 1e-5


@pytest.mark.parametrize("router", ["race", "prototype"])
def test_mean_flow_takes_router_statistics_from_the_pass_with_gradients(router):
    model = model_of(router=router).train()
    flow, x = OBJECTIVES["mean_flow"](), torch.randn(4, 4, 8, 8)
    drawn = flow.draw(x)
    flow.losses(model, x, {"label": LABELS}, **drawn)["loss"].sum().backward()
    load = model.expert_load
    z = x.lerp(drawn["noise"], drawn["t"][:, None, None, None])
    model(z, drawn["t"], {"label": LABELS, "span": drawn["t"] - drawn["r"]})
    assert torch.equal(model.expert_load, load)


def test_guidance_in_training_without_dropped_labels_is_rejected(train_flags, tmp_path, capsys):
    flags = train_flags(tmp_path, objective="mean_flow:kappa=0.5")
    line = expect_error(capsys, "train.py", *flags, "--class-dropout-prob", 0)
    assert "--class-dropout-prob: got 0" in line
    assert not [*tmp_path.iterdir()]


def test_fine_tuning_a_flow_to_mean_flow_starts_with_its_velocity(train_flags, tmp_path):
    """The embedder of the span starts at zero, so the fine-tuned model starts as the flow."""
    flow = ["--objective", "rectified_flow", "--max-steps", "3", "--run-name", "flow"]
    call_main("train", *train_flags(tmp_path), *flow)
    changes = {"model": None, "num_experts": None, "lr": 0.0, "gradient-checkpointing": True}
    command = train_flags(tmp_path, **changes, finetune=tmp_path / "flow")
    command += ["--objective", "mean_flow:kappa=0.5", "--max-steps", "1", "--run-name", "tuned"]
    call_main("train", *command)
    before, after = (load_model(tmp_path / name) for name in ("flow", "tuned"))
    assert after.config.conditions == ("label", "span")
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    for span in (torch.zeros(2), torch.tensor([0.1, 0.9])):
        got = after(x, t, {"label": y, "span": span})[0]
        assert relative_error(got, before(x, t, y)[0]) < 1e-5
    row = json.loads((tmp_path / "tuned" / "log.jsonl").read_text().splitlines()[-1])
    assert row["mse"] > 0
