"""Muon: hidden matrices move by their gradient's nearest orthogonal matrix, the rest by AdamW.

    matrices = {"params": [qkv, up, down], "cuts": [3, 1, 1], "momentum": 0.95}
    optimizer = MuonAdamW([matrices, {"params": others}], lr=1e-3, fused=True)

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Moonlight (arXiv
2502.16982, equation 4), by which AdamW's rates and decay carry over. Matrices of one shape, of
whatever layer and expert, are one batched product.

Shape legend: B matrices of a batch, m x n the shape of a matrix
"""

from collections.abc import Iterator

import torch
from torch import Tensor

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

    def __setstate__(self, state: dict) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's would ask matrices for a step

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
                for cut, stacks in self.batches(group):
                    self.move(stacks, cut, group)

    def batches(self, group: dict) -> Iterator[tuple[int, list[Stack]]]:
        """What moves together: stacks of one shape, and the cut of their rows."""
        alike: dict[tuple, list[Stack]] = {}
        for weight, cut in zip(group["params"], group["cuts"], strict=True):
            if weight.grad is None:
                continue
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            tensors = (weight, weight.grad, self.state[weight]["momentum"])
            count = len(weight) if weight.ndim == 2 else max(1, BATCH // weight[0].numel())
            for stack in zip(*(tensor.split(count) for tensor in tensors), strict=True):
                alike.setdefault((cut, stack[0].shape), []).append(stack)
        for (cut, shape), stacks in alike.items():
            count = max(1, BATCH // shape.numel())
            for first in range(0, len(stacks), count):
                yield cut, stacks[first : first + count]

    def move(self, stacks: list[Stack], cut: int, group: dict) -> None:
        """Takes a step of the matrices in stacks of one shape, whose rows are cut into `cut`."""
        beta, skipped, taken, directions = group["momentum"], self.found_inf, 1.0, []
        if skipped is not None:
            taken = 1 - skipped
        for _, grad, momentum in stacks:
            if skipped is not None:
                grad = grad.where(skipped == 0, 0.0)
            momentum.lerp_(grad, taken * (1 - beta))
            matrices = grad.lerp(momentum, beta).unflatten(-2, (cut, -1)).flatten(0, -3)
            directions.append(matrices.to(self.dtype))
        directions = torch.cat(directions)  # (B, m, n)
        directions = self.orthogonalize(directions, ITERATIONS, QUINTIC, dtype=self.dtype)
        scale = 0.2 * max(directions.shape[-2:]) ** 0.5
        kept = 1 - group["lr"] * group["weight_decay"] * taken
        moves = directions.chunk(len(stacks))
        for (weight, _, _), move in zip(stacks, moves, strict=True):
            move = move.reshape(weight.shape).to(weight.dtype)
            weight.mul_(kept).add_(move * (-group["lr"] * scale * taken))
