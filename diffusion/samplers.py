"""Samplers: functions of (denoise, z, times, callback) that turn noise into data.

    denoise     denoise(x, t, r=None) predicts the noise (Gaussian diffusion) or the velocity
                (flows), (N, C or 2C, h, w); with r, the mean velocity from t to r. DDPM and DDIM
                use all 2C channels, and the other samplers use the first C.
    z           (N, C, h, w) standard normal noise
    times       the objective's `sampling_times`, see `Times`
    callback    called after each step with a dict: "step" (from 0), "t" (N,) as the network
                receives it, "x" (state after the step) and "pred_xstart" (predicted data)
    noise_fn    x -> noise like x, used by stochastic samplers

Samplers return fp32 (N, C, h, w). For fp64 z, all samplers except DDPM and DDIM return fp64.

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

Predict = Callable[..., Tensor]  # (x, t) or (x, t, r) -> noise or velocity
Callback = Callable[[dict], None] | None
NoiseFn = Callable[[Tensor], Tensor]
Moved = tuple[Tensor, Tensor]  # z (N, C, h, w) after a step, and the velocity of the step


class Times(NamedTuple):
    """Times that a sampler visits, from noise to data, as the network receives them."""

    values: list[float]  # flow: S + 1 times from 1 to 0; Gaussian diffusion: S steps of the chain
    diffusion: GaussianDiffusion | None = None  # the complete chain; None for a flow

    @property
    def num_steps(self) -> int:
        return len(self.values) - (self.diffusion is None)


@torch.no_grad()
def integrate(
    take_step: Callable[..., Moved], denoise: Predict, z: Tensor, times: Times,
    callback: Callback = None, *, noise_fn: NoiseFn = torch.randn_like,
    progress: bool = False,
) -> Tensor:
    """Integrates dz/dt = denoise(z, t) over the times of a flow.

    take_step: takes a step from time t to the next time r < t, such as `euler`
    """
    z = at_least_fp32(z)
    for step, (time, after) in bar(enumerate(pairwise(times.values)), progress):
        moved, velocity = take_step(denoise, z, time, after, noise_fn)
        report(callback, step, z.new_full((len(z),), time), moved, z - time * velocity)
        z = moved
    return z


def velocity_at(denoise: Predict, z: Tensor, *times: float) -> Tensor:
    """Returns denoise(z, t) or denoise(z, t, r), without variance channels: (N, C, h, w)."""
    return first_channels(denoise(z, *(z.new_full((len(z),), time) for time in times)), z)


def euler(denoise: Predict, z: Tensor, t: float, r: float, noise_fn: NoiseFn) -> Moved:
    """Euler's method: order 1, one evaluation per step."""
    velocity = velocity_at(denoise, z, t)
    return z + (r - t) * velocity, velocity


def heun(denoise: Predict, z: Tensor, t: float, r: float, noise_fn: NoiseFn) -> Moved:
    """Heun's method: order 2, 2 S - 1 evaluations.

    The last step, which ends at t = 0, is an Euler step, because networks are not trained at t = 0
    (Karras et al. 2022, algorithm 1, with t for sigma).
    """
    velocity = velocity_at(denoise, z, t)
    end = z + (r - t) * velocity
    if r > 0:
        end_velocity = velocity_at(denoise, end, r)
        end = z + (r - t) * (velocity + end_velocity) / 2
    return end, velocity


def euler_maruyama(denoise: Predict, z: Tensor, t: float, r: float, noise_fn: NoiseFn) -> Moved:
    """Euler-Maruyama for the reverse SDE dz = (velocity - D score) dt + sqrt(2 D) dW with D = t.

    The score is -(z + (1 - t) velocity) / t. The last step goes from t = 0.04 (`Sampler.last_step`)
    to 0 along the drift, without noise. Ma et al. 2024 (SiT), equations 4 and 9, with the defaults
    of SiT's sampler: diffusion "sigma", last step "Mean" of size 0.04. Weak order 1.
    """
    velocity, size = velocity_at(denoise, z, t), t - r
    pred_noise = z + (1 - t) * velocity                 # -t score
    end = z - size * (velocity + pred_noise)
    return end + (2 * t * size) ** 0.5 * noise_fn(end) if r > 0 else end, velocity


def chain_sampler(
    sample_loop: Callable[..., Tensor], denoise: Predict, z: Tensor, times: Times,
    callback: Callback = None, **options,
) -> Tensor:
    """Respaces the chain to these times, and samples it by the loop of DDPM or DDIM."""
    options |= {"clip_denoised": False, "callback": callback}
    diffusion = times.diffusion.respaced(times.values[::-1])
    return sample_loop(diffusion, denoise, z.shape, z, **options)


@torch.no_grad()
def multistep(
    solver: str, denoise: Predict, z: Tensor, times: Times, callback: Callback = None, *,
    noise_fn: NoiseFn | None = None, progress: bool = False,
) -> Tensor:
    """Integrates by a solver of the package diffusers: order 2, one evaluation per step.

    solver: class name of the solver, DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) or
        UniPC-2 (Zhao et al. 2023, arXiv 2302.04867)
    """
    import diffusers  # imported here because the import takes a second

    levels_of = flow_levels if times.diffusion is None else chain_levels
    sigmas, options = levels_of(times)
    scheduler = getattr(diffusers, solver)(solver_order=2, **options)
    scheduler.set_timesteps(times.num_steps)
    scheduler.sigmas = sigmas                              # the scheduler would round our times
    scheduler.set_begin_index(0)
    x = at_least_fp32(z)
    for step, time in bar(enumerate(times.values[: times.num_steps]), progress):
        t = torch.full((len(x),), time, device=x.device)   # (N,) int64 or fp32
        prediction = first_channels(denoise(x, t), x)      # (N, C, h, w)
        x = scheduler.step(prediction, time, x, return_dict=False)[0]
        report(callback, step, t, x, scheduler.model_outputs[-1])
    return x


def flow_levels(times: Times) -> tuple[Tensor, dict]:
    """Returns the S + 1 noise levels of a flow, float64, and diffusers' arguments for flows."""
    sigmas = torch.tensor(times.values, dtype=torch.float64)
    sigmas = sigmas.clamp(max=1 - 1e-6)                    # diffusers computes log(1 - sigma)
    return sigmas, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def chain_levels(times: Times) -> tuple[Tensor, dict]:
    """Returns the same as `flow_levels` for a chain, with levels sqrt(1 / alphas_cumprod - 1)."""
    alphas_cumprod = times.diffusion.alphas_cumprod[times.values]  # (S,) float64
    sigmas = torch.cat([(1 / alphas_cumprod - 1).sqrt(), alphas_cumprod.new_zeros(1)])
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
    """A choice of --sampler: a sampler function with its defaults, called like the function."""

    function: Callable[..., Tensor]
    default_steps: int
    last_step: float = 0.0  # size of a flow's last step; 0: all steps have equal size
    ends_above_zero: bool = False  # whether S even steps of a chain end at 999 / S, not at 0

    def __call__(
        self, denoise: Predict, z: Tensor, times: Times, callback: Callback = None, **options
    ) -> Tensor:
        return self.function(denoise, z, times, callback, **options)


DPM_SOLVER, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"  # diffusers classes
# Samplers by kind of objective. The first one is the default.
SAMPLERS: dict[str, dict[str, Sampler]] = {
    "gaussian": {
        "ddpm": Sampler(partial(chain_sampler, GaussianDiffusion.p_sample_loop), 250),
        "ddim": Sampler(partial(chain_sampler, GaussianDiffusion.ddim_sample_loop), 50),
        "dpm-solver++": Sampler(partial(multistep, DPM_SOLVER), 25, ends_above_zero=True),
        "unipc": Sampler(partial(multistep, UNIPC), 25, ends_above_zero=True),
    },
    "rectified_flow": {
        "euler": Sampler(partial(integrate, euler), 50),
        "heun": Sampler(partial(integrate, heun), 25),
        "sde": Sampler(partial(integrate, euler_maruyama), 250, last_step=0.04),  # as in SiT
        "dpm-solver++": Sampler(partial(multistep, DPM_SOLVER), 25),
        "unipc": Sampler(partial(multistep, UNIPC), 25),
    },
}
