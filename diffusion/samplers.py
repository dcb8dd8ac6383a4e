"""Samplers: plain functions of (denoise, z, steps, callback) that turn noise into data.

    denoise = classifier_free_guidance(model, y, null_y, 2.0)
    latents = SAMPLERS["rectified_flow"]["heun"](denoise, z, 25)

denoise(x, t) predicts noise or velocity as (N, C or 2C, h, w); of 2C channels a sampler reads the
first C, ancestral sampling (DDPM, DDIM) all. z (N, C, h, w) is standard normal. `steps` is a number
of steps or the times themselves, from the first to the last, one more than there are steps: in
[0, 1] for rectified flow, steps of the chain (as the network knows them) for Gaussian diffusion.
All samplers return fp32 (N, C, h, w) (fp64 for fp64 z), and call `callback` after each step with
"step" from 0, "t" (N,) as given to the network, "x" the state after the step and "pred_xstart" the
prediction of the data. `noise_fn` (x -> noise like x) is what the stochastic ones draw from.

Shape legend: N batch, C channels, h x w latent size, S sampling steps
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor
from tqdm import tqdm

from diffusion.gaussian_diffusion import create_diffusion

Denoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict], None] | None

SDE_LAST_STEP = 0.04  # the published default: one of 25 equal steps


def flow_times(steps: int | Sequence[float]) -> list[float]:
    """Returns S + 1 times from 1 to 0, or `steps` itself if it is a list of times.

    Raises ValueError for fewer than one step and for times that do not fall within [0, 1].
    """
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {steps}")
        return torch.linspace(1, 0, steps + 1).tolist()
    times = torch.as_tensor(steps).tolist()
    if len(times) < 2 or times[0] > 1 or times[-1] < 0 or sorted(times)[::-1] != times:
        raise ValueError(f"times must fall from at most 1 to at least 0, got {times}")
    return times


@torch.no_grad()
def euler(
    denoise: Denoise,
    z: Tensor,
    steps: int | Sequence[float],
    callback: Callback = None,
    *,
    noise_fn: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """Follows dz/dt = denoise(z, t) by Euler's method: order 1, one evaluation a step."""
    z, times = at_least_fp32(z), flow_times(steps)
    for step, (time, after) in bar(times, progress):
        t = z.new_full((len(z),), time)                    # (N,)
        velocity = first_channels(denoise(z, t), z)        # (N, C, h, w)
        previous, z = z, z + (after - time) * velocity
        report(callback, step, t, z, previous - time * velocity)
    return z


@torch.no_grad()
def heun(
    denoise: Denoise,
    z: Tensor,
    steps: int | Sequence[float],
    callback: Callback = None,
    *,
    noise_fn: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """Follows dz/dt = denoise(z, t) by Heun's method: order 2, 2 S - 1 evaluations down to t = 0.

    A step that ends at t = 0, where no network was trained, is Euler's (Karras et al. 2022,
    algorithm 1, with t for sigma).
    """
    z, times = at_least_fp32(z), flow_times(steps)
    for step, (time, after) in bar(times, progress):
        t = z.new_full((len(z),), time)                    # (N,)
        velocity = first_channels(denoise(z, t), z)        # (N, C, h, w)
        pred_xstart = z - time * velocity
        previous, z = z, z + (after - time) * velocity
        if after > 0:
            end_velocity = first_channels(denoise(z, torch.full_like(t, after)), z)
            z = previous + (after - time) / 2 * (velocity + end_velocity)
        report(callback, step, t, z, pred_xstart)
    return z


@torch.no_grad()
def euler_maruyama(
    denoise: Denoise,
    z: Tensor,
    steps: int | Sequence[float],
    callback: Callback = None,
    *,
    noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
    progress: bool = False,
) -> Tensor:
    """Follows the reverse SDE dz = (velocity - D score) dt + sqrt(2 D) dW with D = t, backwards.

    Of `steps`, all but the last are equal and lead to t = 0.04; the last goes from there to 0 along
    the drift and adds no noise. The score follows from the velocity: -(z + (1 - t) velocity) / t.
    Ma et al. 2024 (SiT), equations 4 and 9, with the defaults of its sampler: diffusion "sigma",
    last step "Mean" of size 0.04. Weak order 1.
    """
    z = at_least_fp32(z)
    if isinstance(steps, int) and steps > 1:
        steps = torch.linspace(1, SDE_LAST_STEP, steps).tolist() + [0.0]
    times = flow_times(steps)
    for step, (time, after) in bar(times, progress):
        t, size = z.new_full((len(z),), time), time - after
        velocity = first_channels(denoise(z, t), z)        # (N, C, h, w)
        pred_noise = z + (1 - time) * velocity             # -t score
        pred_xstart = z - time * velocity
        z = z - size * (velocity + pred_noise)
        if step < len(times) - 2:
            z = z + (2 * time * size) ** 0.5 * noise_fn(z)
        report(callback, step, t, z, pred_xstart)
    return z


def ddpm(
    denoise: Denoise,
    z: Tensor,
    steps: int,
    callback: Callback = None,
    *,
    noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
    progress: bool = False,
    learn_sigma: bool = True,
) -> Tensor:
    """Samples the chain shortened to `steps` steps by ancestral sampling; see `p_sample_loop`."""
    return create_diffusion(steps, learn_sigma=learn_sigma).p_sample_loop(
        denoise, z.shape, z, clip_denoised=False, noise_fn=noise_fn, callback=callback,
        progress=progress,
    )  # fmt: skip


def ddim(
    denoise: Denoise,
    z: Tensor,
    steps: int,
    callback: Callback = None,
    *,
    noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
    progress: bool = False,
    learn_sigma: bool = True,
) -> Tensor:
    """Follows the chain shortened to `steps` steps without noise, order 1; `ddim_sample_loop`."""
    return create_diffusion(steps, learn_sigma=learn_sigma).ddim_sample_loop(
        denoise, z.shape, z, clip_denoised=False, noise_fn=noise_fn, callback=callback,
        progress=progress,
    )  # fmt: skip


@torch.no_grad()
def multistep(
    make_scheduler: Callable[..., SchedulerMixin],
    denoise: Denoise,
    z: Tensor,
    steps: int | Sequence[float],
    callback: Callback = None,
    *,
    objective: str,
    noise_fn: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """Runs one of diffusers' multistep schedulers: one evaluation a step, no noise.

    make_scheduler: DPM-Solver++ (2M: order 2; Lu et al. 2022, arXiv 2211.01095) or UniPC (order 2
        and the corrector: order 3; Zhao et al. 2023, arXiv 2302.04867)
    objective: "gaussian" or "rectified_flow", which says what denoise predicts and is told

    The last step, to the data at noise 0, is of order 1: it takes the prediction there. So the
    orders above hold from one noise level to another, and down to the data both have order 2.
    """
    z = at_least_fp32(z)
    grid = flow_grid(steps) if objective == "rectified_flow" else gaussian_grid(steps)
    to_data = grid.sigmas[-1] == 0
    scheduler = make_scheduler(
        solver_order=2,
        prediction_type="flow_prediction" if objective == "rectified_flow" else "epsilon",
        use_flow_sigmas=objective == "rectified_flow",
        lower_order_final=to_data,
        final_sigmas_type="zero" if to_data else "sigma_min",
    )
    # The grid is ours: the scheduler's own rounds a flow's times to integers.
    scheduler.set_timesteps(len(grid.times))
    scheduler.sigmas = torch.tensor(grid.sigmas, dtype=torch.float64)
    scheduler.set_begin_index(0)
    for step, time in enumerate(tqdm(grid.times, disable=not progress, leave=False)):
        t = torch.full((len(z),), time, device=z.device)   # (N,) int64 or fp32
        prediction = first_channels(denoise(z, t), z).to(z.dtype)  # (N, C, h, w)
        pred_xstart = (z - grid.noise[step] * prediction) / grid.signal[step]
        z = scheduler.step(prediction, time, z, return_dict=False)[0]
        report(callback, step, t, z, pred_xstart)
    return z


class Grid(NamedTuple):
    """What the S steps of a multistep solver are: x_t = signal data + noise level * noise."""

    times: list[float]   # (S,) as the network is told
    sigmas: list[float]  # (S + 1,) as diffusers counts: t of a flow, else noise / signal
    signal: list[float]  # (S,) what the state less noise * prediction is divided by for the data
    noise: list[float]   # (S,)


def flow_grid(steps: int | Sequence[float]) -> Grid:
    """Returns the grid of equal steps, or of the given times; see `flow_times`."""
    times = flow_times(steps)
    # log(signal / noise) has to be finite for UniPC
    sigmas = [min(time, 1 - 1e-6) for time in times]
    return Grid(times[:-1], sigmas, [1.0] * len(times), times)


def gaussian_grid(steps: int | Sequence[int]) -> Grid:
    """Returns the grid of the linear chain of 1000 steps: S of 999 to 999 / S, then noise 0.

    Those are evenly spaced and rounded, as diffusers' default ("linspace") has them. Given steps
    of the chain (S + 1,) end at the last of them instead. Raises ValueError for S outside 1 to 999.
    """
    alphas_cumprod = create_diffusion().alphas_cumprod     # (1000,) float64
    if isinstance(steps, int):
        if not 1 <= steps <= 999:
            raise ValueError(f"num_steps must be 1 to 999, got {steps}")
        times = torch.linspace(999, 0, steps + 1, dtype=torch.float64)[:-1].round().long()
        end = [0.0]
    else:
        times, end = torch.as_tensor(steps), []
    signal, noise = alphas_cumprod[times].sqrt(), (1 - alphas_cumprod[times]).sqrt()
    sigmas = (noise / signal).tolist() + end
    return Grid(times.tolist()[: len(sigmas) - 1], sigmas, signal.tolist(), noise.tolist())


def at_least_fp32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def first_channels(prediction: Tensor, x: Tensor) -> Tensor:
    """Returns the first C of C or 2C predicted channels; ValueError for another number."""
    channels = x.shape[1]
    if prediction.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the network must predict {channels} or {2 * channels} channels, "
            f"got {prediction.shape[1]}"
        )
    return prediction[:, :channels]


def bar(times: list[float], progress: bool) -> Iterable[tuple[int, tuple[float, float]]]:
    """Yields (step, (time, next time)), with a progress bar if asked for."""
    pairs = list(zip(times[:-1], times[1:], strict=True))
    return enumerate(tqdm(pairs, disable=not progress, leave=False))


def report(callback: Callback, step: int, t: Tensor, x: Tensor, pred_xstart: Tensor) -> None:
    if callback is not None:
        callback({"step": step, "t": t, "x": x, "pred_xstart": pred_xstart})


# By objective: what the flag --sampler can name, the default first.
SAMPLERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "gaussian": {
        "ddpm": ddpm,
        "ddim": ddim,
        "dpm-solver++": partial(multistep, DPMSolverMultistepScheduler, objective="gaussian"),
        "unipc": partial(multistep, UniPCMultistepScheduler, objective="gaussian"),
    },
    "rectified_flow": {
        "euler": euler,
        "heun": heun,
        "sde": euler_maruyama,
        "dpm-solver++": partial(multistep, DPMSolverMultistepScheduler, objective="rectified_flow"),
        "unipc": partial(multistep, UniPCMultistepScheduler, objective="rectified_flow"),
    },
}


def function_evaluations(sampler: str, steps: int) -> int:
    """Returns how often a sampler of that name calls denoise in `steps` steps."""
    return 2 * steps - 1 if sampler == "heun" else steps
