"""Detection of gradient norms far above their running mean.

find_spikes = SpikeDetector(factor=10, device)
is_spike = find_spikes(grad_norm)             # each step; bool on the device
"""

import torch
from torch import Tensor

STEPS = 100  # length of the running mean; the first STEPS steps are never spikes


class SpikeDetector:
    """Compares each gradient norm with the mean of about the last `STEPS` ones, without spikes.

    The state stays on the device, so that the host never waits for a norm.

    factor: a norm above `factor` times the mean is a spike; 0: none is
    """

    def __init__(self, factor: float, device: torch.device):
        self.factor = factor
        self.mean, self.count = torch.zeros(2, device=device)

    def __call__(self, norm: Tensor) -> Tensor:
        """Returns whether a norm is a spike; otherwise, if it is finite, it enters the mean."""
        if not self.factor:
            return torch.zeros_like(norm, dtype=torch.bool)
        is_spike = (self.count >= STEPS) & (norm > self.factor * self.mean)
        is_counted = norm.isfinite() & ~is_spike
        self.count += is_counted & (self.count < STEPS)
        self.mean += torch.where(is_counted, (norm - self.mean) / self.count.clamp(min=1), 0.0)
        return is_spike

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean.item(), "count": self.count.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores a state; {} changes nothing."""
        if state:
            self.mean.fill_(state["mean"])
            self.count.fill_(state["count"])
