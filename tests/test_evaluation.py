"""Metrics against what is known of them: equal sets, closed forms, the library's own figures."""

import json
import math
import zipfile

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import ROOT, call_main, run_script
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from evaluation.features import EfficientNetLite0Features, load_extractor
from evaluation.generation import labels_of
from evaluation.images import open_images, reconstructed, write_npz
from evaluation.metrics import (
    RunningMoments,
    Statistics,
    check_counts,
    collect,
    load_statistics,
    save_statistics,
    score,
)
from latents.autoencoder import load_autoencoder
from runtime.errors import UserError
from scripts.prepare_fashion_mnist import read_idx

CPU = torch.device("cpu")


def statistics_of(features: torch.Tensor) -> Statistics:
    moments = RunningMoments()
    for rows in features.split(100):
        moments.add(rows)
    mean, covariance = moments.moments()
    return Statistics(
        len(features), {"pool": mean}, {"pool": covariance}, {"pool": features.float()}
    )


def gaussian_features(mean: float, std: float, seed: int, number: int = 1500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(number, 8, generator=generator)


def test_equal_sets_have_distance_zero():
    features = statistics_of(gaussian_features(0.4, 1.2, seed=0))
    scores = score(features, features, ["fid", "kid", "precision_recall"], kid_subset_size=200)
    assert scores["fid"] == pytest.approx(0, abs=1e-4)
    # Unbiased for independent sets; a set against itself counts each point as its own twin.
    assert scores["kid"] == pytest.approx(0, abs=0.05)
    shifted = statistics_of(gaussian_features(0.9, 1.2, seed=1))
    assert score(features, shifted, ["kid"], kid_subset_size=200)["kid"] > 1
    assert scores["precision"] == scores["recall"] == 1


def test_fid_of_known_gaussians_is_the_closed_form():
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), here of moments that are exactly known.

    The spatial features are twice the others, so their distance, of squares, is four times theirs.
    """
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    first, second = rng.uniform(0.5, 2, 8), rng.uniform(0.5, 2, 8)
    means = rng.normal(size=(2, 8))
    sets = []
    for mean, spread in zip(means, (first, second), strict=True):
        covariance = (basis * spread) @ basis.T
        sets.append(
            Statistics(
                9,
                {"pool": mean, "spatial": 2 * mean},
                {"pool": covariance, "spatial": 4 * covariance},
            )
        )
    want = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    scores = score(*sets, ["fid", "sfid"])
    assert scores["fid"] == pytest.approx(want, rel=1e-9)
    assert scores["sfid"] == pytest.approx(4 * want, rel=1e-9)


def test_fid_of_drawn_gaussians_comes_near_the_closed_form():
    sets = [
        statistics_of(gaussian_features(mean, std, seed, number=20_000))
        for seed, (mean, std) in enumerate(((0.0, 1.0), (0.5, 1.5)))
    ]
    assert score(*sets, ["fid"])["fid"] == pytest.approx(8 * (0.5**2 + 0.5**2), rel=0.05)


def test_running_moments_are_those_of_numpy():
    rows = 1000 + gaussian_features(3, 0.1, seed=2)  # far from zero, where sums of squares cancel
    got = statistics_of(rows)
    np.testing.assert_allclose(got.mean["pool"], rows.double().mean(0), rtol=1e-10)
    want = np.cov(rows.double().numpy(), rowvar=False)
    np.testing.assert_allclose(got.covariance["pool"], want, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 24 real 32 x 32 images of Fashion-MNIST's test set: pullovers and bags."""
    root, assets = tmp_path_factory.mktemp("sets"), ROOT / "assets" / "fashion-mnist"
    images = read_idx(assets / "t10k-images-idx3-ubyte.gz", num_dims=3)
    labels = read_idx(assets / "t10k-labels-idx1-ubyte.gz", num_dims=1)
    for name, label in (("first", 2), ("second", 8)):
        (root / name).mkdir()
        for number, image in enumerate(images[labels == label][:24]):
            padded = Image.fromarray(np.pad(image, 2)).convert("RGB")
            padded.save(root / name / f"{number:02d}.png")
    return root / "first", root / "second"


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file like torch-fidelity's Inception weights, with random values."""

    class WithoutWeights(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, **kwargs):
            return None

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = WithoutWeights("inception", ["2048"], feature_extractor_weights_path=str(path))
    for name, value in network.named_parameters():
        if name.endswith("conv.weight"):  # as large at the end as at the start
            torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


def library_metrics(folders, **options) -> dict:
    return torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), cuda=False, save_cpu_ram=True,
        verbose=False, cache=False, kid_subset_size=24, **options,
    )  # fmt: skip


def test_inception_metrics_are_the_librarys_own(folders, inception_weights):
    """Of FID the moments, from which the library computes it for us too, in many seconds."""
    extractor = load_extractor("inception", inception_weights, CPU)
    sets = [collect(open_images(folder).batches(8), extractor) for folder in folders]
    metrics = ["inception_score", "precision_recall", "kid"]
    got = score(*sets, metrics, kid_subset_size=24)
    want = library_metrics(
        folders, kid=True, isc=True, prc=True, isc_splits=1,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    for moments in sets:
        theirs = fid_features_to_statistics(moments.features["pool"])
        np.testing.assert_allclose(moments.mean["pool"], theirs["mu"], rtol=1e-5)
        np.testing.assert_allclose(moments.covariance["pool"], theirs["sigma"], atol=1e-6)
    assert got["kid"] == pytest.approx(want["kernel_inception_distance_mean"], rel=1e-4)
    assert got["inception_score"] == pytest.approx(want["inception_score_mean"], rel=1e-6)
    assert (got["precision"], got["recall"]) == (want["precision"], want["recall"])
    assert sets[0].mean["spatial"].shape == (7 * 17 * 17,)


def test_spatial_features_are_ordered_as_adm_flattens_them(folders, inception_weights):
    extractor = load_extractor("inception", inception_weights, CPU)
    kept = {}
    extractor.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, out: kept.update(out=out))
    with torch.inference_mode():
        spatial = extractor.features(next(open_images(folders[0]).batches(2)))["spatial"]
    assert spatial[1, 17 * 7 * 3 + 7 * 5 + 2] == kept["out"][1, 2, 3, 5]  # row 3, column 5


def test_efficientnet_kid_is_the_librarys_own(folders):
    name = EfficientNetLite0Features.name
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, EfficientNetLite0Features)
    extractor = load_extractor("efficientnet-lite0", None, CPU)
    sets = [collect(open_images(folder).batches(8), extractor) for folder in folders]
    got = score(*sets, ["kid"], suffix=f"_{name}", kid_subset_size=24)
    want = library_metrics(folders, kid=True, feature_extractor=name)
    assert list(got) == [f"kid_{name}", f"kid_std_{name}"]
    assert got[f"kid_{name}"] == pytest.approx(want["kernel_inception_distance_mean"], rel=1e-4)


def test_npz_is_adms_and_gives_the_same_images(folders, tmp_path):
    images, path = open_images(folders[0]), tmp_path / "samples.npz"
    write_npz(path, images.count, images.size, images.batches(10))
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (24, 32, 32, 3)
    for streamed, read in zip(open_images(path).batches(7), images.batches(7), strict=True):
        assert torch.equal(streamed, read)
    np.savez_compressed(tmp_path / "other.npz", arr_0=np.load(path)["arr_0"])
    assert torch.equal(*(next(open_images(p).batches(24)) for p in (path, tmp_path / "other.npz")))


def test_stored_statistics_give_the_same_scores(tmp_path):
    sets = [statistics_of(gaussian_features(0.2 * seed, 1, seed)) for seed in (0, 1)]
    sets[1].info = {"backbone": "inception-v3-compat"}
    save_statistics(tmp_path / "stats.npz", sets[1])
    stored = load_statistics(tmp_path / "stats.npz")
    assert stored.count == 1500 and stored.info["backbone"] == "inception-v3-compat"
    options = dict(metrics=["fid", "kid", "precision_recall"], kid_subset_size=100)
    assert score(sets[0], stored, **options) == score(sets[0], sets[1], **options)


def test_kept_features_are_a_uniform_sample():
    class Identity(torch.nn.Linear):
        def features(self, images):
            return {"pool": images.flatten(1).float()}

    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None]
    kept = collect(images.split(7), Identity(1, 1), keep=50)
    values = kept.features["pool"].flatten().tolist()
    assert kept.count == 200 and len(set(values)) == 50
    assert sum(values) / 50 == pytest.approx(99.5, abs=20)


def test_labels_do_not_depend_on_the_number_of_images():
    assert labels_of(5, [2, 4, 7], "balanced", 0) == [2, 4, 7, 2, 4]
    for scheme in ("balanced", "uniform"):
        assert labels_of(50, list(range(10)), scheme, 3) == labels_of(
            90, list(range(10)), scheme, 3
        )[:50]  # fmt: skip
    counts = np.bincount(labels_of(10_000, list(range(10)), "uniform", 1))
    assert (abs(counts - 1000) < 5 * math.sqrt(900)).all()


@pytest.mark.parametrize(
    ("metrics", "counts", "message"),
    [
        (["fid"], (2048, 9000, 9000), "fid: got 2048 images, expected more than 2048"),
        (["sfid"], (9000, 500, 500), "sfid: got 500 images"),
        (["kid"], (9000, 9000, 999), "kid: got 999 images, expected at least 1000"),
        (["precision_recall"], (3, 9000, 9000), "precision_recall: got 3 images"),
    ],
)
def test_too_few_images_are_refused(metrics, counts, message):
    with pytest.raises(UserError, match=message):
        check_counts(metrics, *counts, kid_subset_size=1000)


def test_images_against_images_and_against_their_statistics(folders, tmp_path):
    common = ("--backbone", "efficientnet-lite0", "--kid-subset-size", 24)
    call_main(
        "evaluate.py", "--images", folders[0], "--reference", folders[1], *common,
        "--output", tmp_path / "images",
    )  # fmt: skip
    stats = tmp_path / "stats.npz"
    call_main("evaluate.py", "--precompute-reference", stats, "--images", folders[1], *common[:2])
    call_main(
        "evaluate.py", "--images", folders[0], "--reference", stats, *common,
        "--output", tmp_path / "stats",
    )  # fmt: skip
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("images", "stats")]
    names = ["precision", "recall", "kid", "kid_std"]
    assert list(results[0]["metrics"]) == [f"{name}_efficientnet-lite0-64px" for name in names]
    for name, value in results[0]["metrics"].items():
        assert results[1]["metrics"][name] == pytest.approx(value, rel=1e-5)
    measurement = results[0]["measurement"]
    assert measurement["num_images"] == measurement["reference"]["num_images"] == 24
    assert len(measurement["reference"]["sha256"]) == 64
    assert {"torch", "torch-fidelity", "diffusers"} <= results[0]["versions"].keys()


def bad_inputs(folders, vae, root):
    """(arguments, message) of what a user may get wrong."""
    first, second = folders
    mixed = root / "mixed"
    mixed.mkdir()
    for number, size in enumerate((32, 32, 40, 32, 32)):
        Image.new("RGB", (size, size)).save(mixed / f"{number}.png")
    odd = root / "odd"
    odd.mkdir()
    Image.new("RGB", (33, 33)).save(odd / "0.png")
    large = root / "large"
    large.mkdir()
    Image.new("RGB", (64, 64)).save(large / "0.png")
    whole, cut, wrong = root / "whole.npz", root / "cut.npz", root / "wrong.npz"
    images = open_images(first)
    write_npz(whole, images.count, images.size, images.batches(10))
    cut.write_bytes(whole.read_bytes()[:-500])
    np.savez(wrong, arr_0=np.zeros((4, 3, 32, 32), np.float32))
    early = root / "early.npz"
    with zipfile.ZipFile(early, "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (24, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(5000))
    notes = root / "notes"
    notes.mkdir()
    (notes / "broken.png").write_text("not an image")
    lite = ("--backbone", "efficientnet-lite0")
    small = (*lite, "--kid-subset-size", 3, "--output", root / "out")
    return [
        ((), "got neither of --ckpt and --images"),
        (("--images", first, "--reference", second, *lite), "kid: got 24 images"),
        (("--images", first, "--reference", large, *small), "got images of 64 x 64 pixels"),
        (("--images", mixed, "--reference", second, *small), "mixed sizes: 2.png is 40 x 40"),
        (("--images", cut, "--reference", second, *small), "damaged or not an .npz"),
        (("--images", early, "--reference", second, *small), "arr_0 ends early"),
        (("--images", wrong, "--reference", second, *small), "got float32 (4, 3, 32, 32)"),
        (("--images", notes, "--reference", second, *small), "damaged or not an image"),
        (("--images", root / "none", *small), "expected a folder of images or an .npz"),
        (("--images", first, "--reference", cut, *small), "damaged or not an .npz"),
        (("--images", first, "--reference", second, "--metrics", "fid", *lite), "does not define"),
        (("--images", first, "--metrics", "kid", *lite), "there is no --reference"),
        (("--images", first, "--inception-weights", whole), "not torch-fidelity's Inception"),
        (("--precompute-reference", root / "x.npz", "--ckpt", "x"), "got no --images"),
        (("--reconstruct", "--ckpt", "x"), "--reconstruct: expected it with --images"),
        (("--images", odd, "--reconstruct", "--vae-path", vae, *small), "multiples of the autoenc"),
    ]


def test_bad_input_is_one_line(folders, tiny_vae, tmp_path):
    for arguments, message in bad_inputs(folders, tiny_vae, tmp_path):
        with pytest.raises(UserError) as error:
            call_main("evaluate.py", *arguments)
        assert message in str(error.value), arguments
        assert "\n" not in str(error.value)


def test_a_mistake_ends_the_script_with_code_2(tmp_path):
    result = run_script("evaluate.py", "--images", tmp_path / "none", check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_reconstructions_are_scored_with_the_autoencoder_named(folders, tiny_vae, tmp_path):
    small = ("--backbone", "efficientnet-lite0", "--kid-subset-size", 24, "--reference", folders[0])
    results = []
    for name, extra in (
        ("as they are", ()),
        ("rebuilt", ("--reconstruct", "--vae-path", tiny_vae)),
    ):
        output = ("--output", tmp_path / name)
        call_main("evaluate.py", "--images", folders[0], *small, *extra, *output)
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    kid = "kid_efficientnet-lite0-64px"
    assert results[1]["metrics"][kid] > results[0]["metrics"][kid] + 0.1  # of a random autoencoder
    by = results[1]["measurement"]["reconstructed_by"]
    assert by["vae"] == str(tiny_vae) and len(by["vae_sha256"]) == 64
    vae = load_autoencoder(str(tiny_vae), CPU, torch.float32)
    images = next(open_images(folders[0]).batches(4))
    rebuilt = next(reconstructed(open_images(folders[0]), vae).batches(4))
    x = images.float() / 127.5 - 1
    want = vae.decode(vae.encode(x).latent_dist.mode()).sample  # (N, 3, H, W) in [-1, 1]
    assert (rebuilt - ((want + 1) * 127.5).clamp(0, 255)).abs().max() <= 0.5 + 1e-3


def test_resize_brings_mixed_images_to_one_size(folders, tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "0.png")
    Image.new("RGB", (32, 70)).save(tmp_path / "1.png")
    assert open_images(tmp_path, resize=32).size == (32, 32)
    assert next(open_images(tmp_path, resize=32).batches(2)).shape == (2, 3, 32, 32)
