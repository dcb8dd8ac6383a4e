"""Every supported autoencoder class, with tiny random weights, from images to samples."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from helpers import call_main, expect_error, only_run
from PIL import Image
from torch import nn

from checkpoints import read_record
from latents.autoencoder import (
    STATE_FILE,
    WEIGHTS_FILE,
    LatentNorm,
    load_autoencoder,
    open_autoencoder,
    sample_latents,
)
from latents.cache import CachedLatents
from latents.sources import open_images
from runtime.errors import UserError

CONV = {
    "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
MEAN, STD = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 3.0]
DC = {
    "block_types": "ResBlock", "block_out_channels": (8, 32), "layers_per_block": (1, 1),
    "qkv_multiscales": ((), ()),
}  # fmt: skip
TINY = {  # class name: config, (latent channels, latent height of a 16-pixel image)
    "AutoencoderKL": (
        {**CONV, "latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}, (4, 8)
    ),
    "AutoencoderKLFlux2": ({**CONV, "latent_channels": 8}, (32, 4)),
    "AutoencoderKLQwenImage": (
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1,
         "temperal_downsample": [True], "latents_mean": MEAN, "latents_std": STD}, (4, 8)
    ),
    "AutoencoderDC": (
        {"latent_channels": 32, "scaling_factor": 0.4, "encoder_block_types": "ResBlock",
         "decoder_norm_types": "rms_norm",
         **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in DC.items()}}, (32, 8)
    ),
    "AutoencoderRAE": (
        {"encoder_hidden_size": 768, "encoder_num_hidden_layers": 1, "encoder_input_size": 28,
         "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "patch_size": 8,
         "decoder_num_attention_heads": 2, "decoder_intermediate_size": 64,
         "latents_mean": [[[0.1]]] * 768, "latents_std": [[[1.5]]] * 768}, (768, 2)
    ),
    "Pixels": (None, (3, 16)),
}  # fmt: skip


@pytest.fixture(scope="module", params=TINY)
def folder(request, tmp_path_factory) -> Path:
    """A random autoencoder of each class, saved in diffusers' format; or "pixels"."""
    if request.param == "Pixels":
        return Path("pixels")
    if request.param == "AutoencoderRAE":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    vae = getattr(diffusers, request.param)(**TINY[request.param][0])
    if bn := getattr(vae, "bn", None):
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cache(folder, image_tree, tmp_path_factory) -> Path:
    """The latents of 40 images, in shards of 16, 16 and 8."""
    output = tmp_path_factory.mktemp("cache") / "latents"
    call_main(
        "cache_latents.py", "--data-path", image_tree, "--vae-path", folder, "--image-size", 16,
        "--shard-images", 16, "--output", output, "--num-workers", 0,
    )  # fmt: skip
    return output


def pixels_of(image_tree: Path, count: int) -> torch.Tensor:
    images = open_images(str(image_tree), 16)
    return torch.stack([images[index, False][0]["image"] for index in range(count)])


def test_latents_are_normalised_as_in_diffusers_pipelines(folder, image_tree):
    """Decoding inverts the normalisation to within 1e-6."""
    vae, images = load_autoencoder(str(folder), "cpu", torch.float32), pixels_of(image_tree, 3)
    model, x, channel = vae.model, images / 127.5 - 1, (1, -1, 1, 1)
    got = vae.encode(images, torch.zeros_like)
    if model is None:
        want = x
        assert torch.equal(vae.decode(got), images)
    elif vae.config["_class_name"] == "AutoencoderKL":
        mean, std = (torch.tensor(values).view(channel) for values in (MEAN, STD))
        want = (model.encode(x).latent_dist.mean - mean) * 0.5 / std
    elif vae.config["_class_name"] == "AutoencoderKLFlux2":
        z = model.encode(x).latent_dist.mean
        z = z.view(3, 8, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(3, 32, 4, 4)
        std = (model.bn.running_var + model.config.batch_norm_eps).sqrt()
        want = (z - model.bn.running_mean.view(channel)) / std.view(channel)
    elif vae.config["_class_name"] == "AutoencoderKLQwenImage":
        mean, std = (torch.tensor(values).view(channel) for values in (MEAN, STD))
        want = (model.encode(x[:, :, None]).latent_dist.mean[:, :, 0] - mean) / std
    elif vae.config["_class_name"] == "AutoencoderDC":
        want = model.encode(x).latent * 0.4
    else:  # AutoencoderRAE normalises latents in its encode method
        want = model.encode(images / 255).latent
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    z = vae.norm.invert(got)
    torch.testing.assert_close(vae.norm.apply(z), got, atol=1e-6, rtol=1e-6)
    assert torch.equal(vae.decode(got), vae.reconstruct(images))
    _, (channels, side) = TINY[vae.config["_class_name"]]
    facts = open_autoencoder(str(folder))  # without weights
    assert got.shape == (3, channels, side, side)
    assert (facts.channels, facts.latent_side(16)) == (channels, side)
    assert facts.downsampling * side == 16


@pytest.mark.parametrize(
    "folder", ["AutoencoderKL", "AutoencoderRAE", "Pixels"], indirect=True, scope="module"
)
def test_a_model_trains_on_latents_of_any_shape(folder, cache, train_flags, tmp_path):
    """Uses cached latents with 3 to 768 channels. A patch is one latent pixel, or 2 x 2 pixels."""
    latents = CachedLatents(cache)
    name = open_autoencoder(str(folder)).config["_class_name"]
    flags = {
        "latents-path": cache, "data-path": None, "vae-path": None, "image-size": None,
        "global-batch-size": 8, "latents-norm": "data", "max-steps": 2,
    }  # fmt: skip
    patch = {"patch-size": 2 if name == "Pixels" else 1}
    call_main("train.py", *train_flags(tmp_path, **flags, **patch))
    run = only_run(tmp_path)
    record = read_record(run / "checkpoints" / "0000002")
    assert record.norm == CachedLatents(cache, norm="data").norm != latents.norm
    output = tmp_path / "grid.png"
    call_main(
        "sample.py", "--ckpt", run, "--output", output, "--num-sampling-steps", 4,
        "--class-labels", 0, 1,
    )  # fmt: skip
    assert Image.open(output).size[0] >= 32
    if name in ("AutoencoderKL", "Pixels"):  # the note does not depend on the class
        flags |= {"finetune": run, "model": None, "run-name": "more"}
        call_main("train.py", *train_flags(tmp_path, **flags))
        assert "trained with" not in (tmp_path / "more" / "log.txt").read_text()


def test_cache_statistics_normalise_each_channel_to_mean_0_and_std_1(folder, cache):
    latents = CachedLatents(cache, norm="data")
    name = open_autoencoder(str(folder)).config["_class_name"]
    side, channels = latents.geometry("/gone")
    assert (channels, side) == TINY[name][1]
    items = [latents[index, flip][0]["moments"] for index in range(40) for flip in (False, True)]
    norm = latents.norm
    draws = [sample_latents(torch.stack(items), channels, norm) for _ in range(20)]
    std, mean = torch.std_mean(torch.cat(draws), dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(channels), atol=0.05, rtol=0)
    torch.testing.assert_close(std, torch.ones(channels), atol=0.05, rtol=0)


def test_latents_that_differ_from_training_are_noted(train_flags, tmp_path, capsys):
    """Fine-tuning logs a note about different latents; in a run that goes on they are a change."""
    torch.manual_seed(1)
    diffusers.AutoencoderKL(**CONV, latents_mean=MEAN, latents_std=STD).save_pretrained(
        tmp_path / "vae"
    )
    flags = {"max-steps": 1, "run-name": "a", "global-batch-size": 256}
    call_main("train.py", *train_flags(tmp_path, **flags))
    weights = read_record(tmp_path / "a" / "checkpoints" / "0000001")
    flags |= {"vae-path": tmp_path / "vae"}
    other = {"run-name": "b", "finetune": tmp_path / "a", "model": None}
    call_main("train.py", *train_flags(tmp_path, **flags | other))
    call_main("train.py", *train_flags(tmp_path, **flags | {"max-steps": 2}))
    for run in ("a", "b"):
        text = (tmp_path / run / "log.txt").read_text()
        assert f"the autoencoder: was {weights.vae_sha256:.12}, is " in text
        assert "latents: was shift 0.1 and scale 0.5, is shift and scale per channel" in text
    assert (
        "a step takes 256 images, but there are only 40: each step uses every image 6.4 times"
        in text
    )
    line = expect_error(capsys, "train.py", *train_flags(tmp_path, **{"latents-norm": "data"}))
    assert "--latents-norm data: has no effect without --latents-path" in line


def test_a_config_that_no_autoencoder_has_is_a_one_line_error(tiny_vae, tmp_path):
    text = (tiny_vae / "config.json").read_text().strip()
    (tmp_path / "config.json").write_text(text.removesuffix("}") + ', "scaling_factor": 0}')
    shutil.copy(tiny_vae / WEIGHTS_FILE, tmp_path)
    with pytest.raises(UserError, match="^--vae-path") as caught:
        load_autoencoder(str(tmp_path), "cpu", torch.float32)
    assert "\n" not in str(caught.value)


def test_a_factor_that_the_config_lacks_is_that_of_diffusers(tiny_vae, tmp_path):
    """Configs of older versions of diffusers lack scaling_factor."""
    config = json.loads((tiny_vae / "config.json").read_text())
    del config["scaling_factor"], config["shift_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny_vae / WEIGHTS_FILE, tmp_path)
    vae = load_autoencoder(str(tmp_path), "cpu", torch.float32)
    assert vae.norm == LatentNorm(0.0, 0.18215)


def test_an_autoencoder_whose_training_has_not_finished_is_rejected(tmp_path):
    (tmp_path / STATE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="--vae-path.*its training is not finished"):
        load_autoencoder(str(tmp_path), "cpu", torch.float32)
