r"""Measures how alike the routed experts of upcycled models are, in each layer and saved step.

    python train.py --finetune results/upcycled --ema exponential:decay=0 --ckpt-every 25 ...
    python -m experiments.copies --runs results/RUN-0 --output results/copies.jsonl

Each run adds a row per saved step to OUTPUT, with a number for each layer:
    cosine           between the weights of two experts, mean over the pairs
    change_cosine    the same of the changes since the start of the run
    change           norm of the change of an expert, relative to that of its weights, mean
    unchanged        share of the experts' numbers that are, rounded to bf16, as at the start
If the weights of a run are numbers in bf16, the start is rounded to bf16 too. `report.py` makes the
table. The checkpoints hold moving averages of the weights; a decay of 0 makes these the weights
themselves. A dense run has only the held-out loss.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import Checkpoint, read_checkpoint, step_folders
from experiments.rows import measure_missing, read_log
from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config


@dataclass(frozen=True, kw_only=True)
class CopiesConfig:
    runs: tuple[str, ...] = option(help="run folders of train.py --finetune UPCYCLED")
    steps: tuple[int, ...] = option((), help="measure only these steps (default: all saved ones)")
    output: Path = option(Path("results/experiments/copies.jsonl"), help="file of the rows")


def experts_of(checkpoint: Checkpoint, layer: int) -> Tensor:
    """Returns the weights of a layer's routed experts, (E, n), fp32."""
    prefix = f"blocks.{layer}.moe.experts."
    parts = [w for name, w in checkpoint.state_dict.items() if name.startswith(prefix)]
    experts = checkpoint.config.num_experts
    return torch.cat([part[:experts].flatten(1).float() for part in parts], dim=1)


def rounded(weights: Tensor) -> Tensor:
    return weights.bfloat16().float()


def mean_cosine(vectors: Tensor) -> float:
    """Returns the mean cosine of the pairs of vectors (E, n); 0 for vectors of zeros."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    count = len(vectors)
    return ((unit @ unit.T).sum() - unit.square().sum()).item() / (count * (count - 1))


def compare(checkpoint: Checkpoint, start: Checkpoint) -> dict[str, list[float]]:
    """Returns the numbers of a row about the experts, each a list over the sparse layers."""
    found: dict[str, list[float]] = {
        "cosine": [], "change_cosine": [], "change": [], "unchanged": []
    }  # fmt: skip
    for layer in checkpoint.config.sparse_blocks:
        now, before = experts_of(checkpoint, layer), experts_of(start, layer)
        if torch.equal(now, rounded(now)):
            before = rounded(before)
        change = now - before
        found["cosine"].append(mean_cosine(now))
        found["change_cosine"].append(mean_cosine(change))
        found["change"].append((change.norm(dim=1) / before.norm(dim=1)).mean().item())
        found["unchanged"].append((rounded(now) == rounded(before)).float().mean().item())
    return {name: [round(value, 6) for value in values] for name, values in found.items()}


def measure_run(run: Path, config: CopiesConfig) -> None:
    """Adds the missing rows of a run: of its start (step 0) and of each saved step."""
    folders = {int(path.name): path for path in reversed(step_folders(run))}
    if not folders:
        raise UserError(f"--runs: got {run}, expected a folder of a run with checkpoints")
    origin = read_checkpoint(next(iter(folders.values()))).record.initialized_from
    if origin is None:
        raise UserError(f"--runs: got {run}, expected a run of train.py --finetune")
    losses = {line["step"]: line["val_loss"] for line in read_log(run) if "val_loss" in line}
    start = read_checkpoint(origin["path"])

    def measure(row: dict) -> dict:
        step = row["step"]
        checkpoint = read_checkpoint(folders[step]) if step else start
        return {**compare(checkpoint, start), "val_loss": losses.get(step)}

    steps = [step for step in (0, *folders) if step in (config.steps or [step])]
    measure_missing(config.output, [{"run": run.name, "step": step} for step in steps], measure)


def parse_args() -> CopiesConfig:
    return parse_config(CopiesConfig, __doc__)


def main(config: CopiesConfig) -> None:
    prepare_output("--output", config.output)
    for run in config.runs:
        measure_run(Path(run), config)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
