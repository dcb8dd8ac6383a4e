"""--profile STEPS: writes a trace of some steps, for https://ui.perfetto.dev or chrome://tracing.

with profiling(20, run / "profile", start_step=0) as after_step:
    ...
    after_step()
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.profiler

from training.log import warns_if_lost

UNPROFILED = 3  # first steps, which compile and allocate, are not profiled


@contextmanager
def profiling(steps: int | None, folder: Path, start_step: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step. Without `steps` the function does nothing."""
    if steps is None:
        yield lambda: None
        return
    path = folder / f"steps-{start_step + UNPROFILED + 1:07d}.json.gz"

    def write(profile: torch.profiler.profile) -> None:
        with warns_if_lost(path, RuntimeError):
            folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(path))

    schedule = torch.profiler.schedule(wait=UNPROFILED - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=write, record_shapes=True
    ) as profile:
        yield profile.step
