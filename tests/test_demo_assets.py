"""
The demo's assets: the shipped Fashion-MNIST files, the script that unpacks them, the small VAE.

    python -m pytest tests/test_demo_assets.py
"""

import gzip
import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torchvision.datasets import ImageFolder

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "assets" / "fashion-mnist"
VAE = ROOT / "assets" / "vae-fashion-mnist"
LABELS = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
]
CLASSES = sorted(LABELS)


def prepare(*arguments):
    command = [sys.executable, ROOT / "scripts" / "prepare_fashion_mnist.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    return path


def snapshot(tree):
    return {path: path.stat().st_mtime_ns for path in tree.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "fashion-mnist"
    result = prepare("--output", output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def vae():
    model, info = AutoencoderKL.from_pretrained(
        VAE, output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def test_images(tree):
    """Every 20th image: (500, 3, 32, 32) uint8, 50 of each class."""
    dataset = ImageFolder(tree)
    images = [np.array(dataset[index][0]) for index in range(0, len(dataset), 20)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_shipped_files_have_the_documented_checksums():
    readme = (DATA / "README.md").read_text()
    for path in sorted(DATA.glob("*.gz")):
        assert f"| {path.name} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" in readme


def test_prepare_makes_ten_classes_of_a_thousand_images(tree):
    assert sorted(path.name for path in tree.iterdir()) == CLASSES
    for name in CLASSES:
        assert len(list((tree / name).iterdir())) == 1000


def test_prepared_images_are_the_padded_originals_in_label_order(tree):
    images = gzip.decompress((DATA / "t10k-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    labels = gzip.decompress((DATA / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    dataset = ImageFolder(tree)
    assert dataset.classes == CLASSES
    for path, target in dataset.imgs[::100]:
        index = int(Path(path).stem)
        assert LABELS[labels[index]] == CLASSES[target]
        image = np.array(Image.open(path))  # (32, 32, 3)
        expected = np.pad(images[index], 2)[:, :, None].repeat(3, axis=2)
        np.testing.assert_array_equal(image, expected)


def test_prepare_leaves_a_complete_tree_alone(tree):
    before = snapshot(tree)
    assert prepare("--output", tree).returncode == 0
    assert snapshot(tree) == before


def test_prepare_completes_a_partial_tree(tmp_path):
    images = write_idx(tmp_path / "images.gz", np.arange(30 * 28 * 28).reshape(30, 28, 28) % 251)
    labels = write_idx(tmp_path / "labels.gz", np.arange(30) % 10)
    output = tmp_path / "output"
    arguments = ["--images", images, "--labels", labels, "--output", output]
    assert prepare(*arguments).returncode == 0
    complete = {path: path.read_bytes() for path in output.glob("*/*")}
    assert len(complete) == 30

    modified = snapshot(output)
    removed = sorted(complete)[:3]
    for path in removed:
        path.unlink()
    removed[0].with_suffix(".partial").write_bytes(b"left by a killed run")
    assert prepare(*arguments).returncode == 0
    assert {path: path.read_bytes() for path in output.glob("*/*")} == complete
    rewritten = {path for path, time in snapshot(output).items() if time != modified[path]}
    assert rewritten == set(removed)


def test_prepare_refuses_to_mix_two_data_sets(tree, tmp_path):
    images = write_idx(tmp_path / "images.gz", np.zeros((2, 28, 28)))
    labels = write_idx(tmp_path / "labels.gz", np.zeros(2))
    result = prepare("--images", images, "--labels", labels, "--output", tree)
    assert result.returncode == 2
    assert "files of another data set" in result.stderr


@pytest.mark.parametrize(
    "fault", ["missing", "not_gzip", "cut_short", "not_idx", "wrong_size", "counts", "label"]
)
def test_prepare_answers_bad_input_with_one_line_and_exit_code_2(fault, tmp_path):
    images = write_idx(tmp_path / "images.gz", np.zeros((3, 28, 28)))
    labels = write_idx(tmp_path / "labels.gz", np.arange(3))
    if fault == "missing":
        images.unlink()
    elif fault == "not_gzip":
        images.write_bytes(b"plain text")
    elif fault == "cut_short":
        images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-10]))
    elif fault == "not_idx":
        images.write_bytes(gzip.compress(b"plain text, longer than an idx header"))
    elif fault == "wrong_size":
        write_idx(images, np.zeros((3, 32, 32)))
    elif fault == "counts":
        write_idx(labels, np.arange(4))
    elif fault == "label":
        write_idx(labels, np.array([0, 1, 10]))
    result = prepare("--images", images, "--labels", labels, "--output", tmp_path / "output")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "got" in result.stderr and "expected" in result.stderr
    assert not (tmp_path / "output").exists()


@torch.no_grad()
def test_vae_reconstructs_test_images_at_24_db(vae, test_images):
    x = test_images.float() / 127.5 - 1
    latents = vae.encode(x).latent_dist.mean
    assert latents.shape == (500, 4, 8, 8)
    reconstruction = ((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255)
    error = ((reconstruction - test_images) / 255).square().mean(dim=(1, 2, 3))  # (500,)
    assert -10 * error.log10().mean() >= 24


@torch.no_grad()
def test_vae_scaled_latents_have_unit_variance(vae, test_images):
    x = test_images.float() / 127.5 - 1
    latents = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(0))
    latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    assert abs(latents.std() - 1) < 0.1
    assert abs(latents.mean()) < 0.1
    channel_std = latents.std(dim=(0, 2, 3))  # (4,)
    assert ((channel_std - 1).abs() < 0.1).all()


@torch.no_grad()
def test_every_vae_latent_channel_carries_signal(vae, test_images):
    posterior = vae.encode(test_images.float() / 127.5 - 1).latent_dist
    noise_variance = posterior.var.mean(dim=(0, 2, 3))  # (4,)
    signal_variance = posterior.mean.var(dim=(0, 2, 3))  # (4,)
    assert (signal_variance > 4 * noise_variance).all()
