r"""KID of samples of finished runs, each at the best of several guidance scales.

    python -m experiments.samples --runs results/quality/runs/*-800-0 --output results/quality \
        --choosing data/choosing.npz --reporting data/reporting.npz

The two references are images that no run was trained on, or their statistics from evaluate.py
--precompute-reference. The first chooses the scale, the second gives the number. Rows are kept in
OUTPUT/samples.jsonl, and the same command goes on with what is missing; OUTPUT/samples.md has the
table.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.common import markdown
from experiments.routers import ROOT, add_row, read_lines
from runtime.errors import UserError, run_main
from runtime.files import read_json, write_durably
from runtime.flags import flag, parse_config

KID = "kid_efficientnet-lite0-64px"  # what evaluate.py calls it, and its deviation


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    runs: tuple[str, ...] = flag(help="run folders")
    scales: tuple[float, ...] = flag((1.5, 2.0, 2.5), least=0, help="guidance scales to try")
    num_images: int = flag(5000, least=1, help="samples of each run and scale")
    num_sampling_steps: int = flag(13, least=1, help="steps of Heun's method")
    choosing: Path = flag(help="images, or their statistics, that choose the scale")
    reporting: Path = flag(help="images, or their statistics, that give the number")
    output: Path = flag(Path("results/quality"), help="folder of rows, table and samples")


def evaluate(output: Path, *flags: object) -> list[float]:
    """KID and its standard deviation over subsets, by evaluate.py with these flags."""
    command = [sys.executable, ROOT / "evaluate.py", "--backbone", "efficientnet-lite0",
               "--batch-size", "250", "--output", output, *flags]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{output}: evaluate.py ended with code {done.returncode}: {line}")
    metrics = read_json(output / "results.json")["metrics"]
    return [metrics[KID], metrics[KID.replace("kid", "kid_std", 1)]]


def key_of(config: SamplesConfig, run: str, scale: float) -> dict:
    """What a row is of."""
    return {"run": Path(run).name, "scale": scale, "images": config.num_images,
            "steps": config.num_sampling_steps, "choose_by": str(config.choosing),
            "report_by": str(config.reporting)}  # fmt: skip


def measure(config: SamplesConfig, run: str, scale: float) -> dict:
    """The row of a run and a scale: KID to both references."""
    drawn = config.output / "samples" / f"{Path(run).name}-{scale:g}"
    chosen_by = evaluate(
        drawn, "--ckpt", run, "--num-images", config.num_images, "--cfg-scale", scale,
        "--sampler", "heun", "--num-sampling-steps", config.num_sampling_steps,
        "--precision", "bf16", "--reference", config.choosing,
    )  # fmt: skip
    again = drawn.with_name(f"{drawn.name}-reporting")
    reported = evaluate(again, "--images", drawn / "samples.npz", "--reference", config.reporting)
    return {**key_of(config, run, scale), "choosing": chosen_by, "reporting": reported}


def table(rows: list[dict]) -> str:
    """Of each run the scale with the least KID to the first reference, as Markdown."""
    lines = [["run", "scale", "KID, choosing", "KID, reporting"]]
    for run in dict.fromkeys(row["run"] for row in rows):
        best = min((row for row in rows if row["run"] == run), key=lambda row: row["choosing"][0])
        kids = (f"{mean:.4f} ± {std:.4f}" for mean, std in (best["choosing"], best["reporting"]))
        lines.append([run, f"{best['scale']:g}", *kids])
    return markdown(lines)


def main(config: SamplesConfig) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "samples.jsonl"
    rows = []
    for run, scale in product(config.runs, config.scales):
        key = key_of(config, run, scale)
        row = next((row for row in read_lines(path) if key.items() <= row.items()), None)
        if row is None:
            add_row(path, row := measure(config, run, scale))
            print(json.dumps(row), flush=True)
        rows.append(row)
    write_durably(config.output / "samples.md", table(rows))


if __name__ == "__main__":
    run_main(lambda: main(parse_config(SamplesConfig, __doc__)))
