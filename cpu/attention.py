"""Attention in bf16 on a CPU, whose fused backward pass is slow for few tokens.

Shape legend: N batch, T tokens per image, d width of a head
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

few_tokens = 256


def takes_products(v: Tensor) -> bool:
    """Whether two products are faster for values (N, heads, T, d): bf16 on a CPU, few tokens."""
    return v.dtype == torch.bfloat16 and v.device.type == "cpu" and v.shape[2] <= few_tokens


@contextmanager
def fused_attention() -> Iterator[None]:
    """Has a CPU take the attention that a GPU takes: to count what that one keeps."""
    global few_tokens
    kept, few_tokens = few_tokens, 0
    try:
        yield
    finally:
        few_tokens = kept


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q, k and v (N, heads, T, d) as two batched matrix products.

    The backward pass of PyTorch's scaled_dot_product_attention takes two to five times as long up
    to 256 tokens. This keeps T x T weights of each head.
    """
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)  # (N, heads, T, T)
    return weights @ v
