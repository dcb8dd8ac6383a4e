"""The optimizer `muon`: orthogonalised updates for hidden matrices, AdamW for all other parameters.

    matrices = {"params": [qkv, up, down], "num_chunks": [3, 1, 1], "momentum": 0.95}
    optimizer = MuonAdamW([matrices, {"params": others}], lr=1e-3, fused=True)

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Moonlight (arXiv
2502.16982, equation 4), which makes AdamW's learning rate and weight decay suitable for Muon.
Matrices of one shape, from all layers and experts, are orthogonalised in one batched product.

Under FSDP2 each process updates the experts that it holds unsharded. Of matrices that are sharded
along m or n, the processes exchange shards, in the precision of the products, so that each gets an
equal number of unsharded matrices, and then exchange the results back.

Shape legend: B parameters or shards in a batch, m x n the shape of a matrix
"""

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from options.parts import option
from runtime.devices import DTYPES
from training.engines.state import rows_of
from training.optimizers import OPTIMIZERS, Optimizer

# On the CPU, an exchange of shards gathers all of them, and DTensor would print a warning.
logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)

ITERATIONS = 5
QUINTIC = [(3.4445, -4.7750, 2.0315)]  # Jordan's coefficients of the Newton-Schulz iteration
BATCH = 2**25  # largest number of elements in a batched product; bounds the extra memory
CACHED = 2**18  # the same on a CPU, whose cache then holds the matrices between the iterations
Stack = tuple[Tensor, Tensor, Tensor]  # weight (..., m, n), gradient and momentum


class MuonAdamW(torch.optim.AdamW):
    """Muon for parameter groups with "num_chunks", AdamW for the other groups.

    num_chunks is the number of matrices that are fused along the rows of each parameter. A
    parameter (..., m, n) is a stack of matrices. It may be a part of a stack, such as the experts
    of one process. As for the fused AdamW, a `found_inf` of 1 on the device disables a step.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict], *, dtype: torch.dtype = torch.bfloat16, **options):
        from timm.optim.muon import zeropower_via_newtonschulz  # imported here: takes two seconds

        super().__init__(groups, **options)
        self.orthogonalize, self.dtype = zeropower_via_newtonschulz, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert getattr(self, "grad_scale", None) is None, "gradients have to be unscaled before"
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "num_chunks" not in group]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "num_chunks" in group:
                for stacks, like, chunks in self.batches(group):
                    self.move(stacks, like, chunks, group)

    def batches(self, group: dict) -> Iterator[tuple[list[Stack], DTensor | None, int]]:
        """Yields batches of this process: (stacks of one shape, DTensor, number of chunks).

        The DTensor is sharded in the same way as the matrices; None for unsharded matrices.
        """
        by_shape: dict[tuple, tuple[list[Stack], DTensor | None, int, int]] = {}
        for weight, chunks in zip(group["params"], group["num_chunks"], strict=True):
            if weight.grad is None:
                continue
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            local = [rows_of(t) for t in (weight, weight.grad, self.state[weight]["momentum"])]
            like = weight if is_cut(weight) else None
            most = CACHED if like is None and weight.device.type == "cpu" else BATCH
            numel = max(1, weight.shape[-2:].numel())  # of a matrix; that of a shard may be 0
            count = max(1, most // numel)
            stacks = (
                [local] if weight.ndim == 2 else zip(*(t.split(count) for t in local), strict=True)
            )
            for stack in stacks:
                if like is not None or len(stack[0]):
                    sharding = like is not None and (weight.shape, like.placements)
                    key = chunks, stack[0].shape, sharding
                    size = numel * (1 if weight.ndim == 2 else len(stack[0]))
                    batch = by_shape.setdefault(key, ([], like, chunks, max(1, most // size)))
                    batch[0].append(tuple(stack))
        for stacks, like, chunks, count in by_shape.values():
            for first in range(0, len(stacks), count):
                yield stacks[first : first + count], like, chunks

    def move(self, stacks: list[Stack], like: DTensor | None, chunks: int, group: dict) -> None:
        """Updates stacks of one shape, whose rows fuse `chunks` matrices; see `batches`."""
        beta, skipped, taken, directions = group["momentum"], self.found_inf, 1.0, []
        if skipped is not None:
            taken = 1 - skipped
        for _, grad, momentum in stacks:
            if skipped is not None:
                grad = grad.where(skipped == 0, 0.0)
            momentum.lerp_(grad, taken * (1 - beta))
            directions.append(grad.lerp(momentum, beta).to(self.dtype))
        shards = torch.stack(directions)  # (B, ..., m, n), or this process's shards of them
        whole = shards.flatten(0, -3)
        if like is not None:
            whole = exchange(whole, like, len(whole))
        matrices = whole.unflatten(-2, (chunks, -1)).flatten(0, -3)
        if len(matrices):
            matrices = self.orthogonalize(matrices, ITERATIONS, QUINTIC, dtype=self.dtype)
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        kept = 1 - group["lr"] * group["weight_decay"] * taken
        moves = matrices.reshape(whole.shape)
        if like is not None:
            moves = exchange(moves, like, shards.shape[:-2].numel(), back=True)
        for (weight, _, _), move in zip(stacks, moves.reshape(shards.shape), strict=True):
            move = move.to(weight.dtype)
            weight.mul_(kept).add_(move * (-group["lr"] * scale * taken))


def is_cut(weight: Tensor) -> bool:
    """Returns whether the matrices of a parameter (..., m, n) are sharded, along m or n."""
    placements = weight.placements if isinstance(weight, DTensor) else ()
    return any(p.is_shard() and p.dim >= weight.ndim - 2 for p in placements)


def exchange(local: Tensor, like: DTensor, count: int, *, back: bool = False) -> Tensor:
    """Exchanges shards of `count` matrices (m, n), which are sharded like the DTensor's, for an
    equal number of unsharded matrices per process, or with `back` the reverse; all processes call
    it.
    """
    m, n = like.shape[-2:]
    sharded = [Shard(p.dim - like.ndim + 3) if p.is_shard() else p for p in like.placements]
    unsharded = [Shard(0) if p.is_shard() else p for p in like.placements]
    before, after = (unsharded, sharded) if back else (sharded, unsharded)
    batch = DTensor.from_local(
        local, like.device_mesh, before, shape=torch.Size((count, m, n)), stride=(m * n, n, 1)
    )
    return batch.redistribute(placements=after).to_local()


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for the rest; see `MuonAdamW`."""

    momentum: float = option(0.95, help="Nesterov momentum of hidden matrices", ge=0, lt=1)
    betas: tuple[float, float] = option(
        (0.9, 0.95), help="betas of AdamW, for all other parameters", ge=0, lt=1
    )
    weight_decay: float = option(0.0, help="weight decay", ge=0)
    precision: str = option(
        "bf16", choices=("bf16", "fp32"), help="precision of the products that orthogonalise"
    )

    def make(
        self, named: Mapping[str, nn.Parameter], lr: float, matrices: Mapping[str, int]
    ) -> torch.optim.Optimizer:
        hidden = [name for name in named if matrices.get(name)]
        groups = [
            {"params": [named[name] for name in hidden],
             "num_chunks": [matrices[name] for name in hidden], "momentum": self.momentum},
        ]  # fmt: skip
        # By device mesh, because a fused step requires DTensors of one mesh.
        others: dict[object, list[nn.Parameter]] = {}
        for name, weight in named.items():
            if not matrices.get(name):
                others.setdefault(getattr(weight, "device_mesh", None), []).append(weight)
        groups += [{"params": weights} for weights in others.values()]
        return MuonAdamW(
            [group for group in groups if group["params"]], lr=lr, betas=self.betas,
            weight_decay=self.weight_decay, fused=True, dtype=DTYPES[self.precision],
        )  # fmt: skip


OPTIMIZERS["muon"] = Muon
