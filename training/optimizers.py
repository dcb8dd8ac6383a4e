"""Optimizers: each class in `OPTIMIZERS` makes a torch optimizer for a model.

    named = dict(model.named_parameters())
    optimizer = AdamW(weight_decay=0.1).make(named, 1e-4, hidden_matrices(model))

To add an optimizer, write a subclass of `Optimizer` with `make`, and add it to `OPTIMIZERS`. `make`
decides the parameter groups and their learning rates, which the schedule multiplies. Saving,
resuming and the memory plan handle a state of tensors, numbers and text by parameter; under
--shard, state tensors must have the shape of their parameter.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import nn

from checkpoints.costs import FakeTensorMode
from models import DiT, embedder_of
from moe import SparseMoEBlock
from options.parts import Component, Registry, option
from runtime.errors import reported_as

State = dict[str, dict[str, object]]  # state of an optimizer, by parameter and name


class Optimizer(Component, ABC):
    """Base class of optimizers."""

    # Whether the update of an element depends only on its own gradient. A process then updates its
    # shard of a weight as a plain tensor. Other optimizers get DTensors under --shard.
    is_elementwise = False

    @abstractmethod
    def make(
        self, named: Mapping[str, nn.Parameter], lr: float, matrices: Mapping[str, int]
    ) -> torch.optim.Optimizer:
        """Makes the torch optimizer of these parameters.

        named: parameters by name; fake tensors to plan the state
        matrices: see `hidden_matrices`
        """


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    The published recipe uses no weight decay.
    """

    is_elementwise = True

    betas: tuple[float, float] = option(
        (0.9, 0.999), help="decay rates of the gradient's mean and mean square", ge=0, lt=1
    )
    weight_decay: float = option(0.0, help="weight decay", ge=0)
    eps: float = option(1e-8, help="added to the root of the mean square", gt=0)
    decay_vectors: bool = option(
        True, help="also apply weight decay to vectors, such as biases and the weights of norms"
    )

    def make(
        self, named: Mapping[str, nn.Parameter], lr: float, matrices: Mapping[str, int]
    ) -> torch.optim.Optimizer:
        groups = [{"params": list(named.values())}]
        if not self.decay_vectors:
            vectors = [weight for name, weight in named.items() if name not in matrices]
            others = [weight for name, weight in named.items() if name in matrices]
            groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=lr, betas=self.betas, eps=self.eps,
            weight_decay=self.weight_decay, fused=True,
        )  # fmt: skip


OPTIMIZERS = Registry({"adamw": AdamW}, elsewhere={"muon": "extras.muon"})


def hidden_matrices(model: DiT) -> dict[str, int]:
    """Returns the number of hidden matrices in each parameter that is no vector.

    The weight (m, n) of a linear layer is one, or as many of equal size, one below the other, as a
    module around it declares in `matrices`: 3 (queries, keys and values), 6 (the modulations of a
    block). For a weight (E, m, n), which `Experts` declares, this is the number per expert. It is 0
    for embeddings, gates, the first and the last layer. Other parameters of a module of its own are
    vectors, unless declared.
    """
    hidden = ("t_embedder.", "blocks.", *(f"{embedder_of(name)}." for name in model.conditions))
    found: dict[str, int] = {}
    declared: dict[str, int] = {}
    for prefix, module in model.named_modules():
        counts = getattr(module, "matrices", {})
        if isinstance(module, SparseMoEBlock):
            sizes = {**module.experts.per_expert, **module.experts.shared}
            counts = {f"experts.{name}": count for name, count in sizes.items() if count}
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            name = f"{prefix}.weight"
            found[name] = int(isinstance(module, nn.Linear) and name.startswith(hidden))
        declared |= {f"{prefix}.{name}": count for name, count in counts.items()}
    found |= declared
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def planned_state(
    optimizer: Optimizer, shapes: Mapping[str, torch.Size], matrices: Mapping[str, int]
) -> State:
    """Returns the state that an optimizer creates for fp32 parameters of these shapes.

    They come from a step with fake tensors, with one parameter of each shape, or, if the optimizer
    needs data, from one step per shape. Raises UserError for a state that no checkpoint can hold.
    """
    # The rows of a shard may not be divisible into chunks.
    matrices = {name: min(count, 1) for name, count in matrices.items()}
    kinds = {name: (tuple(shape), matrices.get(name)) for name, shape in shapes.items()}
    one_each = {kind: name for name, kind in kinds.items()}
    state = state_of_kinds(optimizer, tuple((name, *kind) for kind, name in one_each.items()))
    for name, kept in state.items():
        for key, value in kept.items():
            if not torch.is_tensor(value):
                got = (
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key} for {name}"
                )
                expected = "a tensor, numbers or text, which a checkpoint can hold"
                with reported_as(f"--optimizer: {got}, expected {expected}", TypeError):
                    json.dumps(value)
    return {name: state[one_each[kind]] for name, kind in kinds.items()}


@lru_cache(maxsize=64)  # the plans of memory, of a save and of the disk ask for the same
def state_of_kinds(
    optimizer: Optimizer, kinds: tuple[tuple[str, tuple[int, ...], int | None], ...]
) -> State:
    """Returns the state of parameters with these names, shapes and numbers of matrices."""
    shapes = {name: torch.Size(shape) for name, shape, _ in kinds}
    matrices = {name: count for name, _, count in kinds if count is not None}
    try:
        with FakeTensorMode():
            return state_after_step(optimizer, shapes, matrices)
    except Exception:  # fake tensors have no data, and do not mix with real ones
        state = {}
        for name, shape in shapes.items():
            real = state_after_step(optimizer, {name: shape}, matrices)[name]
            state[name] = {
                k: v.to("meta") if torch.is_tensor(v) and v.dim() else v for k, v in real.items()
            }
        return state


def state_after_step(
    optimizer: Optimizer, shapes: Mapping[str, torch.Size], matrices: Mapping[str, int]
) -> State:
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    for weight in named.values():
        weight.grad = torch.zeros_like(weight)
    made = optimizer.make(named, 1.0, matrices)
    made.step()
    return {name: dict(made.state[weight]) for name, weight in named.items()}
