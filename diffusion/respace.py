"""Respacing: a short chain that visits some steps of a long one (Nichol and Dhariwal 2021, 4)."""

import torch
from torch import Tensor


def space_timesteps(num_timesteps: int, spec: str | int | None) -> list[int]:
    """Returns the steps of a chain of `num_timesteps` that `spec` keeps, in increasing order.

    spec: "" or None   every step
          "250", 250   250 steps spread evenly from the first to the last
          "10,5,3"     the chain cut into 3 equal sections, which keep 10, 5 and 3 steps
          "ddim50"     50 steps at a constant integer stride from step 0 (Song et al. 2021)

    Raises ValueError for a malformed spec, and for one that asks for more than the chain has.
    """
    if spec is None or spec == "":
        return list(range(num_timesteps))
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _strided(num_timesteps, _parse_count(spec.removeprefix("ddim"), spec))
    counts = [_parse_count(part, spec) for part in str(spec).split(",")]
    if sum(counts) == 0:
        raise ValueError(f"timestep respacing must keep at least one step, got {spec!r}")
    return _sections(num_timesteps, counts)


def respaced_betas(betas: Tensor, timesteps: list[int]) -> Tensor:
    """Returns the betas (K,) whose cumulative products are those of `betas` (S,) at K `timesteps`.

    float64. Nichol and Dhariwal 2021, equation 19.
    """
    kept = (1 - betas.double()).cumprod(0)[timesteps]      # (K,)
    previous = torch.cat([kept.new_ones(1), kept[:-1]])    # (K,)
    return 1 - kept / previous


def _parse_count(text: str, spec: str | int) -> int:
    if not text.strip().isdecimal():
        raise ValueError(
            f'timestep respacing must look like "250", "10,5,3" or "ddim50", got {spec!r}'
        )
    return int(text)


def _strided(num_timesteps: int, count: int) -> list[int]:
    stride = -(-num_timesteps // max(count, 1))  # the smallest that gives no more than count
    kept = list(range(0, num_timesteps, stride))
    if len(kept) != count:
        raise ValueError(
            f"no integer stride keeps {count} of {num_timesteps} steps, got 'ddim{count}'; "
            f"the nearest below is 'ddim{len(kept)}'"
        )
    return kept


def _sections(num_timesteps: int, counts: list[int]) -> list[int]:
    if len(counts) > num_timesteps:
        raise ValueError(
            f"timestep respacing must have at most {num_timesteps} sections, one a step, "
            f"got {len(counts)}"
        )
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        if count > size:
            raise ValueError(
                f"section {section} of the timestep respacing has {size} steps, got {count} to keep"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: where a position falls on .5 the rounding of the sum decides,
        # and the published samplers sum.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept
