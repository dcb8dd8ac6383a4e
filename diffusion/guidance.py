"""Classifier-free guidance, autoguidance, and functions that read network outputs.

Shape legend: N batch, C channels of x, h x w latent size
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Conditions = Tensor | Mapping[str, Tensor]  # labels (N,), or named tensors (N, ...)


def classifier_free_guidance(
    model: Callable[..., Tensor | tuple], y: Conditions, null_y: Conditions | None,
    scale: float | Callable[[float], float], channels: int | None = None,
    *, guide: Callable[..., Tensor | tuple] | None = None,
) -> Callable[..., Tensor]:
    """Returns `denoise(x, t, r=None)`, which computes uncond + scale * (cond - uncond) in fp32.

    model: called as model(x, t, y) on the batch [conditional; unconditional] or, with a `guide`, on
        the conditional half; returns a prediction, or (prediction, aux_loss)
    y, null_y: conditions of the two halves: labels (N,), or tensors by name. With scale 1 only the
        conditional half runs, and null_y may be None.
    scale: a number, or a function of t as the network receives it (see `guidance_within`). A
        function is evaluated at t[0], so all images must have the same t, and the host waits for
        the device. Where the scale is 1, only the conditional half runs.
    channels: number of leading channels to guide; None: the C channels of x. The published Gaussian
        sampler guides 3. The other channels, such as the variance, stay conditional.
    guide: predicts `uncond` in a call of its own: the model itself, if its predictions depend on
        the rest of the batch; or, with null_y = y, a weaker model (autoguidance, Karras et al.
        2024, arXiv 2406.02507, equation 3)

    denoise takes x (N, C, h, w), t (N,) and, for the mean velocity from t to r, r (N,). It returns
    a prediction (N, C or 2C, h, w).

    Ho and Salimans 2022, equation 6, with scale = 1 + w.
    """
    if scale != 1 and shapes(null_y) != shapes(y):
        raise ValueError(f"null_y: got {shapes(null_y)}, expected the shape of y, {shapes(y)}")

    def denoise(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        cond_y, uncond_y = with_span(y, t, r), with_span(null_y, t, r)
        scale_now = scale(t[0].item()) if callable(scale) else scale
        if scale_now == 1:
            return prediction_and_aux_loss(model(x, t, cond_y))[0]
        if guide is not None:
            halves = model(x, t, cond_y), guide(x, t, uncond_y)
            cond, uncond = (prediction_and_aux_loss(half)[0] for half in halves)
        else:
            output = model(torch.cat((x, x)), torch.cat((t, t)), joined(cond_y, uncond_y))
            cond, uncond = prediction_and_aux_loss(output)[0].chunk(2)  # (N, C or 2C, h, w) each
        return guided(uncond, cond, scale_now, x.shape[1] if channels is None else channels)

    return denoise


def with_span(y: Conditions | None, t: Tensor, r: Tensor | None) -> Conditions | None:
    """Adds the span t - r (N,) to the conditions y if r is given."""
    if y is None or r is None:
        return y
    return {**(y if isinstance(y, Mapping) else {"label": y}), "span": t - r}


def shapes(y: Conditions | None) -> object:
    """Returns the shape of the labels, or the shapes of the conditions by name."""
    if isinstance(y, Mapping):
        return {name: tuple(value.shape) for name, value in y.items()}
    return None if y is None else tuple(y.shape)


def joined(y: Conditions, null_y: Conditions) -> Conditions:
    """Returns the conditions of the batch [conditional; unconditional]."""
    if isinstance(y, Mapping):
        return {name: torch.cat((value, null_y[name])) for name, value in y.items()}
    return torch.cat((y, null_y))


def guided(base: Tensor, prediction: Tensor, scale: float, channels: int) -> Tensor:
    """Returns `prediction` with the first channels set to base + scale * (prediction - base)."""
    base = base[:, :channels]                              # (N, channels, h, w)
    first = base + scale * (prediction[:, :channels] - base)
    return torch.cat([first, prediction[:, channels:]], dim=1)


def guidance_within(
    interval: tuple[float, float], scale: float, noise_time: float = 1.0
) -> float | Callable[[float], float]:
    """Returns the guidance scale as a function of t: `scale` within the interval, 1 outside.

    Returns the number `scale` if the scale is 1 or the interval contains all times.

    interval: guidance acts where low <= t / noise_time <= high (Kynkaanniemi et al. 2024, arXiv
        2404.07724), with 0 <= low < high <= 1
    noise_time: t of pure noise, 1 for rectified flow and 999 for the chain of 1000 steps
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"got {low:g} {high:g}, expected 0 <= low < high <= 1")
    if scale == 1 or (low, high) == (0, 1):
        return scale
    # Tolerance for fp32 rounding, so that t = 0.3 lies within the interval 0.3 to 0.7.
    return lambda t: scale if low - 1e-6 <= t / noise_time <= high + 1e-6 else 1.0


def prediction_and_aux_loss(output: Tensor | tuple) -> tuple[Tensor, Tensor]:
    """Splits a network's output into the prediction, cast to fp32, and the auxiliary loss.

    A plain tensor is a prediction with an auxiliary loss of 0.
    """
    prediction, aux_loss = output if isinstance(output, tuple) else (output, None)
    prediction = prediction.float()
    return prediction, prediction.new_zeros(()) if aux_loss is None else aux_loss


def first_channels(prediction: Tensor, x: Tensor) -> Tensor:
    """Returns the first C of C or 2C predicted channels."""
    check_channels(prediction, x, (1, 2))
    return prediction[:, : x.shape[1]]


def check_channels(prediction: Tensor, x: Tensor, factors: tuple[int, ...]) -> None:
    """Requires that the number of predicted channels is C times one of the factors."""
    got, expected = prediction.shape[1], [factor * x.shape[1] for factor in factors]
    if got not in expected:
        allowed = " or ".join(map(str, expected))
        raise ValueError(f"the network's channels: got {got}, expected {allowed}")
