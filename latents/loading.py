"""Which images or cached latents training reads, in which order, and the processes that read."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from latents.sources import Batch, Source
from runtime.errors import UserError


@dataclass
class BatchStream:
    """The micro-batches of one rank, from `start_step` to `end_step`: lists of (index, flip).

    The images form one endless line: epoch after epoch, each shuffled (and half of it mirrored) by
    (seed, epoch) only. Step s takes the next global batch of the line; within it micro-step m of
    rank r takes the (m * world_size + r)-th part. So nothing depends on the run's history, ranks
    never overlap, and an epoch reads every image once.
    """

    num_images: int
    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    start_step: int = 0
    end_step: int = 1
    flip: bool = True
    places: np.ndarray | None = None  # of these images in their source, if it has others

    @property
    def global_batch(self) -> int:
        """Images of a step."""
        return self.micro_batch * self.accumulation * self.world_size

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        first, end = self.start_step * self.accumulation, self.end_step * self.accumulation
        for micro_step in range(first, end):
            start = (micro_step * self.world_size + self.rank) * self.micro_batch
            yield [self.image_at(position) for position in range(start, start + self.micro_batch)]

    def image_at(self, position: int) -> tuple[int, bool]:
        """The image at a position of the endless line, and whether it is mirrored."""
        epoch, place = divmod(position, self.num_images)
        order, flips = shuffle(self.num_images, self.seed, epoch)
        index = order[place] if self.places is None else self.places[order[place]]
        return int(index), bool(flips[place]) and self.flip


@lru_cache(maxsize=2)
def shuffle(num_images: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order (num_images,) of an epoch and which of its images are mirrored."""
    generator = np.random.default_rng([seed, epoch])
    return generator.permutation(num_images), generator.random(num_images) < 0.5


def split(images: Source, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the images to train on and of those held out, a fixed share, in order.

    The draw has a seed of its own and depends only on the number of images, so all runs on the
    same images, or on their latents, hold out the same ones. An image that cannot be read is from
    then on replaced by one of its own side. Latents of such images are copies of a neighbour, and
    more of those may be held out.
    """
    count = len(images)
    is_held_out = np.zeros(count, dtype=bool)
    drawn = np.random.default_rng(0).permutation(count)
    is_held_out[drawn[: min(round(share * count), count - 1)]] = True
    is_held_out = images.hold_out(is_held_out)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def evenly_spaced(number: int, most: int) -> list[int]:
    """Up to `most` of 0 to number - 1, evenly spaced with both ends among them."""
    return np.linspace(0, number - 1, min(number, most)).round().astype(int).tolist()


def loader_workers(requested: int | None) -> int:
    """How many processes read images for this rank: what is asked, within its share of the cores.

    Without a GPU none unless asked, because training computes on all cores.
    """
    can_tell = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if requested is None:
        requested = 4 if torch.cuda.is_available() else 0
    return min(requested, share)


def make_loader(
    dataset: Dataset, batches: Iterable, num_workers: int | None, pin: bool
) -> DataLoader:
    """Reads batches, lists of a dataset's keys, ahead in processes of one thread each."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loader_workers(num_workers),
        collate_fn=collate,
        pin_memory=pin,
        generator=torch.Generator(),  # the global one would be drawn from otherwise
        worker_init_fn=leave_signals_to_parent,
    )


def collate(items: list[tuple[Batch, list[str]]]) -> tuple[Batch, list[str]]:
    """Stacks the tensors of each name, and joins the names of all unreadable images."""
    tensors, unreadable = zip(*items, strict=True)
    batch = {name: torch.stack([item[name] for item in tensors]) for name in tensors[0]}
    return batch, sum(unreadable, [])


def leave_signals_to_parent(worker: int) -> None:
    """Makes a reader ignore what Ctrl-C or a scheduler sends to all processes of a job.

    The training process needs its images to finish the step, and ends it by a SIGTERM of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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


def batches_of(loader: DataLoader) -> Iterator:
    """Yields the loader's batches; a worker's UserError comes out without its traceback."""
    try:
        yield from loader
    except UserError as error:
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{UserError.__module__}.UserError: ")) from None
