"""Metrics compared with closed forms and with torch-fidelity, and the inputs of evaluate.py."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers import ROOT, call_main, expect_error, in_processes
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics

from evaluation.extractors import InceptionFeatures, load_extractor
from evaluation.image_sets import ImageSet, open_image_set, reconstructed, write_npz
from evaluation.metrics import (
    Statistics,
    choose_metrics,
    collect,
    load_statistics,
    open_reference,
    save_statistics,
    score,
)
from latents.autoencoder import load_autoencoder
from runtime.processes import ALONE, Distributed
from tools.prepare_fashion_mnist import read_idx

CPU = torch.device("cpu")
IMAGES = 5  # per folder
LITE = ("--backbone", "efficientnet-lite0", "--kid-subset-size", IMAGES)


class Pixels(torch.nn.Linear):
    """Feature extractor that returns the pixels divided by 100."""

    name = "pixels"

    def features(self, images):
        return {"pool": images.flatten(1).float() / 100}


def pixels(values: torch.Tensor) -> ImageSet:
    """Image set of shape (N, 1, 1, D) with the given values."""
    images = values.to(torch.uint8)[:, None, None]
    return ImageSet(len(values), (1, values.shape[1]), lambda start, stop: images[start:stop])


def test_fid_and_sfid_of_known_gaussians_equal_the_closed_form():
    """FID is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), here for moments that are known exactly.

    The spatial features are twice the pooled features, so sFID must be four times FID.
    """
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    first, second = rng.uniform(0.5, 2, 8), rng.uniform(0.5, 2, 8)
    means = rng.normal(size=(2, 8))
    sets = []
    for mean, spread in zip(means, (first, second), strict=True):
        covariance = (basis * spread) @ basis.T
        spatial = {"mu_s": 2 * mean, "sigma_s": 4 * covariance}
        sets.append(Statistics({"mu": mean, "sigma": covariance, **spatial}))
    want = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    scores = score(*sets, ["fid", "sfid"], 1000)
    assert scores["fid"] == pytest.approx(want, rel=1e-9)
    assert scores["sfid"] == pytest.approx(4 * want, rel=1e-9)


def test_feature_moments_equal_numpy_and_kept_features_are_evenly_spaced():
    values = torch.randint(0, 256, (200, 3), generator=torch.Generator().manual_seed(0))
    extractor = Pixels(1, 1)
    got = collect(pixels(values), extractor, batch_size=7, keep=50)
    assert got.info["num_images"] == 200 and got.info["image_size"] == [1, 3]
    rows = values.double().numpy() / 100
    np.testing.assert_allclose(got.moments["mu"], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(got.moments["sigma"], np.cov(rows, rowvar=False), rtol=1e-5)
    chosen = np.linspace(0, 199, 50).round()
    np.testing.assert_allclose(got.features["pool"], rows[chosen.astype(int)], rtol=1e-6)
    assert got.info == collect(pixels(values), extractor, batch_size=200).info
    assert got.info != collect(pixels(values.flip(0)), extractor, batch_size=200).info


def test_statistics_from_several_processes_equal_those_of_one():
    """With 20 images the second process has some batches; with 7 images it has none."""
    alone = collect_pixels(ALONE)
    for process in in_processes(collect_pixels):
        for got, want in zip(process, alone, strict=True):
            for name, moment in want.moments.items():
                np.testing.assert_allclose(got.moments[name], moment, rtol=1e-12)
            assert torch.equal(got.features["pool"], want.features["pool"])
            assert got.info == want.info


def collect_pixels(dist: Distributed) -> list[Statistics]:
    torch.manual_seed(0)
    extractor, values = Pixels(1, 1), torch.randint(0, 256, (20, 3))
    return [collect(pixels(v), extractor, 7, keep=6, dist=dist) for v in (values, values[:7])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of real 32 x 32 images of Fashion-MNIST's test set: pullovers and bags."""
    root, assets = tmp_path_factory.mktemp("sets"), ROOT / "assets" / "fashion-mnist"
    images = read_idx(assets / "t10k-images-idx3-ubyte.gz", num_dims=3)
    labels = read_idx(assets / "t10k-labels-idx1-ubyte.gz", num_dims=1)
    for name, label in (("first", 2), ("second", 8)):
        (root / name).mkdir()
        for number, image in enumerate(images[labels == label][:IMAGES]):
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
        if name.endswith("conv.weight"):  # keeps activations at the same scale in all layers
            torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


def test_inception_metrics_equal_those_of_torch_fidelity(folders, inception_weights):
    """Only the moments of FID are compared, because torch-fidelity computes FID here too."""
    extractor, pairs = load_extractor("inception", inception_weights, CPU), []
    extractor.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: pairs.append((extractor.spatial, output))
    )
    sets = [collect(open_image_set(folder), extractor, batch_size=8) for folder in folders]
    got = score(*sets, ["inception_score", "precision_recall", "kid"], kid_subset_size=IMAGES)
    want = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), cuda=False, save_cpu_ram=True,
        verbose=False, cache=False, kid_subset_size=IMAGES, kid=True, isc=True, prc=True,
        isc_splits=1, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    for ours in sets:
        theirs = fid_features_to_statistics(ours.features["pool"])
        np.testing.assert_allclose(ours.moments["mu"], theirs["mu"], rtol=1e-5)
        np.testing.assert_allclose(ours.moments["sigma"], theirs["sigma"], atol=1e-6)
    assert got["kid"] == pytest.approx(want["kernel_inception_distance_mean"], rel=1e-4)
    assert got["inception_score"] == pytest.approx(want["inception_score_mean"], rel=1e-6)
    assert (got["precision"], got["recall"]) == (want["precision"], want["recall"])
    spatial, output = pairs[0]  # spatial features are flattened in ADM's order
    assert spatial.shape == (IMAGES, 7 * 17 * 17)
    np.testing.assert_allclose(sets[0].moments["mu_s"], spatial.mean(0), rtol=1e-4)
    assert spatial[1, 17 * 7 * 3 + 7 * 5 + 2] == output[1, 2, 3, 5]  # row 3, column 5


def test_a_sample_npz_has_adms_format_and_is_read_back_unchanged(folders, tmp_path):
    images, path = open_image_set(folders[0]), tmp_path / "samples.npz"
    write_npz(path, images, 10)
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (IMAGES, 32, 32, 3)
    for stored, read in zip(open_image_set(path).batches(4), images.batches(4), strict=True):
        assert torch.equal(stored, read)


def test_stored_reference_statistics_give_the_same_scores(tmp_path):
    values = torch.randint(0, 256, (2, 1500, 8), generator=torch.Generator().manual_seed(0))
    sets = [collect(pixels(each), Pixels(1, 1), batch_size=500) for each in values]
    save_statistics(tmp_path / "stats.npz", sets[1])
    stored = load_statistics(tmp_path / "stats.npz")
    assert stored.info == sets[1].info
    options = dict(metrics=["fid", "kid", "precision_recall"], kid_subset_size=100)
    assert score(sets[0], stored, **options) == score(sets[0], sets[1], **options)


def test_an_adm_reference_file_provides_its_moments_and_features_of_its_images(folders, tmp_path):
    images, path, extractor = open_image_set(folders[0]), tmp_path / "adm.npz", Pixels(1, 1)
    extractor.name = InceptionFeatures.name
    write_npz(path, images, 10)
    moments = dict(mu=np.ones(2), sigma=np.eye(2), mu_s=np.zeros(3), sigma_s=2 * np.eye(3))
    np.savez(path, **np.load(path), **moments)
    got = open_reference(path, extractor, images.size, resize=None, batch_size=5)
    for name, value in moments.items():
        np.testing.assert_array_equal(got.moments[name], value)
    want = collect(images, extractor, batch_size=8)
    assert torch.equal(got.features["pool"], want.features["pool"])


def test_a_reference_of_images_or_of_their_statistics_gives_the_same_metrics(folders, tmp_path):
    stats, results = tmp_path / "stats.npz", []
    call_main("evaluate.py", "--precompute-reference", stats, "--images", folders[1], *LITE[:2])
    for reference in (folders[1], stats):
        output = tmp_path / f"scores-{reference.stem}"
        given = ("--images", folders[0], "--reference", reference, "--output", output)
        call_main("evaluate.py", *given, *LITE)
        results.append(json.loads((output / "results.json").read_text()))
    names = ["precision", "recall", "kid", "kid_std"]
    assert list(results[0]["metrics"]) == [f"{name}_efficientnet-lite0-64px" for name in names]
    for name, value in results[0]["metrics"].items():
        assert results[1]["metrics"][name] == pytest.approx(value, rel=1e-5)
    settings = results[0]["settings"]
    assert settings["images"]["num_images"] == settings["reference"]["num_images"] == IMAGES
    assert settings["images"]["backbone_sha256"] == settings["reference"]["backbone_sha256"]


def test_wrong_evaluate_inputs_are_one_line_errors(folders, tiny_vae, tmp_path, capsys):
    (first, second), root = folders, tmp_path
    mixed, odd, notes = (root / name for name in ("mixed", "odd", "notes"))
    for folder, sizes in ((mixed, (32, 32, 40, 32, 32)), (odd, (33,)), (notes, ())):
        folder.mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", (size, size)).save(folder / f"{number}.png")
    (notes / "broken.png").write_text("not an image")
    whole, cut, wrong = root / "whole.npz", root / "cut.npz", root / "wrong.npz"
    write_npz(whole, open_image_set(first), 10)
    cut.write_bytes(whole.read_bytes()[:-500])
    np.savez(wrong, arr_0=np.zeros((4, 3, 32, 32), np.float32))
    small = (*LITE, "--kid-subset-size", 3, "--output", root / "out")
    for arguments, message in (
        ((), "got neither of --ckpt and --images"),
        (("--images", first, "--loss"), "--loss: has no effect without --ckpt"),
        (("--images", first, "--reference", odd, *small), "got images of (33, 33) pixels"),
        (("--images", mixed, "--reference", second, *small), "2.png (got (40, 40) pixels, exp"),
        (("--images", cut, "--reference", second, *small), "cut.npz"),
        (("--images", wrong, "--reference", second, *small), "got float32 (4, 3, 32, 32)"),
        (
            ("--images", notes, "--reference", second, *small),
            "1 of 1 image cannot be evaluated: broken.png (its format is not one of",
        ),
        (("--images", root / "none", *small), "expected a folder of images or an .npz"),
        (("--images", first, "--reference", cut, *small), "cut.npz"),
        (("--images", first, "--inception-weights", whole), "--inception-weights"),
        (("--images", first, "--reference", cut, "--inception-weights", whole), "cut.npz"),
        (("--precompute-reference", root / "x.npz", "--ckpt", "x"), "without --images"),
        (("--reconstruct", "--ckpt", "x"), "--reconstruct: has no effect without --images"),
        (("--ckpt", "x", "--data-path", first), "--data-path: has no effect without --loss"),
        (("--images", first, "--num-images", 3), "--num-images: has no effect without --ckpt"),
        (("--images", first, "--cfg-scale", 4), "--cfg-scale: has no effect without --ckpt"),
        (("--images", first, "--image-size", 64), "--image-size: has no effect without --ckpt"),
        (("--ckpt", "x", "--loss", "--resize", 8), "--resize: has no effect with --loss"),
        (("--images", first, "--output", __file__), f"--output: cannot write {__file__}"),
        (("--images", first, "--vae-path", tiny_vae), "--vae-path: has no effect on --images"),
        (("--images", first, "--precompute-reference", root / "x"), "a name that ends in .npz"),
        (("--images", first, "--reference", "none"), "--reference: none does not exist"),
        (
            ("--images", odd, "--reconstruct", "--vae-path", tiny_vae, *small),
            "expected a multiple of 2",
        ),
    ):
        assert message in expect_error(capsys, "evaluate.py", *arguments), arguments


@pytest.mark.parametrize(
    ("backbone", "num_images", "count", "kept", "want"),
    [
        ("inception-v3-compat", 9000, 0, 9000, ["precision_recall", "kid", "fid", "sfid"]),
        ("inception-v3-compat", 2048, 9000, 1000, ["precision_recall", "kid", "sfid"]),
        ("inception-v3-compat", 9000, 500, 999, ["precision_recall"]),
        ("inception-v3-compat", 9000, 9000, 0, ["fid", "sfid"]),
        ("another", 9000, 9000, 9000, ["precision_recall", "kid"]),
        ("another", 1000, 9000, 3, []),
    ],
)
def test_metrics_are_chosen_by_backbone_and_image_count(backbone, num_images, count, kept, want):
    moments, features = dict.fromkeys(("mu", "mu_s")), {"pool": torch.zeros(kept, 1)}
    reference = Statistics(moments, features, {"num_images": count} if count else {})
    got = choose_metrics(backbone, reference, num_images, 1000)
    assert got == want + (["inception_score"] if backbone == InceptionFeatures.name else [])
    without_reference = choose_metrics(InceptionFeatures.name, None, num_images, 1000)
    assert without_reference == ["inception_score"]


def test_all_bad_files_of_a_folder_are_named_at_once(folders, tmp_path, capsys):
    bad = shutil.copytree(folders[0], tmp_path / "bad")
    for number in (0, 3, 4):
        (bad / f"{number:02d}.png").write_text("not an image")
    Image.new("RGB", (40, 40)).save(bad / "02.png")
    for flag, other in (("--reference", "--images"), ("--images", "--reference")):
        arguments = (flag, bad, other, folders[1], *LITE, "--output", tmp_path / "out")
        line = expect_error(capsys, "evaluate.py", *arguments)
        assert f"{bad}: 4 of {IMAGES} images cannot be evaluated: 00.png (" in line
        assert all(name in line for name in ("02.png (got (40, 40)", "03.png (", "04.png ("))


def test_resized_images_are_said_in_the_results(folders, tmp_path, capsys):
    arguments = ("--images", folders[0], "--reference", folders[1], *LITE, "--output", tmp_path)
    for resize, is_resized in (((), False), (("--resize", 16), True)):
        capsys.readouterr()
        call_main("evaluate.py", *arguments, *resize)
        settings = json.loads((tmp_path / "results.json").read_text())["settings"]
        assert [settings[x].get("resized", False) for x in ("images", "reference")] == [
            is_resized, is_resized,
        ]  # fmt: skip
        line = "--reference: scaled and cropped to 16 x 16 pixels"
        assert (line in capsys.readouterr().out) == is_resized


def test_an_image_folder_of_any_format_is_resized_for_evaluation(tmp_path):
    (tmp_path / "class").mkdir()
    Image.new("RGB", (50, 40)).save(tmp_path / "class" / "0.tif")
    Image.new("L", (32, 70)).save(tmp_path / "class" / "1.PGM")
    Image.new("RGB", (32, 32)).save(tmp_path / "2.webp")
    images = open_image_set(tmp_path, resize=32)
    assert (images.count, images.size) == (3, (32, 32))
    assert next(images.batches(3)).shape == (3, 3, 32, 32)


def test_evaluate_scores_the_reconstructions_of_an_autoencoder(folders, tiny_vae, tmp_path):
    call_main(
        "evaluate.py", "--images", folders[0], "--reference", folders[0], *LITE,
        "--reconstruct", "--vae-path", tiny_vae, "--output", tmp_path,
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"]["kid_efficientnet-lite0-64px"] > 0.1  # the autoencoder is random
    assert len(results["settings"]["vae_sha256"]) == 64
    vae = load_autoencoder(str(tiny_vae), CPU, torch.float32)
    model, images = vae.model, next(open_image_set(folders[0]).batches(4))
    rebuilt = next(reconstructed(open_image_set(folders[0]), vae).batches(4))
    x = images.float() / 127.5 - 1
    want = model.decode(model.encode(x).latent_dist.mode()).sample  # (N, 3, H, W) in [-1, 1]
    assert (rebuilt - ((want + 1) * 127.5).clamp(0, 255)).abs().max() <= 0.5 + 1e-3
