"""Muon: hidden matrices move by their gradient's nearest orthogonal matrix, the rest by AdamW.

    matrices = {"params": [qkv, up, down], "cuts": [3, 1, 1], "momentum": 0.95}
    optimizer = MuonAdamW([matrices, {"params": others}], lr=1e-3, fused=True)

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Moonlight (arXiv
2502.16982, equation 4), by which AdamW's rates and decay carry over. Matrices of one shape, of
whatever layer and expert, are one batched product.

Under FSDP2 a process moves the experts that it holds. Of other matrices it holds some rows: those
of a batch are gathered at once, in the precision of the products, and of the result it keeps its
own.

Shape legend: B parameters or parts of one in a batch, m x n the shape of a matrix
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

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

    def batches(self, group: dict) -> Iterator[tuple[list[Stack], Tensor, int]]:
        """Yields stacks of one shape that this process has, a tensor like one of them (a DTensor
        where other processes have the other rows), and into how many matrices its rows are cut."""
        alike: dict[tuple, tuple[list[Stack], Tensor, int]] = {}
        for weight, cut in zip(group["params"], group["cuts"], strict=True):
            if weight.grad is None:
                continue
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            own = [rows_of(t) for t in (weight, weight.grad, self.state[weight]["momentum"])]
            if weight.ndim == 2:
                alike.setdefault((cut, weight.shape), ([], weight, cut))[0].append(tuple(own))
                continue
            count = max(1, BATCH // weight.shape[1:].numel())
            for stack in zip(*(tensor.split(count) for tensor in own), strict=True):
                if len(stack[0]):
                    alike.setdefault((cut, stack[0].shape), ([], stack[0], cut))[0].append(stack)
        for stacks, like, cut in alike.values():
            count = max(1, BATCH // like.numel())
            for first in range(0, len(stacks), count):
                yield stacks[first : first + count], like, cut

    def move(self, stacks: list[Stack], like: Tensor, cut: int, group: dict) -> None:
        """Takes a step of stacks of one shape, each row of matrices cut into `cut`."""
        beta, skipped, taken, directions = group["momentum"], self.found_inf, 1.0, []
        if skipped is not None:
            taken = 1 - skipped
        for _, grad, momentum in stacks:
            if skipped is not None:
                grad = grad.where(skipped == 0, 0.0)
            momentum.lerp_(grad, taken * (1 - beta))
            directions.append(grad.lerp(momentum, beta).to(self.dtype))
        whole = gather(torch.stack(directions), like)  # (B, ..., m, n)
        matrices = whole.unflatten(-2, (cut, -1)).flatten(0, -3)
        matrices = self.orthogonalize(matrices, ITERATIONS, QUINTIC, dtype=self.dtype)
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        kept = 1 - group["lr"] * group["weight_decay"] * taken
        moves = scatter(matrices.reshape(whole.shape), like)
        for (weight, _, _), move in zip(stacks, moves, strict=True):
            move = move.to(weight.dtype)
            weight.mul_(kept).add_(move * (-group["lr"] * scale * taken))


def rows_of(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_of(like: DTensor) -> list[Placement]:
    """How a batch (B, m, n) of matrices like a DTensor (m, n) is cut over the processes."""
    return [Shard(1) if placement.is_shard() else placement for placement in like.placements]


def gather(rows: Tensor, like: Tensor) -> Tensor:
    """Whole matrices (B, m, n) of what this process has of each; all processes call it."""
    if not isinstance(like, DTensor):
        return rows
    shape, stride = (len(rows), *like.shape), (like.numel(), *like.stride())
    return DTensor.from_local(
        rows, like.device_mesh, cut_of(like), shape=torch.Size(shape), stride=stride
    ).full_tensor()


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """What this process has of whole matrices (B, m, n): the reverse of `gather`."""
    if not isinstance(like, DTensor):
        return whole
    everywhere = [Replicate()] * like.device_mesh.ndim
    whole = DTensor.from_local(whole, like.device_mesh, everywhere)
    return whole.redistribute(placements=cut_of(like)).to_local()
