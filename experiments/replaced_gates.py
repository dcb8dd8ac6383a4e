r"""Replaces the gates of trained `topk` models by tables: their choice, their weights, or both.

    python -m experiments.replaced_gates --runs results/router/runs/topk-8e-3-1600-0 \
        --latents-path data/train-latents --report-path data/reporting-latents \
        --output results/replaced/rows.jsonl

A table is by class and position (images without a class are one more class). It holds the experts
that the gate chooses most, and for each expert its mean weight where the gate chooses it, over
training images at ten times of equal probability in training. Each run gives a row for every
replacement and number of steps of fine-tuning, with the loss on the reporting images:
    choice    gate, table, or without fine-tuning also position (a table by position) and random
    weights   gate or table
    steps     of fine-tuning, 0 for none
The whole gate, fine-tuned as long, is the row with the choice and the weights of the gate.

Shape legend:
    N batch, L layers, C classes, T tokens per image, E experts, K experts per token
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import MODEL_FILE, Checkpoint, build_model, read_checkpoint, save_model
from diffusion import OBJECTIVES
from evaluation.heldout import held_out_loss, latent_batches
from experiments.choice_tables import count_by_class_and_position
from experiments.rows import measure_missing, read_log
from latents.cache import CachedLatents
from latents.loading import evenly_spaced
from options.parts import option
from runtime.errors import UserError, run_main
from runtime.files import prepare_output
from runtime.flags import parse_config
from runtime.plugins import import_plugins

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "experiments" / "fixed_routers.py"
TUNING = (
    "--lr", "1e-3", "--lr-schedule", "linear", "--warmup-steps", "10", "--grad-clip", "0.5",
    "--optimizer", "adamw:betas=0.9,0.95", "--ema", "exponential:decay=0", "--precision", "fp32",
    "--num-sample", "0",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReplacedGatesConfig:
    runs: tuple[Path, ...] = option(help="run folders of flows with `topk`, named ARM-SEED")
    latents_path: str = option(help="the training latents")
    report_path: str = option(help="other latents, on which the losses are reported")
    num_images: int = option(1000, ge=1, help="number of training latents in the tables")
    steps: tuple[int, ...] = option((0, 50, 200), help="steps of fine-tuning")
    batch_size: int = option(128, ge=1, help="images per step of fine-tuning")
    output: Path = option(help="file of the rows; the models are written next to it")


@dataclass
class Tables:
    """Counts (L, C + 1, T, E) of the choices, and the sums of their weights."""

    count: Tensor
    weight: Tensor

    def experts(self, choice: str, k: int) -> Tensor:
        """Returns the experts (L, C + 1, T, K) of a table."""
        count = self.count
        if choice == "position":
            count = count.sum(dim=1, keepdim=True).expand_as(count)
        elif choice == "random":
            count = torch.rand(count.shape, generator=torch.Generator().manual_seed(0))
        return count.topk(k, dim=-1).indices

    def mean_weights(self) -> Tensor:
        """Returns the mean weight of each expert where it was chosen (L, C + 1, T, E).

        An expert that was never chosen at a place has its mean weight over all places.
        """
        over_all = (self.weight.sum((1, 2)) / self.count.sum((1, 2)).clamp_min(1))[:, None, None]
        return torch.where(self.count > 0, self.weight / self.count.clamp_min(1), over_all)


def replaced(source: Checkpoint, tables: Tables, choice: str, weights: str) -> Checkpoint:
    """Returns the model with tables in place of the gates' choice, weights, or both."""
    if (choice, weights) == ("gate", "gate"):
        return source
    config, state_dict = source.config, dict(source.state_dict)
    word = (
        f"replaced:choice={'gate' if choice == 'gate' else 'table'},weights={weights},"
        f"tokens={config.num_patches},classes={config.num_classes}"
    )
    experts = tables.experts(choice, config.num_experts_per_tok)
    for layer, block in enumerate(config.sparse_blocks):
        gate = f"blocks.{block}.moe.gate"
        if choice != "gate":
            state_dict[f"{gate}.table"] = experts[layer].contiguous()
        if weights == "table":
            state_dict[f"{gate}.places"] = tables.mean_weights()[layer].contiguous()
    record = replace(
        source.record, config=replace(config, router=word), initialized_from=source.origin
    )
    return Checkpoint(source.path, state_dict, record)


def fine_tune(start: Path, name: str, config: ReplacedGatesConfig, row: dict) -> Path:
    """Trains a model on; returns the run folder."""
    folder = config.output.resolve().parent / "tuned"
    words = [
        "--finetune", start, "--plugin", PLUGIN, *TUNING, "--latents-path", config.latents_path,
        "--max-steps", row["steps"], "--global-batch-size", config.batch_size,
        "--global-seed", row["seed"], "--log-every", row["steps"],
        "--results-dir", folder, "--run-name", name,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{folder / name}: training failed: {line}")
    return folder / name


def settings_of(run: Path, config: ReplacedGatesConfig) -> list[dict]:
    """Returns the rows of a run, without results."""
    arm, _, seed = run.name.rpartition("-")
    kinds = [(c, w, s) for s in config.steps for w in ("gate", "table") for c in ("gate", "table")]
    if 0 in config.steps:
        kinds += [("position", "gate", 0), ("random", "gate", 0)]
    names = ("choice", "weights", "steps")
    return [{"run": arm, "seed": int(seed)} | dict(zip(names, kind, strict=True)) for kind in kinds]


def measure_run(run: Path, images: CachedLatents, config: ReplacedGatesConfig) -> None:
    """Adds the missing rows of a run."""
    reported = CachedLatents(config.report_path, "--report-path")
    read_log(run)  # refuses a run that was changed
    source = read_checkpoint(run)
    names, objective = list(source.record.class_names), source.record.objective.make(OBJECTIVES)
    images.norm = reported.norm = source.record.norm or images.norm
    chosen = evenly_spaced(len(images), config.num_images)
    batches = latent_batches(images, chosen, None, names, batch_size=250)
    model = build_model(source)
    found = [count_by_class_and_position(model, one["latents"], one["label"]) for one in batches]
    tables = Tables(*map(sum, zip(*found, strict=True)))

    def measure(row: dict) -> dict:
        model = replaced(source, tables, row["choice"], row["weights"])
        if row["steps"]:
            name = f"{run.name}-{row['choice']}-{row['weights']}"
            start = config.output.parent / "starts" / name
            start.mkdir(parents=True, exist_ok=True)
            save_model(start / MODEL_FILE, model.state_dict, model.record)
            model = read_checkpoint(fine_tune(start, f"{name}-{row['steps']}", config, row))
        every = range(len(reported))
        batches = latent_batches(reported, every, None, names, batch_size=250)
        loss = held_out_loss(build_model(model), objective, batches)
        return {"replaced_loss": loss.mean, "bins": loss.bins}

    facts = {"images": config.num_images, "reported_on": reported.fingerprint}
    measure_missing(config.output, settings_of(run, config), measure, facts)


def main(config: ReplacedGatesConfig) -> None:
    prepare_output("--output", config.output)
    import_plugins([PLUGIN])
    images = CachedLatents(config.latents_path, "--latents-path")
    for run in config.runs:
        measure_run(run, images, config)


def parse_args() -> ReplacedGatesConfig:
    return parse_config(ReplacedGatesConfig, __doc__)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
