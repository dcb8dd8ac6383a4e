"""The emoji data set in assets/emoji, the script that prepares it, and nearest images."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main, expect_error
from PIL import Image

from latents.autoencoder import load_autoencoder
from latents.sources import open_images
from scripts.prepare_emoji import emoji_of, plain_code

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
    call_main("scripts.prepare_emoji", *packages, "--output", tmp_path / "emoji")
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
    assert "got" in expect_error(capsys, "scripts.prepare_emoji", *swapped)
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


def test_nearest_images_pairs_a_copied_sample_with_its_original(tmp_path):
    """Three sets of noise images; the first sample is a copy of training image 2."""
    draw = np.random.default_rng(0)
    images = {}
    for name, count in (("train", 6), ("held-out", 8), ("samples", 4)):
        images[name] = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images["samples"][0] = images["train"][2]
    for name, pixels in images.items():
        np.savez(tmp_path / name, pixels)
    paths = {name: tmp_path / f"{name}.npz" for name in images}
    call_main(
        "scripts.nearest_images", "--images", paths["samples"], "--train", paths["train"],
        "--held-out", paths["held-out"], "--rows", 2, "--output", tmp_path / "near",
    )  # fmt: skip
    result = json.loads((tmp_path / "near" / "nearest.json").read_text())
    quantiles = result["distance_of_samples"]
    assert (
        abs(quantiles["0%"]) < 1e-5 < quantiles["25%"]
        and result["distance_of_held_out"]["0%"] > 1e-3
    )
    assert result["samples_nearer_than_5%_of_held_out"] >= 0.25
    picture = np.asarray(Image.open(tmp_path / "near" / "nearest.png"))
    # In the first row, the sample and its nearest image are equal.
    shown = images["train"][2].repeat(4, 0).repeat(4, 1)
    places = [x for x in range(picture.shape[1] - 127) if _is_at(picture, shown, x)]
    assert len(places) == 2


def _is_at(picture: np.ndarray, shown: np.ndarray, x: int) -> bool:
    """Whether a picture contains an image with the left edge at x, at any height."""
    height = len(shown)
    return any(
        np.array_equal(picture[y : y + height, x : x + height], shown)
        for y in range(len(picture) - height + 1)
    )


def test_the_shipped_autoencoder_reconstructs_held_out_emoji_at_33_db():
    """Uses every fourth held-out picture."""
    vae = load_autoencoder(str(ROOT / "assets" / "vae-emoji"), "cpu", torch.float32)
    images = open_images(str(ASSETS / "held-out.tar"), 64)
    pixels = torch.stack([images[i, False][0]["image"] for i in range(0, len(images), 4)])
    error = ((vae.reconstruct(pixels).float() - pixels) / 255).square()
    assert -10 * error.mean(dim=(1, 2, 3)).log10().mean() >= 33  # dB


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
