"""Quantised experts, for inference, in place of those of a finished model.

    quantize_experts(model, "int8")

They store integers and scales (moe_kernels/quantized.py); biases stay as they are.
"""

from torch import Tensor, nn

from moe import Experts, SparseMoEBlock
from moe_kernels.quantized import QuantizedWeight, quantize


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

    def weight(self, name: str) -> Tensor | QuantizedWeight | None:
        if name.endswith("_bias"):
            return super().weight(name)
        return QuantizedWeight(getattr(self, name), getattr(self, f"{name}_scale"))


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
