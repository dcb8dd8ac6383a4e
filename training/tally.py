"""What log lines tell: sums over the steps since the last line, and counts over the whole run."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.weights import as_user_error
from runtime.files import MAX_JSON
from runtime.processes import Distributed

METRICS = ("loss", "aux_loss", "grad_norm")


class Tally:
    """This process's sums and counts; the sums stay on the device until a line is written.

    A skipped step adds to the counts and not to the sums. The state goes into checkpoints, so the
    lines of a run do not depend on where it was interrupted.
    """

    def __init__(self, dist: Distributed):
        self.dist = dist
        # Steps skipped since the last line, in all, and in a row until now.
        self.counts = torch.zeros(3, dtype=torch.int64, device=dist.device)
        self.overflows = 0  # fp16 steps that were taken again
        self.unreadable: set[str] = set()  # images that were skipped
        self.start_interval()

    def start_interval(self) -> None:
        self.sums = torch.zeros(len(METRICS), device=self.dist.device)
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

    def means(self) -> dict[str, float]:
        """METRICS, over all ranks and the steps since the last line that were not skipped.

        They are nan if all were. All processes call it together; it waits for the device.
        """
        skipped, _, _ = self.skipped()
        sums = self.dist.sum(self.sums.clone())
        means = sums / (self.dist.world_size * (self.steps - skipped))
        return dict(zip(METRICS, means.tolist(), strict=True))

    def skipped(self) -> tuple[int, int, int]:
        """Steps skipped since the last line, in all, and in a row until now; waits for them."""
        return tuple(self.counts.tolist())

    def forget_skipped(self, steps: int) -> None:
        """Takes back the last steps, all of them skipped: the checkpoint is from before them."""
        self.counts -= torch.tensor([0, steps, steps], device=self.dist.device)

    def elapsed(self) -> float:
        """Seconds since the last line, without those that were paused."""
        return self.seconds + (time.perf_counter() - self.since if self.since else 0.0)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that counts for no step."""
        self.seconds, self.since = self.elapsed(), None
        yield
        self.since = time.perf_counter()

    def state(self) -> str:
        """The state of all ranks as JSON, its sums as text: to the bit, and infinite ones too."""
        interval = {
            "sums": list(map(str, self.sums.tolist())),
            "counts": self.counts.tolist(),
            "steps": self.steps,
            "seconds": self.elapsed(),
        }
        mine = {
            "interval": interval,
            "overflows": self.overflows,
            "unreadable": sorted(self.unreadable),
        }
        ranks = self.dist.gather(mine)
        text = json.dumps(ranks)
        if len(text) > MAX_JSON:  # what is read; those names will be told again
            text = json.dumps([{**state, "unreadable": []} for state in ranks])
        return text

    def load(self, path: Path) -> None:
        """Takes up a state: this rank's own, or the ranks' mean if their number has changed.

        Checkpoints of older versions have none: then nothing changes. UserError if it is damaged.
        """
        if path.is_file():
            with as_user_error(path, "damaged"):
                self.take_up(json.loads(path.read_text()))

    def take_up(self, ranks: list[dict]) -> None:
        intervals = [state["interval"] for state in ranks]
        sums = torch.tensor([[float(v) for v in interval["sums"]] for interval in intervals])
        counts = torch.tensor([int(count) for count in intervals[0]["counts"]])
        for got, wanted in ((sums, (len(ranks), len(METRICS))), (counts, self.counts.shape)):
            if got.shape != wanted:
                raise ValueError(f"got {tuple(got.shape)} sums, expected {tuple(wanted)}")
        same_ranks = len(ranks) == self.dist.world_size
        sums = sums[self.dist.rank] if same_ranks else sums.mean(dim=0)
        self.sums, self.counts = sums.to(self.dist.device), counts.to(self.dist.device)
        self.steps, self.seconds = int(intervals[0]["steps"]), float(intervals[0]["seconds"])
        self.since = time.perf_counter()
        self.overflows = int(ranks[0]["overflows"])
        if same_ranks:
            self.unreadable = set(map(str, ranks[self.dist.rank]["unreadable"]))
