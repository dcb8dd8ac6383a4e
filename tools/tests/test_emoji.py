"""The emoji data set in assets/emoji, the script that prepares it, and nearest images."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, call_main, expect_error, save_checkpoint
from PIL import Image
from test_models import randomised

from latents.autoencoder import load_autoencoder
from latents.sources import open_images
from tools.nearest_images import Neighbours
from tools.prepare_emoji import emoji_of, plain_code

ASSETS = ROOT / "assets" / "emoji"


def write_tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def packages(tmp_path) -> list:
    """Flags with two small packages: 20 animals, and one hand in three skin tones."""
    animals, hand, buffer = [f"1f4{n:02x}" for n in range(20)], "1f44b", io.BytesIO()
    Image.new("RGBA", (256, 256), (0, 0, 0, 0)).save(buffer, format="WEBP")
    skins = [f"{hand}-1f3f{tone}" for tone in "bc"]
    data = [{"hexcode": code.upper(), "group": 3, "subgroup": 34} for code in animals]
    data.append({"hexcode": hand.upper(), "group": 1, "subgroup": 16,
                 "skins": [{"hexcode": code.upper()} for code in skins]})  # fmt: skip
    meta = {"groups": {"1": "people-body", "3": "animals-nature"},
            "subgroups": {"16": "hand-fingers-open", "34": "animal-mammal"}}  # fmt: skip
    names = {"en/data.json": data, "meta/groups.json": meta}
    images = {f"assets/{code}.webp": buffer.getvalue() for code in [*animals, hand, *skins]}
    return [
        "--images", write_tarball(tmp_path / "images.tgz", images),
        "--names", write_tarball(
            tmp_path / "names.tgz", {n: json.dumps(v).encode() for n, v in names.items()}
        ),
    ]  # fmt: skip


def test_emoji_shards_have_subgroups_as_labels_and_groups_as_folders(packages, tmp_path, capsys):
    call_main("tools.prepare_emoji", *packages, "--output", tmp_path / "emoji")
    shards = [open_images(str(tmp_path / "emoji" / f"{n}.tar"), 64) for n in ("train", "held-out")]
    assert sum(map(len, shards)) == 23 and len(shards[1]) == 2  # a tenth of 21 emoji
    train = shards[0]
    assert train.classes == ["animal-mammal", "people-body-other"]  # small subgroups are merged
    assert np.bincount(train.labels).tolist() == [18, 3]
    assert (train[0, False][0]["image"] == 255).all()  # transparent pixels became white
    with tarfile.open(tmp_path / "emoji" / "train.tar") as tar:
        tar.extractall(tmp_path / "tree", filter="data")
    tree = open_images(str(tmp_path / "tree"), 64)
    assert tree.classes == ["animals-nature", "people-body"] and len(tree) == len(train)
    swapped = "--images", packages[3], "--names", packages[1], "--output", tmp_path / "none"
    assert "got" in expect_error(capsys, "tools.prepare_emoji", *swapped)
    assert not (tmp_path / "none").exists()


def test_gender_and_skin_tone_variants_of_an_emoji_share_a_code():
    def code(text: str) -> str:
        return emoji_of(plain_code("-".join(f"{ord(c):04X}" for c in text)))

    assert len({code(c) for c in ("👋", "👋🏻", "👋🏿")}) == 1
    assert len({code(c) for c in ("👩‍🚀", "👨🏽‍🚀", "🧑‍🚀")}) == 1
    assert len({code(c) for c in ("🏃", "🏃‍♀️", "🏃🏾‍♂️‍➡️")}) == 1
    assert len({code(c) for c in ("👫", "👭", "🧑🏻‍🤝‍🧑🏿")}) == 1
    assert len({code(c) for c in ("👩‍🚀", "👩‍🚒", "👩", "🧒")}) == 4


def test_the_shipped_emoji_shards_share_no_emoji_and_match_their_readme():
    codes, readme = {}, (ASSETS / "README.md").read_text()
    for name, count, emoji in (("train", "3,040", "1,498"), ("held-out", "351", "166")):
        path = ASSETS / f"{name}.tar"
        with tarfile.open(path) as tar:
            stems = [Path(member.name).stem for member in tar if member.name.endswith(".webp")]
        codes[name] = {emoji_of(plain_code(stem)) for stem in stems}
        assert (f"{len(stems):,}", f"{len(codes[name]):,}") == (count, emoji)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"| {path.name} | {count} | {emoji} | {digest} |" in readme
    assert not codes["train"] & codes["held-out"]
    train, held_out = (open_images(str(ASSETS / f"{name}.tar"), 64) for name in codes)
    assert len(train.classes) == 70 and set(held_out.classes) < set(train.classes)
    assert np.bincount(train.labels).min() >= 5


def test_nearest_images_finds_the_samples_that_are_training_images(tiny_vae, tmp_path, capsys):
    """The training images contain all samples of one checkpoint, and none of a second one."""
    facts = dict(image_size=16, vae_path=str(tiny_vae), class_names=("ape", "bee"))
    checkpoints = [
        save_checkpoint(
            randomised(noise, num_classes=2), tmp_path / f"{noise}.safetensors",
            objective="rectified_flow", **facts,
        )
        for noise in (0.2, 0.05)
    ]  # fmt: skip
    sampler = "--num-sampling-steps", 2, "--cfg-scale", 1
    call_main(
        "sample.py", "--ckpt", checkpoints[1], *sampler, "--images-per-class", 3,
        "--output-dir", tmp_path / "train",
    )  # fmt: skip
    draw = np.random.default_rng(0)
    for name in ("ape/0", "ape/1", "ape/2", "bee/0", "bee/1", "bee/2"):
        path = tmp_path / "held-out" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    command = [
        "tools.nearest_images", *sampler, "--train", tmp_path / "train",
        "--held-out", tmp_path / "held-out", "--rows", 3, "--output", tmp_path / "near", "--ckpt",
    ]  # fmt: skip
    call_main(*command, *checkpoints)
    result = json.loads((tmp_path / "near" / "nearest.json").read_text())
    other, copies = result["checkpoints"]
    assert copies["close"] == 1 and copies["100%"] < 1e-5 < result["held_out"]["0%"]
    assert other["0%"] > 1e-5 and result["images"] == result["train"] == 6
    assert f"| {checkpoints[1]} |" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "near" / "nearest.webp"))
    top, left = picture.shape[0] - 3 * 114, picture.shape[1] - 6 * 114  # 2 pixels between cells
    for row in range(3):  # a sample, its nearest training image, the next one and a held-out image
        cells = [picture[top + 114 * row :, left + 114 * x :][:112, :112] for x in range(4)]
        same, _, other = (abs(cells[0].astype(int) - cell).mean() for cell in cells[1:])
        assert same < other / 3
    (tmp_path / "held-out" / "bee").rename(tmp_path / "held-out" / "cat")
    assert "--held-out: got cat, expected" in expect_error(capsys, *command, checkpoints[0])


def test_the_distance_of_equal_images_is_not_negative():
    """Rounding makes the similarity larger than 1."""
    features = torch.full((2, 1), 1 + 1e-6)
    assert Neighbours(None, features, None, features).distance.tolist() == [0, 0]


def test_the_shipped_autoencoder_reconstructs_held_out_emoji_at_33_db():
    """Uses every sixteenth held-out picture."""
    vae = load_autoencoder(str(ROOT / "assets" / "vae-emoji"), "cpu", torch.float32)
    images = open_images(str(ASSETS / "held-out.tar"), 64)
    pixels = torch.stack([images[i, False][0]["image"] for i in range(0, len(images), 16)])
    error = ((vae.reconstruct(pixels).float() - pixels) / 255).square()
    assert -10 * error.mean(dim=(1, 2, 3)).log10().mean() >= 34  # dB


def test_the_shipped_model_of_emoji_samples_people_in_few_steps(tmp_path):
    call_main(
        "sample.py", "--ckpt", ROOT / "assets" / "demo-emoji", "--class-labels", "person",
        "--sampler", "heun", "--num-sampling-steps", 4, "--cfg-scale", 2.5,
        "--output-dir", tmp_path,
    )  # fmt: skip
    (path,) = tmp_path.glob("*.png")
    image = np.asarray(Image.open(path)).astype(int)
    corners, centre = image[[0, 0, -1, -1], [0, -1, 0, -1]], image[24:40, 24:40]
    assert image.shape == (64, 64, 3) and corners.mean() > 235  # white background
    assert centre.mean() < 215 and (centre[..., 0] - centre[..., 2]).mean() > 20  # a face: skin
