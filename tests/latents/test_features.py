"""Image features from timm networks, stored in latent caches and compared by evaluate.py."""

import json

import pytest
import timm
import torch
from helpers import call_main, expect_error, only_run, rows
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from latents.cache import CachedLatents
from latents.features import load_features
from latents.sources import open_images


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    """Name of a random vision transformer with 4 tokens and 8 features in timm's format."""
    torch.manual_seed(0)
    options = dict(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    model = timm.create_model("vit_tiny_patch16_224", **options)
    for weights in model.parameters():
        if weights.dim() > 1:
            nn.init.normal_(weights, std=0.5)
    folder = tmp_path_factory.mktemp("timm")
    timm.models.save_for_hf(model, folder, model_args=options, safe_serialization=True)
    return f"timm:local-dir:{folder}@16"


@pytest.fixture(scope="module")
def images(image_tree) -> torch.Tensor:
    source = open_images(str(image_tree), 16)
    return torch.stack([source[index, False][0]["image"] for index in range(len(source))])


@pytest.mark.parametrize("name", ["vit", "efficientnet-lite0"])
def test_pooled_and_token_features_equal_the_outputs_of_the_network(name, network, images):
    found = load_features(network if name == "vit" else name, "cpu")
    vector, tokens = found(images[:3])
    assert torch.equal(found.features(images[:3])["pool"], vector)
    if name == "vit":
        x = found.network.forward_features((images[:3] / 255 - 0.5) / 0.5)
        torch.testing.assert_close(vector, x[:, 0])  # the class token
        torch.testing.assert_close(tokens, x[:, 1:])
    else:
        torch.testing.assert_close(tokens.mean(1), vector)


def test_a_latent_cache_stores_features_that_condition_a_model(
    network, images, image_tree, tiny_vae, train_flags, tmp_path, capsys
):
    flags = (
        "--data-path", image_tree, "--vae-path", tiny_vae, "--image-size", 16, "--shard-images", 32,
        "--num-workers", 0, "--output", tmp_path / "latents", "--features", network,
    )  # fmt: skip
    call_main("cache_latents.py", *flags, "--feature-tokens")
    # 40 images x 2 views x 2 bytes x (2 x 4 x 8 x 8, 8 and 4 x 8 numbers)
    parts = "(latents 8.19e-05 GB, vector 1.28e-06 GB, tokens 5.12e-06 GB)"
    assert parts in capsys.readouterr().out
    latents, (vector, tokens) = (
        CachedLatents(tmp_path / "latents"),
        load_features(network, "cpu")(images),
    )
    flipped, _ = load_features(network, "cpu")(images.flip(-1))
    assert "tokens" not in latents[0, False][0]
    latents.requested = ["tokens"]
    for index in (0, 39):
        item = latents[index, False][0]
        torch.testing.assert_close(item["vector"], vector[index].half())
        torch.testing.assert_close(item["tokens"], tokens[index].half())
        torch.testing.assert_close(latents[index, True][0]["vector"], flipped[index].half())
    train = train_flags(
        tmp_path / "r", **{"latents-path": tmp_path / "latents", "data-path": None,
                           "vae-path": None, "image-size": None, "max-steps": 2, "log-every": 1,
                           "global-batch-size": 8, "conditions": "vector"}
    )  # fmt: skip
    call_main("train.py", *train)
    assert len(rows(tmp_path / "r")) == 2
    index = tmp_path / "latents" / "index.json"
    sha = json.loads(index.read_text())["features"]["sha256"]
    index.write_text(index.read_text().replace(sha, "0" * 64))  # as if made by a different network
    call_main("train.py", "--resume", only_run(tmp_path / "r"), "--max-steps", 3)
    changed = rows(tmp_path / "r")[-2]["changed"]
    assert f"the network of the features: was {sha:.12}, is {'0' * 12}" in changed
    line = expect_error(capsys, "cache_latents.py", *flags)
    assert "--output" in line and "tensors" in line


def test_unknown_feature_networks_are_one_line_errors(image_tree, tmp_path, capsys):
    flags = ("--data-path", image_tree, "--output", tmp_path / "x")
    for arguments, message in (
        (("--features", "resnet"), "--features: got resnet, expected efficientnet-lite0 or timm:"),
        (("--features", "timm:no-such"), "--features: got timm:no-such, expected a network"),
        (("--feature-tokens",), "--feature-tokens: has no effect without --features"),
    ):
        assert message in expect_error(capsys, "cache_latents.py", *flags, *arguments)


def test_frechet_distances_of_features_equal_torch_fidelity(network, images, image_tree, tmp_path):
    call_main(
        "evaluate.py", "--images", image_tree / "class-0", "--reference", image_tree, "--backbone",
        network, "--resize", 16, "--output", tmp_path,
    )  # fmt: skip
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    pools = [load_features(network, "cpu").features(x)["pool"] for x in (images[:10], images)]
    moments = [fid_features_to_statistics(pool) for pool in pools]
    want = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert metrics[f"fd_{network}"] == pytest.approx(want, rel=1e-4)
