"""Metrics of training: means of the values that losses, routers and optimizers return by name."""

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.heldout import held_out_loss
from latents.sources import Batch
from models import DiT
from runtime.devices import peak_tflops
from runtime.processes import Distributed
from training.config import TrainConfig
from training.engine import Engine


class MetricTracker:
    """Tracks means of metrics since the last log line; the sums stay on the device."""

    def __init__(self, dist: Distributed):
        self.dist = dist
        self.sums: dict[str, Tensor] = {}
        self.good = torch.zeros((), device=dist.device)  # number of steps that were not skipped
        self.bad = torch.zeros((), device=dist.device)  # and of those whose loss is nan here
        self.start, self.steps = time.perf_counter(), 0
        # Seconds between the steps, which do not count, and seconds in which steps wait for data.
        self.paused, self.waited = 0.0, 0.0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds the numbers of a step: scalars, or one per layer. A skipped step counts only for the
        time.
        """
        skipped = metrics["skipped"]
        for name, value in metrics.items():
            if name != "skipped":
                added = torch.where(skipped, 0.0, value.float())
                self.sums[name] = self.sums[name] + added if name in self.sums else added
        self.good += torch.where(skipped, 0.0, 1.0)
        self.bad += ~metrics["loss"].isfinite()
        self.steps += 1

    def means(self) -> dict[str, float | list[float]]:
        """Returns the means over the steps and all processes; waits for the steps to finish."""
        values = torch.cat([total.flatten() for total in (*self.sums.values(), self.good)])
        *sums, steps = self.dist.sum(values).tolist()
        means = iter([total / steps if steps else math.nan for total in sums])
        return {
            name: [next(means) for _ in total] if total.dim() else next(means)
            for name, total in self.sums.items()
        }

    def seconds(self) -> float:
        """Returns the time of the steps so far. Call `means` first, which waits for the steps."""
        return time.perf_counter() - self.start - self.paused


class ForwardClock:
    """Times the last forward pass of a model in training.

    All processes take equally long for a step, because they wait for the slowest one, but hardly in
    the forward pass. With --shard, the processes of a copy of the model also wait for each other
    there, so a slow process slows down its copy.
    """

    def __init__(self, model: DiT, device: torch.device):
        self.model, self.is_cuda = model, device.type == "cuda"
        self.times = [0.0, 0.0]
        if self.is_cuda:
            self.events = [torch.cuda.Event(enable_timing=True) for _ in self.times]
        model.register_forward_pre_hook(lambda *_: self.note(0))
        model.register_forward_hook(lambda *_: self.note(1))

    def note(self, number: int) -> None:
        if self.model.training and self.is_cuda:
            self.events[number].record()
        elif self.model.training:
            self.times[number] = time.perf_counter()

    def seconds(self) -> float:
        """Returns the time of a pass that a GPU has finished."""
        if self.is_cuda:
            return self.events[0].elapsed_time(self.events[1]) / 1000
        return self.times[1] - self.times[0]


class ProcessReport(NamedTuple):
    """What each process reports at a log line."""

    host: str
    peaks: dict[str, float]  # metrics that are logged as their maximum over the processes
    unreadable: set[str]
    num_read: int  # images
    waited: float  # seconds, for data
    bad: int  # steps whose loss is infinite or nan on this process
    busy: float  # seconds in which a micro-batch waits for data or is in the forward pass


def name_ranks(hosts: Mapping[int, str]) -> str:
    """Returns "rank 3 (node0), rank 9 (node1)", for at most eight ranks."""
    named = [f"rank {rank} ({host})" for rank, host in hosts.items()]
    return ", ".join(named[:8]) + (f" and {len(named) - 8} others" if len(named) > 8 else "")


def round_number(most: float) -> int:
    """Returns the largest of 1, 2, 5, 10, 20, 50, ... that is at most `most`, or 1."""
    power = 10 ** int(math.log10(max(1.0, most)))
    return max(factor for factor in (1, 2, 5) if factor * power <= max(1.0, most)) * power


def speed_metrics(
    config: TrainConfig, macs: int, images_per_second: float, dist: Distributed
) -> dict[str, float]:
    """Returns the model TFLOP/s per process and, where the peak is known, the fraction of it (MFU).

    macs: multiply-adds of the forward pass on one image

    A training step computes three times the matrix products of a forward pass, at two FLOPs per
    multiply-add. The recomputation of --gradient-checkpointing does not count.
    """
    flops = 6 * macs * images_per_second / dist.world_size
    values, peak = {"tflops_per_gpu": flops / 1e12}, peak_tflops(dist.device)
    if peak is not None and config.step.precision != "fp32":
        values["mfu"] = flops / 1e12 / peak
    return values


def expert_metrics(model: DiT, dist: Distributed) -> dict[str, float | list[float]]:
    """Returns the use of the experts in the last micro-batches and the state of the routers.

    Lists have one number per sparse layer. The result is empty for a dense model.
    """
    if model.expert_load is None:
        return {}
    load = dist.sum(model.expert_load.clone()) / dist.world_size  # (L, E + extra experts)
    routed = load[:, : model.config.num_experts]
    states: dict[str, list[Tensor]] = {}
    for block in model.blocks:
        for name, state in block.moe.gate.named_buffers() if block.moe else ():
            states.setdefault(f"router_{name}", []).append(state.float().abs().max())
    return {
        "expert_load": load.amax(dim=1).tolist(),  # load of the busiest expert
        "dead_experts": int((routed == 0).sum()),
        "experts_in_all": routed.numel(),
        "experts_per_token": model.experts_per_token,
        **{name: torch.stack(values).tolist() for name, values in states.items()},
    }


def process_load(model: DiT) -> dict[str, float]:
    """Returns the largest load of this process since the last call: the rows that it received in a
    layer, relative to the mean. {} without --expert-parallel.
    """
    spread = [b.moe.experts for b in model.blocks if b.moe and hasattr(b.moe.experts, "load")]
    if not spread:
        return {}
    largest = max(experts.load for experts in spread)
    for experts in spread:
        experts.load = 0.0
    return {"expert_parallel_load": largest}


def held_out_metrics(engine: Engine, batches: list[Batch]) -> dict[str, float | list[float]]:
    """Returns the EMAs' losses on the held-out images: mean, standard error, and by ten time bins.

    The names end in _ema_NAME, except for the first EMA.
    """
    values: dict[str, float | list[float]] = {}
    config = engine.config
    for number, ema in enumerate(engine.emas):
        with engine.ema_weights(number):
            loss = held_out_loss(
                engine.model, config.objective, batches, times=config.data.val_times
            )
        ending = f"_ema_{ema.name}" if number else ""
        values |= {f"val_loss{ending}": loss.mean, f"val_error{ending}": loss.standard_error}
        if not number:
            values |= {"val_bins": loss.bins, "val_edges": loss.edges}
            if loss.experts_per_token:
                values["ema_experts_per_token"] = loss.experts_per_token
    return values
