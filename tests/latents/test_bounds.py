"""Files of strangers: what a header may cost. Ordinary photos are read as Pillow reads them."""

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import in_process, resident
from PIL import Image, ImageOps

from latents.images import FORMATS, read_rgb

BYTES, RATIONAL, SHORT, LONG = 7, 5, 3, 4  # types of tags
SMALL = Image.new("RGB", (16, 16), (255, 0, 0))


def stored(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def directory(tags: list[tuple[int, int, int, int]], is_big: bool = False) -> bytes:
    """A directory of tags (number, type, count, value or offset)."""
    head, entry = ("<Q", "<HHQQ") if is_big else ("<H", "<HHLL")
    entries = b"".join(struct.pack(entry, *tag) for tag in sorted(tags))
    return struct.pack(head, len(tags)) + entries + bytes(8)


def tiff(more: int, blob: bytes, kind: int = BYTES, is_big: bool = False, **changed) -> bytes:
    """A grey TIFF of 16 x 16 pixels with `more` tags, which all point to one blob.

    changed: other (type, count, value) of the tags of that number, such as t322=(4, 1, 26000)
    """
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if is_big else b"II*\0\x08\0\0\0"
    tags = {
        256: (LONG, 1, 16), 257: (LONG, 1, 16), 258: (SHORT, 1, 8), 259: (SHORT, 1, 1),
        262: (SHORT, 1, 1), 273: (LONG, 1, 8), 277: (SHORT, 1, 1), 278: (LONG, 1, 16),
        279: (LONG, 1, 256),
    }  # fmt: skip
    tags |= {int(name[1:]): value for name, value in changed.items()}
    place = len(head) + len(directory([(0, 0, 0, 0)] * (len(tags) + more), is_big))
    tags |= {1000 + number: (kind, len(blob), place) for number in range(more)}
    listed = [(number, *value) for number, value in tags.items() if value]
    return head + directory(listed, is_big) + blob + bytes(256)


def tiled(size: tuple[int, int], tile: tuple[int, int]) -> bytes:
    """A grey TIFF with tiles, which all hold the same deflated zeros."""
    count = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    content = zlib.compress(bytes(tile[0] * tile[1]))
    place = 8 + len(directory([(0, 0, 0, 0)] * 10))  # of offsets, sizes and content
    offsets, sizes = ([value] * count for value in (place + 8 * count, len(content)))
    tags = [
        (256, LONG, 1, size[0]), (257, LONG, 1, size[1]), (258, SHORT, 1, 8), (259, SHORT, 1, 8),
        (262, SHORT, 1, 1), (277, SHORT, 1, 1), (322, LONG, 1, tile[0]), (323, LONG, 1, tile[1]),
        (324, LONG, count, place if count > 1 else offsets[0]),
        (325, LONG, count, place + 4 * count if count > 1 else sizes[0]),
    ]  # fmt: skip
    listed = struct.pack(f"<{2 * count}L", *offsets, *sizes)
    return b"II*\0\x08\0\0\0" + directory(tags) + listed + content


def run_lengths(width: int, height: int) -> bytes:
    """A grey BMP with a run of one pixel in each line."""
    palette = b"".join(bytes((value, value, value, 0)) for value in range(256))
    content, place = b"\1\0\0\0" * height, 54 + len(palette)
    head = struct.pack("<LHHL", place + len(content), 0, 0, place)
    head += struct.pack("<LllHHLLllLL", 40, width, height, 1, 8, 1, len(content), 0, 0, 256, 0)
    return b"BM" + head + palette + content


def exif(more: int, blob: bytes) -> bytes:
    """EXIF data with an orientation and `more` tags, which all point to one blob."""
    place = 8 + len(directory([(0, 0, 0, 0)] * (more + 1)))
    tags = [(1000 + number, BYTES, len(blob), place) for number in range(more)]
    return b"II*\0\x08\0\0\0" + directory([(274, SHORT, 1, 6), *tags]) + blob


def png(metadata: bytes) -> bytes:
    content = stored(SMALL, "PNG")
    chunk = b"eXIf" + metadata
    chunk = struct.pack(">L", len(metadata)) + chunk + struct.pack(">L", zlib.crc32(chunk))
    return content[:33] + chunk + content[33:]


def jpeg(metadata: bytes) -> bytes:
    parts = [metadata[start : start + 65_000] for start in range(0, len(metadata), 65_000)]
    parts = [b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts]
    return b"\xff\xd8" + b"".join(parts) + stored(SMALL, "JPEG")[20:]  # without a resolution


def many_scans(scans: int) -> bytes:
    content = stored(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xc4") : -2]  # a table and a scan
    return content[:-2] + scans * last + content[-2:]


def forged_images(folder: Path) -> None:
    blob, gif = bytes(2_000_000), stored(SMALL, "GIF")
    frame = gif.index(b",\0\0\0\0")
    progressive = bytearray(stored(SMALL, "JPEG", progressive=True))
    size = progressive.index(b"\xff\xc2") + 5
    progressive[size : size + 4] = struct.pack(">HH", 13_000, 13_000)
    for name, content in {
        "tags.tif": tiff(300, blob),
        "tags-big.tif": tiff(300, blob, is_big=True),
        "rational.tif": tiff(0, blob, t282=(RATIONAL, 240_000, 122)),
        "offsets.tif": tiff(0, blob, t273=(BYTES, 1_900_000, 122), t278=(LONG, 1, 1)),
        "tile.tif": tiff(
            0, zlib.compress(b"x"), t259=(SHORT, 1, 8), t273=None, t278=None, t279=None,
            t322=(LONG, 1, 26_000), t323=(LONG, 1, 26_000), t324=(LONG, 1, 150),
            t325=(LONG, 1, 100),
        ),
        "tiles.tif": tiled((65_535, 1), (16, 65_536)),
        "runs.bmp": run_lengths(65_535, 1373),
        "tags.png": png(exif(300, blob)),
        "tags.jpg": jpeg(exif(300, blob)),
        "tags.webp": stored(SMALL, "WEBP", exif=exif(300, blob)),
        "scans.jpg": many_scans(3000),
        "segments.jpg": b"\xff\xd8" + b"\xff\xe3\0\x02" * 500_000 + stored(SMALL, "JPEG")[2:],
        "progressive.jpg": progressive,
        "comment.gif": gif[:frame] + b"!\xfe" + (b"\xff" + bytes(255)) * 9000 + b"\0" + gif[frame:],
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    with open(folder / "sparse.webp", "wb") as file:
        file.write(stored(SMALL, "WEBP"))
        file.truncate(1_000_000_000)


PEAK = Path("/proc/self/clear_refs")


def costly_images(folder: Path) -> list[str]:
    """Images that take more than 50 MB or more than a second to read."""
    costly = []
    for path in sorted(folder.iterdir()):
        PEAK.write_text("5")  # resets the peak
        before, start = resident(), time.process_time()
        try:
            result = read_rgb(path).size
        except ValueError as error:
            result = error
        seconds, megabytes = time.process_time() - start, (resident("VmHWM") - before) / 1e6
        if megabytes > 50 or seconds > 1:
            costly.append(f"{path.name}: {megabytes:.0f} MB, {seconds:.1f} s ({result})")
    return costly


@pytest.mark.skipif(not PEAK.exists(), reason="needs /proc, which has the peak of the memory")
def test_a_forged_header_costs_neither_memory_nor_time(tmp_path):
    forged_images(tmp_path)
    assert in_process(costly_images, tmp_path) == []


@pytest.mark.parametrize(("content", "reason"), [
    (lambda: tiff(300, bytes(9000)), "got tags of 2,700,"),
    (lambda: tiff(300, bytes(9000), is_big=True), "got tags of 2,700,"),
    (lambda: tiff(0, bytes(2_000_000), t282=(RATIONAL, 240_000, 122)), "got tags of 240,0"),
    (lambda: tiled((65_535, 1), (16, 65_536)), "got 4,096 tiles of 16 x 65,536 pixels"),
    (lambda: run_lengths(16, 16), "got a BMP with run-length compression"),
    (lambda: many_scans(60), "got more than 50 scans"),
    (lambda: many_scans(600), "got more than 50 scans"),
])  # fmt: skip
def test_a_forged_image_is_refused_with_its_reason(content, reason):
    with pytest.raises(ValueError, match=reason):
        read_rgb(io.BytesIO(content()))


def photo_files(folder: Path) -> None:
    """Writes what cameras, phones and editors write."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((160, 120))
    exif = Image.Exif()
    exif[271], exif[282] = "Maker", 72.0
    exif.get_ifd(0x8769).update({37500: bytes(40_000), 36867: "2024:01:01 00:00:00"})
    for orientation in range(1, 9):
        exif[274] = orientation
        has_avif = "AVIF" in FORMATS and orientation in (1, 6)  # slow to write
        for suffix in ("jpg", "png", "tif", "webp", *(["avif"] if has_avif else [])):
            photo.save(folder / f"turned-{orientation}.{suffix}", exif=exif)
    photo.save(folder / "progressive.jpg", progressive=True, exif=exif)
    photo.convert("CMYK").save(folder / "cmyk.jpg", progressive=True)
    photo.convert("L").save(folder / "grey.jpg", progressive=True)
    photo.save(folder / "several.jpg", "MPO", save_all=True, append_images=[photo], exif=exif)
    for name in ("turned-6", "progressive"):  # with a film after the image
        film = rng.integers(0, 256, 3_000_000, np.uint8).tobytes() + b"\xff\xda\0\x02" * 1000
        (folder / f"{name}-film.jpg").write_bytes((folder / f"{name}.jpg").read_bytes() + film)
    photo.quantize(100).save(folder / "palette.png")
    photo.quantize(100).save(folder / "palette.bmp")
    photo.save(folder / "rgb.bmp")
    photo.quantize(100).save(folder / "comment.gif", comment=b"x" * 9000)
    photo.save(folder / "big.tif", big_tiff=True)
    photo.convert("CMYK").save(folder / "cmyk.tif", compression="tiff_lzw")
    for size, tile in (
        ((1100, 1100), (1024, 1024)),
        ((16, 16), (512, 512)),
        ((2000, 30), (256,) * 2),
    ):
        (folder / f"tiled-{size[0]}.tif").write_bytes(tiled(size, tile))
    (folder / "strip.tif").write_bytes(tiff(0, b"", t278=(LONG, 1, 2**32 - 1)))
    rows = rng.integers(0, 2**16, (20, 30, 3)).astype(">u2")
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">LLBBBBB", 30, 20, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        (b"IEND", b""),
    ):
        png += (
            struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
        )
    (folder / "rgb-16.png").write_bytes(png)


def test_ordinary_photos_are_read_as_pillow_reads_them(tmp_path):
    photo_files(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(np.asarray(read_rgb(path)), want), path.name
