"""Classifier-free guidance, and how the losses and samplers read what a network returns.

Shape legend: N batch, C channels of x, h x w latent size
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def classifier_free_guidance(
    model: Callable[..., Tensor | tuple], y: Tensor, null_y: Tensor | None,
    scale: float | Callable[[float], float], channels: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """Returns `denoise(x, t)`, the guided prediction uncond + scale * (cond - uncond), in fp32.

    model: called once a step as model(x, t, y) on the batch [conditional; unconditional];
        returns a prediction, or (prediction, aux_loss)
    y, null_y: (N,) labels, and the labels of the unconditional half; null_y may be None when
        scale is 1, for then only the conditional half runs
    scale: a number, or a function of t as the network is given it (see `guidance_schedule`), for
        which each step reads t back from the device; where it is 1 only the conditional half runs
    channels: how many of the first channels to guide; None for the C channels of x. The published
        Gaussian sampler guides 3. The others, variance channels among them, stay conditional.

    denoise takes x (N, C, h, w) and t (N,) and returns a prediction, (N, C or 2C, h, w).

    Raises ValueError when null_y is missing or unlike y, or channels is not within 1 to C.
    Ho and Salimans 2022, equation 6, with scale = 1 + w.
    """
    if scale == 1:
        return lambda x, t: prediction_and_aux_loss(model(x, t, y))[0]
    if null_y is None or null_y.shape != y.shape:
        got = "None" if null_y is None else tuple(null_y.shape)
        raise ValueError(
            f"guidance scale {scale} needs null_y of the shape of y {tuple(y.shape)}, got {got}"
        )
    y_both = torch.cat([y, null_y])                        # (2N,)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        scale_now = scale(t[0].item()) if callable(scale) else scale
        if scale_now == 1:
            return prediction_and_aux_loss(model(x, t, y))[0]
        guided = x.shape[1] if channels is None else channels
        if not 1 <= guided <= x.shape[1]:
            raise ValueError(f"guided channels must be 1 to {x.shape[1]}, those of x, got {guided}")
        output = model(torch.cat([x, x]), torch.cat([t, t]), y_both)
        cond, uncond = prediction_and_aux_loss(output)[0].chunk(2)  # (N, C or 2C, h, w) each
        base = uncond[:, :guided]                          # (N, guided, h, w)
        mixed = base + scale_now * (cond[:, :guided] - base)
        return torch.cat([mixed, cond[:, guided:]], dim=1)

    return denoise


def guidance_schedule(
    scale: float, interval: tuple[float, float] = (0.0, 1.0), shape: str = "constant",
    time_scale: float = 1.0,
) -> float | Callable[[float], float]:  # fmt: skip
    """Returns a guidance scale that depends on t, or `scale` itself where it does not.

    interval: guidance acts where low <= t / time_scale <= high; elsewhere the scale is 1
        (Kynkaanniemi et al. 2024, arXiv 2404.07724)
    shape: "constant"; or "linear" or "cosine", by which scale - 1 grows from 0 at t = time_scale to
        twice its value at t = 0, with the same mean over all t (Wang et al. 2024, arXiv 2404.13040)
    time_scale: the t of pure noise, 1 for rectified flow and 999 for the chain of 1000 steps

    Raises ValueError unless 0 <= low < high <= 1, and for another shape.
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guidance interval must have 0 <= low < high <= 1, got {low} {high}")
    if shape not in GUIDANCE_SHAPES:
        raise ValueError(f"guidance schedule must be one of {list(GUIDANCE_SHAPES)}, got {shape!r}")
    if scale == 1 or ((low, high) == (0, 1) and shape == "constant"):
        return scale

    def scale_at(t: float) -> float:
        time = t / time_scale
        # fp32 times are off by rounding, and 0.3 shall be within 0.3 to 0.7
        if not low - 1e-6 <= time <= high + 1e-6:
            return 1.0
        return 1 + (scale - 1) * GUIDANCE_SHAPES[shape](time)

    return scale_at


GUIDANCE_SHAPES = {
    "constant": lambda time: 1.0,
    "linear": lambda time: 2 * (1 - time),
    "cosine": lambda time: 1 + math.cos(math.pi * time),
}


def prediction_and_aux_loss(output: Tensor | tuple) -> tuple[Tensor, Tensor]:
    """Splits what a network returns into the prediction in fp32 and the aux loss as it came.

    A plain tensor is a prediction with an aux loss of zero, a scalar.
    """
    prediction, aux_loss = output if isinstance(output, tuple) else (output, None)
    prediction = prediction.float()
    return prediction, prediction.new_zeros(()) if aux_loss is None else aux_loss
