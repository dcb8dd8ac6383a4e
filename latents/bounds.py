"""Bounds on what the headers of an image file may ask of Pillow, checked before pixels are decoded.

    check_content(file)                   # an open file, before Image.open
    check_image(image)                    # an open image, before image.load

A file of 1 KB can ask for gigabytes or for hours. These bounds depend on the file alone, so every
machine skips the same images. A process with limits of memory and time would not.
"""

import os
import re
import struct
from contextlib import suppress
from typing import BinaryIO

from PIL import BmpImagePlugin, Image, TiffImagePlugin

# Larger images would take gigabytes in each worker.
MAX_PIXELS, MAX_SIDE = 90_000_000, 65_535
Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS  # Pillow refuses twice this: JPEGs are read at half size
MAX_BYTES = 6 * MAX_PIXELS  # of a file: uncompressed pixels of 16 bits
MAX_SEGMENTS, MAX_SCANS = 500, 50  # of a JPEG; photos have up to 18 scans
MAX_EXTENSIONS = 2**20  # bytes, before the first frame of a GIF
MAX_NUMBERS = 200_000  # in the tags of a TIFF or EXIF directory
MAX_TILE = 2**20  # pixels, if the image is smaller
SHARED_BYTES = 2**16  # that several tags of a directory may point to

# Markers of a JPEG: FF and a byte, but neither FF 00, an escaped FF, nor a restart.
MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN = 0xD8, 0xD9, 0xDA
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)

# Bytes of a number by the type of a tag; the types that Pillow keeps as bytes.
NUMBER_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8,
}  # fmt: skip
KEPT_AS_BYTES = (1, 2, 7)
RUN_LENGTHS = (1, 2)  # compressions of a BMP that Pillow decodes in Python, a byte at a time
TILE_WIDTH, TILE_HEIGHT, *OFFSETS = 322, 323, 273, 324  # tags; the offsets are of strips and tiles
read_directory = TiffImagePlugin.ImageFileDirectory_v2.load


def check_content(file: BinaryIO) -> None:
    """Raises ValueError for a file that is too large, and a JPEG or GIF with too many parts."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > MAX_BYTES:
        raise ValueError(f"got {size:,} bytes, the limit is {MAX_BYTES:,}")
    start = file.read(3)
    file.seek(0)
    if start.startswith(b"\xff\xd8"):
        check_jpeg(file.read())
    elif start == b"GIF":
        with suppress(IndexError):  # truncated
            check_gif(file.read())
    file.seek(0)


def check_jpeg(content: bytes) -> None:
    """Checks the segments of a JPEG, and its size if libjpeg holds all of its coefficients, as it
    does for progressive images, even those read at half their size."""
    scans = place = 0
    size, layers, is_progressive = (0, 0), 0, False
    for _ in range(MAX_SEGMENTS):
        if (marker := MARKER.search(content, place)) is None or len(content) < marker.end() + 9:
            return
        (kind,), place = marker[1], marker.end()
        if kind == END_OF_IMAGE:
            return
        if kind in FRAMES:
            *size, layers = struct.unpack_from(">HHB", content, place + 3)
            is_progressive = kind in PROGRESSIVE
        elif kind == START_OF_SCAN:
            scans += 1
            if not is_progressive and content[place + 2] == layers:
                return  # libjpeg reads one scan only
            check_pixels(size[1], size[0])
            if scans > MAX_SCANS:
                raise ValueError(f"got more than {MAX_SCANS} scans, which take too long")
        if kind not in (1, START_OF_IMAGE):
            place += int.from_bytes(content[place : place + 2], "big")
    raise ValueError(f"got more than {MAX_SEGMENTS} segments, which take too long")


def check_gif(content: bytes) -> None:
    """Checks the size of the extensions before the first frame.

    Pillow joins the blocks of a comment in quadratic time.
    """
    palette = 3 << 1 + content[10] % 8 if content[10] & 0x80 else 0
    place = start = 13 + palette
    while content[place] == ord("!"):
        place += 2
        while num_bytes := content[place]:
            place += 1 + num_bytes
        place += 1
    if place - start > MAX_EXTENSIONS:
        raise ValueError(
            f"got extensions of {place - start:,} bytes, the limit is {MAX_EXTENSIONS:,}"
        )


def check_image(image: Image.Image) -> None:
    """Checks the size of an image and of its tiles, and the compression of a BMP.

    A large JPEG will be read at half its size.
    """
    if image.width * image.height > MAX_PIXELS:
        image.draft(None, (image.width // 2, image.height // 2))  # only JPEG follows this
    check_pixels(*image.size)
    if isinstance(image, BmpImagePlugin.BmpImageFile) and image.info["compression"] in RUN_LENGTHS:
        raise ValueError("got a BMP with run-length compression, expected one without")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag, 0) for tag in (TILE_WIDTH, TILE_HEIGHT))
        size = image.width * image.height
        if width * height > max(size, MAX_TILE):
            raise ValueError(f"got tiles of {width:,} x {height:,} pixels, more than the image has")
        if not width or not height:
            return  # strips, which libtiff ends with the image
        # Tiles that are no larger than the image have less than 4 times its pixels.
        count = -(-image.width // width) * -(-image.height // height)
        if count * width * height > 4 * size + MAX_TILE:
            raise ValueError(
                f"got {count:,} tiles of {width:,} x {height:,} pixels, which take too long"
            )


def check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        got, most = f"{width:,} x {height:,} pixels", f"{MAX_PIXELS // 10**6} million"
        raise ValueError(f"got {got}, the limit is {most}, and {MAX_SIDE:,} a side")


def read_bounded(directory: TiffImagePlugin.ImageFileDirectory_v2, file: BinaryIO) -> None:
    """Reads the tags of a TIFF file or of EXIF data in any format, if their values fit the file.

    Pillow copies the values of all tags, although many may point to the same bytes, and converts
    numbers to Python's. It offers no limit, so this function replaces its method.
    """
    order = "<" if directory.prefix == b"II" else ">"
    check_directory(file, order, is_big=directory._bigtiff)
    read_directory(directory, file)


TiffImagePlugin.ImageFileDirectory_v2.load = read_bounded


def check_directory(file: BinaryIO, order: str, is_big: bool) -> None:
    """Checks the tags of the directory at the position of a file.

    order: "<" or ">"
    is_big: whether the file is a BigTIFF
    """
    head, entry = (struct.Struct(order + form) for form in (("H", "HHLL"), ("Q", "HHQQ"))[is_big])
    inline = 8 if is_big else 4  # bytes of a value that an entry holds itself
    start, size = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(start)
    (count,) = head.unpack(file.read(head.size).ljust(head.size, b"\0"))
    entries = file.read(entry.size * min(count, MAX_NUMBERS))
    file.seek(start)
    copied, numbers = 0, count
    for place in range(0, len(entries) - entry.size + 1, entry.size):
        tag, kind, length, offset = entry.unpack_from(entries, place)
        num_bytes = NUMBER_BYTES.get(kind, 0) * length
        if num_bytes > inline and offset + num_bytes > size:
            break  # Pillow reads no further
        copied += num_bytes
        if num_bytes and (kind not in KEPT_AS_BYTES or tag in OFFSETS):
            numbers += length
    if copied > size + SHARED_BYTES:
        raise ValueError(
            f"got tags of {copied:,} bytes, more than the {size:,} bytes that hold them"
        )
    if numbers > MAX_NUMBERS:
        raise ValueError(f"got tags of {numbers:,} numbers, the limit is {MAX_NUMBERS:,}")
