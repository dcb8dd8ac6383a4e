"""What steps came to: means of everything that losses, routers and optimizers return by name."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusion import Objective
from evaluation.heldout import held_out_loss
from models import DiT
from runtime.devices import peak_tflops
from runtime.processes import Distributed
from training.config import TrainConfig
from training.engine import Engine


class Interval:
    """What the steps since the last log line came to; sums stay on the device until then."""

    def __init__(self, dist: Distributed):
        self.dist = dist
        self.sums: dict[str, Tensor] = {}
        self.good = torch.zeros((), device=dist.device)  # steps that were not skipped
        self.start, self.steps = time.perf_counter(), 0
        self.pauses, self.waited = 0.0, 0.0  # seconds

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds the scalars of a step; of a skipped one only the time counts."""
        skipped = metrics["skipped"]
        for name, value in metrics.items():
            if name != "skipped":
                added = torch.where(skipped, 0.0, value.float())
                self.sums[name] = self.sums[name] + added if name in self.sums else added
        self.good += torch.where(skipped, 0.0, 1.0)
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile does not count as time of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.pauses += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time meanwhile as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def means(self) -> dict[str, float]:
        """The means over the steps and all processes, which wait for each other and the steps."""
        values = torch.stack([*self.sums.values(), self.good])
        *sums, steps = self.dist.sum(values).tolist()
        means = [total / steps if steps else math.nan for total in sums]
        return dict(zip(self.sums, means, strict=True))

    def seconds(self) -> float:
        """The time of the steps so far; `means` has waited for them."""
        return time.perf_counter() - self.start - self.pauses


def round_number(most: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not above `most`, at least 1."""
    power = 10 ** int(math.log10(max(1.0, most)))
    return max(factor for factor in (1, 2, 5) if factor * power <= max(1.0, most)) * power


def speed_metrics(
    config: TrainConfig, macs: int, images_per_second: float, dist: Distributed
) -> dict[str, float]:
    """The model TFLOP/s of a process and, where the peak is known, the fraction of it (MFU).

    macs: multiply-adds of a forward pass on an image

    A training step computes three times the products of a forward pass, two FLOPs a multiply-add.
    What --gradient-checkpointing recomputes does not count.
    """
    flops = 6 * macs * images_per_second / dist.world_size
    values, peak = {"tflops_per_gpu": flops / 1e12}, peak_tflops(dist.device)
    if peak is not None and config.step.precision != "fp32":
        values["mfu"] = flops / 1e12 / peak
    return values


def expert_metrics(model: DiT, dist: Distributed) -> dict[str, float | list[float]]:
    """How the experts were used in the last micro-batches, and what routers with state have learnt.

    A list has a number for each sparse layer; nothing of a dense model.
    """
    if model.expert_load is None:
        return {}
    load = dist.sum(model.expert_load.clone()) / dist.world_size  # (L, E)
    states: dict[str, list[float]] = {}
    for block in model.blocks:
        for name, state in block.moe.gate.named_buffers() if block.moe else ():
            states.setdefault(f"router_{name}", []).append(state.abs().max().item())
    return {
        "expert_load": load.amax(dim=1).tolist(),  # busiest over mean
        "dead_experts": int((load == 0).sum()),
        "experts_in_all": load.numel(),
        "experts_per_token": model.experts_per_token,
        **states,
    }


def held_out_metrics(
    engine: Engine, objective: Objective, batches: list[tuple[Tensor, Tensor]], times: str
) -> dict[str, float | list[float]]:
    """The EMAs' loss on held-out images: mean, standard error, and by ten bins of time.

    The first EMA's has plain names, another one's has its own behind them.
    """
    values: dict[str, float | list[float]] = {}
    for number, ema in enumerate(engine.emas):
        with engine.ema_weights(number):
            loss = held_out_loss(engine.model, objective, batches, times=times)
        ending = f"_ema_{ema.name}" if number else ""
        values |= {f"val_loss{ending}": loss.mean, f"val_error{ending}": loss.standard_error}
        if not number:
            values |= {"val_bins": loss.bins, "val_edges": loss.edges}
            if loss.experts_per_token:
                values["ema_experts_per_token"] = loss.experts_per_token
    return values
