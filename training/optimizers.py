"""Optimizers: each is a class in `OPTIMIZERS` that makes a torch optimizer for a model.

    named = dict(model.named_parameters())
    optimizer = AdamW(weight_decay=0.1).make(named, 1e-4, model.matrices())

To add one: a subclass of `Optimizer` with `make`, and its name in `OPTIMIZERS`. What it keeps of
each parameter is saved, resumed, checked and planned for whatever it is. Its groups and their rates
are its own; the schedule multiplies them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import nn

from parts import Part, option
from runtime.devices import DTYPES

State = dict[str, dict[str, object]]  # what an optimizer keeps, by parameter and name


class Optimizer(Part, ABC):
    """How weights follow their gradients."""

    # Whether a number of a weight moves by its own gradient only, so that a process can move its
    # shard of a weight as a plain tensor. Other optimizers get DTensors under --shard.
    is_elementwise = False

    @abstractmethod
    def make(
        self, named: Mapping[str, nn.Parameter], lr: float, matrices: Mapping[str, int]
    ) -> torch.optim.Optimizer:
        """Makes the optimizer of these parameters; on the device "meta" it is planned with.

        matrices: which of them are hidden matrices, and their number in the rows of a parameter,
            see `DiT.matrices`
        """


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); the published recipe has no decay."""

    is_elementwise = True

    betas: tuple[float, float] = option(
        (0.9, 0.999), help="decay rates of the gradient's mean and square", least=0, below=1
    )
    weight_decay: float = option(0.0, help="weight decay", least=0)
    eps: float = option(1e-8, help="added to the root of the mean square", above=0)
    decay_vectors: bool = option(
        True, help="decay parameters with one dimension too, such as biases and norms"
    )

    def make(
        self, named: Mapping[str, nn.Parameter], lr: float, matrices: Mapping[str, int]
    ) -> torch.optim.Optimizer:
        groups = [{"params": list(named.values())}]
        if not self.decay_vectors:
            vectors = [weight for weight in named.values() if weight.ndim < 2]
            others = [weight for weight in named.values() if weight.ndim >= 2]
            groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=lr, betas=self.betas, eps=self.eps,
            weight_decay=self.weight_decay, fused=is_real(named),
        )  # fmt: skip


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for the rest; see training/muon.py."""

    momentum: float = option(0.95, help="Nesterov momentum of hidden matrices", least=0, below=1)
    betas: tuple[float, float] = option(
        (0.9, 0.95), help="AdamW's, for what is no hidden matrix", least=0, below=1
    )
    weight_decay: float = option(0.0, help="weight decay", least=0)
    precision: str = option(
        "bf16", choices=("bf16", "fp32"), help="precision of the products that orthogonalise"
    )

    def make(
        self, named: Mapping[str, nn.Parameter], lr: float, matrices: Mapping[str, int]
    ) -> torch.optim.Optimizer:
        from training.muon import MuonAdamW

        hidden = [name for name in named if name in matrices]
        groups = [
            {"params": [named[name] for name in hidden], "cuts": [matrices[n] for n in hidden],
             "momentum": self.momentum},
        ]  # fmt: skip
        others: dict[object, list[nn.Parameter]] = {}  # a fused step takes DTensors of one mesh
        for name, weight in named.items():
            if name not in matrices:
                others.setdefault(getattr(weight, "device_mesh", None), []).append(weight)
        groups += [{"params": weights} for weights in others.values()]
        return MuonAdamW(
            [group for group in groups if group["params"]], lr=lr, betas=self.betas,
            weight_decay=self.weight_decay, fused=is_real(named), dtype=DTYPES[self.precision],
        )  # fmt: skip


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon}


def is_real(named: Mapping[str, nn.Parameter]) -> bool:
    """Whether the parameters have data, so that a fused optimizer can be made of them."""
    return all(weight.device.type != "meta" for weight in named.values())


def planned_state(
    optimizer: Optimizer, shapes: Mapping[str, torch.Size], matrices: Mapping[str, int]
) -> State:
    """What an optimizer will keep of fp32 parameters of these shapes, as tensors without data.

    It takes a step on the device "meta", or where it reads its numbers a real one, of one parameter
    at a time.
    """
    matrices = dict.fromkeys(matrices, 1)  # a process's rows cannot always be cut as the whole is
    with suppress(RuntimeError, NotImplementedError):  # what a tensor without data raises
        return state_after_step(optimizer, shapes, matrices, "meta")
    state: State = {}
    for name, shape in shapes.items():
        kept = state_after_step(optimizer, {name: shape}, matrices, "cpu")[name].items()
        state[name] = {k: v.to("meta") if torch.is_tensor(v) and v.dim() else v for k, v in kept}
    return state


def state_after_step(
    optimizer: Optimizer, shapes: Mapping[str, torch.Size], matrices: Mapping[str, int], device: str
) -> State:
    named = {name: nn.Parameter(torch.zeros(s, device=device)) for name, s in shapes.items()}
    for weight in named.values():
        weight.grad = torch.zeros_like(weight)
    made = optimizer.make(named, 1.0, matrices)
    made.step()
    return {name: dict(made.state[weight]) for name, weight in named.items()}
