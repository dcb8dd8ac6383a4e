"""Classifier-free guidance: the formula, which channels it touches, and how often it calls."""

import pytest
import torch

from diffusion import classifier_free_guidance

N, C = 3, 4
Y, NULL_Y = torch.tensor([1, 2, 3]), torch.tensor([10, 10, 10])


class Recorder:
    """A network of 2C output channels that depends on x, t and y, and keeps what it was given."""

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


def both_predictions(x, t):
    return Recorder()(x, t, Y), Recorder()(x, t, NULL_Y)


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (1, 1), (None, C)])
@pytest.mark.parametrize("scale", [0.0, 2.5, 7.0])
def test_guided_channels_follow_the_formula_and_the_others_stay_conditional(
    scale, channels, guided
):
    x, t = inputs()
    cond, uncond = both_predictions(x, t)
    got = classifier_free_guidance(Recorder(), Y, NULL_Y, scale, channels)(x, t)
    mixed = uncond + scale * (cond - uncond)
    torch.testing.assert_close(got[:, :guided], mixed[:, :guided])
    assert not torch.allclose(got[:, :guided], cond[:, :guided])
    assert torch.equal(got[:, guided:], cond[:, guided:])


@pytest.mark.parametrize("null_y", [None, NULL_Y])
def test_scale_one_runs_the_conditional_pass_alone(null_y):
    model = Recorder()
    x, t = inputs()
    got = classifier_free_guidance(model, Y, null_y, 1.0, channels=3)(x, t)
    ((x_given, _, y_given),) = model.calls
    assert torch.equal(x_given, x) and torch.equal(y_given, Y)
    assert torch.equal(got, both_predictions(x, t)[0])


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_aux_loss_of_the_network_is_dropped(scale):
    x, t = inputs()
    model = Recorder(returns=lambda prediction: (prediction, prediction.sum()))
    got = classifier_free_guidance(model, Y, NULL_Y, scale)(x, t)
    assert torch.equal(got, classifier_free_guidance(Recorder(), Y, NULL_Y, scale)(x, t))


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_half_precision_predictions_are_mixed_in_fp32(scale):
    x, t = inputs()
    rounded = Recorder(returns=lambda prediction: prediction.bfloat16().float())
    half = Recorder(returns=lambda prediction: prediction.bfloat16())
    got = classifier_free_guidance(half, Y, NULL_Y, scale)(x, t)
    assert got.dtype == torch.float32
    assert torch.equal(got, classifier_free_guidance(rounded, Y, NULL_Y, scale)(x, t))


@pytest.mark.parametrize("null_y", [None, NULL_Y[:2]])
def test_missing_or_misshapen_null_labels_raise(null_y):
    with pytest.raises(ValueError, match="null_y"):
        classifier_free_guidance(Recorder(), Y, null_y, 2.5)
