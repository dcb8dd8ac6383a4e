"""Samplers: plain functions of (denoise, z, steps, callback) that turn noise into data.

denoise(x, t) predicts noise (Gaussian diffusion) or velocity (rectified flow), (N, C or 2C, h, w).
Of 2C channels a sampler reads the first C; DDPM and DDIM read all. z (N, C, h, w) is standard
normal. `steps` is a number of steps, or for rectified flow the times themselves: S + 1, falling
within [0, 1].

Every sampler returns fp32 (N, C, h, w) (fp64 for fp64 z), and calls `callback` after each step with
"step" from 0, "t" (N,) as given to the network, "x" the state after the step and "pred_xstart" the
prediction of the data. The stochastic ones draw from `noise_fn`, x -> noise like x.

Shape legend: N batch, C channels, h x w latent size, S sampling steps
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.gaussian_diffusion import GaussianDiffusion, create_diffusion
from diffusion.guidance import first_channels

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict], None] | None
NoiseFunction = Callable[[Tensor], Tensor]
Steps = int | Sequence[float]


@torch.no_grad()
def euler(
    denoise: Denoise, z: Tensor, steps: Steps, callback: Callback = None, *,
    noise_fn: NoiseFunction | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Follows dz/dt = denoise(z, t) by Euler's method: order 1, one evaluation a step."""
    z, times = at_least_fp32(z), flow_times(steps)
    for step, (time, after) in bar(enumerate(pairwise(times)), progress):
        t = z.new_full((len(z),), time)                    # (N,)
        velocity = first_channels(denoise(z, t), z)        # (N, C, h, w)
        pred_xstart = z - time * velocity
        z = z + (after - time) * velocity
        report(callback, step, t, z, pred_xstart)
    return z


@torch.no_grad()
def heun(
    denoise: Denoise, z: Tensor, steps: Steps, callback: Callback = None, *,
    noise_fn: NoiseFunction | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Follows dz/dt = denoise(z, t) by Heun's method: order 2, 2 S - 1 evaluations down to t = 0.

    A step that ends at t = 0, where no network was trained, is Euler's (Karras et al. 2022,
    algorithm 1, with t for sigma).
    """
    z, times = at_least_fp32(z), flow_times(steps)
    for step, (time, after) in bar(enumerate(pairwise(times)), progress):
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
    denoise: Denoise, z: Tensor, steps: Steps, callback: Callback = None, *,
    noise_fn: NoiseFunction = torch.randn_like, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Follows the reverse SDE dz = (velocity - D score) dt + sqrt(2 D) dW with D = t, backwards.

    Of `steps`, all but the last are equal and lead to t = 0.04; the last goes from there to 0 along
    the drift and adds no noise. The score follows from the velocity: -(z + (1 - t) velocity) / t.
    Ma et al. 2024 (SiT), equations 4 and 9, with the defaults of its sampler: diffusion "sigma",
    last step "Mean" of size 0.04. Weak order 1.
    """
    z = at_least_fp32(z)
    if isinstance(steps, int) and steps > 1:
        steps = torch.linspace(1, 0.04, steps).tolist() + [0.0]  # SiT's default last step
    times = flow_times(steps)
    for step, (time, after) in bar(enumerate(pairwise(times)), progress):
        t, size = z.new_full((len(z),), time), time - after
        velocity = first_channels(denoise(z, t), z)        # (N, C, h, w)
        pred_noise = z + (1 - time) * velocity             # -t score
        pred_xstart = z - time * velocity
        z = z - size * (velocity + pred_noise)
        if after > times[-1]:
            z = z + (2 * time * size) ** 0.5 * noise_fn(z)
        report(callback, step, t, z, pred_xstart)
    return z


def chain_sampler(
    sample_loop: Callable[..., Tensor], denoise: Denoise, z: Tensor, steps: int,
    callback: Callback = None, **options,
) -> Tensor:  # fmt: skip
    """Walks the chain shortened to `steps` steps by DDPM's or DDIM's loop."""
    diffusion = create_diffusion(steps, learn_sigma=None)
    options |= {"clip_denoised": False, "callback": callback}
    return sample_loop(diffusion, denoise, z.shape, z, **options)


class NoiseLevels:
    """Where a multistep solver stops on its way: x = alpha data + sigma noise at S + 1 levels.

    times: as the network is told, of the first S
    divisor: data = (x - sigma prediction) / divisor. That is alpha where noise is predicted; it is
        1 where velocity = noise - data is, since there alpha = 1 - sigma.
    """

    def __init__(self, times: list, alpha: list[float], sigma: list[float], divisor: list[float]):
        self.times, self.alpha, self.sigma, self.divisor = times, alpha, sigma, divisor
        pairs = zip(alpha, sigma, strict=True)             # log_snr is the solvers' own time
        log_snr = [math.log(a / s) if s > 0 else math.inf for a, s in pairs]
        self.h = [after - before for before, after in pairwise(log_snr)]  # S step lengths

    def predict_data(self, denoise: Denoise, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Returns the prediction of the data (N, C, h, w), and t (N,) as the network was told."""
        t = torch.full((len(x),), self.times[step], device=x.device)  # (N,) int64 or fp32
        prediction = first_channels(denoise(x, t), x)
        return (x - self.sigma[step] * prediction) / self.divisor[step], t

    def move(self, x: Tensor, data: Tensor, step: int) -> Tensor:
        """Moves x from a level to the next one, exactly if `data` is right on the whole way."""
        shrink = self.sigma[step + 1] / self.sigma[step]
        return shrink * x - self.alpha[step + 1] * math.expm1(-self.h[step]) * data


@torch.no_grad()
def dpm_solver(
    levels_of: Callable[[Steps], NoiseLevels],
    denoise: Denoise, z: Tensor, steps: Steps, callback: Callback = None, *,
    noise_fn: NoiseFunction | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M): order 2, one evaluation a step (Lu et al. 2022, 2211.01095, algorithm 2).

    Each step takes the data from the line through its last two predictions.
    """
    x, levels, previous = at_least_fp32(z), levels_of(steps), None
    for step in bar(range(len(levels.times)), progress):
        data, t = levels.predict_data(denoise, x, step)    # (N, C, h, w)
        x = levels.move(x, predicted_data(levels.h, step, data, previous), step)
        report(callback, step, t, x, data)
        previous = data
    return x


@torch.no_grad()
def unipc(
    levels_of: Callable[[Steps], NoiseLevels],
    denoise: Denoise, z: Tensor, steps: Steps, callback: Callback = None, *,
    noise_fn: NoiseFunction | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """UniPC-2 (B2, data prediction): order 3 with its corrector (Zhao et al. 2023, 2302.04867).

    The predictor is DPM-Solver++'s step. The corrector takes that step again once the data have
    been predicted where it led. The next step needs that prediction anyway, so a step is one
    evaluation. A last step to noise 0 is of order 1, so down to the data the order is 2.
    """
    x, levels = at_least_fp32(z), levels_of(steps)
    start, previous, oldest = x, None, None                # the last step's state and predictions
    for step in bar(range(len(levels.times)), progress):
        data, t = levels.predict_data(denoise, x, step)    # (N, C, h, w)
        if step > 0:
            corrected = corrected_data(levels.h, step - 1, data, previous, oldest)
            x = levels.move(start, corrected, step - 1)
        start, oldest, previous = x, previous, data
        x = levels.move(x, predicted_data(levels.h, step, data, oldest), step)
        report(callback, step, t, x, data)
    return x


def predicted_data(h: list[float], step: int, data: Tensor, previous: Tensor | None) -> Tensor:
    """Returns the data that a step moves by: halfway on, on the line of two predictions.

    The first step has but one prediction. A last step to noise 0 goes to the prediction itself.
    """
    if previous is None or math.isinf(h[step]):
        return data
    return data + (data - previous) * h[step] / (2 * h[step - 1])


def corrected_data(
    h: list[float], step: int, end: Tensor, data: Tensor, previous: Tensor | None
) -> Tensor:
    """Returns the data that a step moves by, from predictions at its end, start and before.

    The weights solve the conditions of Zhao et al. 2023, theorem 3.1, with B(h) = e^h - 1.
    """
    if previous is None:
        return (data + end) / 2
    ratio = h[step - 1] / h[step]
    phi_1 = math.expm1(-h[step])
    phi_2 = -phi_1 / h[step] - 1
    phi_3 = -phi_2 / h[step] - 1 / 2
    # old + new = b_1 and -ratio old + 1 new = b_2, for the slopes to the nodes -ratio and 1
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    old = (b_1 - b_2) / (1 + ratio)
    return data + old * (data - previous) / ratio + (b_1 - old) * (end - data)


def flow_times(steps: Steps) -> list[float]:
    """Returns S + 1 times from 1 to 0, or `steps` itself; ValueError for fewer than one step."""
    if not isinstance(steps, int):
        return list(steps)
    if steps < 1:
        raise ValueError(f"num_steps: got {steps}, expected at least 1")
    return torch.linspace(1, 0, steps + 1).tolist()


def flow_levels(steps: Steps) -> NoiseLevels:
    """Returns the levels of a flow at equal steps, or at the given times; see `flow_times`."""
    times = flow_times(steps)
    sigma = [min(time, 1 - 1e-6) for time in times]        # or log_snr would be infinite at t = 1
    return NoiseLevels(times[:-1], [1 - s for s in sigma], sigma, [1.0] * len(sigma))


def chain_levels(steps: int) -> NoiseLevels:
    """Returns the levels of the linear chain of 1000 steps: S of 999 to 999 / S, then noise 0.

    S is at most 999. The steps are evenly spaced and rounded, as diffusers' default ("linspace")
    has them.
    """
    alphas_cumprod = create_diffusion().alphas_cumprod     # (1000,) float64
    times = torch.linspace(999, 0, steps + 1, dtype=torch.float64)[:-1].round().long()  # (S,)
    signal = torch.cat([alphas_cumprod[times], alphas_cumprod.new_ones(1)])  # (S + 1,)
    alpha = signal.sqrt().tolist()
    return NoiseLevels(times.tolist(), alpha, (1 - signal).sqrt().tolist(), alpha)


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
    evaluations: Callable[[int], int] = int  # how often S steps call denoise

    def __call__(
        self, denoise: Denoise, z: Tensor, steps: Steps, callback: Callback = None, **options
    ) -> Tensor:
        return self.function(denoise, z, steps, callback, **options)


# By the kind of path that an objective trains on, the default first.
SAMPLERS: dict[str, dict[str, Sampler]] = {
    "gaussian": {
        "ddpm": Sampler(partial(chain_sampler, GaussianDiffusion.p_sample_loop), 250, 1000),
        "ddim": Sampler(partial(chain_sampler, GaussianDiffusion.ddim_sample_loop), 50, 1000),
        "dpm-solver++": Sampler(partial(dpm_solver, chain_levels), 25, 999),
        "unipc": Sampler(partial(unipc, chain_levels), 25, 999),
    },
    "rectified_flow": {
        "euler": Sampler(euler, 50),
        "heun": Sampler(heun, 25, evaluations=lambda steps: 2 * steps - 1),
        "sde": Sampler(euler_maruyama, 250),
        "dpm-solver++": Sampler(partial(dpm_solver, flow_levels), 25),
        "unipc": Sampler(partial(unipc, flow_levels), 25),
    },
}
