"""Warnings about a run that trains, but not as it should: one line, once, for each cause."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LINES = 10  # consecutive log lines for which a cause must last
LOAD = 3.0  # of the busiest expert, in units of the mean load
DATA_WAIT = 0.2  # fraction of the time


@dataclass
class Alarms:
    """Watches the metrics of the log lines of a run."""

    layers: Sequence[int]  # indices of the sparse blocks
    lasted: dict[str, int] = field(default_factory=dict)  # consecutive log lines, by cause

    def check(self, values: Mapping[str, Any]) -> list[str]:
        """Returns the lines to log after a log line with these metrics."""
        found = self.causes(values)
        self.lasted = {
            cause: 1 + lasted if cause in found or lasted >= LINES else 0
            for cause, lasted in (dict.fromkeys(found, 0) | self.lasted).items()
        }
        new = [found[cause] for cause, lasted in self.lasted.items() if lasted == LINES]
        return [f"WARNING: for {LINES} log lines, {line}" for line in new]

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
