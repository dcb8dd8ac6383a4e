"""Whether what a weight file says can be true, checked before a model of that size is built.

    check_weights(state_dict, num_bytes)
    check_fit(config, state_dict)

All raise ValueError with one line of what was got and expected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models import DiTConfig

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_weights(state_dict: dict, num_bytes: int) -> None:
    """Checks that weights are finite numbers of floating point, together no more than `num_bytes`.

    num_bytes: of the files that they come from; more would mean that they overlap or repeat
    """
    total = 0
    for key, value in state_dict.items():
        if type(key) is not str or type(value) not in (Tensor, nn.Parameter):
            raise ValueError(
                f"got a {type(value).__name__} named {key!s:.80}, expected a state dict of tensors"
            )
        dense = value.layout == torch.strided and value.device.type == "cpu"
        if value.dtype not in WEIGHT_DTYPES or not dense:
            kind = str(value.dtype if dense else value.layout).removeprefix("torch.")
            raise ValueError(f"{key:.80}: got {kind} weights, expected floating-point ones")
        total += value.numel() * value.element_size()
        if total > num_bytes:
            raise ValueError(
                f"{key:.80}: got tensors of {total} bytes, expected no more than the file's "
                f"{num_bytes}"
            )
        if value.numel() and not all(torch.isfinite(end) for end in torch.aminmax(value)):
            raise ValueError(f"{key:.80}: got weights that are not finite, expected numbers")


def check_fit(config: DiTConfig, state_dict: dict[str, Tensor]) -> None:
    """Checks that weights have the depth, the width and the tables that a config asks for.

    All that makes a model large follows from these or is a parameter's own shape, which loading
    compares.
    """
    d, patch = config.hidden_size, config.patch_size
    rows = config.num_classes + (config.class_dropout_prob > 0)
    for name, shape in {
        "pos_embed": (1, (config.input_size // patch) ** 2, d),
        "x_embedder.proj.weight": (d, config.in_channels, patch, patch),
        "y_embedder.embedding_table.weight": (rows, d),
    }.items():
        got = tuple(state_dict[name].shape) if name in state_dict else "none"
        if got != shape:
            raise ValueError(f"another model: {name}: got {got}, expected {shape}")
    blocks = {key.split(".")[1] for key in state_dict if key.startswith("blocks.")}
    if blocks != set(map(str, range(config.depth))):
        raise ValueError(
            f"another model: got {len(blocks)} blocks, expected {config.depth}, numbered from 0"
        )


def check_shapes(got: dict[str, Sequence[int]], expected: dict[str, Sequence[int]]) -> None:
    """Checks that there is a tensor of each of the expected names, of its shape, and no other."""
    for name in sorted(got.keys() | expected.keys()):
        mine, wanted = (tuple(side[name]) if name in side else "none" for side in (got, expected))
        if mine != wanted:
            raise ValueError(f"{name:.80}: got {mine}, expected {wanted}")


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    for name, value in tensors.items():
        if type(name) is not str or not isinstance(value, Tensor):
            raise ValueError(f"{name!s:.80}: got a {type(value).__name__}, expected a tensor")
    return {name: value.shape for name, value in tensors.items()}
