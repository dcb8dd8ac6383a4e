"""Softmax attention, computed by flash-attn, PyTorch or two matrix products.

    x = attend(q, k, v)

Shape legend: N batch, T tokens per image, L tokens attended to, d width of a head
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.forward_mode import has_tangent

few_tokens = 256  # largest number of tokens per image for `attention_by_products`


def load_flash_attention() -> tuple[Callable | None, str]:
    """Returns flash-attn's function; or None, and why an installed package does not load.

    It does not load if it was built for another PyTorch.
    """
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        return None, str(error) if find_spec("flash_attn") else ""
    return flash_attn_func, ""


flash_attn_func, flash_attention_fault = load_flash_attention()
MOST_CHANNELS = 256  # of a head, in flash-attn


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the attention (N, T, heads, d) of q (N, T, heads, d) to k and v (N, L, heads, d).

    On CUDA in half precision, flash-attn computes it if installed, except with a mask or under
    torch.func.jvp.

    mask: (N, L) bool, true where k and v are attended to; None: everywhere
    """
    is_half_on_gpu = v.is_cuda and v.dtype in (torch.bfloat16, torch.float16)
    # Compute plain matrix products under torch.func.jvp: fused attention has no jvp.
    by_products = products_are_faster(v) or has_tangent(q, k, v)
    fits = v.shape[-1] <= MOST_CHANNELS
    if flash_attn_func is not None and is_half_on_gpu and fits and mask is None and not by_products:
        fixed_order = torch.are_deterministic_algorithms_enabled()
        return flash_attn_func(q, k, v, deterministic=fixed_order)
    q, k, v = (rows.transpose(1, 2) for rows in (q, k, v))                  # (N, heads, T or L, d)
    compute = attention_by_products if by_products else F.scaled_dot_product_attention
    mask = None if mask is None else mask[:, None, None]                    # (N, 1, 1, L)
    return compute(q, k, v, mask).transpose(1, 2)


def products_are_faster(v: Tensor) -> bool:
    """Returns whether `attention_by_products` is faster for values (N, L, heads, d): in bf16 on a
    CPU, for at most `few_tokens` tokens."""
    return v.dtype == torch.bfloat16 and v.device.type == "cpu" and v.shape[1] <= few_tokens


@contextmanager
def fused_attention() -> Iterator[None]:
    """Makes a CPU use the same attention as a GPU, to count the activations that a GPU keeps."""
    global few_tokens
    kept, few_tokens = few_tokens, 0
    try:
        yield
    finally:
        few_tokens = kept


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q (N, heads, T, d) to k and v (N, heads, L, d) as two batched matrix products.

    Up to 256 tokens on a CPU, the backward pass of PyTorch's scaled_dot_product_attention takes two
    to five times as long. This version keeps the T x L weights of each head for that pass.
    """
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)                  # (N, heads, T, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v
