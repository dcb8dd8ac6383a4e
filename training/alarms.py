"""Warnings about a run that trains, but not as it should: one line, once, for each cause.

A loss that is infinite or nan is a line each time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

from runtime.errors import pluralize
from training.step_metrics import ProcessReport, name_ranks

LINES = 10  # consecutive log lines for which a cause must last
LOAD = 3.0  # of the busiest expert, in units of the mean load
DATA_WAIT = 0.2  # fraction of the time
SLOW = 1.3  # time of a process, in units of the median


@dataclass
class Alarms:
    """Watches the metrics of the log lines of a run."""

    layers: Sequence[int]  # indices of the sparse blocks
    lasted: dict[str, int] = field(default_factory=dict)  # consecutive log lines, by cause

    def check(self, values: Mapping[str, Any], reports: Sequence[ProcessReport]) -> list[str]:
        """Returns the lines to log after a log line with these metrics.

        reports: of all processes, by rank
        """
        found = self.causes(values) | slow_processes(reports)
        self.lasted = {
            cause: 1 + lasted if cause in found or lasted >= LINES else 0
            for cause, lasted in (dict.fromkeys(found, 0) | self.lasted).items()
        }
        new = [found[cause] for cause, lasted in self.lasted.items() if lasted == LINES]
        lines = [f"for {LINES} log lines, {line}" for line in new]
        bad = {rank: report.host for rank, report in enumerate(reports) if report.bad}
        if bad and len(reports) > 1:  # the log line counts skipped steps
            steps = max(report.bad for report in reports)
            count = f"up to {pluralize(steps, 'step')} since the last log line"
            lines.append(f"the loss was infinite or nan in {count} on {name_ranks(bad)}")
        return [f"WARNING: {line}" for line in lines]

    def causes(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Returns a description of each cause that these metrics show."""
        found = {}
        loads = values.get("expert_load", [0.0])
        load = max(loads)
        if load > LOAD:
            block = self.layers[loads.index(load)]
            found["load"] = (
                f"an expert has had more than {LOAD:g} times the mean load (now {load:.1f} times "
                f"in block {block})"
            )
        if dead := values.get("dead_experts"):
            total = values["experts_in_all"]
            found["dead"] = f"some experts have had no tokens (now {dead} of {total})"
        if (wait := values["data_wait"]) > DATA_WAIT:
            found["wait"] = (
                f"training has waited for data more than {DATA_WAIT:.0%} of the time (now "
                f"{wait:.0%}): raise --num-workers, or encode the images once (cache_latents.py)"
            )
        return found


def slow_processes(reports: Sequence[ProcessReport]) -> dict[str, str]:
    """Returns a description of each process that is slower than most, by cause."""
    typical = median_low(report.busy for report in reports)
    return {
        f"slow {rank}": (
            f"rank {rank} ({report.host}) has taken more than {SLOW:g} times the median time for "
            f"images and forward pass (now {report.busy:.3g} s, median {typical:.3g} s): all "
            "processes wait for it"
        )
        for rank, report in enumerate(reports)
        if report.busy > SLOW * typical
    }
