"""Sampling noise that belongs to an image: one generator per image seed (as in EDM2).

Shape legend: N images, one seed each
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class PerImageNoise:
    """Gaussian noise whose row i comes from the seed of image i and from nothing else.

    So an image does not depend on its batch, the number of processes or the device: the generators
    live on the CPU. Each call goes on where the last one stopped, so make one of these per batch.

    noise = PerImageNoise([17, 18, 19])
    z = noise.randn((4, 32, 32), device="cuda")
    diffusion.p_sample_loop(denoise, z.shape, z, noise_fn=noise.randn_like)

    Raises ValueError for a seed outside [0, 2**32): torch's CPU generator reads the low 32 bits
    alone, so larger seeds would silently repeat images.
    """

    def __init__(self, seeds: Iterable[int]):
        seeds = [int(seed) for seed in seeds]
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"image seed: got {seed}, expected one in [0, 2**32)")
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def randn(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Returns noise (N, *shape), fp32, on `device`; `shape` is that of one image."""
        on_gpu = torch.device(device).type == "cuda"       # pinned, else the copy waits for the GPU
        size = (len(self.generators), *shape)
        noise = torch.empty(size, dtype=torch.float32, device="cpu", pin_memory=on_gpu)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(device, non_blocking=on_gpu)

    def randn_like(self, x: Tensor) -> Tensor:
        """Returns noise of the shape, dtype and device of x (N, ...); plugs in as `noise_fn`."""
        assert len(x) == len(self.generators), "one row a seed"
        return self.randn(x.shape[1:], device=x.device).to(x.dtype)
