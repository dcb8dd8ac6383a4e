"""Sources of training images: a folder, a Hugging Face dataset or WebDataset shards.

    images = open_images("path/to/folder", image_size=256)
    images = open_images("datasets:ylecun/mnist:train", image_size=32)
    images = open_images("shards/photos-{000..031}.tar", image_size=256)
    item, unreadable = images[17, True]     # image 17, mirrored: {"image", "label", "size"}

The second line needs the package `datasets` (requirements-extras.txt). Every source supports random
access by index, so that a run can resume at any step.

Shape legend: H x W pixels
"""

import hashlib
import io
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import chain
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from latents.autoencoder import Autoencoder, LatentNorm, NoiseFn, open_autoencoder
from latents.captions import MAX_CAPTION, SIDES, Captions, caption_column, captions_of_files
from latents.images import (
    IMAGE_SUFFIXES,
    center_crop_arr,
    find_classes,
    is_storage_fault,
    read_rgb,
    size_and_crop,
    to_rgb,
    to_uint8,
)
from latents.words import Words
from options.parts import Size, sides
from runtime.errors import UserError, pluralize, print_safely, printable, reported_as
from runtime.processes import Distributed

Batch = dict[str, Tensor]  # tensors by name: (N, ...) for a batch, (...) for one image


def same_images(one: dict | None, other: dict | None) -> bool:
    """Returns whether two fingerprints, see `Source`, are of the same images."""
    keys = "count", "names"
    return all(one and other and one.get(key) == other.get(key) is not None for key in keys)


def images_name(fingerprint: dict) -> str:
    """Returns a short name of a fingerprint: "131 images (e4cefcfb)"."""
    return f"{fingerprint.get('count')} images ({str(fingerprint.get('names'))[:8]})"


class Source(Dataset):
    """Base class of training data: of images, and of `CachedLatents`, which redefine the methods.

    An item of images has "image" (3, H, W) uint8, cropped, "label" and "size" (4,), see
    `SizeEmbedder`, and if requested "text", see `Words`. The next readable image replaces an
    unreadable one, the same on every rank and worker; of held-out images a held-out one, of
    training images a training one.

    A subclass for images is created from (path, image_size) and raises OSError or ValueError for an
    unsuitable path. It implements `name(index)` and `read(index)`, which returns an RGB image or
    raises an exception.
    """

    spelling: str  # regular expression for --data-path
    expected: str  # description of a valid --data-path
    flag = "--data-path"  # flag or argument that names the images, for messages
    left_out: Sequence[str] = ()  # descriptions of ignored files

    labels: np.ndarray  # (images,)
    classes: list[str]  # names, by label
    image_size: Size  # pixels
    can_flip = True  # whether mirrored images are available
    vae_path: str | None = None  # autoencoder of cached latents; None for images
    vae_sha256: str | None = None  # digest of the autoencoder's weights; None for images
    features_sha256: str | None = None  # digest of the network that computed cached features
    text_encoder: str | None = None  # MODEL@LENGTH, which computed the cached "tokens" of captions
    words: Words | None = None  # of the captions, that the model knows
    norm: LatentNorm | None = None  # None for images, until the autoencoder is read
    root = ""  # common folder of all names, if any
    is_held_out: np.ndarray | None = None  # (images,) bool
    # Shapes of the tensors of an item, except "image"; of "text" the length and number of words.
    shapes: dict[str, tuple[int, ...]] = {"label": (), "size": (4,)}
    requested: Collection[str] = ()  # optional tensors that items contain

    @classmethod
    def is_here(cls, path: str) -> bool:
        """Returns whether --dry-run opens the images; otherwise it assumes their number."""
        return True

    def __len__(self) -> int:
        return len(self.labels)

    def geometry(self, vae_path: str) -> tuple[Size, int]:
        """Returns (latent size, latent channels); cached latents ignore the autoencoder's path."""
        vae = open_autoencoder(vae_path)
        return vae.latent_size(self.image_size), vae.channels

    def to_latents(
        self, vae: Autoencoder | None, batch: Batch, noise_fn: NoiseFn | None = None
    ) -> Batch:
        """Replaces the images or moments of a batch by normalised "latents" (N, C, h, w), fp32.

        The latents are sampled from the posterior. Cached latents need no vae.
        """
        others = {name: value for name, value in batch.items() if name != "image"}
        return {"latents": vae.encode(batch["image"].to(vae.device), noise_fn), **others}

    def hold_out(self, is_held_out: np.ndarray) -> np.ndarray:
        """Separates held-out images (images,) bool from training images: no image of one group then
        stands in for an unreadable image of the other.

        Returns the images that are held out: a cache adds the copies of held-out images.
        """
        self.is_held_out = is_held_out
        return is_held_out

    @cached_property
    def fingerprint(self) -> dict:
        """Number of images, and digest of their labels and of their names below `root`."""
        sha = hashlib.sha256()
        for index, label in enumerate(self.labels):
            sha.update(b"%b\0%d\n" % (os.fsencode(self.name(index).removeprefix(self.root)), label))
        return {"count": len(self), "names": sha.hexdigest()}

    def read_captions(self) -> Iterable[str | Sequence[str] | None]:
        """Returns the captions of each image: one a line, a list, or None."""
        return [None] * len(self)

    @cached_property
    def captions(self) -> Captions:
        """The captions of each image."""
        with reported_as(f"{self.flag}: captions", OSError, ValueError, ImportError):
            return Captions.of(self.read_captions())

    def use_words(self, words: Words) -> None:
        """Sets the words that the condition "text" consists of."""
        self.words = words
        self.shapes = {**self.shapes, "text": (words.length, len(words.names))}

    def text_of(self, index: int, flip: bool, draw: float) -> tuple[Batch, bool]:
        """Returns {"text": words} if requested, and whether the image is mirrored: not if its
        caption tells left from right.

        draw: number in [0, 1) that chooses one of the captions
        """
        if "text" not in self.requested:
            return {}, flip
        captions = self.captions[index] or [""]
        caption = captions[int(draw * len(captions))]
        return {"text": self.words.numbers(caption)}, flip and not SIDES.search(caption)

    def __getitem__(self, key: tuple) -> tuple[Batch, list[str]]:
        """Returns the tensors of image (index, flip), and ["name (reason)"] if it is unreadable.

        A key may have a third part, see `text_of`.
        """
        index, flip, draw = (*key, 0.0)[:3]
        fault, num_faults = "", 0
        for other in chain(range(index, len(self)), range(index)):
            if self.is_held_out is not None and self.is_held_out[other] != self.is_held_out[index]:
                continue
            try:
                original = self.read(other)
                image = center_crop_arr(original, self.image_size)
            except Exception as error:  # including MemoryError for an image that claims to be huge
                name, reason = self.name(other), str(error) or type(error).__name__
                if is_storage_fault(error):
                    message = f"{self.flag}: the storage failed to read {name} ({error.strerror})"
                    raise UserError(message) from None
                fault, num_faults = fault or f"{name} ({reason})", num_faults + 1
                continue
            text, is_mirrored = self.text_of(other, flip, draw)
            pixels = np.asarray(image)[:, :: -1 if is_mirrored else 1]  # (H, W, 3)
            item = text | {
                "image": torch.tensor(pixels.copy()).permute(2, 0, 1),
                "label": torch.tensor(int(self.labels[other])),
                "size": torch.tensor(size_and_crop(original.size, self.image_size)),
            }
            return item, [fault] if fault else []
        raise UserError(
            f"{self.flag}: got {pluralize(num_faults, 'image')}, none of which can be read; the "
            f"first one is {printable(fault)}"
        )


def number_labels(written: Sequence, one_class: str) -> tuple[list[str], np.ndarray]:
    """Converts labels, numbers or names, to sorted class names and the class index of each image.

    If all labels are None, the images are one class named `one_class`.
    """
    unlabelled = sum(label is None for label in written)
    if unlabelled == len(written):
        written = [one_class] * len(written)
    elif unlabelled:
        raise ValueError(f"{unlabelled} images without a label")
    if not any(all(isinstance(label, kind) for label in written) for kind in (str, Integral)):
        raise ValueError(f"labels such as {written[0]!r:.50}, expected only names or only integers")
    values = sorted(set(written))
    if all(str(value).isdecimal() for value in values):
        values.sort(key=int)
    number_of = {value: number for number, value in enumerate(values)}
    return class_names(map(str, values)), np.array([number_of[value] for value in written])


def class_names(labels: Iterable[str]) -> list[str]:
    """Returns unique, printable, one-line names for labels, as folder names may be arbitrary."""
    names: dict[str, None] = {}
    for label in labels:
        name = re.sub(r"[\0-\x1f\x7f]", " ", os.fsencode(label).decode(errors="replace"))
        while name in names:
            name += "'"
        names[name] = None
    return list(names)


class ImageTree(Source):
    """Images in a folder of class folders, or in one folder without classes (one class)."""

    spelling = ".*"
    expected = "a folder of class folders with images"
    is_here = staticmethod(os.path.exists)

    def __init__(self, path: str, image_size: Size):
        classes, self.left_out = find_classes(Path(path))
        if not classes:
            raise ValueError("; ".join(["no images", *self.left_out]))
        self.classes, self.image_size = class_names(classes), image_size
        self.root = os.path.join(Path(path), "")
        # Arrays, because reference counting in workers would copy the memory of lists.
        self.paths = np.array([os.fsencode(path) for paths in classes.values() for path in paths])
        self.labels = np.repeat(range(len(classes)), [len(paths) for paths in classes.values()])

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def read(self, index: int) -> Image.Image:
        return read_rgb(self.name(index))

    def read_captions(self) -> Iterable[str | Sequence[str] | None]:
        return captions_of_files([os.fsdecode(path) for path in self.paths], self.root)


class HubImages(Source):
    """Dataset of the package `datasets`: "datasets:ID_OR_FOLDER[:SPLIT]"; default split: train.

    The images are the first image column. The labels are the first ClassLabel column, or a column
    named label or labels. Without such a column, all images are one class. The captions are a
    column named text, caption or prompt, of texts or lists of texts.
    """

    spelling = "datasets:.*"
    expected = "a hub id or folder that datasets can load, and one of its splits, with images"

    @classmethod
    def is_here(cls, path: str) -> bool:  # a hub id may need a download
        return os.path.isdir(path.removeprefix("datasets:").partition(":")[0])

    def __init__(self, path: str, image_size: Size):
        fix = "run: pip install -r requirements-extras.txt"
        with reported_as(f"{path} requires the package datasets; {fix}", ImportError):
            import datasets
        self.path, self.image_size = path, image_size
        name, _, split = path.removeprefix("datasets:").partition(":")
        if os.path.isdir(name):  # the fingerprint contains the folder's name, but not its location
            self.path = path.replace(name, name.rstrip("/"), 1)
            self.root = "datasets:" + os.path.join(os.path.dirname(name.rstrip("/")), "")
        try:
            rows = datasets.load_dataset(name, split=split or "train")
        except Exception as error:  # the package raises many kinds
            raise ValueError(error) from None
        columns = rows.features
        images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise ValueError(f"it has no image column, only {', '.join(columns)}")
        self.image_column = images[0]
        self.rows = rows.cast_column(images[0], datasets.Image(decode=False))
        self.caption_column = caption_column(columns)
        named = [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [name for name in ("label", "labels") if name in columns]
        if named:
            labels = [-1 if label is None else label for label in rows[named[0]]]
            self.classes, self.labels = columns[named[0]].names, np.array(labels)
            if self.labels.min() < 0:
                raise ValueError("images without a label")
        else:
            written = rows[plain[0]] if plain else [None] * len(rows)
            self.classes, self.labels = number_labels(written, one_class=Path(name).name)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def read(self, index: int) -> Image.Image:
        stored = self.rows[index][self.image_column] or {"bytes": b""}
        content = stored["bytes"]
        return read_rgb(stored["path"] if content is None else io.BytesIO(content))

    def read_captions(self) -> Iterable[str | Sequence[str] | None]:
        column = self.caption_column
        return [None] * len(self) if column is None else self.rows[column]


class GivenImages(Source):
    """Map-style dataset of (image, label) or (image, label, caption) passed from Python:
    `train.run(data=dataset)`.

    An image is a Pillow image, an array (H, W, 3) uint8, or a tensor (1 or 3, H, W), uint8 or
    floating-point in [0, 1]. Labels are numbers or names. They are `dataset.targets` or, without
    that attribute, the labels of all items, which are read once. The class names are
    `dataset.classes`, or the labels. A caption is a text, a list of texts or None;
    `dataset.captions`, if there, saves reading all items for them.
    """

    spelling = "python:.*"
    expected = "a dataset of (image, label) that train.run(data=...) passed to this process"
    flag = "data"
    datasets: dict[str, Dataset] = {}  # by --data-path

    @classmethod
    def is_here(cls, path: str) -> bool:
        return path in cls.datasets

    def __init__(self, path: str, image_size: Size):
        if path not in self.datasets:
            raise ValueError("no dataset of this name was passed")
        self.path, self.image_size, self.dataset = path, image_size, self.datasets[path]
        labels = getattr(self.dataset, "targets", None)
        if labels is None:
            labels = [self.label(index) for index in range(len(self.dataset))]
        labels = [x.item() if math.prod(getattr(x, "shape", [0])) == 1 else x for x in labels]
        if not labels:
            raise ValueError("no images")
        names = getattr(self.dataset, "classes", None)
        allowed = f"0 to {len(names) - 1}, numbers of its classes" if names else "numbers or names"
        for label in labels:
            fits = label in range(len(names)) if names else isinstance(label, int | str | None)
            if not fits:
                raise ValueError(f"got the label {label!r:.80}, expected {allowed}")
        if names:
            self.classes, self.labels = class_names(map(str, names)), np.array(labels)
        else:
            self.classes, self.labels = number_labels(labels, one_class="images")

    def label(self, index: int) -> object:
        return self.item(index)[1]

    def item(self, index: int) -> Sequence:
        item = self.dataset[index]
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise ValueError(f"item {index} is a {type(item).__name__}")
        return item

    def read_captions(self) -> Iterable[str | Sequence[str] | None]:
        if (captions := getattr(self.dataset, "captions", None)) is not None:
            if len(captions) != len(self):
                raise ValueError(
                    f"got {len(captions)}, expected one for each of {len(self)} images"
                )
            return captions
        if len(self.item(0)) == 2:
            return [None] * len(self)
        return ((*self.item(index), None)[2] for index in range(len(self)))

    def name(self, index: int) -> str:
        return f"{self.path}, item {index}"

    def read(self, index: int) -> Image.Image:
        image = self.dataset[index][0]
        if isinstance(image, Tensor):
            if image.ndim != 3 or len(image) not in (1, 3):
                raise ValueError(f"got a tensor {tuple(image.shape)}, expected (1 or 3, H, W)")
            if image.is_floating_point():
                if not 0 <= image.min() <= image.max() <= 1:
                    raise ValueError("got numbers outside 0 to 1, expected unnormalised images")
                image = to_uint8(image * 2 - 1)
            image = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
        return to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))


def expand_range(path: str) -> list[str]:
    """Expands "NAME-{000..031}.tar" to all names; returns a name without a range as it is."""
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
    if not match:
        return [path]
    head, first, last, tail = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{head}{number:0{len(first)}d}{tail}" for number in numbers]


class ShardImages(Source):
    """WebDataset shards on local disks, "NAME-{000..031}.tar".

    The label of an image KEY.jpg is in KEY.cls, a number or a name. Without any labels, all images
    are one class. Its captions are in KEY.txt, one a line. The shards are indexed once for random
    access: streaming would neither allow a run to resume at any step nor shuffle a complete epoch.
    """

    spelling = r".*\.tar"
    expected = "local shards of images, with labels for all images or for none"

    @classmethod
    def is_here(cls, path: str) -> bool:
        return os.path.exists(expand_range(path)[0])

    def __init__(self, path: str, image_size: Size):
        self.shards, self.image_size = expand_range(path), image_size
        self.passed_over: Counter[str] = Counter()
        samples = [sample for shard in range(len(self.shards)) for sample in self.index(shard)]
        self.left_out = [f"{count:,} {kind}" for kind, count in self.passed_over.items()]
        if not samples:
            raise ValueError("; ".join(["no images", *self.left_out]))
        places, labels, captions = zip(*samples, strict=True)
        self.captions = Captions.of(captions)
        self.places = np.array(places)  # (images, 3): shard, offset, bytes
        folder = Path(self.shards[0]).parent
        self.root = os.path.join(folder, "")
        self.classes, self.labels = number_labels(labels, one_class=folder.resolve().name)

    def index(self, shard: int) -> list[tuple[tuple[int, int, int], str | None, str | None]]:
        """Lists ((shard, offset, bytes), label, captions) for the images of a shard."""
        places, labels, captions = {}, {}, {}
        try:
            with (
                open(self.shards[shard], "rb") as file,
                tarfile.open(fileobj=file, mode="r:") as tar,
            ):
                for member in tar:
                    if not member.isfile():
                        if member.islnk() or member.issym():
                            self.passed_over["links in shards"] += 1
                        continue
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = name.partition(".")
                    if f".{extension.lower()}" in IMAGE_SUFFIXES:
                        if (folder, key) in places:
                            self.passed_over["images whose key a later image has"] += 1
                        places[folder, key] = (shard, member.offset_data, member.size)
                    elif extension == "cls":
                        labels[folder, key] = tar.extractfile(member).read().decode().strip()
                    elif extension == "txt":
                        text = tar.extractfile(member).read(MAX_CAPTION)
                        captions[folder, key] = text.decode(errors="replace")
                    elif name.lower().endswith(IMAGE_SUFFIXES):
                        self.passed_over["images with a dot before their suffix"] += 1
        except tarfile.TarError as error:
            raise ValueError(f"{self.shards[shard]}: {error}") from None
        return [(place, labels.get(key), captions.get(key)) for key, place in places.items()]

    def name(self, index: int) -> str:
        shard, offset, _ = self.places[index]
        return f"{self.shards[shard]}, offset {offset}"

    def read(self, index: int) -> Image.Image:
        shard, offset, num_bytes = self.places[index]
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return read_rgb(io.BytesIO(file.read(num_bytes)))


SOURCES = (GivenImages, HubImages, ShardImages, ImageTree)  # the first match of `spelling` wins


def source_of(path: str) -> type[Source]:
    """Returns the class that opens a --data-path."""
    return next(kind for kind in SOURCES if re.fullmatch(kind.spelling, path, re.DOTALL))


def open_images(path: str, image_size: Size, flag: str | None = None) -> Source:
    """Opens images.

    flag: the flag that names them; None: --data-path, or the argument of `train.run`
    """
    kind = source_of(path)
    flag = flag or kind.flag
    got = path or "an empty path"
    with reported_as(f"{flag}: got {got}, expected {kind.expected}", OSError, ValueError):
        if not path:
            raise ValueError("is a variable of the shell unset?")
        images = kind(path, image_size)
    images.flag = flag
    if images.left_out and os.environ.get("RANK", "0") == "0":
        print_safely(printable(f"{flag} {path}: ignored {'; '.join(images.left_out)}"))
    return images


def open_on_all(path: str, image_size: Size, dist: Distributed) -> Source:
    """Opens --data-path on all processes, which call this function together. Only the main process
    lists the files of a folder."""
    read = partial(open_images, path, image_size)
    if ":" in path:  # a dataset on the hub
        return read()
    if dist.is_main:
        print_safely(f"reading the names of the images in {path}")
    return dist.from_main(read)


def size_notes(images: Source) -> list[str]:
    """Returns a note if most of up to five images are smaller than --image-size."""
    sizes, (height, width) = [], sides(images.image_size)
    for index in range(0, len(images), -(-len(images) // 5)):
        with suppress(Exception):  # an unreadable image is reported when it is used
            sizes.append(images.read(index).size)
    small = sum(size[0] < width or size[1] < height for size in sizes)
    if 2 * small <= len(sizes):
        return []
    return [
        f"{small} of {pluralize(len(sizes), 'image')} that were checked are smaller than "
        f"--image-size ({height} x {width} pixels) and are enlarged, which adds no detail"
    ]
