"""Images of strangers: read as they look, or named, counted and skipped, the same on every rank."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main, run_script
from PIL import Image
from safetensors.torch import load_file

from latents.images import MAX_PIXELS, center_crop_arr, read_rgb
from latents.loading import BatchStream, ImageTree, make_loader
from latents.sources import open_images
from runtime.errors import UserError, printable

RED, GREEN = (255, 0, 0), (0, 255, 0)


def png(width: int, height: int, bits: int = 8, colour: int = 2, rows=b"") -> bytes:
    """A PNG that declares any size; `rows` are its filtered pixels, none by default."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = zlib.compress(rows)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bad_images(folder: Path) -> dict[str, str]:
    """Writes what cannot be read; {name: a word of the reason}."""
    folder.mkdir(parents=True, exist_ok=True)
    good = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(good, "PNG")
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(jpeg, "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n"
    contents = {
        "truncated.png": (good.getvalue()[:-100], "truncated"),
        "truncated.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "truncated"),
        "flipped.png": (good.getvalue()[:60] + b"\xff" + good.getvalue()[61:], ""),
        "header-alone.png": (good.getvalue()[:33], ""),
        "empty.png": (b"", "cannot identify"),
        "text.jpg": (b"not an image", "cannot identify"),
        "program.png": (b"\x7fELF" + bytes(100), "cannot identify"),
        "postscript.png": (eps, "cannot identify"),
        "bomb.png": (png(50_000, 50_000), "exceeds limit"),
        "bomb-100-mp.png": (png(10_000, 10_000), "expected at most"),
        "narrow.png": (png(1, 400_000, rows=bytes(4 * 400_000)), "narrower"),
        "no-size.png": (png(0, 0), ""),
        "float.tiff": (None, "of a range that nothing tells"),
    }
    for name, (content, _) in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
    Image.fromarray(np.ones((20, 20), np.float32)).save(folder / "float.tiff")
    (folder / "broken-link.png").symlink_to(folder / "nowhere.png")
    (folder / "link-to-itself.png").symlink_to(folder / "link-to-itself.png")
    os.mkfifo(folder / "pipe.png")
    others = {
        "broken-link.png": "No such file",
        "link-to-itself.png": "symbolic links",
        "pipe.png": "not a regular file",
    }
    return {**{name: reason for name, (_, reason) in contents.items()}, **others}


def good_images(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Writes images of every mode, each of one colour as it looks; {name: that colour}."""
    folder.mkdir(parents=True, exist_ok=True)
    size, grey = (20, 20), (128, 128, 128)
    red = Image.new("RGB", size, RED)
    clear = Image.new("RGBA", size, (0, 0, 0, 0))
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    frames = [red, Image.new("RGB", size, GREEN)]
    sixteen = Image.fromarray(np.full((20, 20), 128 * 257, np.uint16))
    animated = dict(save_all=True, append_images=frames[1:])
    for name, image, options in (
        ("rgb.png", red, {}),
        ("grey.png", Image.new("L", size, 128), {}),
        ("grey-16.png", sixteen, {}),
        ("grey-16.tiff", sixteen, {}),
        ("one-bit.png", Image.new("1", size, 1), {}),
        ("palette.png", palette, {}),
        ("palette-clear.png", Image.new("P", size, 0), {"transparency": 0}),
        ("rgba.png", Image.new("RGBA", size, (*RED, 255)), {}),
        ("rgba-clear.png", clear, {}),
        ("rgba-half.png", Image.new("RGBA", size, (*RED, 128)), {}),
        ("grey-alpha.png", Image.new("LA", size, (0, 0)), {}),
        ("cmyk.jpg", Image.new("CMYK", size, (0, 255, 255, 0)), {"quality": 100}),
        ("cmyk.tiff", Image.new("CMYK", size, (0, 255, 255, 0)), {}),
        ("animated.webp", red, {**animated, "lossless": True}),
        ("animated.png", red, animated),
        ("pages.tiff", red, animated),
    ):
        image.save(folder / name, **options)
    red.save(folder / "gif.png", format="GIF", **animated)  # the name is not believed
    rows = b"".join(b"\0" + b"\xff\xff\0\0\0\0" * 20 for _ in range(20))
    (folder / "rgb-16.png").write_bytes(png(20, 20, bits=16, rows=rows))
    white = (255, 255, 255)
    colours = dict.fromkeys(("grey.png", "grey-16.png", "grey-16.tiff"), grey)
    colours |= dict.fromkeys(
        ("one-bit.png", "palette-clear.png", "rgba-clear.png", "grey-alpha.png"), white
    )
    colours["rgba-half.png"] = (255, 127, 127)
    return {path.name: colours.get(path.name, RED) for path in folder.iterdir()}


def test_every_mode_is_read_as_it_looks(tmp_path):
    colours = good_images(tmp_path)
    assert len(colours) == 18
    for name, colour in colours.items():
        pixels = np.asarray(read_rgb(tmp_path / name)).astype(int)
        assert pixels.shape == (20, 20, 3), name
        assert np.abs(pixels - colour).max() <= 3, f"{name}: {pixels[0, 0]}, expected {colour}"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(orientation, tmp_path):
    upright = Image.new("RGB", (16, 24), (255, 255, 255))
    upright.paste(RED, (0, 0, 8, 12))  # the upper left quarter
    turned = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    stored = upright
    for transpose in turned:
        stored = stored.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", quality=100, subsampling=0, exif=exif)
    got = np.asarray(read_rgb(tmp_path / "x.jpg")).astype(int)
    assert got.shape == (24, 16, 3)
    assert np.abs(got - np.asarray(upright)).mean() < 3


def test_damaged_exif_of_good_pixels_is_no_fault(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (20, 20), RED).save(path, exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01\x12")
    assert np.abs(np.asarray(read_rgb(path)).astype(int) - RED).max() <= 3


def test_bad_images_are_named_and_the_next_one_is_taken(tmp_path):
    reasons = bad_images(tmp_path / "a")
    Image.new("RGB", (20, 20), RED).save(tmp_path / "a" / "zz-good.png")
    dataset = ImageTree(str(tmp_path), 16)
    assert len(dataset) == len(reasons) + 1
    for index in range(len(dataset) - 1):
        image, _, unreadable = dataset[index, False]
        assert (image[0] == 255).all() and (image[1:] == 0).all()
        name = Path(dataset.name(index)).name
        assert unreadable[0] == dataset.name(index)
        assert len(unreadable) == len(reasons) - index
        with pytest.raises((ValueError, OSError)) as caught:
            center_crop_arr(dataset.read(index)[0], 16)
        assert reasons[name] in str(caught.value), f"{name}: {caught.value}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_without_permission_is_skipped(tmp_path):
    Image.new("RGB", (20, 20), RED).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        ImageTree(str(tmp_path), 16)[0, False]


def test_a_folder_named_like_an_image_is_neither_image_nor_class(tmp_path):
    Image.new("RGB", (20, 20), RED).save(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    dataset = ImageTree(str(tmp_path), 16)
    assert dataset.classes == [tmp_path.name]
    assert dataset[1, False][2] == [str(tmp_path / "b.png")]


def test_a_class_whose_name_is_no_text_is_one_line(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"class-\xff")
    os.mkdir(folder)
    Image.new("RGB", (20, 20), RED).save(os.path.join(os.fsdecode(folder), "a.png"))
    with pytest.raises(UserError, match="expected UTF-8") as caught:
        ImageTree(str(tmp_path), 16)
    str(caught.value).encode()


def test_an_image_whose_name_is_no_text_can_be_named(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff\n\x1b.png")
    with open(path, "wb") as file:
        file.write(b"nothing")
    Image.new("RGB", (20, 20), RED).save(tmp_path / "b.png")
    dataset = ImageTree(str(tmp_path), 16)
    bad = next(i for i in range(2) if not dataset.name(i).endswith("b.png"))
    (named,) = dataset[bad, False][2]
    assert printable(named).isprintable() and printable(named).encode()


MEASURE = """
import resource, sys
import numpy as np
from latents.images import center_crop_arr, read_rgb
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    center_crop_arr(read_rgb(sys.argv[1]), 256)
    outcome = "read"
except ValueError as error:
    outcome = "refused"
print(outcome, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
"""


@pytest.mark.parametrize(
    ("size", "outcome", "megabytes"),
    [((9000, 9900), "read", 1300), ((30_000, 30_000), "refused", 50), ((1, 89_000), "refused", 50)],
)
def test_memory_of_an_image_is_bounded(size, outcome, megabytes, tmp_path):
    width, height = size
    rows = bytes((4 * width + 1) * height) if outcome == "read" else b""
    (tmp_path / "x.png").write_bytes(png(width, height, colour=6, rows=rows))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "x.png"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    got, used = result.stdout.split()
    assert got == outcome and int(used) < megabytes
    assert width * height <= MAX_PIXELS or outcome == "refused"


def mixed_tree(root: Path) -> dict[str, str]:
    """Two classes, of good images of every mode and of all bad ones; returns the bad."""
    rng = np.random.default_rng(0)
    for label in range(2):
        good_images(root / f"class-{label}")
        for number in range(4):
            pixels = rng.integers(0, 255, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class-{label}" / f"noise-{number}.png")
    return bad_images(root / "class-0")


def test_what_replaces_a_bad_image_does_not_depend_on_workers_or_ranks(tmp_path):
    mixed_tree(tmp_path)
    dataset = ImageTree(str(tmp_path), 16)

    def images_of(world_size: int, workers: int) -> torch.Tensor:
        """Two steps' images in the order of the global batch."""
        parts = []
        for rank in range(world_size):
            stream = BatchStream(
                len(dataset), micro_batch=32 // world_size, rank=rank, world_size=world_size,
                seed=1, end_step=2,
            )  # fmt: skip
            parts.append([batch[0] for batch in make_loader(dataset, stream, workers, False)])
        return torch.cat([images for step in zip(*parts, strict=True) for images in step])

    want = images_of(1, 0)
    for world_size, workers in ((2, 0), (4, 1), (1, 2)):
        assert torch.equal(images_of(world_size, workers), want)


def train_flags(data: Path, vae: Path, results: Path, **changes) -> list[str]:
    values = {
        "data-path": data, "vae-path": vae, "image-size": 16, "model": "DiT-Ti/2",
        "num_experts": 4, "global-batch-size": 16, "precision": "fp32", "results-dir": results,
        "log-every": 1, "num-sample": 0, "max-steps": 6, "lr": 1e-3, **changes,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def test_two_processes_train_on_a_folder_with_all_of_them(tiny_vae, tmp_path):
    """They go on together and name each bad image that they met."""
    bad = mixed_tree(tmp_path / "data")
    changes = {"num-workers": 2, "run-name": "run"}
    flags = train_flags(tmp_path / "data", tiny_vae, tmp_path / "results", **changes)
    result = run_script("train.py", *flags, processes=2)
    run = tmp_path / "results" / "run"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for name in bad:  # 96 of an epoch's 63 images: every one was met
        assert f"cannot be read: {tmp_path / 'data' / 'class-0' / name}\n" in result.stdout
    for name in good_images(tmp_path / "other"):
        assert f"/{name}\n" not in result.stdout
    assert rows[-1]["skipped_images"] >= len(bad)
    assert all(np.isfinite(row["loss"]) for row in rows) and len(rows) == 6


def test_workers_change_no_weight_though_images_are_bad(tiny_vae, tmp_path):
    mixed_tree(tmp_path / "data")
    weights = []
    for workers in (0, 2):
        changes = {"num-workers": workers, "run-name": "run"}
        flags = train_flags(tmp_path / "data", tiny_vae, tmp_path / str(workers), **changes)
        call_main("train.py", *flags)
        checkpoint = tmp_path / str(workers) / "run" / "checkpoints" / "0000006"
        weights.append(load_file(checkpoint / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_folder_of_nothing_but_bad_images_is_one_line(tiny_vae, tmp_path):
    bad_images(tmp_path / "data" / "class-0")
    flags = train_flags(tmp_path / "data", tiny_vae, tmp_path / "r", **{"num-workers": 2})
    result = run_script("train.py", *flags, check=False)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "images that cannot be read, expected some that can; one is " in line
    assert len(line) < 500


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_shards_of_strangers_are_read_or_refused(tmp_path):
    pytest.importorskip("webdataset")
    good = io.BytesIO()
    Image.new("RGB", (20, 20), RED).save(good, "PNG")
    image = {"a.png": good.getvalue(), "b.png": b"nothing"}
    dataset = open_images(
        str(
            write_tar(tmp_path / "ok.tar", {**image, "c.eps": b"%!PS", "d.pyd": b"cos\nsystem\n."})
        ),
        16,
    )
    assert len(dataset) == 2 and dataset[1, False][2]
    for number, labels in enumerate((
        {"a.cls": b"99999999999", "b.cls": b"0"},
        {"a.json": b"[" * 100_000},
        {"a.json": b'{"label": "' + b"x" * 2**23 + b'"}'},
    )):  # fmt: skip
        with pytest.raises(UserError):
            open_images(str(write_tar(tmp_path / f"{number}.tar", {**image, **labels})), 16)
    with pytest.raises(UserError, match="damaged shard"):
        open_images(str(write_tar(tmp_path / "packed.tar", image, "w:gz")), 16)


def test_a_crop_of_any_shape_that_is_taken_has_the_asked_size():
    for size in ((1, 5), (2000, 3), (3, 2000), (300, 7)):
        assert center_crop_arr(Image.new("RGB", size), 16).size == (16, 16)
