"""Classifier-free guidance and autoguidance: formula, guided channels, and forward passes."""

from dataclasses import replace

import pytest
import torch
from helpers import call_main, expect_error, save_checkpoint
from PIL import Image, ImageChops
from test_models import randomised

from diffusion import classifier_free_guidance, guidance_within
from sampling.generate import SamplerSettings, generate

N, C = 3, 4
Y, NULL_Y = torch.tensor([1, 2, 3]), torch.tensor([10, 10, 10])


class Recorder:
    """Network with 2C output channels that depends on x, t and y and records its inputs."""

    def __init__(self, returns=lambda prediction: prediction):
        self.returns = returns
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((x, t, y))
        u = (t + y)[:, None, None, None]
        return self.returns(torch.cat([x * torch.cos(u), torch.sin(x + u)], 1))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, C, 6, 6, generator=generator), torch.tensor([7, 70, 700])


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (1, 1), (None, C)])
@pytest.mark.parametrize("scale", [0.0, 2.5, 7.0])
def test_guided_channels_follow_the_formula_and_the_rest_stay_conditional(scale, channels, guided):
    x, t = inputs()
    cond, uncond = Recorder()(x, t, Y), Recorder()(x, t, NULL_Y)
    got = classifier_free_guidance(Recorder(), Y, NULL_Y, scale, channels)(x, t)
    mixed = uncond + scale * (cond - uncond)
    torch.testing.assert_close(got[:, :guided], mixed[:, :guided])
    assert not torch.allclose(got[:, :guided], cond[:, :guided])
    assert torch.equal(got[:, guided:], cond[:, guided:])


@pytest.mark.parametrize("null_y", [None, NULL_Y])
def test_guidance_scale_one_runs_only_the_conditional_pass(null_y):
    model, (x, t) = Recorder(), inputs()
    got = classifier_free_guidance(model, Y, null_y, 1.0, channels=3)(x, t)
    ((x_given, _, y_given),) = model.calls
    assert torch.equal(x_given, x) and torch.equal(y_given, Y)
    assert torch.equal(got, Recorder()(x, t, Y))


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_guidance_ignores_the_aux_loss_and_mixes_half_precision_in_fp32(scale):
    half = Recorder(returns=lambda prediction: (prediction.bfloat16(), prediction.sum()))
    rounded = Recorder(returns=lambda prediction: prediction.bfloat16().float())
    got, want = (
        classifier_free_guidance(model, Y, NULL_Y, scale)(*inputs()) for model in (half, rounded)
    )
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("null_y", [None, NULL_Y[:2]])
def test_guidance_rejects_missing_or_misshapen_null_labels(null_y):
    with pytest.raises(ValueError, match="null_y"):
        classifier_free_guidance(Recorder(), Y, null_y, 2.5)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1), (0, 1.1), (0.7, 0.3)])
def test_a_wrong_guidance_interval_is_rejected_with_got_and_expected(interval):
    with pytest.raises(ValueError, match="got .* expected 0 <= low < high <= 1"):
        guidance_within(interval, 2.0)


LABELS, T = torch.tensor([1, 2]), torch.tensor([0.5, 0.5])


def network(factor: float, channels: int):
    """Network whose output of `channels` channels depends on the input and the label."""
    return lambda x, t, y: factor * (x + y[:, None, None, None]).repeat(1, channels // 4, 1, 1)


def test_flow_x_is_not_guided_near_the_data_by_default():
    """There, the velocity is the error of the predicted data, divided by a small t."""
    model, guided = randomised(learn_sigma=False, class_dropout_prob=0.1).eval(), []
    model.register_forward_hook(
        lambda _, args, __: guided.append((args[1][0].item(), len(args[0])))
    )
    for objective, expected in (("rectified_flow", 10), ("flow_x", 9)):
        guided.clear()
        generate(model, [1], [0], SamplerSettings(objective, "euler", 10, 2.0))
        times = [round(t, 3) for t, count in guided if count == 2]
        assert len(times) == expected and set(times) >= {0.3, 0.5, 0.7}
        assert (1.0 in times) == (objective == "rectified_flow")
    last = SamplerSettings("flow_x", "euler", 20, 2.0)
    for changes, lowest in (({}, 0.1), ({"guidance_interval": (0.0, 1.0)}, 0.05)):
        guided.clear()
        generate(model, [1], [0], replace(last, **changes))
        assert min(t for t, count in guided if count == 2) == pytest.approx(lowest)


def test_autoguidance_moves_the_prediction_away_from_the_guide():
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    model, guide = network(1.0, 8), network(0.5, 4)
    cond, base = model(x, T, LABELS), guide(x, T, LABELS)
    for channels, scale in ((4, 2.5), (3, 0.0)):
        got = classifier_free_guidance(model, LABELS, LABELS, scale, channels, guide=guide)(x, T)
        mixed = base[:, :channels] + scale * (cond - base.repeat(1, 2, 1, 1))[:, :channels]
        torch.testing.assert_close(got[:, :channels], mixed)
        assert torch.equal(got[:, channels:], cond[:, channels:])
    outside = guidance_within((0.6, 1.0), 2.5)
    silent = classifier_free_guidance(model, LABELS, LABELS, outside, guide=Recorder())
    assert torch.equal(silent(x, T), cond)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_vae):
    """Three models without label dropout. The latents of the third model are larger."""
    paths = [tmp_path_factory.mktemp("guides") / f"{number}.safetensors" for number in range(3)]
    facts = dict(vae_path=str(tiny_vae), objective="rectified_flow")
    for path, input_size, noise in zip(paths, (8, 8, 16), (0.02, 0.05, 0.02), strict=True):
        model = randomised(noise, input_size=input_size)
        save_checkpoint(model, path, image_size=2 * input_size, **facts)
    return paths


def test_sample_py_accepts_a_guide_model_with_scale_and_interval(files, tmp_path, capsys):
    def draw(*flags) -> Image.Image:
        path = tmp_path / "grid.png"
        common = ("--ckpt", files[0], "--output", path, "--num-sampling-steps=2")
        call_main("sample.py", *common, *flags)
        return Image.open(path).copy()

    plain, guide = draw("--cfg-scale=1"), ("--guide-ckpt", files[1], "--cfg-scale=3")
    assert ImageChops.difference(plain, draw(*guide)).getbbox()
    assert f"guidance 3 by {files[1]}" in capsys.readouterr().out
    never = draw(*guide, "--guidance-interval", "0.1", "0.2")  # Euler's times are 1 and 0.5
    assert not ImageChops.difference(plain, never).getbbox()


def test_a_note_on_the_objective_is_printed_once(tmp_path, tiny_vae, capsys):
    path = save_checkpoint(randomised(), tmp_path / "model.safetensors", vae_path=str(tiny_vae))
    flags = (f"--output={tmp_path / 'grid.png'}", "--num-sampling-steps=2", "--cfg-scale=3")
    call_main("sample.py", "--ckpt", path, "--guide-ckpt", path, *flags)
    assert capsys.readouterr().out.count("does not record its objective") == 1


def test_a_guide_with_other_latents_or_no_effect_is_a_one_line_error(files, capsys):
    for script, flags, message in (
        ("sample.py", (files[2],), "latents: got 4 x 16 x 16, expected 4 x 8 x 8"),
        (
            "sample.py",
            (files[1], "--cfg-scale=1"),
            "--guide-ckpt: has no effect with --cfg-scale 1",
        ),
        ("evaluate.py", (files[1], "--loss"), "--guide-ckpt: has no effect with --loss"),
    ):
        line = expect_error(capsys, script, "--ckpt", files[0], "--guide-ckpt", *flags)
        assert message in line
