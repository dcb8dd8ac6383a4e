"""What the steps from one log line to the next add up to."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

METRICS = ("loss", "aux_loss", "grad_norm")


class Interval:
    """Sums over the steps since the last log line, kept on the device until the line is written.

    A skipped step adds to the counts and not to the sums. The state goes into checkpoints, so the
    lines of a run do not depend on where it was interrupted.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.start()

    def start(self) -> None:
        self.sums = torch.zeros(len(METRICS), device=self.device)
        self.counts[0] = 0
        self.steps, self.seconds, self.since = 0, 0.0, time.perf_counter()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds a step's METRICS, and "skipped", a bool: scalars on the device."""
        skipped = metrics["skipped"]
        values = torch.stack([metrics[name] for name in METRICS])
        self.sums += torch.where(skipped, 0.0, values)
        self.counts += skipped
        self.counts[2] *= skipped
        self.steps += 1

    def skipped(self) -> tuple[int, int, int]:
        """Steps skipped since the last line, in all, and in a row until now; waits for them."""
        return tuple(self.counts.tolist())

    def elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self.since if self.since else 0.0)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that counts for no step."""
        self.seconds, self.since = self.elapsed(), None
        yield
        self.since = time.perf_counter()

    def state(self) -> dict:
        """As plain values: fp32 numbers survive JSON to the bit, infinite ones as text."""
        return {
            "sums": list(map(str, self.sums.tolist())),
            "counts": self.counts.tolist(),
            "steps": self.steps,
            "seconds": self.elapsed(),
        }

    def load(self, states: list[dict], rank: int, world_size: int) -> None:
        """Takes up the states of all ranks: its own, or their mean if their number has changed.

        ValueError, TypeError or LookupError for what is no such state.
        """
        sums = torch.tensor([[float(v) for v in state["sums"]] for state in states])
        counts = torch.tensor([int(count) for count in states[0]["counts"]])
        for got, wanted in ((sums, (len(states), len(METRICS))), (counts, self.counts.shape)):
            if got.shape != wanted:
                raise ValueError(f"got {tuple(got.shape)} sums, expected {tuple(wanted)}")
        sums = sums[rank] if len(states) == world_size else sums.mean(dim=0)
        self.sums, self.counts = sums.to(self.device), counts.to(self.device)
        self.steps, self.seconds = int(states[0]["steps"]), float(states[0]["seconds"])
        self.since = time.perf_counter()
