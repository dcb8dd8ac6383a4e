"""Where each process's shard of a parameter lies.

layout = Layout(shards=8)
place = layout.place("blocks.0.attn.qkv.weight", shape, shard_index)
shard = weight[place]
"""

from dataclasses import dataclass

import torch

Place = tuple[slice, ...]  # position of a shard in a tensor


@dataclass(frozen=True)
class Layout:
    """Distribution of the weights over the processes that hold one copy of the model.

    Process p of a copy belongs to group p % spread, whose processes share the experts of the group.
    Every other weight is split into `shards * spread` shards, one per process.
    """

    shards: int
    spread: int = 1  # processes that hold different experts of a layer: --expert-parallel
    extra: int = 0  # experts of a layer in addition to the routed ones
    experts: frozenset[str] = frozenset()  # names of the parameters whose experts are spread

    @property
    def size(self) -> int:
        """Number of processes that hold one copy of the model."""
        return self.shards * self.spread

    def gathered(self, name: str) -> int:
        """Returns the number of processes that a parameter is sharded over."""
        return self.shards if name in self.experts else self.size

    def place(self, name: str, shape: torch.Size, shard_index: int) -> Place:
        """Returns the position, in a parameter of this shape, of shard number `shard_index`."""
        if name not in self.experts:
            return shard_place(shape, shard_index, self.gathered(name))
        counts = stored_of_each(shape[0] - self.extra, self.spread, self.extra)
        rank = shard_index % self.spread
        first, shape_here = sum(counts[:rank]), torch.Size((counts[rank], *shape[1:]))
        rows, *others = shard_place(shape_here, shard_index // self.spread, self.shards)
        return (slice(first + rows.start, first + rows.stop), *others)


def experts_of_each(num_experts: int, size: int) -> list[int]:
    """Returns the number of routed experts of each of `size` processes.

    If `size` does not divide the number of experts, the first processes have one more expert.
    """
    return [len(range(rank, num_experts, size)) for rank in range(size)]


def stored_of_each(num_experts: int, size: int, extra: int) -> list[int]:
    """Returns the number of stored experts by process; the last process has `extra` more."""
    counts = experts_of_each(num_experts, size)
    return [*counts[:-1], counts[-1] + extra]


def shard_dim(shape: torch.Size, num_shards: int) -> int:
    """Returns the sharded dimension: the first one, except the last, whose size `num_shards`
    divides; else 0, with padding.

    The last one, whose shards are scattered over the rows of a file, is sharded only if dimension 0
    has fewer rows than shards and `num_shards` divides the last.
    """
    *outer, last = range(len(shape))
    even = [dim for dim in outer if shape[dim] % num_shards == 0]
    is_last = shape[0] < num_shards and shape[last] % num_shards == 0
    return even[0] if even else last * is_last


def shard_place(shape: torch.Size, shard_index: int, num_shards: int) -> Place:
    """Returns the position of shard number `shard_index` under FSDP2.

    The shards are equal, except that the last ones are shorter or empty if no dimension divides.
    """
    place = [slice(0, size) for size in shape]
    if num_shards > 1:
        dim = shard_dim(shape, num_shards)
        size = -(-shape[dim] // num_shards)
        start = shard_index * size
        place[dim] = slice(min(shape[dim], start), min(shape[dim], start + size))
    return tuple(place)
