r"""Draws the training losses of runs beside each other: docs/images/upcycling.png.

    python scripts/upcycling_curve.py --output docs/images/upcycling.png \
        --runs results/scratch results/upcycled results/dense-on \
        --names "DiT-MoE from scratch" "DiT-MoE upcycled" "dense, trained on"

docs/upcycling.md has the commands that train the runs.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

SMOOTHING = 3  # log rows of a running mean


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="run folders")
    parser.add_argument("--names", nargs="+", required=True, help="a name for each")
    parser.add_argument("--max-steps", type=int, help="draw up to this step")
    parser.add_argument("--output", type=Path, required=True, help="the picture, a PNG")
    return parser.parse_args()


def read_losses(run: Path, max_steps: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses (balance loss not included), a running mean over the log's rows."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if max_steps is None or row["step"] <= max_steps]
    steps, losses = (np.array([row[key] for row in rows]) for key in ("step", "loss"))
    means = np.array([losses[max(0, i + 1 - SMOOTHING) : i + 1].mean() for i in range(len(rows))])
    return steps, means


def main(args: argparse.Namespace) -> None:
    missing = [run for run in args.runs if not (run / "log.jsonl").is_file()]
    if missing or len(args.runs) != len(args.names):
        print(
            f"error: got {len(args.names)} names for {len(args.runs)} runs, without a log: "
            f"{[str(run) for run in missing]}; expected a name and a log.jsonl for each",
            file=sys.stderr,
        )
        sys.exit(2)
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for run, name in zip(args.runs, args.names, strict=True):
        steps, losses = read_losses(run, args.max_steps)
        ax.plot(steps, losses, label=name)
        print(f"{name}: {losses[-1]:.4f} at step {steps[-1]}")
    ax.set(xlabel="step", ylabel="rectified-flow loss (training)", ylim=(0.65, 1.2))
    ax.grid(alpha=0.3)
    ax.legend()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main(parse_args())
