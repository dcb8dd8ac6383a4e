"""Assets of the demo: Fashion-MNIST, the script that unpacks it and the small autoencoder."""

import gzip
import hashlib
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, call_main, command_line, expect_error
from PIL import Image

from latents.autoencoder import load_autoencoder
from latents.sources import open_images
from runtime.errors import UserError
from runtime.signals import SIGNALS
from tools import train_autoencoder
from tools.prepare_fashion_mnist import PrepareConfig

DATA = ROOT / "assets" / "fashion-mnist"
VAE = str(ROOT / "assets" / "vae-fashion-mnist")
LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle-boot",
)  # fmt: skip


def prepare(*arguments) -> None:
    call_main("tools.prepare_fashion_mnist", *arguments)


def write_idx(path: Path, array: np.ndarray) -> Path:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    return path


def shipped() -> tuple[np.ndarray, np.ndarray]:
    """The images (N, 28, 28) and labels (N,) that are prepared by default."""
    config = PrepareConfig()
    pixels, labels = (gzip.decompress(path.read_bytes()) for path in (config.images, config.labels))
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
    return images, np.frombuffer(labels, np.uint8, offset=8)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The first 300 of the images that are prepared by default, which are 10,000."""
    folder, (images, labels) = tmp_path_factory.mktemp("data"), shipped()
    files = (
        "--images", write_idx(folder / "images.gz", images[:300]),
        "--labels", write_idx(folder / "labels.gz", labels[:300]),
    )  # fmt: skip
    prepare(*files, "--output", folder / "fashion-mnist")
    return folder / "fashion-mnist"


@pytest.fixture
def small(tmp_path) -> list:
    """Flags that prepare a data set of 30 images, three per class."""
    images = np.random.default_rng(0).integers(0, 255, (30, 28, 28))
    return [
        "--images", write_idx(tmp_path / "images.gz", images),
        "--labels", write_idx(tmp_path / "labels.gz", np.arange(30) % 10),
        "--output", tmp_path / "small",
    ]  # fmt: skip


def test_fashion_mnist_files_have_the_documented_checksums():
    readme = (DATA / "README.md").read_text()
    for path in sorted(DATA.glob("*.gz")):
        assert f"| {path.name} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" in readme


def test_prepared_fashion_mnist_images_are_the_padded_originals_of_1000_per_class(tree):
    pixels, labels = shipped()
    assert np.bincount(labels).tolist() == [1000] * 10
    images = open_images(str(tree), 32)
    assert images.classes == sorted(LABELS) and len(images) == 300
    for place in range(0, len(images), 10):
        index = int(Path(images.name(place)).stem)
        item, _ = images[place, False]
        assert LABELS[labels[index]] == images.classes[item["label"]]
        assert (item["image"].numpy() == np.pad(pixels[index], 2)).all()


def test_prepare_fashion_mnist_completes_its_folder_and_rejects_other_files(
    small, tmp_path, capsys
):
    prepare(*small)
    files = sorted((tmp_path / "small").glob("*/*.png"))
    whole = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in files[3:]}
    assert len(files) == 30
    for path in files[:3]:
        path.unlink()
    prepare(*small)
    assert {path: path.read_bytes() for path in files} == whole
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (tmp_path / "small" / "dress" / "00077.png").write_bytes(b"of another one")
    line = expect_error(capsys, "tools.prepare_fashion_mnist", *small)
    assert "has other images" in line and "00077.png" in line and "expected" in line


FAULTS = {
    "missing": lambda images, labels: images.unlink(),
    "not_gzip": lambda images, labels: images.write_bytes(b"plain text"),
    "cut_short": lambda images, labels: images.write_bytes(
        gzip.compress(gzip.decompress(images.read_bytes())[:-10])
    ),
    "counts": lambda images, labels: write_idx(labels, np.arange(4)),
    "label": lambda images, labels: write_idx(labels, np.arange(30)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_prepare_fashion_mnist_rejects_damaged_files(fault, small, tmp_path, capsys):
    FAULTS[fault](tmp_path / "images.gz", tmp_path / "labels.gz")
    line = expect_error(capsys, "tools.prepare_fashion_mnist", *small)
    assert "images" in line and "got" in line and "expected" in line
    assert not (tmp_path / "small").exists()


def test_train_autoencoder_reaches_unit_variance_and_can_train_only_the_decoder(
    small, tmp_path, capsys
):
    prepare(*small)
    train = "tools.train_autoencoder", "--data-path", tmp_path / "small", "--steps", 3
    train = *train, "--batch-size", 4, "--precision", "fp32", "--output"
    call_main(*train, tmp_path / "vae")
    assert len({file.stat().st_mode for file in (tmp_path / "vae").iterdir()}) == 1
    vae = load_autoencoder(str(tmp_path / "vae"), "cpu", torch.float32)
    images = open_images(str(tmp_path / "small"), 32)
    moments = vae.posterior(torch.stack([images[i, False][0]["image"] for i in range(30)]))
    mean, log_variance = moments.chunk(2, dim=1)  # (30, 4, 8, 8)
    variance = mean.var(dim=(0, 2, 3)) + log_variance.exp().mean(dim=(0, 2, 3))  # (4,)
    torch.testing.assert_close(
        variance.sqrt() * vae.config.scaling_factor, torch.ones(4), atol=0.1, rtol=0
    )
    call_main(*train, tmp_path / "decoder", "--decoder-of", tmp_path / "vae")
    decoder = load_autoencoder(str(tmp_path / "decoder"), "cpu", torch.float32)
    again = decoder.model.state_dict()
    changed = {
        name.split(".")[0] for name, w in vae.model.state_dict().items() if (w != again[name]).any()
    }
    assert changed == {"decoder", "post_quant_conv"}
    pixels = decoder.reconstruct(images[0, False][0]["image"][None])  # from a grey image
    assert pixels.float().std() > 1 and (pixels == pixels[:, :1]).all()
    critic = "--critic-weight", 0.1
    call_main(*train, tmp_path / "sharp", "--decoder-of", tmp_path / "vae", *critic)
    sharp = load_autoencoder(str(tmp_path / "sharp"), "cpu", torch.float32)
    assert (sharp.reconstruct(images[0, False][0]["image"][None]) != pixels).any()
    line = expect_error(capsys, *train, tmp_path / "none", "--decoder-of", "README.md")
    assert "--decoder-of: got README.md, expected" in line
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = expect_error(capsys, *train, tmp_path / "none", "--decoder-of", tmp_path / "vae")
    assert f"--decoder-of {tmp_path / 'vae'}: cannot load the weights" in line
    assert not (tmp_path / "none").exists()


def test_an_interrupted_autoencoder_training_resumes_exactly(small, tmp_path, monkeypatch, capsys):
    prepare(*small)

    def flags(output: str) -> tuple:
        values = {"data-path": tmp_path / "small", "image-size": 24, "steps": 5, "batch-size": 2,
                  "critic-weight": 0.01, "latent-channels": 8, "precision": "fp32"}  # fmt: skip
        return "tools.train_autoencoder", *(f"--{k}={v}" for k, v in values.items()), *output

    call_main(*flags(["--output", tmp_path / "whole"]))
    assert "held-out PSNR" in capsys.readouterr().out
    steps, losses = [], train_autoencoder.losses

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return losses(*arguments)

    monkeypatch.setattr(train_autoencoder, "losses", interrupted)
    again = flags(["--output", tmp_path / "again"])
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with command_line(again[0], again[1:]) as script:
        assert script.main(script.parse_args()) == 75
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert (tmp_path / "again" / "reconstructions.png").is_file()
    sheet = (tmp_path / "again" / "images.png").read_bytes()
    others = tmp_path / "small" / "bag"
    for word, value, message in (
        ("--seed", 1, "seed: got 1, expected 0"),
        ("--data-path", others, r"data_path: got 3 images \(.*\), expected \d+ images"),
    ):
        with pytest.raises(UserError, match=f"created with other settings: {message}"):
            call_main(*again, word, value)
    assert (tmp_path / "again" / "images.png").read_bytes() == sheet
    call_main(*again)
    assert len(steps) == 5
    whole, resumed = tmp_path / "whole", tmp_path / "again"
    assert {p.name: p.read_bytes() for p in whole.iterdir() if p.suffix != ".pt"} == {
        p.name: p.read_bytes() for p in resumed.iterdir() if p.suffix != ".pt"
    }  # pickles of equal states may differ
    capsys.readouterr()
    longer = again[0], *(str(word).replace("--steps=5", "--steps=7") for word in again[1:])
    call_main(*longer)
    output = capsys.readouterr().out
    assert len(steps) == 7 and "dB over 6 images. Above 30 dB" in output
    sizes = [Image.open(resumed / f"{name}.png").size for name in ("images", "reconstructions")]
    assert all(width > 112 and height > 112 for width, height in sizes)
    with pytest.raises(UserError, match="--steps: got 5, expected at least 7"):
        call_main(*again)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    other = flags(["--output", tmp_path / "other"])
    assert "new or empty folder" in expect_error(capsys, *other)
    with pytest.raises(UserError, match="--lr: the weights became infinite or nan before step 5"):
        call_main(*flags(["--output", tmp_path / "nan"]), "--lr", 1e30)
    wrong = expect_error(capsys, *flags(["--output", tmp_path / "x"]), "--image-size", 50)
    assert "got 50, expected a multiple of 4" in wrong


def test_the_shipped_autoencoder_reconstructs_test_images_at_28_db(tree):
    """Uses 50 test images, about 5 per class."""
    vae, images = load_autoencoder(VAE, "cpu", torch.float32), open_images(str(tree), 32)
    pixels = torch.stack([images[i, False][0]["image"] for i in range(0, len(images), 6)])
    got = vae.reconstruct(pixels)  # (50, 3, 32, 32)
    error = ((got.float() - pixels) / 255).square()
    assert -10 * error.mean(dim=(1, 2, 3)).log10().mean() >= 28  # dB
    assert (got == got[:, :1]).all()  # grey
