"""User data: folders, datasets and shards of images, and how images of any kind are read."""

import errno
import io
import os
import resource
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call_main, expect_error, rows
from PIL import Image
from torchvision.datasets import ImageFolder

import latents.images as images_module
import train
from latents.images import FORMATS, center_crop_arr, read_rgb
from latents.loading import check_unreadable, read_batches
from latents.sources import GivenImages, open_images, size_notes
from runtime.errors import UserError

RED, GREY, WHITE = (255, 0, 0), (128, 128, 128), (255, 255, 255)


def save(folder: Path, name: str, colour=RED) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(folder / name)
    return folder / name


def good_images(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Writes single-coloured images of many modes and formats; returns {name: visible colour}."""
    folder.mkdir(parents=True, exist_ok=True)
    size = (20, 20)
    red = Image.new("RGB", size, RED)
    animated = dict(save_all=True, append_images=[Image.new("RGB", size, (0, 255, 0))])
    colours = {}
    for name, image, colour, options in (
        ("rgb.png", red, RED, {}),
        ("grey.png", Image.new("L", size, 128), GREY, {}),
        ("grey-16.png", Image.fromarray(np.full(size, 0x80FF, np.uint16)), GREY, {}),
        ("one-bit.png", Image.new("1", size, 1), WHITE, {}),
        ("palette.png", red.convert("P", palette=Image.Palette.ADAPTIVE), RED, {}),
        ("palette-clear.png", Image.new("P", size, 0), WHITE, {"transparency": 0}),
        ("rgba-clear.png", Image.new("RGBA", size, (0, 0, 0, 0)), WHITE, {}),
        ("rgba-half.png", Image.new("RGBA", size, (*RED, 128)), (255, 127, 127), {}),
        ("grey-alpha.png", Image.new("LA", size, (0, 0)), WHITE, {}),
        ("cmyk.JPG", Image.new("CMYK", size, (0, 255, 255, 0)), RED, {"quality": 100}),
        ("bad-exif.jpg", red, RED, {"exif": b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01\x12"}),
        ("cmyk.tiff", Image.new("CMYK", size, (0, 255, 255, 0)), RED, {}),
        ("animated.webp", red, RED, {**animated, "lossless": True}),
        ("animated.png", red, RED, animated),
        ("animated.gif", red, RED, animated),
        ("camera.jfif", red, RED, {"quality": 100, "format": "JPEG"}),
        *([("phone.avif", red, RED, {"quality": 100})] if "AVIF" in FORMATS else []),
        *([("phone.HEIC", red, RED, {"quality": 100})] if "HEIF" in FORMATS else []),
        ("phone.jpg", red, RED, {**animated, "format": "MPO", "quality": 100}),
        ("gif.png", red, RED, {**animated, "format": "GIF"}),  # the content decides, not the name
    ):
        image.save(folder / name, **options)
        colours[name] = colour
    return colours


def bad_images(folder: Path) -> dict[str, str]:
    """Writes files that cannot be read as images; returns {name: part of the expected reason}."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, content = Image.effect_noise((64, 64), 50).convert("RGB"), {}
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        noise.save(file, kind)
        content[kind] = file.getvalue()
    reasons = {}
    for name, data, reason in (
        ("cut.png", content["PNG"][:-100], "truncated"),
        ("cut.jpg", content["JPEG"][: len(content["JPEG"]) // 2], "truncated"),
        ("wrong-byte.png", content["PNG"][:60] + b"\xff" + content["PNG"][61:], ""),
        ("empty.png", b"", "its format is not one of"),
        ("text.jpg", b"not an image", "its format is not one of"),
        (
            "postscript.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
            "its format is not one of",
        ),
    ):
        (folder / name).write_bytes(data)
        reasons[name] = reason
    Image.fromarray(np.ones((20, 20), np.float32)).save(folder / "float.tiff")
    Image.fromarray(np.ones((20, 20), np.uint16)).save(folder / "grey-16.tiff")
    (folder / "broken-link.png").symlink_to(folder / "nowhere.png")
    reasons |= {"float.tiff": "8 bits", "grey-16.tiff": "8 bits"}
    return {**reasons, "broken-link.png": "No such file"}


def test_images_of_every_mode_are_read_with_their_visible_colour(tmp_path):
    for name, colour in good_images(tmp_path).items():
        pixels = np.asarray(read_rgb(tmp_path / name)).astype(int)
        assert pixels.shape == (20, 20, 3), name
        assert np.abs(pixels - colour).max() <= 3, f"{name}: {pixels[0, 0]}, expected {colour}"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_by_their_exif_orientation(orientation, tmp_path):
    upright = Image.new("RGB", (16, 24), WHITE)
    upright.paste(RED, (0, 0, 8, 12))  # the upper left quarter
    kinds = Image.Transpose
    turn = (
        None, kinds.FLIP_LEFT_RIGHT, kinds.ROTATE_180, kinds.FLIP_TOP_BOTTOM, kinds.TRANSPOSE,
        kinds.ROTATE_90, kinds.TRANSVERSE, kinds.ROTATE_270,
    )[orientation - 1]  # fmt: skip
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", quality=100, subsampling=0, exif=exif)
    got = np.asarray(read_rgb(tmp_path / "x.jpg")).astype(int)
    assert got.shape == (24, 16, 3)
    assert np.abs(got - np.asarray(upright)).mean() < 3


def test_unreadable_images_are_named_and_replaced_by_the_next_readable_one(tmp_path):
    reasons = bad_images(tmp_path / "a")
    save(tmp_path / "a", "zz-good.png")
    images = open_images(str(tmp_path), 16)
    assert len(images) == len(reasons) + 1
    for index in range(len(reasons)):
        item, unreadable = images[index, False]
        image = item["image"]
        assert (image[0] == 255).all() and (image[1:] == 0).all()
        (text,) = unreadable  # the image that was asked for
        name = Path(images.name(index)).name
        assert text.startswith(f"{images.name(index)} (") and reasons[name] in text


def test_messages_on_images_name_the_flag_or_the_argument_of_the_images(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_text("")
    (tmp_path / "a" / "notes.txt").touch()
    images = open_images(str(tmp_path), 16, "--held-out")
    assert capsys.readouterr().out.startswith(f"--held-out {tmp_path}: ignored files")
    with pytest.raises(UserError, match="^--held-out: got 1 image, none of which"):
        images[0, False]
    monkeypatch.setitem(GivenImages.datasets, "python:x", [("no image", 0)])
    with pytest.raises(UserError, match="^data: got 1 image, none of which"):
        open_images("python:x", 16)[0, False]


def test_images_that_are_smaller_than_the_image_size_are_noted(image_tree):
    """The images have 40 x 36 pixels."""
    (note,) = size_notes(open_images(str(image_tree), (40, 38)))
    assert "5 of 5 images" in note and "--image-size (40 x 38 pixels)" in note
    assert not size_notes(open_images(str(image_tree), (40, 36)))


def test_an_image_too_large_for_memory_counts_as_unreadable(tmp_path):
    save(tmp_path, "a.png")
    Image.new("1", (15_000, 12_000)).save(tmp_path / "bomb.png")
    save(tmp_path, "c.png")
    (bomb,) = open_images(str(tmp_path), 16)[1, False][1]
    assert "bomb.png (" in bomb and "limit" in bomb


def test_a_very_thin_image_is_cropped_before_scaling(tmp_path):
    """Scaling the entire strip to a width of 256 would take 16 GB."""
    strip = Image.new("RGB", (1, 60_000), RED)
    strip.paste(WHITE, (0, 29_000, 1, 31_000))
    strip.save(tmp_path / "strip.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    item, unreadable = open_images(str(tmp_path), 256)[0, False]
    image = item["image"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000  # kB
    assert image.shape == (3, 256, 256) and (image == 255).all() and not unreadable


@pytest.mark.parametrize("size", [(40, 36), (300, 64), (33, 500), (64, 64), (32, 16)])
def test_images_are_cropped_as_in_adm_bit_for_bit(size):
    """Bit for bit, because published FID statistics depend on this crop."""
    image = Image.effect_noise(size, 80).convert("RGB")
    got, want = center_crop_arr(image, 16), image
    while min(want.size) >= 32:
        want = want.resize((want.width // 2, want.height // 2), resample=Image.BOX)
    scale = 16 / min(want.size)
    want = want.resize(tuple(round(x * scale) for x in want.size), resample=Image.BICUBIC)
    top, left = (want.height - 16) // 2, (want.width - 16) // 2
    assert (np.array(got) == np.array(want)[top : top + 16, left : left + 16]).all()


def test_training_names_each_unreadable_image_once(train_flags, tmp_path, capsys):
    good_images(tmp_path / "data" / "class-0")
    bad = bad_images(tmp_path / "data" / "class-1")
    losses = []
    for workers in (0, 1):
        changes = {
            "data-path": tmp_path / "data", "num-workers": workers, "global-batch-size": 16,
            "max-steps": 2, "log-every": 1,
        }  # fmt: skip
        call_main("train.py", *train_flags(tmp_path / f"{workers}", **changes))
        output = capsys.readouterr().out
        assert all(output.count(f"/class-1/{name}") == 1 for name in bad)
        log = rows(tmp_path / f"{workers}")
        losses.append([row["loss"] for row in log])
        assert log[-1]["skipped_images"] == len(bad)
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_more_than_ten_and_1_percent_unreadable_images_are_an_error(
    train_flags, tiny_vae, tmp_path, capsys
):
    good_images(tmp_path / "data" / "class-0")
    for number in range(12):
        (tmp_path / "data" / "class-0" / f"empty-{number:02d}.png").touch()
    data = {"data-path": tmp_path / "data", "vae-path": tiny_vae, "image-size": 16}
    flags = train_flags(tmp_path / "r", **data, **{"global-batch-size": 16, "max-steps": 9})
    line = expect_error(capsys, "train.py", *flags)
    assert "--data-path: 1" in line and "cannot be read, expected at most 1%" in line
    data = [f"--{name}={value}" for name, value in data.items()]
    output = tmp_path / "latents"
    with pytest.raises(UserError, match="^--data-path: 12 of "):
        call_main("cache_latents.py", *data, "--num-workers=0", f"--output={output}")
    assert not list(output.glob("shard-*"))
    check_unreadable("--data-path", 10, 40)
    check_unreadable("--data-path", 300, 30_000)
    with pytest.raises(UserError, match="301 of 30,000 images"):
        check_unreadable("--data-path", 301, 30_000)


def test_a_fault_of_the_storage_is_an_error_and_not_a_bad_image(tmp_path, monkeypatch):
    good_images(tmp_path)
    images = open_images(str(tmp_path), 16)

    class Stale(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(
        images_module, "open", raising=False,
        value=lambda path, mode: Stale() if path == images.name(1) else open(path, mode),  # noqa: SIM115
    )  # fmt: skip
    assert images[0, False][1] == []
    with pytest.raises(UserError, match="^--data-path: the storage failed to read .*Stale file"):
        images[1, False]


def test_a_folder_with_only_unreadable_images_is_a_one_line_error(tmp_path, train_flags, capsys):
    bad_images(tmp_path / "data" / "class-0")
    flags = train_flags(tmp_path / "r", **{"data-path": tmp_path / "data", "num-workers": 1})
    line = expect_error(capsys, "train.py", *flags)
    message = "--data-path: got 9 images, none of which can be read; the first one is "
    assert message in line and len(line) < 500
    images = open_images(str(tmp_path / "data"), 16)
    with pytest.raises(UserError, match=f"^{message}"):
        list(read_batches(images, [[(0, False)]], num_workers=1, pin=False))


def test_figures_in_a_folder_of_ours_are_not_taken_for_photos(tiny_vae, train_flags, tmp_path):
    call_main("train.py", *train_flags(tmp_path, **{"max-steps": 1, "run-name": "run"}))
    shutil.copytree(tmp_path / "run", tmp_path / "copied-run").joinpath("log.jsonl").unlink()
    folders = {
        tiny_vae: "an autoencoder .*--vae-path",
        tmp_path / "run": "a run.*--resume", tmp_path / "copied-run": "a run.*--resume",
    }  # fmt: skip
    for number, (folder, kind) in enumerate(folders.items()):
        parent = tmp_path / f"photos-{number}"
        save(shutil.copytree(folder, parent / folder.name), "figure.png")
        for path in (parent / folder.name, parent):
            with pytest.raises(UserError, match=f"{folder.name} is {kind}"):
                open_images(str(path), 16)


def test_a_folder_of_images_without_subfolders_is_one_class(tmp_path):
    for number in range(3):
        save(tmp_path / "photos", f"{number}.png")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    images = open_images(str(tmp_path / "photos"), 16)
    assert len(images) == 3 and images.classes == ["photos"] and images[2, False][0]["label"] == 0


def test_files_outside_class_folders_are_skipped_and_listed(tmp_path, capsys):
    save(tmp_path / "cats", "a.png")
    save(tmp_path / "dogs" / "small", "b.png")
    save(tmp_path / "dogs" / ".ipynb_checkpoints", "b.png")
    save(tmp_path / "cats", "._a.png")  # macOS creates such files
    save(tmp_path / "__MACOSX" / "cats", "a.png")
    save(tmp_path, "loose.png")
    (tmp_path / "empty").mkdir()
    for name in ("cats/1.heix", "cats/2.heix", "dogs/small/notes.txt", "dogs/README"):
        (tmp_path / name).write_text("not an image")
    images = open_images(str(tmp_path), 16)
    assert images.classes == ["cats", "dogs"] and len(images) == 2
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and "small" not in output
    assert all(name in output for name in ("1 image ", "loose.png", "__MACOSX", "empty"))
    assert ".webp" in output and "2 .heix, 1 .txt, 1 without a suffix" in output
    shutil.rmtree(tmp_path / "dogs")
    for path in (tmp_path / "cats" / "a.png", tmp_path / "loose.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"no images.*2 \.heix"):
        open_images(str(tmp_path), 16)


def test_a_folder_of_images_with_a_smaller_sub_folder_is_refused(tmp_path, train_flags, capsys):
    for number in range(3):
        save(tmp_path / "photos", f"{number}.png")
    for number in range(2):
        save(tmp_path / "photos" / "best", f"{number}.png")
    flags = train_flags(tmp_path / "r", **{"data-path": tmp_path / "photos", "max-steps": 1})
    line = expect_error(capsys, "train.py", *flags)
    assert "3 images outside the class folders, such as 0.png, and only 2 inside; put" in line
    save(tmp_path / "photos" / "best", "2.png")
    assert len(open_images(str(tmp_path / "photos"), 16)) == 3


def test_symbolic_links_are_followed_without_loops(tmp_path):
    save(tmp_path / "elsewhere" / "deep", "b.png")
    save(tmp_path / "data" / "cats", "a.png")
    (tmp_path / "data" / "dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to("..")
    (tmp_path / "data" / "cats" / "up").symlink_to("..")
    (tmp_path / "data" / "cats" / "self.png").symlink_to("self.png")
    for name in ("x", "y"):
        (tmp_path / "data" / "cats" / name).symlink_to(".")
        (tmp_path / "elsewhere" / "deep" / name).symlink_to("..")
    images = open_images(str(tmp_path / "data"), 16)
    assert images.classes == ["cats", "dogs"] and images.labels.tolist() == [0, 0, 1]
    assert [Path(images.name(i)).name for i in range(3)] == ["a.png", "self.png", "b.png"]


def test_any_folder_name_becomes_a_unique_one_line_class_name(tmp_path):
    for name in (b"\xff\xfe", b"\xfe\xff", b"two\nlines", b"two lines", "käse".encode()):
        save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), "a.png")
    names = open_images(str(tmp_path), 16).classes
    assert set(names) == {"\ufffd\ufffd", "\ufffd\ufffd'", "two lines", "two lines'", "käse"}


def test_the_fingerprint_of_data_depends_on_names_and_labels_not_on_location(image_tree, tmp_path):
    (tmp_path / "moved").symlink_to(image_tree)
    there, moved = (open_images(str(path), 16) for path in (image_tree, tmp_path / "moved"))
    one_class = open_images(str(image_tree / "class-0"), 16)
    assert there.fingerprint == moved.fingerprint != one_class.fingerprint
    shutil.copytree(image_tree, tmp_path / "changed")
    write_shards(there, tmp_path, lambda label: str(label).encode())
    shards = str(tmp_path / "photos-{000..001}.tar")
    before = [there.fingerprint, open_images(shards, 16).fingerprint]
    (tmp_path / "changed" / "class-0" / "03.png").rename(tmp_path / "changed/class-0/other.png")
    changed = open_images(str(tmp_path / "changed"), 16)
    write_shards(changed, tmp_path, lambda label: str(3 - label).encode())
    after = [changed.fingerprint, open_images(shards, 16).fingerprint]
    for now, then in zip(after, before, strict=True):
        assert now["count"] == then["count"] and now != then


def write_shards(images, folder: Path, label_of) -> None:
    """Writes images to two WebDataset shards. label_of(label) gives the content of .cls files."""
    for shard in range(2):
        with tarfile.open(folder / f"photos-{shard:03d}.tar", "w") as tar:
            for index in range(shard, len(images), 2):
                content = Path(images.name(index)).read_bytes()
                label = label_of(int(images.labels[index]))
                files = {"png": content} if label is None else {"png": content, "cls": label}
                for kind, data in files.items():
                    member = tarfile.TarInfo(f"{index:05d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["numbers", "names", "none"])
def test_webdataset_shards_give_the_same_images_as_a_folder(image_tree, tmp_path, kind):
    tree = open_images(str(image_tree), 16)
    classes = {"numbers": list("0123"), "names": tree.classes, "none": [tmp_path.name]}[kind]
    write_shards(tree, tmp_path, lambda label: None if kind == "none" else classes[label].encode())
    shards = open_images(str(tmp_path / "photos-{000..001}.tar"), 16)
    assert shards.classes == classes and len(shards) == len(tree)
    order = [*range(0, len(tree), 2), *range(1, len(tree), 2)]
    for place, index in enumerate(order):
        got, want = shards[place, True][0], tree[index, True][0]
        assert torch.equal(got["image"], want["image"])
        assert got["label"] == (0 if kind == "none" else want["label"])


def test_what_a_shard_cannot_give_is_noted(tmp_path, capsys):
    red, white = (
        save(tmp_path, name, colour) for name, colour in (("a.png", RED), ("a.bmp", WHITE))
    )
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(red, "a.png")
        tar.add(white, "a.bmp")  # the same key
        tar.add(white, "b.edit.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    assert len(open_images(str(tmp_path / "photos.tar"), 16)) == 1
    line = capsys.readouterr().out
    kinds = "images whose key a later image has", "images with a dot before their suffix"
    assert all(f"1 {kind}" in line for kind in (*kinds, "links in shards"))


class Pairs:
    """Map-style dataset of (image, label), made from a folder of images."""

    def __init__(self, source, form):
        self.source, self.form = source, form

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple:
        return self.form(self.source.read(index)), f"class {self.source.labels[index]}"


@pytest.mark.parametrize("form", ["Pillow", "array", "uint8", "float"])
def test_a_python_dataset_gives_the_same_images_as_a_folder(image_tree, monkeypatch, form):
    tree, forms = open_images(str(image_tree), 16), {
        "Pillow": lambda image: image, "array": np.array,
        "uint8": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
        "float": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
    }  # fmt: skip
    monkeypatch.setitem(GivenImages.datasets, "python:x", Pairs(tree, forms[form]))
    images = open_images("python:x", 16)
    assert images.classes == [f"class {i}" for i in range(4)] and len(images) == 40
    for index in (0, 17, 39):
        got, want = images[index, True][0], tree[index, True][0]
        assert got["label"] == want["label"] and torch.equal(got["image"], want["image"])
    for wrong, message in (
        (-torch.ones(3, 9, 9), "unnormalised"),
        (torch.ones(2, 9, 9), r"got a tensor \(2, 9, 9\), expected \(1 or 3, H, W\)"),
    ):
        dataset = Pairs(tree, lambda image, wrong=wrong: wrong)
        monkeypatch.setitem(GivenImages.datasets, "python:x", dataset)
        with pytest.raises(UserError, match=message):
            open_images("python:x", 16)[0, False]
    dataset = Pairs(tree, forms[form])
    monkeypatch.setitem(GivenImages.datasets, "python:x", dataset)
    for targets in (torch.arange(40) % 4, np.arange(40) % 4):
        dataset.targets = targets
        images = open_images("python:x", 16)
        assert images.classes == ["0", "1", "2", "3"] and (images.labels == np.arange(40) % 4).all()
    for targets, classes, message in (
        ([[1, 2]] * 40, None, r"got the label \[1, 2\], expected numbers or names"),
        ([1, "a"] * 20, None, "labels such as 1, expected only names or only integers"),
        ([2] * 40, ["cat", "dog"], "got the label 2, expected 0 to 1, numbers of its classes"),
    ):
        dataset.targets, dataset.classes = targets, classes
        with pytest.raises(UserError, match=message):
            open_images("python:x", 16)
    with pytest.raises(
        UserError, match="python:y, expected a dataset of .image, label. that train"
    ):
        open_images("python:y", 16)


def test_train_run_accepts_a_dataset_instead_of_a_folder(image_tree, train_flags, tmp_path):
    changes = {"max-steps": 2, "log-every": 1, "global-batch-size": 8}
    call_main("train.py", *train_flags(tmp_path / "folder", **changes))
    words = train_flags(tmp_path / "dataset", **changes, **{"data-path": None})
    flags = dict(word.removeprefix("--").split("=", 1) for word in words)
    dataset = ImageFolder(str(image_tree))
    train.run(data=dataset, **{name.replace("-", "_"): value for name, value in flags.items()})
    got, want = ([row["loss"] for row in rows(tmp_path / x)] for x in ("dataset", "folder"))
    assert got == want and len(got) == 2
    with pytest.raises(UserError, match="python:data, expected a dataset"):  # it is not kept
        open_images("python:data", 16)
    with pytest.raises(UserError, match="data: cannot be combined with data_path"):
        train.run(data=dataset, data_path="x")
    for wrong, message in (
        (3, "data: got int, expected a map-style dataset"),
        (iter(dataset), "data: got .*, expected a map-style dataset"),
        ([torch.zeros(3, 9, 9)], "dataset of .image, label. .* .item 0 is a Tensor.$"),
    ):
        for dry_run in (True, False):
            with pytest.raises(UserError, match=message):
                train.run(data=wrong, vae_path=flags["vae-path"], image_size=16, dry_run=dry_run)


def test_a_hugging_face_dataset_gives_the_same_images_as_a_folder(image_tree, tmp_path):
    pytest.importorskip("datasets")
    tree = open_images(str(image_tree), 16)
    images = open_images(f"datasets:{image_tree}", 16)
    assert images.classes == tree.classes and len(images) == len(tree)
    moved = shutil.copytree(image_tree, tmp_path / "moved" / image_tree.name)
    assert open_images(f"datasets:{moved}/", 16).fingerprint == images.fingerprint
    for index in range(0, 40, 7):
        got, want = images[index, False][0], tree[index, False][0]
        assert torch.equal(got["image"], want["image"]) and got["label"] == want["label"]
    for name, column in (("plain", {"label": [10 - i % 3 for i in range(40)]}), ("none", {})):
        table = images.rows.remove_columns("label")
        for key, values in column.items():
            table = table.add_column(key, values)
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train.parquet")
    plain, none = (open_images(f"datasets:{tmp_path / name}", 16) for name in ("plain", "none"))
    assert plain.classes == ["8", "9", "10"]
    assert [plain[i, False][0]["label"] for i in range(3)] == [2, 1, 0]
    assert none.classes == ["none"] and none[5, False][0]["label"] == 0


def test_a_missing_data_source_is_a_one_line_error(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "empty.tar").write_bytes(b"no tar")
    (tmp_path / "empty").mkdir()
    paths = ["datasets:nobody/nothing", *(str(tmp_path / name) for name in (
        "a-{0..1}.tar", "empty.tar", "none", "empty",
    )), ""]  # fmt: skip
    for path in paths:
        with pytest.raises(UserError, match="--data-path: got .*expected"):
            open_images(path, 16)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="datasets.*pip install -r"):
        open_images("datasets:x", 16)
