"""The index of a latent cache, and how to read one that anyone may have written.

A cache is a folder with index.json and the shards shard-00000.safetensors, shard-00001.safetensors
and so on. Shard k holds the images from k * shard_images on, in the order of the source:

    moments    (n, 2, 2C, h, w) fp16   image; as it is, mirrored; mean | log-variance, unscaled
    labels     (n,)             int32  numbers of the classes
    checksums  (n, 2)           int64  CRC-32 of the bytes of moments[image, flip], begun at the
                                       label

The place of an image that could not be read holds the next one that could, as in training from
images. The index is JSON:

    format, version      "dit-moe-latents", 1
    image_size           pixels a side
    latent_shape         [C, h, w], a square
    scaling_factor, shift_factor   latents are (z - shift_factor) * scaling_factor
    vae_path, vae_sha256           the autoencoder: where it came from, and its fp32 weights' digest
    precision            that it computed in: fp32, bf16 or fp16
    classes              names, by label
    images, shard_images in all, and in each shard but the last
    source_sha256        of the images' names and sizes, in order
    skipped              [{"place", "name"}, ...]: images that could not be read
    shards               [{"name", "images", "bytes", "sha256"}, ...]
"""

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch

from runtime.errors import UserError

FORMAT, VERSION = "dit-moe-latents", 1
INDEX_FILE, UNFINISHED = "index.json", "unfinished"  # the latter a folder, until all is there
LARGEST = 2**40  # of any count or size: what is more is a damaged number


@dataclass(frozen=True)
class Settings:
    """What decides a cache's contents; see the top of this file."""

    image_size: int
    latent_shape: tuple[int, int, int]
    scaling_factor: float
    shift_factor: float
    vae_path: str
    vae_sha256: str
    precision: str
    classes: tuple[str, ...]
    images: int
    shard_images: int
    source_sha256: str

    @property
    def image_bytes(self) -> int:
        """Bytes of the moments of one image: 2 flips x mean and log-variance x (C, h, w) x fp16."""
        channels, height, width = self.latent_shape
        return 2 * 2 * channels * height * width * 2

    @property
    def num_shards(self) -> int:
        return -(-self.images // self.shard_images)

    def images_of(self, shard: int) -> range:
        """The places of a shard's images in the source."""
        start = shard * self.shard_images
        return range(start, min(start + self.shard_images, self.images))


@dataclass(frozen=True)
class Shard:
    """A shard file: its size in bytes and the SHA-256 of all of them."""

    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    settings: Settings
    skipped: dict[int, str]  # place: name
    shards: tuple[Shard, ...]

    def to_json(self) -> str:
        skipped = [{"place": place, "name": name} for place, name in self.skipped.items()]
        return settings_json(
            self.settings, skipped=skipped, shards=[asdict(shard) for shard in self.shards]
        )


def settings_json(settings: Settings, **more) -> str:
    values = {"format": FORMAT, "version": VERSION, **asdict(settings), **more}
    return json.dumps(values, indent=1) + "\n"


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def is_count(value: object, least: int = 1) -> bool:
    return type(value) is int and least <= value <= LARGEST


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6  # False of nan


def is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_list(value: object, is_item) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_item, value))


def is_shape(value: object) -> bool:
    return is_list(value, is_count) and len(value) == 3 and value[1] == value[2]


RULES = {
    "image_size": (is_count, "a number of pixels"),
    "latent_shape": (is_shape, "[C, h, h]"),
    "scaling_factor": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "shift_factor": (is_number, "a number"),
    "vae_path": (lambda value: isinstance(value, str), "a path or a hub id"),
    "vae_sha256": (is_digest, "64 hexadecimal digits"),
    "precision": (lambda value: value in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
    "classes": (
        lambda value: is_list(value, lambda name: isinstance(name, str)), "a list of names",
    ),
    "images": (is_count, "a number of images"),
    "shard_images": (is_count, "a number of images"),
    "source_sha256": (is_digest, "64 hexadecimal digits"),
}  # fmt: skip


def parse_settings(content: bytes) -> tuple[Settings, dict]:
    """Reads the settings of an index, and returns all its values too; UserError if any is wrong."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({reprlib.repr(str(error))})") from None
    if not isinstance(values, dict):
        raise UserError(f"got {reprlib.repr(values)}, expected an object")
    for name, wanted in (("format", FORMAT), ("version", VERSION)):
        expect(values.get(name) == wanted, name, values.get(name), wanted)
    for name, (is_right, expected) in RULES.items():
        expect(is_right(values.get(name)), name, values.get(name), expected)
    known = {field.name: values[field.name] for field in fields(Settings)}
    known["latent_shape"], known["classes"] = tuple(known["latent_shape"]), tuple(known["classes"])
    return Settings(**known), values


def parse_index(content: bytes, sizes: Mapping[str, int] | None = None) -> Index:
    """Reads an index; UserError, one line with got and expected, for anything that is not right.

    content: of index.json, from anywhere
    sizes: bytes of each file of the folder, by name; None leaves the files unchecked
    """
    settings, values = parse_settings(content)
    written, count = values.get("shards"), settings.num_shards
    expect(isinstance(written, list), "shards", written, "a list")
    expect(len(written) == count, "shards", f"{len(written)} shards", f"{count} for all images")
    shards = tuple(parse_shard(value, k, settings) for k, value in enumerate(written))
    for shard in shards if sizes is not None else ():
        got = sizes.get(shard.name, "no such file")
        expect(got == shard.bytes, shard.name, got, f"{shard.bytes} bytes")
    return Index(settings, parse_skipped(values.get("skipped"), settings), shards)


def parse_shard(value: object, place: int, settings: Settings) -> Shard:
    """Reads what is said of the shard at a place: its name and numbers follow from the settings."""
    name, images = shard_name(place), len(settings.images_of(place))
    expect(isinstance(value, dict), name, value, "an object")
    expect(value.get("name") == name, f"shard {place}: name", value.get("name"), name)
    got = value.get("images")
    expect(is_count(got) and got == images, f"{name}: images", got, images)
    least = images * settings.image_bytes
    size = value.get("bytes")
    expect(is_count(size, least), f"{name}: bytes", size, f"{least} or more")
    digest = value.get("sha256")
    expect(is_digest(digest), f"{name}: sha256", digest, "64 hexadecimal digits")
    return Shard(name, images, size, digest)


def parse_skipped(values: object, settings: Settings) -> dict[int, str]:
    """Reads the list of unreadable images: places in order, and not all images there are."""
    expect(isinstance(values, list), "skipped", values, "a list")
    skipped, last = {}, -1
    for value in values:
        expect(isinstance(value, dict), "skipped", value, "objects")
        place, name = value.get("place"), value.get("name")
        is_next = is_count(place, last + 1) and place < settings.images
        expect(is_next, "skipped: place", place, f"{last + 1} to {settings.images - 1}")
        expect(isinstance(name, str), "skipped: name", name, "a name")
        skipped[place], last = name, place
    expect(len(skipped) < settings.images, "skipped", "all images", "some that can be read")
    return skipped


def expect(is_right: bool, name: str, got: object, expected: object) -> None:
    if not is_right:
        raise UserError(f"{name}: got {reprlib.repr(got)}, expected {expected}")


def layout_of(count: int, latent_shape: tuple[int, int, int]) -> dict[str, tuple]:
    """The tensors of a shard of `count` images: (dtype, shape) by name."""
    channels, height, width = latent_shape
    return {
        "moments": (torch.float16, (count, 2, 2 * channels, height, width)),
        "labels": (torch.int32, (count,)),
        "checksums": (torch.int64, (count, 2)),
    }
