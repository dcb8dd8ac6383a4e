"""Where training images come from: a folder, a Hugging Face dataset, WebDataset shards.

    images = open_images("path/to/folder", image_size=256)
    images = open_images("datasets:ylecun/mnist:train", image_size=32)
    images = open_images("shards/photos-{000..031}.tar", image_size=256)

The last two read through the packages `datasets` and `webdataset` (requirements-extras.txt). Every
source is indexed by number, so that any step of a run can be resumed at.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from latents.images import FORMATS, read_rgb
from latents.loading import ImageSource, ImageTree
from runtime.errors import UserError
from runtime.untrusted import MAX_JSON, parse_json

PREFIX = "datasets:"
MAX_LABEL = 1000  # bytes of a .cls file that are read
MAX_DIGITS = 6  # of a label that is a number
EXTRAS = "pip install -r requirements-extras.txt"


def open_images(path: str, image_size: int) -> ImageSource:
    """Opens what --data-path names; UserError when it is not there or holds no images."""
    if path.startswith(PREFIX):
        return HubImages(path, image_size)
    if path.endswith(".tar"):
        return ShardImages(path, image_size)
    return ImageTree(path, image_size)


class HubImages(ImageSource):
    """A dataset of the package `datasets`: "datasets:ID_OR_FOLDER[:SPLIT]", split train if none.

    Its image column is the first of that type. Its label column is the first ClassLabel, else a
    column named label or labels; without any, the images are one class.
    """

    def __init__(self, path: str, image_size: int):
        try:
            import datasets
        except ImportError:
            raise UserError(f"--data-path {path}: needs the package datasets: {EXTRAS}") from None
        name, _, split = path.removeprefix(PREFIX).partition(":")
        try:
            if (Path(name) / "state.json").is_file():
                self.rows = datasets.load_from_disk(name)
            elif (Path(name) / "dataset_dict.json").is_file():
                self.rows = datasets.load_from_disk(name)[split or "train"]
            else:
                self.rows = datasets.load_dataset(name, split=split or "train")
        except Exception as error:  # the package raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--data-path: got {path}, expected a folder, or a dataset that can be reached, "
                f"and one of its splits ({reason})"
            ) from None
        self.path, self.image_size = path, image_size
        columns = self.rows.features
        images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise UserError(f"--data-path {path}: got columns {list(columns)}, expected an image")
        self.image_column = images[0]
        named = [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [name for name in ("label", "labels") if name in columns]
        self.label_column = (named + plain + [None])[0]
        if named:
            self.classes = list(columns[named[0]].names)
            self.label_of = {label: label for label in range(len(self.classes))}
        elif plain:
            values = self.values_of(plain[0])
            self.classes = [str(value) for value in values]
            self.label_of = {value: label for label, value in enumerate(values)}
        else:
            self.classes = [Path(name).name]

    def values_of(self, column: str) -> list:
        try:
            return sorted(set(self.rows[column]))
        except TypeError:
            raise UserError(
                f"--data-path {self.path}: column {column}: got lists or mixed values, expected a "
                "number or a name in each row"
            ) from None

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            row = self.rows[index]
        except Exception as error:  # the package decodes the image
            raise ValueError(" ".join(str(error).split())[:200]) from None
        image = read_rgb(row[self.image_column])
        if self.label_column is None:
            return image, 0
        value = row[self.label_column]
        if value not in self.label_of:
            raise UserError(f"{self.name(index)}: got label {value}, expected one of the classes")
        return image, self.label_of[value]


class ShardImages(ImageSource):
    """WebDataset shards on this machine's disks, as "NAME-{000..031}.tar".

    A sample is an image beside KEY.cls, a number or a name, or KEY.json with a "label"; without
    any, the images are one class. Names for numbers stand in classes.txt beside the shards, one a
    line. The shards are indexed once and then read at any place, which streaming them would not
    allow: a resumed run goes on at its step, and an epoch is shuffled as a whole.
    """

    def __init__(self, path: str, image_size: int):
        try:
            from webdataset.shardlists import expand_urls
        except ImportError:
            raise UserError(f"--data-path {path}: needs the package webdataset: {EXTRAS}") from None
        self.shards, self.image_size = expand_urls(path), image_size
        missing = [shard for shard in self.shards if not Path(shard).is_file()]
        if missing:
            raise UserError(f"--data-path: got {path}, expected local shards; no file {missing[0]}")
        samples = [sample for shard in range(len(self.shards)) for sample in self.index(shard)]
        if not samples:
            raise UserError(f"--data-path: got {path}, expected images in it; found none")
        places, labels = zip(*samples, strict=True)
        self.places = np.array(places)  # (images, 3): shard, offset, size
        self.classes, self.labels = name_labels(labels, Path(self.shards[0]).parent)

    def index(self, shard: int) -> list[tuple[tuple[int, int, int], str | None]]:
        """Lists ((shard, offset, size), label as written) of the images of a shard."""
        from webdataset.tariterators import base_plus_ext

        places: dict[str, tuple[int, int, int]] = {}
        labels: dict[str, str] = {}
        try:
            with tarfile.open(self.shards[shard], "r:") as tar:
                for member in tar:
                    key, extension = base_plus_ext(member.name)
                    if key is None or not member.isfile():
                        continue
                    extension = extension.lower()
                    if Image.registered_extensions().get(f".{extension}") in FORMATS:
                        places[key] = (shard, member.offset_data, member.size)
                    elif extension == "cls":
                        labels[key] = tar.extractfile(member).read(MAX_LABEL).decode().strip()
                    elif extension == "json":
                        content = parse_json(tar.extractfile(member).read(MAX_JSON + 1))
                        if isinstance(content, dict) and "label" in content:
                            labels[key] = str(content["label"])
        except (tarfile.TarError, ValueError, OSError) as error:
            raise UserError(f"{self.shards[shard]}: damaged shard ({error})") from None
        return [(place, labels.get(key)) for key, place in places.items()]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        shard, offset, _ = self.places[index]
        return f"{self.shards[shard]}, offset {offset}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        shard, offset, size = self.places[index]
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return read_rgb(io.BytesIO(file.read(size))), int(self.labels[index])


def name_labels(written: tuple[str | None, ...], folder: Path) -> tuple[list[str], np.ndarray]:
    """Turns labels as written into class names and numbers (images,)."""
    if all(label is None for label in written):
        return [folder.resolve().name], np.zeros(len(written), dtype=int)
    if None in written:
        raise UserError(f"{folder}: got {written.count(None)} images without a label")
    names = folder / "classes.txt"
    if not all(label.isascii() and label.isdigit() for label in written):
        classes = sorted(set(written))
        number = {name: label for label, name in enumerate(classes)}
        return classes, np.array([number[label] for label in written])
    if too_long := [label for label in written if len(label) > MAX_DIGITS]:
        raise UserError(f"{folder}: got label {too_long[0]:.80}, expected {MAX_DIGITS} digits")
    labels = np.array([int(label) for label in written])
    classes = [str(label) for label in range(labels.max() + 1)]
    if names.is_file():
        classes = names.read_text().splitlines()
        if labels.max() >= len(classes):
            raise UserError(
                f"{names}: got {len(classes)} names, expected one for each of the labels up to "
                f"{labels.max()}"
            )
    return classes, labels
