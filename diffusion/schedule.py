"""Noise schedules, and the choice of the steps that a respaced chain keeps.

Shape legend: S steps of the chain
"""

import math
import re

import torch
from torch import Tensor


def noise_schedule_betas(noise_schedule: str, num_timesteps: int) -> Tensor:
    """Returns betas (S,), float64, of the schedule "linear" or "squaredcos_cap_v2".

    linear: from 1e-4 to 0.02 for 1000 steps; scaled for other lengths, so that every chain ends
        with the same noise (Ho et al. 2020, section 4)
    squaredcos_cap_v2: the cosine schedule (Nichol and Dhariwal 2021, equation 17), betas <= 0.999
    """
    if noise_schedule == "linear":
        scale = 1000 / num_timesteps
        return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    if noise_schedule == "squaredcos_cap_v2":
        edges = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps  # (S + 1,)
        alphas_cumprod = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(
        f"noise_schedule: got {noise_schedule!r}, expected linear or squaredcos_cap_v2"
    )


def space_timesteps(num_timesteps: int, spec: str | int | None) -> list[int]:
    """Returns the steps of a chain of `num_timesteps` that `spec` keeps, in increasing order.

    spec: "" or None   every step
          "250", 250   250 steps spread evenly from the first to the last
          "10,5,3"     the chain split into 3 equal sections, which keep 10, 5 and 3 steps
          "ddim50"     50 steps at a constant integer stride from step 0 (Song et al. 2021)
    """
    if spec is None or spec == "":
        return list(range(num_timesteps))
    counts = [int(count) for count in re.findall(r"\d+", str(spec))]
    if not re.fullmatch(r"(ddim)?\d+|\d+(,\s*\d+)*", str(spec)) or sum(counts) == 0:
        raise ValueError(
            f'timestep respacing: got {spec!r}, expected a spec such as "250", "10,5,3" or "ddim50"'
        )
    if not str(spec).startswith("ddim"):
        return _sections(num_timesteps, counts)
    stride = -(-num_timesteps // counts[0])  # the smallest stride that keeps at most counts[0]
    kept = list(range(0, num_timesteps, stride))
    if len(kept) != counts[0]:
        raise ValueError(
            f"timestep respacing: got {spec}, but no integer stride keeps {counts[0]} of "
            f"{num_timesteps} steps; expected for example ddim{len(kept)}"
        )
    return kept


def _sections(num_timesteps: int, counts: list[int]) -> list[int]:
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        if count > size:
            raise ValueError(
                f"timestep respacing: got {count} steps in section {section + 1} of {len(counts)}, "
                f"expected at most {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Sum the strides, as the published samplers do: where a position is near .5, a product
        # could round to a different step.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept
