"""Memory that sampling needs on the device and the host, computed without allocating the model."""

from collections.abc import Iterable

import torch
from torch import Tensor

from checkpoints.quantizers import QUANTIZERS, quantizer
from models import DiT, DiTConfig
from moe import width_of
from runtime.devices import pinned_bytes
from sampling.offload import block_bytes, type_of

GB = 1e9


def weight_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_in_memory(
    config: DiTConfig, dtype: torch.dtype, kind: str | None
) -> list[tuple[int, int]]:
    """Returns the bytes of the weights on (device, host), without and with offload.

    The host has one pinned tensor per weight (see `pinned_bytes`).

    kind: int8 or int4 for quantised experts, or None
    """
    with torch.device("meta"):
        model = DiT(config).to(dtype)
        if kind:
            quantizer(kind).replace_experts(model)
        model.to(dtype)
    blocks = [list(block.state_dict().values()) for block in model.blocks]
    in_blocks = [weight_bytes([tensor]) for block in blocks for tensor in block]
    total = weight_bytes(model.state_dict().values())
    slot = max(block_bytes(block, [type_of(t, dtype) for t in block]) for block in blocks)
    offloaded = total - sum(in_blocks) + 2 * slot, sum(map(pinned_bytes, in_blocks))
    return [(total, 0), offloaded]


def activation_bytes(config: DiTConfig, dtype: torch.dtype, images: int) -> int:
    """Estimates the peak memory of one layer's activations, in bytes.

    The peak consists of three tensors of tokens (S, D) and the rows of the experts, (R, D), (R, U)
    and (R, H), or the hidden units of a dense layer.

    images: number of images per pass
    """
    tokens = images * max(map(config.tokens_of, range(config.depth)))
    width, gated = config.hidden_size, config.expert_mlp.startswith("swiglu")
    hidden = width_of(width, config.mlp_ratio) * (3 if gated else 2)
    rows = tokens * (config.num_experts_per_tok if config.num_experts else 1)
    return (3 * tokens * width + rows * (width + hidden)) * dtype.itemsize


def print_memory(config: DiTConfig, dtype: torch.dtype, images: int) -> None:
    """Prints the memory for unquantised, int8 and int4 weights, with and without offload."""
    print(f"{'experts':<10} {'offload':<8} {'GPU, GB':>9} {'host, GB':>9}")
    for kind in (None, *QUANTIZERS) if config.num_experts else (None,):
        name = kind or f"{8 * dtype.itemsize} bit"
        try:
            rows = weights_in_memory(config, dtype, kind)
        except ValueError as error:
            print(f"{name:<10} {error}")
            continue
        for offload, (device, host) in zip(("no", "yes"), rows, strict=True):
            print(f"{name:<10} {offload:<8} {device / GB:9.3g} {host / GB:9.3g}")
    print(
        f"These are the weights of the model. A pass over {images} images also needs about "
        f"{activation_bytes(config, dtype, images) / GB:.3g} GB on the GPU, and the autoencoder "
        "needs its own memory."
    )
