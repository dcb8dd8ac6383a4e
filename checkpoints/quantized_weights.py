"""State dicts whose expert weights are quantised; see `moe_kernels.quantized`."""

import re
from collections.abc import Iterable

from torch import Tensor

from checkpoints.meta import meta_model
from models import DiT, DiTConfig
from moe import SparseMoEBlock
from moe_kernels.quantized import KINDS, quantize
from quantization import matrices_to_quantize
from runtime.errors import UserError, reported_as


def quantization_of(state_dict: dict[str, Tensor]) -> str | None:
    """Returns int8 or int4 if the expert weights of a state dict are quantised, else None."""
    types = (value.dtype for name, value in state_dict.items() if f"{name}_scale" in state_dict)
    return next((KINDS[dtype] for dtype in types if dtype in KINDS), None)


def quantize_state_dict(state_dict: dict[str, Tensor], kind: str, config: DiTConfig) -> None:
    """Replaces the expert weights by integers and scales, one weight at a time."""
    names: list[str] = []
    for prefix, module in meta_model(config).named_modules():
        if isinstance(module, SparseMoEBlock):
            with reported_as(f"--quantize: got {kind}", ValueError):
                names += [
                    f"{prefix}.experts.{name}" for name in matrices_to_quantize(module.experts)
                ]
    names = [name for name in names if name in state_dict]
    stored = quantization_of(state_dict)
    if not names or stored not in (None, kind):
        expected = f"{stored}, as the file stores them" if names else "a model with experts"
        raise UserError(f"--quantize: got {kind}, expected {expected}")
    for name in names if stored is None else ():
        try:
            weight = quantize(state_dict.pop(name), kind)
        except ValueError as error:
            raise UserError(f"--quantize: {error} ({name})") from None
        state_dict |= {name: weight.values, f"{name}_scale": weight.scale}


def describe(model: DiT, kind: str) -> str:
    """Describes in one line which weights are quantised, and which are not."""
    sizes: dict[str, int] = {}
    for name, weight in model.state_dict().items():
        part = re.sub(r"blocks\.\d+\.", "", name)
        if not part.startswith("moe.experts."):
            part = re.match(r"moe\.\w+|\w+", part)[0].removeprefix("moe.")
            sizes[part] = sizes.get(part, 0) + weight.numel()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    rest = ", ".join(sorted(sizes, key=sizes.get, reverse=True))
    return f"experts in {kind}; not quantised, in {dtype}: {rest}"


def weight_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
