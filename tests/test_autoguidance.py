"""Guidance by another model: the formula, where it acts, and which models can guide."""

import pytest
import torch
from conftest import TINY_MODEL, call_main, expect_error
from PIL import Image, ImageChops

from checkpoints import Record, save_model
from diffusion import autoguidance, guidance_within
from models import DiT

Y, T = torch.tensor([1, 2]), torch.tensor([0.5, 0.5])


def network(factor: float, channels: int):
    """Gives `channels` that depend on its input and label."""
    return lambda x, t, y: factor * (x + y[:, None, None, None]).repeat(1, channels // 4, 1, 1)


def test_the_prediction_moves_away_from_the_guides():
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    model, guide = network(1.0, 8), network(0.5, 4)
    cond, base = model(x, T, Y), guide(x, T, Y)
    for channels, scale in ((4, 2.5), (3, 0.0)):
        got = autoguidance(model, guide, Y, scale, channels)(x, T)
        mixed = base[:, :channels] + scale * (cond - base.repeat(1, 2, 1, 1))[:, :channels]
        torch.testing.assert_close(got[:, :channels], mixed)
        assert torch.equal(got[:, channels:], cond[:, channels:])
    outside = guidance_within((0.6, 1.0), 2.5)
    assert torch.equal(autoguidance(model, None, Y, outside)(x, T), cond)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_vae):
    """Three models without label dropout; the last one's latents are larger."""
    paths = [tmp_path_factory.mktemp("guides") / f"{number}.safetensors" for number in range(3)]
    for path, input_size in zip(paths, (8, 8, 16), strict=True):
        model = DiT(**{**TINY_MODEL, "input_size": input_size, "class_dropout_prob": 0.0})
        for weight in model.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
        record = Record(config=model.config, image_size=2 * input_size, vae_path=str(tiny_vae),
                        objective="rectified_flow")  # fmt: skip
        save_model(path, model.state_dict(), record)
    return paths


def test_sample_py_takes_a_guide_with_scale_and_interval(files, tmp_path, capsys):
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


def test_a_guide_of_other_latents_or_without_effect_is_one_line(files, capsys):
    for script, flags, message in (
        ("sample.py", (files[2],), "latents: got 4 x 16 x 16, expected 4 x 8 x 8"),
        ("sample.py", (files[1], "--cfg-scale=1"), "--cfg-scale: got 1"),
        ("evaluate.py", (files[1], "--loss"), "--guide-ckpt: got it"),
    ):
        line = expect_error(capsys, script, "--ckpt", files[0], "--guide-ckpt", *flags)
        assert message in line
