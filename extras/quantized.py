"""Experts in int8 or int4, for inference, in place of those of a finished model.

    quantize_experts(model, "int8")

They store integers and scales (moe_kernels/quantized.py); biases stay as they are.
"""

import re
from dataclasses import dataclass

from torch import Tensor, nn

from checkpoints.meta import meta_model
from checkpoints.quantizers import QUANTIZERS, quantizer_of
from models import DiT, DiTConfig
from moe import Experts, ExpertWeights, SparseMoEBlock
from moe_kernels.quantized import KINDS, QuantizedWeight, quantize
from runtime.errors import UserError, reported_as


class QuantizedExperts(Experts):
    """Experts whose matrices are stored as integers with scales, for inference only.

    The parameter NAME of a matrix is replaced by the buffers NAME (integers) and NAME_scale.
    """

    def __init__(self, experts: Experts, kind: str):
        nn.Module.__init__(self)
        self.backend, matrices = experts.backend, matrices_to_quantize(experts)
        for name, parameter in experts.named_parameters():
            if name in matrices:
                weight = quantize(parameter, kind)
                self.register_buffer(name, weight.values)
                self.register_buffer(f"{name}_scale", weight.scale)
            else:
                self.register_parameter(name, parameter)

    def weights(self) -> ExpertWeights:
        stored, up = super().weights(), "gate_up" if hasattr(self, "gate_up_proj") else "up"
        return stored._replace(
            up_proj=QuantizedWeight(stored.up_proj, getattr(self, f"{up}_proj_scale")),
            down_proj=QuantizedWeight(stored.down_proj, self.down_proj_scale),
        )


def matrices_to_quantize(experts: Experts) -> list[str]:
    """Returns the names of the matrices that quantisation replaces."""
    if type(experts) is not Experts or experts.shared:
        raise ValueError(
            f"got {type(experts).__name__} with the parameters "
            f"{', '.join(name for name, _ in experts.named_parameters())}; expected those of "
            "moe.Experts, because only their products are computed with integers"
        )
    return [name for name, _ in experts.named_parameters() if experts.per_expert[name]]


def quantize_experts(model: nn.Module, kind: str) -> None:
    """Replaces the experts of every sparse layer by quantised ones; kind: int8 or int4."""
    for module in list(model.modules()):
        if isinstance(module, SparseMoEBlock):
            module.experts = QuantizedExperts(module.experts, kind)


@dataclass(frozen=True)
class IntegerQuantizer:
    """int8 or int4; see `checkpoints.quantizers.Quantizer`."""

    name: str

    def is_in(self, state_dict: dict[str, Tensor]) -> bool:
        stored = (name for name in state_dict if f"{name}_scale" in state_dict)
        return any(KINDS.get(state_dict[name].dtype) == self.name for name in stored)

    def convert(self, state_dict: dict[str, Tensor], config: DiTConfig) -> None:
        names: list[str] = []
        for prefix, module in meta_model(config).named_modules():
            if isinstance(module, SparseMoEBlock):
                with reported_as(f"--quantize: got {self.name}", ValueError):
                    matrices = matrices_to_quantize(module.experts)
                names += [f"{prefix}.experts.{name}" for name in matrices]
        names = [name for name in names if name in state_dict]
        stored = quantizer_of(state_dict)
        if not names or stored not in (None, self):
            expected = (
                f"{stored.name}, as the file stores them" if names else "a model with experts"
            )
            raise UserError(f"--quantize: got {self.name}, expected {expected}")
        for name in names if stored is None else ():
            try:
                weight = quantize(state_dict.pop(name), self.name)
            except ValueError as error:
                raise UserError(f"--quantize: {error} ({name})") from None
            state_dict |= {name: weight.values, f"{name}_scale": weight.scale}

    def replace_experts(self, model: nn.Module) -> None:
        quantize_experts(model, self.name)

    def describe(self, model: DiT) -> str:
        sizes: dict[str, int] = {}
        for name, weight in model.state_dict().items():
            part = re.sub(r"blocks\.\d+\.", "", name)
            if not part.startswith("moe.experts."):
                part = re.match(r"moe\.\w+|\w+", part)[0].removeprefix("moe.")
                sizes[part] = sizes.get(part, 0) + weight.numel()
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        rest = ", ".join(sorted(sizes, key=sizes.get, reverse=True))
        return f"experts in {self.name}; not quantised, in {dtype}: {rest}"


QUANTIZERS.update({kind: IntegerQuantizer(kind) for kind in ("int8", "int4")})
