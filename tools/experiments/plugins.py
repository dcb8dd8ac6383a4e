"""Components that only experiments use; pass this file to --plugin of train.py.

rounded_adamw   AdamW on weights in bf16, with fp32 moments
nucleus         expert choice as in Nucleus-Image
"""

import torch
from torch import Tensor

from options.parts import option
from routers import ROUTERS, Context, ExpertChoiceRouter, Routing
from training.optimizers import OPTIMIZERS, AdamW


class RoundedAdamW(AdamW):
    """AdamW whose weights are rounded to bf16 before and after each step, as bf16 master weights.

    An update below half the distance to the next number in bf16, 0.2% to 0.4% of the weight, is
    lost. Gradients and moments stay in fp32.
    """

    def make(self, named, lr, matrices) -> torch.optim.Optimizer:
        optimizer = super().make(named, lr, matrices)
        optimizer.register_step_pre_hook(round_weights)
        optimizer.register_step_post_hook(round_weights)
        return optimizer


@torch.no_grad()
def round_weights(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.copy_(weight.bfloat16())


class NucleusRouter(ExpertChoiceRouter):
    """Expert choice whose weights of a token sum to `scale` (Nucleus-Image, arXiv 2604.12163).

    With --router nucleus:input=normalised_time, the router of Nucleus-Image.
    """

    scale: float = option(2.5, help="sum of the weights of a token that has an expert", gt=0)

    def forward(self, x: Tensor, context: Context) -> Routing:
        routing = super().forward(x, context)
        total = routing.weight.new_zeros(x.shape[0] * x.shape[1])  # (S,)
        total = total.index_add(0, routing.token, routing.weight)
        weight = self.scale * routing.weight / total[routing.token]
        return routing._replace(weight=weight)


OPTIMIZERS["rounded_adamw"] = RoundedAdamW
ROUTERS["nucleus"] = NucleusRouter
