"""Captions: the conventions in which people store them, their digest, and caches."""

import io
import json
import tarfile

import pytest
from datasets import Dataset, Features, Image, Value
from helpers import call_main, expect_error
from PIL import Image as Pillow
from test_own_data import good_images, save

from latents.cache import CachedLatents
from latents.captions import Captions
from latents.sources import GivenImages, open_images


def captions_of(path, image_size=8) -> list[list[str]]:
    return [*open_images(str(path), image_size).captions]


def test_captions_are_beside_images_or_in_metadata_of_their_folder_or_above(tmp_path, capsys):
    for folder in "ab":
        for name in ("1.png", "2.png"):
            save(tmp_path / folder, name)
    (tmp_path / "a" / "1.txt").write_text("a red  square\na square\n")
    lines = [{"file_name": "2.png", "caption": "of its folder", "other": 1}]
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = {"file_name": ["b/1.png", "b/2.png"], "text": [["one", "two"], None]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "metadata.parquet")
    images = open_images(str(tmp_path), 8)
    expected = [["a red square", "a square"], ["of its folder"], ["one", "two"], []]
    assert [*images.captions] == expected and images.captions.missing.tolist() == [3]
    assert "ignored" not in capsys.readouterr().out
    (tmp_path / "a" / "1.txt").write_text("a blue square")
    assert open_images(str(tmp_path), 8).captions.sha256 != images.captions.sha256
    (tmp_path / "a" / "metadata.jsonl").write_text("{")
    with pytest.raises(Exception, match="--data-path: captions"):
        captions_of(tmp_path)


def test_shards_and_datasets_of_the_hub_and_of_python_have_captions(tmp_path):
    path = save(tmp_path, "red.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("0.png", path.read_bytes()), ("0.txt", b"zero"),
                              ("1.png", path.read_bytes())):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert captions_of(tmp_path / "x.tar") == [["zero"], []]
    features = Features({"image": Image(), "prompt": Value("string")})
    rows = {"image": [str(path)] * 2, "prompt": ["one", None]}
    (folder := tmp_path / "hub").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    assert captions_of(f"datasets:{folder}") == [["one"], []]
    items = [(Pillow.new("RGB", (8, 8)), 0, "a"), (Pillow.new("RGB", (8, 8)), 1, ["b", "c"])]
    GivenImages.datasets["python:captions"] = items
    assert captions_of("python:captions") == [["a"], ["b", "c"]]
    GivenImages.datasets["python:captions"] = [item[:2] for item in items]
    assert not open_images("python:captions", 8).captions


def test_a_cache_has_the_captions_and_refuses_to_go_on_with_others(tmp_path, tiny_vae, capsys):
    good_images(tmp_path / "images")
    (tmp_path / "images" / "rgb.txt").write_text("a red square")
    command = ("cache_latents.py", "--data-path", tmp_path / "images", "--image-size", 16,
               "--vae-path", tiny_vae, "--output", tmp_path / "cache")  # fmt: skip
    call_main(*command)
    latents = CachedLatents(tmp_path / "cache")
    images = open_images(str(tmp_path / "images"), 16)
    assert [*latents.captions] == [*images.captions] and latents.captions
    (tmp_path / "images" / "rgb.txt").write_text("a blue square")
    assert "captions" in expect_error(capsys, *command)


def test_captions_are_text():
    with pytest.raises(ValueError, match="expected text"):
        Captions.of([["a", 3]])
