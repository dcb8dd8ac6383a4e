"""Changes to the experts of a model while it samples."""

import math
from functools import partial

from torch import Tensor

from models import DiT
from moe import Experts
from routers import Router, Routing


class DropSmall:
    """Forward hook of a router that leaves out the rows whose weight is below `min_weight`."""

    def __init__(self, min_weight: float):
        self.min_weight, self.rows_per_token = min_weight, []

    def __call__(self, router: Router, args: tuple[Tensor], routing: Routing) -> Routing:
        kept = (routing.weight >= self.min_weight).nonzero().squeeze(1)
        self.rows_per_token.append(len(kept) / math.prod(args[0].shape[:2]))
        token, expert, weight = routing.token[kept], routing.expert[kept], routing.weight[kept]
        rows = {"token": token, "expert": expert, "weight": weight}
        return routing._replace(**rows, per_token=0, is_even=False)


class Reuse:
    """Lets routed experts compute in every `every`-th pass of a batch, and repeat their output."""

    def __init__(self, model: DiT, every: int):
        self.every, self.passes, self.time = every, 0, -math.inf
        self.layers = [block.moe.experts for block in model.blocks if block.moe is not None]
        self.handle = model.register_forward_pre_hook(self.start_pass)
        for experts in self.layers:
            experts.forward = partial(self.forward, experts, {})

    def start_pass(self, model: DiT, inputs: tuple) -> None:
        """Counts the passes; the time only grows when the next batch begins."""
        time = inputs[1][0].item()
        self.passes = 0 if time > self.time else self.passes + 1
        self.time = time

    def forward(self, experts: Experts, kept: dict, x: Tensor, routing: Routing) -> Tensor:
        # Guidance in a part of the time changes the size of the batch.
        if self.passes % self.every == 0 or kept["output"].shape != x.shape:
            kept["output"] = type(experts).forward(experts, x, routing)
        return kept["output"]

    def remove(self) -> None:
        self.handle.remove()
        for experts in self.layers:
            del experts.forward
