"""Samplers: plain functions of (denoise, z, times, callback) that turn noise into data.

denoise(x, t, r=None) predicts noise (Gaussian diffusion) or velocity (flows), (N, C or 2C, h, w);
with r the mean velocity from t to r. Of 2C channels a sampler reads the first C; DDPM and DDIM read
all. z (N, C, h, w) is standard normal. `times` come from the objective, see `Times`.

Every sampler returns fp32 (N, C, h, w) (fp64 for fp64 z), and calls `callback` after each step with
"step" from 0, "t" (N,) as given to the network, "x" the state after the step and "pred_xstart" the
prediction of the data. The stochastic ones draw from `noise_fn`, x -> noise like x.

Shape legend: N batch, C channels, h x w latent size, S sampling steps
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.guidance import first_channels

Denoise = Callable[..., Tensor]  # (x, t) or (x, t, r)
Callback = Callable[[dict], None] | None
NoiseFunction = Callable[[Tensor], Tensor]


class Times(NamedTuple):
    """The times that a sampler visits, from noise to data, as the network is given them."""

    values: list[float]  # of a flow S + 1 times from 1 to 0; of a chain S of its steps
    chain: GaussianDiffusion | None = None  # the complete chain; None for a flow

    @property
    def num_steps(self) -> int:
        return len(self.values) - (self.chain is None)



@torch.no_grad()
def euler(
    denoise: Denoise, z: Tensor, times: Times, callback: Callback = None, *,
    noise_fn: NoiseFunction | None = None, progress: bool = False,
) -> Tensor:
    """Follows dz/dt = denoise(z, t) by Euler's method: order 1, one evaluation a step."""
    z = at_least_fp32(z)
    for step, (time, after) in bar(enumerate(pairwise(times.values)), progress):
        t = z.new_full((len(z),), time)                    # (N,)
        velocity = first_channels(denoise(z, t), z)        # (N, C, h, w)
        pred_xstart = z - time * velocity
        z = z + (after - time) * velocity
        report(callback, step, t, z, pred_xstart)
    return z


@torch.no_grad()
def heun(
    denoise: Denoise, z: Tensor, times: Times, callback: Callback = None, *,
    noise_fn: NoiseFunction | None = None, progress: bool = False,
) -> Tensor:
    """Follows dz/dt = denoise(z, t) by Heun's method: order 2, 2 S - 1 evaluations down to t = 0.

    A step that ends at t = 0, where no network was trained, is Euler's (Karras et al. 2022,
    algorithm 1, with t for sigma).
    """
    z = at_least_fp32(z)
    for step, (time, after) in bar(enumerate(pairwise(times.values)), progress):
        t = z.new_full((len(z),), time)                    # (N,)
        velocity = first_channels(denoise(z, t), z)        # (N, C, h, w)
        pred_xstart = z - time * velocity
        end = z + (after - time) * velocity
        if after > 0:
            end_velocity = first_channels(denoise(end, torch.full_like(t, after)), z)
            end = z + (after - time) * (velocity + end_velocity) / 2
        z = end
        report(callback, step, t, z, pred_xstart)
    return z


@torch.no_grad()
def euler_maruyama(
    denoise: Denoise, z: Tensor, times: Times, callback: Callback = None, *,
    noise_fn: NoiseFunction = torch.randn_like, progress: bool = False,
) -> Tensor:
    """Follows the reverse SDE dz = (velocity - D score) dt + sqrt(2 D) dW with D = t, backwards.

    All steps but the last lead to t = 0.04 (`Sampler.last_step`); the last goes from there to 0
    along the drift and adds no noise. The score is -(z + (1 - t) velocity) / t. Ma et al. 2024
    (SiT), equations 4 and 9, with the defaults of its sampler: diffusion "sigma", last step "Mean"
    of size 0.04. Weak order 1.
    """
    z = at_least_fp32(z)
    for step, (time, after) in bar(enumerate(pairwise(times.values)), progress):
        t, size = z.new_full((len(z),), time), time - after
        velocity = first_channels(denoise(z, t), z)        # (N, C, h, w)
        pred_noise = z + (1 - time) * velocity             # -t score
        pred_xstart = z - time * velocity
        z = z - size * (velocity + pred_noise)
        if after > times.values[-1]:
            z = z + (2 * time * size) ** 0.5 * noise_fn(z)
        report(callback, step, t, z, pred_xstart)
    return z


@torch.no_grad()
def mean(
    denoise: Denoise, z: Tensor, times: Times, callback: Callback = None, *,
    noise_fn: NoiseFunction | None = None, progress: bool = False,
) -> Tensor:
    """Goes from each time t to the next, r, by the mean velocity denoise(z, t, r) between them.

    One evaluation a step; exact in any number of steps for a network without error. Geng et al.
    2025, arXiv 2505.13447, equation 12.
    """
    z = at_least_fp32(z)
    for step, (time, after) in bar(enumerate(pairwise(times.values)), progress):
        t, r = z.new_full((len(z),), time), z.new_full((len(z),), after)  # (N,) each
        velocity = first_channels(denoise(z, t, r), z)     # (N, C, h, w)
        pred_xstart = z - time * velocity
        z = z + (after - time) * velocity
        report(callback, step, t, z, pred_xstart)
    return z


def chain_sampler(
    sample_loop: Callable[..., Tensor], denoise: Denoise, z: Tensor, times: Times,
    callback: Callback = None, **options,
) -> Tensor:
    """Walks the chain of these times only by DDPM's or DDIM's loop."""
    options |= {"clip_denoised": False, "callback": callback}
    return sample_loop(times.chain.respaced(times.values[::-1]), denoise, z.shape, z, **options)


@torch.no_grad()
def multistep(
    solver: str, denoise: Denoise, z: Tensor, times: Times, callback: Callback = None, *,
    noise_fn: NoiseFunction | None = None, progress: bool = False,
) -> Tensor:
    """Takes the steps of one of diffusers' solvers, of order 2 with one evaluation a step.

    DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) or UniPC-2 (Zhao et al. 2023, 2302.04867).
    """
    import diffusers  # which takes a second

    levels_of = flow_levels if times.chain is None else chain_levels
    sigmas, path = levels_of(times)
    scheduler = getattr(diffusers, solver)(solver_order=2, **path)
    scheduler.set_timesteps(times.num_steps)
    scheduler.sigmas = sigmas                              # its own would round our times
    scheduler.set_begin_index(0)
    x = at_least_fp32(z)
    for step, time in bar(enumerate(times.values[: times.num_steps]), progress):
        t = torch.full((len(x),), time, device=x.device)   # (N,) int64 or fp32
        prediction = first_channels(denoise(x, t), x)      # (N, C, h, w)
        x = scheduler.step(prediction, time, x, return_dict=False)[0]
        report(callback, step, t, x, scheduler.model_outputs[-1])
    return x


def flow_levels(times: Times) -> tuple[Tensor, dict]:
    """The S + 1 levels of noise of a flow, float64, and the name of its path in diffusers."""
    sigmas = torch.tensor(times.values, dtype=torch.float64)
    sigmas = sigmas.clamp(max=1 - 1e-6)                    # log(1 - sigma) is taken
    return sigmas, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def chain_levels(times: Times) -> tuple[Tensor, dict]:
    """Returns as `flow_levels`; here a level is noise over signal."""
    signal = times.chain.alphas_cumprod[times.values]      # (S,) float64
    sigmas = torch.cat([(1 / signal - 1).sqrt(), signal.new_zeros(1)])
    return sigmas, {"prediction_type": "epsilon"}


def at_least_fp32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def bar(steps: Iterable, progress: bool) -> tqdm:
    return tqdm(list(steps), disable=not progress, leave=False)


def report(callback: Callback, step: int, t: Tensor, x: Tensor, pred_xstart: Tensor) -> None:
    if callback is not None:
        callback({"step": step, "t": t, "x": x, "pred_xstart": pred_xstart})


@dataclass(frozen=True)
class Sampler:
    """A sampler as the flag --sampler names it; called like its function."""

    function: Callable[..., Tensor]
    default_steps: int
    most_steps: int | None = None  # that the chain allows
    last_step: float = 0.0  # size of a flow's last step; 0: as large as the others
    skips_start: bool = False  # a chain's equal steps end above step 0: 999 to 999 / S

    def __call__(
        self, denoise: Denoise, z: Tensor, times: Times, callback: Callback = None, **options
    ) -> Tensor:
        return self.function(denoise, z, times, callback, **options)


DPM_SOLVER, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"  # of diffusers
# By the kind of path that an objective trains on, the default first.
SAMPLERS: dict[str, dict[str, Sampler]] = {
    "gaussian": {
        "ddpm": Sampler(partial(chain_sampler, GaussianDiffusion.p_sample_loop), 250, 1000),
        "ddim": Sampler(partial(chain_sampler, GaussianDiffusion.ddim_sample_loop), 50, 1000),
        "dpm-solver++": Sampler(partial(multistep, DPM_SOLVER), 25, 999, skips_start=True),
        "unipc": Sampler(partial(multistep, UNIPC), 25, 999, skips_start=True),
    },
    "rectified_flow": {
        "euler": Sampler(euler, 50),
        "heun": Sampler(heun, 25),
        "sde": Sampler(euler_maruyama, 250, last_step=0.04),  # SiT's
        "dpm-solver++": Sampler(partial(multistep, DPM_SOLVER), 25),
        "unipc": Sampler(partial(multistep, UNIPC), 25),
    },
}
SAMPLERS["mean_flow"] = {"mean": Sampler(mean, 4), **SAMPLERS["rectified_flow"]}  # at r = t a flow
