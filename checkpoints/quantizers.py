"""Quantised experts, for inference: the table of the kinds of --quantize.

quantizer("int8").convert(state_dict, config)      # quantises the experts of a state dict
quantizer_of(state_dict)                           # the one whose weights it has, or None
"""

from typing import Protocol

from torch import Tensor, nn

from models import DiT, DiTConfig
from options.parts import Registry
from runtime.errors import UserError


class Quantizer(Protocol):
    """A kind of quantised experts."""

    name: str

    def is_in(self, state_dict: dict[str, Tensor]) -> bool:
        """Returns whether the experts of a state dict are quantised in this way."""

    def convert(self, state_dict: dict[str, Tensor], config: DiTConfig) -> None:
        """Quantises the experts of a state dict in place, one weight at a time."""

    def replace_experts(self, model: nn.Module) -> None:
        """Replaces the experts of every sparse layer by quantised ones, also on the meta device."""

    def describe(self, model: DiT) -> str:
        """Describes in one line which weights are quantised, and which are not."""


QUANTIZERS = Registry(elsewhere=dict.fromkeys(("int8", "int4"), "extras.quantized"))


def quantizer(name: str) -> Quantizer:
    if name not in QUANTIZERS:
        known = ", ".join(QUANTIZERS) or "none, because extras/ is absent"
        raise UserError(f"--quantize: got {name}, expected one of {known}")
    return QUANTIZERS[name]


def quantizer_of(state_dict: dict[str, Tensor]) -> Quantizer | None:
    """Returns the quantiser of the experts in a state dict; None if they are not quantised."""
    return next((one for one in QUANTIZERS.values() if one.is_in(state_dict)), None)
