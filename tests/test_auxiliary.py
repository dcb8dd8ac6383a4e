"""Auxiliary losses compared with naive versions, and their use in a training run."""

import math

import pytest
import torch
from conftest import call_main, expect_error, only_run, relative_error, rows
from test_training import engine_of

from checkpoints.checkpoint import load_model
from diffusion import RectifiedFlow
from training.auxiliary import AUXILIARY_LOSSES
from training.step import losses


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"latents": torch.randn(6, 4, 8, 8), "label": torch.arange(6) % 4}


def naive(name: str, model, x, y, t, noise) -> torch.Tensor:
    """Auxiliary loss computed by loops over the images."""
    tokens = []
    hook = model.blocks[0].register_forward_hook(lambda _, given, output: tokens.append(output[0]))
    z = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * noise
    prediction = model(z, t, y)[0][:, :4]
    hook.remove()
    count = len(x)
    if name == "contrastive":
        others = [noise[(i + 1) % count] - x[(i + 1) % count] for i in range(count)]
        return (
            -sum((v - o).square().mean() for v, o in zip(prediction, others, strict=True)) / count
        )
    terms = [math.e ** (-(a - b).square().mean() / 0.5) for a in tokens[0] for b in tokens[0]]
    return torch.log(sum(terms) / count**2)


@pytest.mark.parametrize("name", AUXILIARY_LOSSES)
def test_an_auxiliary_loss_and_its_gradients_equal_the_naive_version(name):
    part, data = AUXILIARY_LOSSES[name](weight=0.3), batch()
    engine = engine_of("fp32", class_dropout_prob=0.0)
    torch.manual_seed(3)
    terms = losses(engine, RectifiedFlow(), data, [part])
    weights = dict(engine.model.named_parameters())
    got = torch.autograd.grad(terms["loss"] + terms["aux_loss"], weights.values(),
                              allow_unused=True)  # fmt: skip
    torch.manual_seed(3)
    t, noise = torch.randn(6).sigmoid(), torch.randn(6, 4, 8, 8)
    x, y = data["latents"], data["label"]
    plain = RectifiedFlow().losses(engine.model, x, y, t, noise)
    want = naive(name, engine.model, x, y, t, noise)
    assert terms[name].item() == pytest.approx(want.item(), rel=1e-4)
    total = plain["loss"].mean() + plain["aux_loss"] + 0.3 * want
    wanted = torch.autograd.grad(total, weights.values(), allow_unused=True)
    for weight, one, other in zip(weights, got, wanted, strict=True):
        assert (one is None) == (other is None), weight
        assert one is None or other.norm() < 1e-7 or relative_error(one, other) < 1e-3, weight


def test_a_run_can_use_several_auxiliary_losses_with_separate_weights(
    train_flags, tmp_path, capsys
):
    """They are logged and stored with the settings, and add no tensors to a checkpoint."""
    asked = ["--auxiliary", "dispersive", "contrastive", "--auxiliary-contrastive-weight", "0.1"]
    own = {"global-batch-size": 8, "max-steps": 2, "log-every": 1}
    call_main("train.py", *train_flags(tmp_path, rf=True, **own), *asked)
    run = only_run(tmp_path)
    assert {"dispersive", "contrastive"} <= rows(tmp_path)[-1].keys()
    assert "auxiliary_contrastive_weight: 0.1" in (run / "config.yaml").read_text()
    assert not any("auxiliary" in name for name in load_model(run).state_dict())
    call_main("train.py", "--resume", run, "--max-steps", "3")
    line = expect_error(capsys, "train.py", *train_flags(tmp_path, **own), *asked)
    assert "--auxiliary: got contrastive with objective gaussian, expected a rectified flow" in line
