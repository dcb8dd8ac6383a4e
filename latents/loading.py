"""The order in which training reads images or cached latents, and the reader processes."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from latents.sources import Batch, Source
from runtime.errors import UserError, pluralize

FEW_UNREADABLE, MOST_UNREADABLE = 10, 0.01  # number, and fraction, of unreadable images


@dataclass
class BatchStream:
    """Micro-batches of one rank, from `start_step` to `end_step`: lists of (index, flip), or with
    `draws` of (index, flip, number in [0, 1)), which chooses among an image's captions.

    The images form one endless sequence of epochs. (seed, epoch) determine the order of an epoch
    and the half of its images that is mirrored. Step s takes global batch number s; in it,
    micro-step m of rank r takes micro-batch number m * world_size + r. The images of a step
    therefore do not depend on the run's history, ranks never overlap, and an epoch reads every
    image once.
    """

    indices: Sequence[int] | np.ndarray  # of the images in the source
    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    start_step: int = 0
    end_step: int = 1
    flip: bool = True
    draws: bool = False

    @property
    def num_images(self) -> int:
        return len(self.indices)

    @property
    def global_batch(self) -> int:
        """Number of images per optimizer step."""
        return self.micro_batch * self.accumulation * self.world_size

    def __iter__(self) -> Iterator[list[tuple]]:
        first, end = self.start_step * self.accumulation, self.end_step * self.accumulation
        for micro_step in range(first, end):
            start, keys = (micro_step * self.world_size + self.rank) * self.micro_batch, []
            for position in range(start, start + self.micro_batch):  # in the endless sequence
                epoch, offset = divmod(position, self.num_images)
                order, flips = shuffle(self.num_images, self.seed, epoch)
                index = int(self.indices[order[offset]])
                key = index, bool(flips[offset]) and self.flip
                if self.draws:
                    key += (np.random.default_rng([self.seed, 1, position]).random(),)
                keys.append(key)
            yield keys


@lru_cache(maxsize=2)
def shuffle(num_images: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order (num_images,) of an epoch, and whether each of its images is mirrored."""
    generator = np.random.default_rng([seed, epoch])
    return generator.permutation(num_images), generator.random(num_images) < 0.5


def split(images: Source, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the training images and of the held-out images, in order.

    The random choice depends only on the number of images, so all runs on the same images, or on
    their latents, hold out the same images. `Source.hold_out` may hold out more than the fraction.
    """
    count = len(images)
    is_chosen = np.zeros(count, dtype=bool)
    drawn = np.random.default_rng(0).permutation(count)
    is_chosen[drawn[: min(round(fraction * count), count - 1)]] = True
    is_held_out = images.hold_out(is_chosen)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def evenly_spaced(number: int, most: int) -> list[int]:
    """Returns up to `most` evenly spaced integers from 0 to number - 1, including both ends."""
    return np.linspace(0, number - 1, min(number, most)).round().astype(int).tolist()


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    can_tell = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1


def loader_workers(requested: int | None) -> int:
    """Returns the number of worker processes for this rank, at most its share of the cores.

    requested: value of --num-workers; None: 4 with a GPU, else 0, because training then uses all
        cores
    """
    share = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if requested is None:
        requested = 4 if torch.cuda.is_available() else 0
    return min(requested, share)


def read_batches(
    dataset: Dataset, batches: Iterable, num_workers: int | None, pin: bool
) -> Iterator[tuple[Batch, list[str]]]:
    """Reads batches, given as lists of the dataset's keys, ahead of time in worker processes."""
    workers = loader_workers(num_workers)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        # Python 3.14 would start workers in another way, and copy the lists of files to each.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        collate_fn=collate,
        pin_memory=pin,
        generator=torch.Generator(),  # otherwise the loader draws from the global generator
        worker_init_fn=leave_signals_to_parent,
    )
    try:
        yield from loader
    except UserError as error:  # of a worker, with a traceback
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{UserError.__module__}.UserError: ")) from None


def collate(items: list[tuple[Batch, list[str]]]) -> tuple[Batch, list[str]]:
    """Stacks the tensors of each name, and joins the lists of unreadable images."""
    tensors, unreadable = zip(*items, strict=True)
    batch = {name: torch.stack([item[name] for item in tensors]) for name in tensors[0]}
    return batch, sum(unreadable, [])


def check_unreadable(flag: str, unreadable: int, read: int) -> None:
    """Ends a run of which more than ten and more than 1% of the images that were read are
    unreadable, so that it does not train on the copies that replace them.

    flag: flag that names the images
    """
    if unreadable > max(FEW_UNREADABLE, MOST_UNREADABLE * read):
        raise UserError(
            f"{flag}: {unreadable:,} of {pluralize(read, 'image')} cannot be read, expected at "
            f"most {MOST_UNREADABLE:.0%}; the lines above name them"
        )


def leave_signals_to_parent(worker: int) -> None:
    """Makes a worker ignore signals to all processes of a job, as of Ctrl-C or a scheduler.

    The training process needs its images to finish the step, and then ends it.
    """
    os.setpgrp()  # a signal to the process group does not reach the worker
    signal.set_wakeup_fd(-1)  # of the training process, see `runtime.signals`
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
