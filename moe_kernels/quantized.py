"""Expert weights as integers of 8 or 4 bits and scales, for inference.

    weight = quantize(up_proj, "int8")         # (E, O, I) in any floating-point type
    weight[0].to(torch.bfloat16)               # expert 0, dequantised: (O, I)

Quantisation is symmetric: w = scale * q, with |q| <= 127 (int8) or 7 (int4). An int8 weight has one
scale for each expert and output row; an int4 weight has one for each 32 inputs of a row, and stores
q + 8 for two inputs in a byte, the first input in the low half. A scale is a number that bf16 and
fp16 both represent exactly, so casting a model does not change its quantised weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32  # inputs that share a scale in int4
LARGEST = {"int8": 127, "int4": 7}
FINEST = 2**-24  # smallest positive number of fp16
KINDS = {torch.int8: "int8", torch.uint8: "int4"}  # by the type of the stored values


@dataclass(frozen=True)
class QuantizedWeight:
    """Quantised matrices (..., O, I). Indexing by an expert returns the matrix of that expert."""

    values: Tensor  # (..., O, I) int8, or (..., O, I / 2) uint8
    scale: Tensor  # (..., O, 1), or (..., O, I / 32) for int4

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised matrices."""
        *sizes, stored = self.values.shape
        return (*sizes, stored if self.values.dtype == torch.int8 else 2 * stored)

    def __getitem__(self, expert: int) -> "QuantizedWeight":
        return QuantizedWeight(self.values[expert], self.scale[expert])

    def __len__(self) -> int:
        return len(self.values)

    def to(self, dtype: torch.dtype) -> Tensor:
        """Dequantises the weights; each weight is rounded once, to dtype."""
        scale = self.scale.to(dtype)
        if self.values.dtype == torch.int8:
            return self.values.to(dtype) * scale
        pairs = torch.stack([self.values & 15, self.values >> 4], dim=-1)   # (..., O, I / 2, 2)
        q = pairs.flatten(-2).unflatten(-1, (-1, GROUP)).to(dtype) - 8      # (..., O, I / 32, 32)
        return (q * scale[..., None]).flatten(-2)


def quantize(weight: Tensor, kind: str) -> QuantizedWeight:
    """Quantises expert weights (E, O, I), one expert at a time to save memory.

    On the meta device only the shapes are computed. int4 requires that 32 divides I. Weights whose
    scale exceeds fp16 are refused.
    """
    experts, outputs, inputs = weight.shape
    if kind == "int4" and inputs % GROUP:
        raise ValueError(f"int4: got {inputs} inputs, expected a multiple of {GROUP}")
    is_int8 = kind == "int8"
    groups, stored = (1, inputs) if is_int8 else (inputs // GROUP, inputs // 2)
    dtype = torch.int8 if is_int8 else torch.uint8
    result = QuantizedWeight(
        torch.empty(experts, outputs, stored, dtype=dtype, device=weight.device),
        torch.empty(experts, outputs, groups, dtype=torch.bfloat16, device=weight.device),
    )
    if weight.is_meta:
        return result
    for of_expert, values, scale in zip(weight, result.values, result.scale, strict=True):
        w = of_expert.detach().float().unflatten(-1, (groups, -1))          # (O, groups, n)
        exact = w.abs().amax(dim=-1) / LARGEST[kind]
        # Below 2^-16, fp16 only has the multiples of 2^-24. Rounding up keeps q within its limits.
        tiny = (exact / FINEST).ceil() * FINEST
        scale.copy_(tiny.where(exact < 2**-16, exact.bfloat16().half().float()))
        if not scale.isfinite().all():
            most = f"{w.abs().max():.3g}, expected less than {65504 * LARGEST[kind]:,}"
            raise ValueError(f"{kind}: got weights up to {most}")
        q = w / scale.float().where(scale > 0, torch.inf)[..., None]
        q = q.round_().clamp_(-LARGEST[kind], LARGEST[kind]).flatten(-2)    # (O, I)
        if not is_int8:
            q = (q + 8).unflatten(-1, (-1, 2)) @ q.new_tensor([1.0, 16.0])  # (O, I / 2)
        values.copy_(q)
    return result
