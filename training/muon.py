"""Muon: hidden matrices move by their gradient's nearest orthogonal matrix, the rest by AdamW.

    matrices = {"params": [qkv, up, down], "cuts": [3, 1, 1], "momentum": 0.95}
    optimizer = MuonAdamW([matrices, {"params": others}], lr=1e-3, fused=True)

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Moonlight (arXiv
2502.16982, equation 4), by which AdamW's rates and decay carry over. Matrices of one shape, of
whatever layer and expert, are one batched product.

Under FSDP2 a process moves the experts that it holds unsharded. Other matrices are cut along m or
n: the processes exchange the parts of a batch at once, in the precision of the products, so that
each gets an equal number of unsharded matrices, and exchange the results back.

Shape legend: B parameters or parts of one in a batch, m x n the shape of a matrix
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

# On the CPU an exchange of parts gathers them, which DTensor would announce.
logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)

ITERATIONS = 5
QUINTIC = [(3.4445, -4.7750, 2.0315)]  # Jordan's coefficients of the Newton-Schulz iteration
BATCH = 2**25  # numbers of a batched product at most, which bounds the memory beside the state
Stack = tuple[Tensor, Tensor, Tensor]  # of a parameter (..., m, n), its gradient and its momentum


class MuonAdamW(torch.optim.AdamW):
    """Muon for a group that has "cuts": into how many matrices the rows of each parameter are cut.

    A parameter (..., m, n) is a stack of matrices. Any part of a stack may be given alone, such as
    the experts of one process. As for the fused AdamW, a `found_inf` of 1 on the device makes a
    step change nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict], *, dtype: torch.dtype = torch.bfloat16, **options):
        from timm.optim.muon import zeropower_via_newtonschulz  # takes two seconds

        super().__init__(groups, **options)
        self.orthogonalize, self.dtype = zeropower_via_newtonschulz, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert getattr(self, "grad_scale", None) is None, "gradients have to be unscaled before"
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "cuts" not in group]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "cuts" in group:
                for stacks, like, cut in self.batches(group):
                    self.move(stacks, like, cut, group)

    def batches(self, group: dict) -> Iterator[tuple[list[Stack], DTensor | None, int]]:
        """Yields stacks of one shape that this process holds; a DTensor that is sharded as they are
        if they hold parts of matrices, else None; and into how many matrices rows are cut."""
        alike: dict[tuple, tuple[list[Stack], DTensor | None, int, int]] = {}
        for weight, cut in zip(group["params"], group["cuts"], strict=True):
            if weight.grad is None:
                continue
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            own = [rows_of(t) for t in (weight, weight.grad, self.state[weight]["momentum"])]
            like = weight if is_cut(weight) else None
            numbers = weight.shape[-2:].numel()  # of an unsharded matrix
            count = max(1, BATCH // numbers)
            stacks = [own] if weight.ndim == 2 else zip(*(t.split(count) for t in own), strict=True)
            for stack in stacks:
                if like is not None or len(stack[0]):
                    key = cut, stack[0].shape, like is not None and (weight.shape, like.placements)
                    size = numbers * (1 if weight.ndim == 2 else len(stack[0]))
                    alike.setdefault(key, ([], like, cut, size))[0].append(tuple(stack))
        for stacks, like, cut, size in alike.values():
            count = max(1, BATCH // size)
            for first in range(0, len(stacks), count):
                yield stacks[first : first + count], like, cut

    def move(self, stacks: list[Stack], like: DTensor | None, cut: int, group: dict) -> None:
        """Takes a step of stacks of one shape, each row of matrices cut into `cut`."""
        beta, skipped, taken, directions = group["momentum"], self.found_inf, 1.0, []
        if skipped is not None:
            taken = 1 - skipped
        for _, grad, momentum in stacks:
            if skipped is not None:
                grad = grad.where(skipped == 0, 0.0)
            momentum.lerp_(grad, taken * (1 - beta))
            directions.append(grad.lerp(momentum, beta).to(self.dtype))
        parts = torch.stack(directions)  # (B, ..., m, n), or this process's parts of them
        whole = parts.flatten(0, -3) if like is None else gather(parts.flatten(0, -3), like)
        matrices = whole.unflatten(-2, (cut, -1)).flatten(0, -3)
        if len(matrices):
            matrices = self.orthogonalize(matrices, ITERATIONS, QUINTIC, dtype=self.dtype)
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        kept = 1 - group["lr"] * group["weight_decay"] * taken
        moves = matrices.reshape(whole.shape)
        if like is not None:
            moves = scatter(moves, like, parts.shape[:-2].numel())
        for (weight, _, _), move in zip(stacks, moves.reshape(parts.shape), strict=True):
            move = move.to(weight.dtype)
            weight.mul_(kept).add_(move * (-group["lr"] * scale * taken))


def rows_of(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_cut(weight: Tensor) -> bool:
    """Whether a process holds parts of matrices of a parameter (..., m, n)."""
    placements = weight.placements if isinstance(weight, DTensor) else ()
    return any(p.is_shard() and p.dim >= weight.ndim - 2 for p in placements)


def gather(parts: Tensor, like: DTensor) -> Tensor:
    """Exchanges parts (B, m, n) of B matrices, cut like the DTensor's, for unsharded matrices, of
    which each process gets its share of the B. All processes call it."""
    cut, apart = placements(like)
    return exchange(parts, like, len(parts), (cut, apart))


def scatter(whole: Tensor, like: DTensor, count: int) -> Tensor:
    """The reverse of `gather`: exchanges unsharded matrices, of `count` in all, for parts."""
    cut, apart = placements(like)
    return exchange(whole, like, count, (apart, cut))


def placements(like: DTensor) -> tuple[list[Placement], list[Placement]]:
    """How a batch (B, m, n) is placed when its matrices are cut like the DTensor's, and when every
    process has some matrices unsharded."""
    cut = [Shard(p.dim - like.ndim + 3) if p.is_shard() else p for p in like.placements]
    return cut, [Shard(0) if p.is_shard() else p for p in like.placements]


def exchange(
    own: Tensor, like: DTensor, count: int, how: tuple[list[Placement], list[Placement]]
) -> Tensor:
    """This process's part of a batch of `count` matrices after a change of placements."""
    m, n = like.shape[-2:]
    batch = DTensor.from_local(
        own, like.device_mesh, how[0], shape=torch.Size((count, m, n)), stride=(m * n, n, 1)
    )
    return batch.redistribute(placements=how[1]).to_local()
