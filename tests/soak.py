"""Trains the demo's model for many steps and measures what a process must not accumulate.

    python scripts/prepare_fashion_mnist.py --output data/fashion-mnist
    python tests/soak.py --steps 2000

Prints resident memory and open file handles for each tenth of the run, and whether log.jsonl and
TensorBoard have every line. Both are medians, so that the moment of a checkpoint does not count.
The drift is that of memory from the fourth tenth, before which checkpoints were written and a
sample grid was drawn, to the last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent


def soak(arguments: list[str], run: Path, steps: int, log_every: int, period: float) -> dict:
    """Runs train.py with arguments that end at `steps`; returns what was measured.

    period: seconds between two looks at the process; run: its folder
    """
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    looks = []  # (step, resident MB, file handles)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(period)
            rows = rows_of(run)
            if rows:
                try:
                    looks.append((rows[-1]["step"], *look_at(process.pid)))
                except (FileNotFoundError, ProcessLookupError, StopIteration):
                    break  # it has just ended
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}")
    tenths = [
        [look for look in looks if tenth <= 10 * look[0] / steps < tenth + 1] for tenth in range(10)
    ]
    memory = [statistics.median(mb for _, mb, _ in tenth) for tenth in tenths]
    handles = [statistics.median(count for _, _, count in tenth) for tenth in tenths]
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {
        "steps": steps,
        "looks": len(looks),
        "resident_mb": [round(mb, 1) for mb in memory],
        "memory_drift": memory[-1] / memory[3] - 1,  # by then all has happened once
        "file_handles": handles,
        "log_lines": [row["step"] for row in rows_of(run)],
        "tensorboard_lines": [event.step for event in board.Scalars("loss")],
        "wanted_lines": list(range(log_every, steps + 1, log_every)),
    }


def rows_of(run: Path) -> list[dict]:
    path = run / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # without a line that is being written
    return [json.loads(line) for line in lines]


def look_at(pid: int) -> tuple[float, int]:
    """The resident memory in MB and the number of open file handles of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    kilobytes = next(line for line in status if line.startswith("VmRSS")).split()[1]
    return int(kilobytes) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps, a multiple of 20")
    parser.add_argument("--batch", type=int, default=32, help="images of a step; the demo has 128")
    parser.add_argument("--data", default=str(ROOT / "data" / "fashion-mnist"), help="images")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as results:
        arguments = [
            "--data-path", args.data, "--vae-path", str(ROOT / "assets" / "vae-fashion-mnist"),
            "--image-size", "32", "--model", "DiT-Ti/2", "--num_experts", "8",
            "--num_experts_per_tok", "2", "--rf", "--global-batch-size", str(args.batch),
            "--max-steps", str(args.steps), "--lr", "2e-3", "--warmup-steps", "50",
            "--ema-decay", "0.995", "--precision", "fp32", "--num-workers", "1",
            "--run-name", "soak", "--results-dir", results, "--log-every", "10",
            "--ckpt-every", str(args.steps // 10), "--sample-every", str(args.steps // 4),
            "--num-sample", "4",
        ]  # fmt: skip
        measured = soak(arguments, Path(results) / "soak", args.steps, 10, period=0.5)
    wanted = measured.pop("wanted_lines")
    for name in ("log_lines", "tensorboard_lines"):
        got = measured.pop(name)
        measured[name] = f"{len(got)} of {len(wanted)}, {'all' if got == wanted else 'NOT all'}"
    for name, value in measured.items():
        print(f"{name:18} {value:+.2%}" if name == "memory_drift" else f"{name:18} {value}")


if __name__ == "__main__":
    main()
