"""Noise for sampling, determined by the seeds of the images: one generator per seed, as in EDM2.

Shape legend: N images, with one seed per image
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class PerImageNoise:
    """Gaussian noise whose row i depends only on the seed of image i.

    The generators are CPU generators, so an image does not depend on the rest of its batch, the
    number of processes or the device. Each call continues the random streams of the previous one,
    so create one instance per batch.

    noise = PerImageNoise([17, 18, 19])
    z = noise.randn((4, 32, 32), device="cuda")
    diffusion.p_sample_loop(denoise, z.shape, z, noise_fn=noise.randn_like)

    Raises ValueError for a seed outside [0, 2**32). torch's CPU generator uses only the low 32 bits
    of a seed, so larger seeds would silently repeat images.
    """

    def __init__(self, seeds: Iterable[int]):
        seeds = [int(seed) for seed in seeds]
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seed: got {seed}, expected an integer from 0 to {2**32 - 1}")
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def randn(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Returns noise (N, *shape), fp32, on `device`; shape: the shape of one image."""
        on_gpu = torch.device(device).type == "cuda"
        size = (len(self.generators), *shape)
        # Pinned memory, so that the host does not wait for the copy to the GPU.
        noise = torch.empty(size, dtype=torch.float32, device="cpu", pin_memory=on_gpu)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(device, non_blocking=on_gpu)

    def randn_like(self, x: Tensor) -> Tensor:
        """Returns noise of the shape, dtype and device of x (N, ...), for use as `noise_fn`."""
        assert len(x) == len(self.generators), "one row per seed"
        return self.randn(x.shape[1:], device=x.device).to(x.dtype)
