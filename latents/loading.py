"""Training images: a class-per-folder tree, read in an order that any step can be resumed at.

dataset = ImageTree("path/to/imagenet/train", image_size=256)
stream = BatchStream(len(dataset), micro_batch=32, rank=rank, world_size=8, seed=0)
"""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from latents.images import center_crop_arr, read_rgb
from runtime.errors import UserError, printable


class ImageSource(Dataset):
    """Labelled images, cropped, as uint8; keys are (index, flip).

    An item is (image (3, H, W) uint8, label, unreadable images): an image that cannot be read is
    named and its place taken by the next one that can, which follows from the index
    alone, so it is the same on every rank and in any worker. What is behind it says how many there
    are (`__len__`), `read(index)` as (RGB PIL image, label), ValueError or OSError if it cannot be
    read, and `name(index)`.
    """

    classes: list[str]  # names, by label
    image_size: int
    root = ""  # what all names begin with, if anything

    @cached_property
    def listing(self) -> dict:
        """What tells these images from others: their number, and a hash of their names in order.

        The contents of the files are not read.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(os.fsencode(self.name(index)) + b"\n")
        return {"count": len(self), "names_sha256": digest.hexdigest()}

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int, list[str]]:
        index, flip = key
        unreadable, reason = [], ""
        for place in range(index, index + len(self)):
            place %= len(self)
            try:
                image, label = self.read(place)
                image = center_crop_arr(image, self.image_size)
            except (OSError, ValueError) as error:
                unreadable.append(self.name(place))
                reason = reason or str(error)
                continue
            pixels = np.asarray(image)[:, ::-1] if flip else np.asarray(image)
            return torch.tensor(pixels.copy()).permute(2, 0, 1), label, unreadable
        raise UserError(
            f"--data-path: got {len(self)} images that cannot be read, expected some that can; one "
            f"is {printable(unreadable[0])} ({reason})"
        )


class ImageTree(ImageSource):
    """Images of a class-per-folder tree, or of one folder without classes, which is one class."""

    def __init__(self, root: str, image_size: int):
        if not Path(root).is_dir():
            raise UserError(f"--data-path: got {root}, expected a folder of class folders")
        try:
            paths, self.classes, labels = find_images(Path(root))
            json.dumps(self.classes, ensure_ascii=False).encode()
        except OSError as error:
            raise UserError(f"--data-path {root}: {error}") from None
        except UnicodeEncodeError:
            raise UserError(
                f"--data-path {root}: got a class folder whose name is not text, expected UTF-8"
            ) from None
        # Arrays, not lists: reading a list's items would copy its pages into every worker.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels)
        self.image_size = image_size
        self.root = os.path.join(root, "")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        return read_rgb(self.name(index)), int(self.labels[index])


def find_images(root: Path) -> tuple[list[str], list[str], list[int]]:
    """Returns paths, class names and labels; FileNotFoundError when there is no image.

    A folder that is named like an image is no class, if there are no others.
    """
    if not any(path.is_dir() and not is_image_name(path.name) for path in root.iterdir()):
        paths = sorted(str(path) for path in root.iterdir())
        paths = [path for path in paths if is_image_name(path)]
        if paths:
            return paths, [root.resolve().name], [0] * len(paths)
    folder = ImageFolder(str(root))
    return [path for path, _ in folder.samples], folder.classes, folder.targets


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def collate(items: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Batches items: images (N, 3, H, W) uint8, labels (N,), all unreadable paths."""
    images, labels, unreadable = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), sum(unreadable, [])


class BatchStream(Sampler):
    """The micro-batches of one rank, from `start_step` to `end_step`: lists of (index, flip).

    The images form one endless line: epoch after epoch, each shuffled (and flipped) by (seed,
    epoch) alone. Step s takes the next global batch of the line; within it micro-step m of rank r
    takes the (m * world_size + r)-th part. So nothing depends on the run's history, ranks never
    overlap, and an epoch reads every image once.
    """

    def __init__(
        self,
        num_images: int,
        *,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        end_step: int = 1,
    ):
        self.num_images, self.micro_batch, self.accumulation = num_images, micro_batch, accumulation
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start_step, self.end_step = start_step, end_step
        self.global_batch = micro_batch * accumulation * world_size  # images of a step

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        epoch = -1
        for step in range(self.start_step, self.end_step):
            for micro_step in range(self.accumulation):
                part = (step * self.accumulation + micro_step) * self.world_size + self.rank
                batch = []
                for position in range(part * self.micro_batch, (part + 1) * self.micro_batch):
                    if position // self.num_images != epoch:
                        epoch = position // self.num_images
                        order, flips = self.shuffle(epoch)
                    place = position % self.num_images
                    batch.append((int(order[place]), bool(flips[place])))
                yield batch

    def shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order (num_images,) of an epoch and which of its images are flipped."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.num_images)
        return order, generator.random(self.num_images) < 0.5


def outlive_stop_signals(worker: int) -> None:
    """Lets a data-loading process live on when a scheduler signals every process of a job.

    It still ends on the SIGTERM of the training process, which alone knows when it is done.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell whose signal it is
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def make_loader(dataset: Dataset, stream: Sampler, num_workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin,
        generator=torch.Generator(),  # its base seed would else be drawn from the global generator
        worker_init_fn=outlive_stop_signals,
    )


def batches_of(loader: DataLoader) -> Iterator:
    """Yields the loader's batches; a worker's UserError comes out without its traceback."""
    try:
        yield from loader
    except UserError as error:
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{UserError.__module__}.UserError: ")) from None


def to_model_range(images: Tensor) -> Tensor:
    """Maps uint8 images to fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Maps images in [-1, 1] to uint8, clamped and rounded."""
    return (images.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
