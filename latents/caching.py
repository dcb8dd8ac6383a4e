"""Writes the cache that latents/cache.py reads: shard by shard, each whole or not at all.

Process r of W encodes every W-th of the shards that are missing, in batches that begin with the
shard, so a shard's bytes depend neither on W nor on when the others were written. A shard gets its
name when it is whole; then its size and digest are noted in unfinished/. Process 0 waits for the
notes of all shards, writes index.json and removes unfinished/.

Shape legend: n images of a shard, C latent channels, h x w latent size
"""

import hashlib
import json
import os
import reprlib
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from latents.autoencoder import encode_moments
from latents.cache import checksum, map_shard
from latents.index import (
    INDEX_FILE,
    UNFINISHED,
    Index,
    Settings,
    Shard,
    layout_of,
    parse_index,
    parse_settings,
    parse_shard,
    parse_skipped,
    settings_json,
    shard_name,
)
from latents.loading import ImageSource, batches_of, make_loader
from runtime.errors import UserError, printable
from runtime.files import file_digest, flush_to_disk
from runtime.processes import Distributed

SETTINGS_FILE = "settings.json"
Note = tuple[Shard, dict[int, str]]  # a finished shard, and the unreadable images of it


def source_digest(images: ImageSource) -> str:
    """SHA-256 of the names of all images, in order, and of their sizes if they are files."""
    sha = hashlib.sha256()
    for index in range(len(images)):
        name = images.name(index)
        try:
            size = os.stat(name).st_size
        except OSError:
            size = -1
        sha.update(f"{name.removeprefix(images.root)}\0{size}\0".encode(errors="surrogateescape"))
    return sha.hexdigest()


def stored_settings(folder: Path, settings: Settings) -> Settings:
    """The settings that a folder was begun with, those given if it is new.

    UserError for a folder of something else, or of a cache with other settings.
    """
    index, begun = folder / INDEX_FILE, folder / UNFINISHED / SETTINGS_FILE
    try:
        if index.is_file():
            stored = parse_index(index.read_bytes()).settings
        elif begun.is_file():
            stored = parse_settings(begun.read_bytes())[0]
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError("got something else there, expected a new or empty folder")
        else:
            return settings
    except UserError as error:
        raise UserError(f"--output {folder}: {error}") from None
    differing = [
        f"{field.name} got {reprlib.repr(getattr(settings, field.name))}, expected "
        f"{reprlib.repr(getattr(stored, field.name))}"
        for field in fields(Settings)
        if getattr(settings, field.name) != getattr(stored, field.name)
        and field.name != "vae_path"  # the same weights may lie elsewhere
    ]
    if differing:
        raise UserError(f"--output {folder} was begun with other settings: {'; '.join(differing)}")
    return stored


def finished_shards(folder: Path, settings: Settings, dist: Distributed) -> dict[int, Note]:
    """Finds the shards that are whole, by the size and digest noted; all processes take part."""
    notes = noted_shards(folder, settings)
    is_whole = torch.zeros(settings.num_shards, dtype=torch.int64, device=dist.device)
    for place in sorted(notes)[dist.rank :: dist.world_size]:
        shard, path = notes[place][0], folder / shard_name(place)
        whole = path.is_file() and path.stat().st_size == shard.bytes
        is_whole[place] = whole and file_digest(path) == shard.sha256
    is_whole = dist.sum(is_whole).tolist()
    return {place: note for place, note in notes.items() if is_whole[place]}


def noted_shards(folder: Path, settings: Settings) -> dict[int, Note]:
    """What index.json and then the notes in unfinished/ say of shards, true or not any more."""
    notes = {}
    if (folder / INDEX_FILE).is_file():
        index = parse_index((folder / INDEX_FILE).read_bytes())
        for place, shard in enumerate(index.shards):
            own = settings.images_of(place)
            notes[place] = shard, {i: name for i, name in index.skipped.items() if i in own}
    for place in range(settings.num_shards):
        if note := read_note(folder, place, settings):
            notes[place] = note
    return notes


def read_note(folder: Path, place: int, settings: Settings) -> Note | None:
    """Reads the note of a shard; None if there is none, or it is damaged."""
    try:
        values = json.loads(note_path(folder, place).read_bytes())
        return parse_shard(values["shard"], place, settings), parse_skipped(
            values["skipped"], settings
        )
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def note_path(folder: Path, place: int) -> Path:
    return (folder / UNFINISHED / shard_name(place)).with_suffix(".json")


def count_images(settings: Settings, shards: list[int]) -> int:
    return sum(len(settings.images_of(shard)) for shard in shards)


def check_disk(folder: Path, settings: Settings, missing: list[int]) -> int:
    """The free bytes of the disk that a folder is to be on; UserError if too few for shards."""
    num_bytes = count_images(settings, missing) * settings.image_bytes
    folders = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in folders if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"--output {folder}: got {free / 1e9:.2f} GB free on that disk, expected "
            f"{num_bytes / 1e9:.2f} GB for the shards that are missing"
        )
    return free


class ShardBatches(Sampler):
    """Lists of (index, flip) for the images of shards: batches that begin anew with each shard."""

    def __init__(self, settings: Settings, shards: list[int], batch_size: int):
        self.settings, self.shards, self.batch_size = settings, shards, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for shard in self.shards:
            places = self.settings.images_of(shard)
            for start in range(0, len(places), self.batch_size):
                yield [(place, False) for place in places[start : start + self.batch_size]]

    def __len__(self) -> int:
        return sum(
            -(-len(self.settings.images_of(shard)) // self.batch_size) for shard in self.shards
        )


def write_missing(
    images: ImageSource,
    vae: AutoencoderKL,
    folder: Path,
    settings: Settings,
    missing: list[int],
    *,
    batch_size: int,
    num_workers: int,
    dist: Distributed,
) -> None:
    """Encodes this process's part of the missing shards."""
    own = missing[dist.rank :: dist.world_size]
    stream = ShardBatches(settings, own, batch_size)
    loader = make_loader(images, stream, num_workers, pin=dist.device.type == "cuda")
    bar = tqdm(batches_of(loader), total=len(stream), unit="batch",
               disable=not (dist.is_main and sys.stderr.isatty()))  # fmt: skip
    batches, start = iter(bar), time.perf_counter()
    for number, shard in enumerate(own, start=1):
        places = settings.images_of(shard)
        moments, labels, skipped = encode_shard(batches, vae, places, images, dist.device)
        for name in skipped.values():
            bar.write(printable(f"skipped an image that cannot be read: {name}"), file=sys.stdout)
        write_shard(folder, shard, settings, moments, labels, skipped)
        if dist.is_main:
            here = sum(note_path(folder, place).is_file() for place in missing)
            speed = count_images(settings, own[:number]) / (time.perf_counter() - start)
            left = count_images(settings, own[number:]) / speed
            bar.write(
                f"{here} of {len(missing)} shards, {speed:.1f} images/s a process, about "
                f"{left / 60:.1f} min left",
                file=sys.stdout,
            )
    bar.close()


def encode_shard(
    batches: Iterator, vae: AutoencoderKL, places: range, images: ImageSource, device: torch.device
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Takes the batches of a shard: moments (n, 2, 2C, h, w) fp16, labels (n,), skipped images."""
    parts, labels, unreadable, count = [], [], set(), 0
    while count < len(places):
        pixels, batch_labels, names = next(batches)  # (N, 3, H, W) uint8
        pixels = pixels.to(device, non_blocking=True)
        both = [encode_moments(vae, view) for view in (pixels, pixels.flip(-1))]
        parts.append(torch.stack(both, dim=1).half().cpu())  # (N, 2, 2C, h, w)
        labels.append(batch_labels)
        unreadable.update(names)
        count += len(pixels)
    named = {place: images.name(place) for place in places} if unreadable else {}
    skipped = {
        place: name.removeprefix(images.root) for place, name in named.items() if name in unreadable
    }
    return torch.cat(parts), torch.cat(labels), skipped


def write_shard(
    folder: Path,
    shard: int,
    settings: Settings,
    moments: Tensor,
    labels: Tensor,
    skipped: dict[int, str],
) -> None:
    """Writes a shard, reads it back and only then gives it its name and its note."""
    path, count = folder / shard_name(shard), len(labels)
    if not moments.isfinite().all():
        place = settings.images_of(shard)[int((~moments.isfinite()).flatten(1).any(1).nonzero()[0])]
        raise UserError(
            f"--precision: got inf or nan in the latents of image {place} in {settings.precision}, "
            "expected finite ones: try fp32"
        )
    tensors = {
        "moments": moments,
        "labels": labels.to(torch.int32),
        "checksums": torch.tensor(
            [[checksum(moments[i, flip], int(labels[i])) for flip in (0, 1)] for i in range(count)]
        ),
    }
    assert layout_of(count, settings.latent_shape) == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary)
        temporary.chmod(0o644)  # safetensors makes files that others cannot read
        flush_to_disk(temporary)
        forget_pages(temporary)
        stored = map_shard(temporary, count, settings.latent_shape)
        if not all(torch.equal(stored[name], tensors[name]) for name in tensors):
            raise UserError(f"{path}: what was read back is not what was written: a faulty disk")
        size, digest = temporary.stat().st_size, file_digest(temporary)
        temporary.replace(path)
        note = {
            "shard": asdict(Shard(path.name, count, size, digest)),
            "skipped": [{"place": place, "name": name} for place, name in skipped.items()],
        }
        write_whole(note_path(folder, shard), json.dumps(note))
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output: cannot write {path} ({error})") from None


def forget_pages(path: Path) -> None:
    """Drops a flushed file from memory, so that reading it back asks the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name, flushes it and renames it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)


def begin(folder: Path, settings: Settings, missing: list[int]) -> None:
    """Makes the folder, with the settings and without notes of missing shards; call on one process.

    UserError when it cannot be written.
    """
    try:
        (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        for place in missing:  # a damaged shard's note is none of the one that will be there
            note_path(folder, place).unlink(missing_ok=True)
        write_whole(folder / UNFINISHED / SETTINGS_FILE, settings_json(settings))
    except OSError as error:
        raise UserError(f"--output: cannot write to {folder} ({error.strerror})") from None


def check_shared(folder: Path, dist: Distributed) -> None:
    """Raises UserError on a process that does not see what `begin` wrote on another."""
    if not (folder / UNFINISHED / SETTINGS_FILE).is_file():
        raise UserError(
            f"--output: {folder} cannot be seen from rank {dist.rank}, expected a folder that all "
            "nodes share"
        )


def finish(folder: Path, settings: Settings, kept: dict[int, Note]) -> Index:
    """Waits for the notes of all shards that were not kept, and writes the index from them.

    Waiting in a barrier instead would end with its timeout, which a shard on a CPU can exceed.
    """
    notes = dict(kept)
    while len(notes) < settings.num_shards:
        for place in set(range(settings.num_shards)) - notes.keys():
            if note := read_note(folder, place, settings):
                notes[place] = note
        time.sleep(0.2)
    shards, skipped = zip(*(notes[place] for place in range(settings.num_shards)), strict=True)
    merged = {place: name for part in skipped for place, name in part.items()}
    index = Index(settings, merged, shards)
    path, text = folder / INDEX_FILE, index.to_json()
    if not path.is_file() or path.read_text() != text:
        write_whole(path, text)
    if (folder / UNFINISHED).is_dir():
        shutil.rmtree(folder / UNFINISHED)
    return index
