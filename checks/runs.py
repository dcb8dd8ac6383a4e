"""Whole runs of train.py and train_deepspeed.py under torchrun, on the images of assets/."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoints import load_model
from checks.common import NO_GPU, ROOT, CheckConfig, Checks
from runtime.errors import counted
from sampling.generate import SamplerSettings, generate

VAE = ROOT / "assets" / "vae-fashion-mnist"
PARALLEL = ("shard", "zero2", "zero3", "zero2_ep", "zero3_ep")
BATCH = 64
# How far losses may be apart, relatively. Choices of experts flip on rounding, so runs that round
# differently part slowly: the first steps are held to more than the last quarter.
FIRST = {"fp32": 1e-3, "bf16": 5e-3}
LATER = 1e-2
LEARNT = 0.8  # of the first step's loss that the last quarter's mean may be


@dataclass(frozen=True)
class Runs:
    """The runs of this machine: the same images, order, noise and model in all."""

    folder: Path
    config: CheckConfig

    @property
    def steps(self) -> int:
        return 8 if self.config.is_small else 60 if self.config.quick else 200

    def start(self, script: str, *arguments: object, processes: int = 1) -> None:
        """Runs a script to its end; CalledProcessError if it fails."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc_per_node={processes}", str(ROOT / script)]
        subprocess.run([*command, *map(str, arguments)], check=True, cwd=ROOT)

    def cache_latents(self) -> None:
        """Encodes the embedded images, a few of each class."""
        images, few = self.folder / "images", 20 if self.config.is_small else 200
        self.start("scripts/prepare_fashion_mnist.py", "--output", images)
        for folder in images.iterdir():
            for path in sorted(folder.iterdir())[few:]:
                path.unlink()
        self.start(
            "cache_latents.py", "--data-path", images, "--vae-path", VAE, "--image-size", 32,
            "--flip", False, "--num-workers", 0, "--output", self.folder / "latents",
        )  # fmt: skip

    def train(
        self, name: str, precision: str, processes: int = 1, layout: str | None = None
    ) -> list[float]:
        """Trains a run, or goes on with it; returns the loss of each step.

        One process takes in micro-batches what several take at once, as balance losses are of a
        micro-batch.
        """
        flags = [
            "--latents-path", self.folder / "latents", "--model", "DiT-Ti/2", "--rf", "--lr", 1e-3,
            "--max-steps", self.steps, "--ckpt-every", self.steps // 2, "--log-every", 1,
            "--num-sample", 0, "--save-minutes", 0, "--num-workers", 0, "--precision", precision,
            "--results-dir", self.folder, "--run-name", name,
            "--accum_iter", self.config.processes // processes,
        ]  # fmt: skip
        script, micro_batch = "train.py", max(1, BATCH // self.config.processes)
        batch = ["--global-batch-size", micro_batch * self.config.processes]
        if layout == "shard":
            batch += ["--shard"]
        elif layout is not None:
            script, path = "train_deepspeed.py", ROOT / "config" / f"{layout}.json"
            batch = ["--deepspeed_config", path, "--train_batch_size", micro_batch]
        self.start(script, *flags, *batch, processes=processes)
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [float(row["loss"]) for row in map(json.loads, lines) if "loss" in row]


def check(checks: Checks, config: CheckConfig) -> None:
    runs = Runs(Path(tempfile.mkdtemp()), config)
    with checks.guard("embedded images, encoded"):
        runs.cache_latents()
    done: dict[str, list[float]] = {}
    train = partial(train_and_compare, checks, runs, done)
    train("fp32", None, "fp32")
    if "fp32" in done:
        check_run(checks, runs, done["fp32"])
    train("bf16", "fp32", "bf16")
    several = f"on {counted(config.processes, 'process')}"
    if config.processes > 1:
        train(f"fp32 {several}", "fp32", "fp32", config.processes)
    else:
        checks.skip("data parallelism equals one process", "one GPU")
    for layout in PARALLEL:
        if config.quick and layout in ("zero3", "zero2_ep"):
            checks.skip(f"{layout} against DDP", "--quick")
        else:
            train(f"{layout} {several}", "bf16", "bf16", config.processes, layout)


def train_and_compare(
    checks: Checks, runs: Runs, done: dict, name: str, other: str | None, *how: object
) -> None:
    """Trains a run and compares its losses with those of another, as far as that has come."""
    if other not in (None, *done):
        checks.skip(f"{name} against {other}", f"{other} failed")
        return
    with checks.guard(name):
        done[name] = losses = runs.train(name.replace(" ", "-"), *how)
        checks.holds(f"{name}: steps", len(losses) == runs.steps, len(losses), str(runs.steps))
        if other is not None:
            precision = how[0]
            compare(checks, f"{name} against {other}", losses, done[other], FIRST[precision])


def compare(checks: Checks, name: str, got: list[float], want: list[float], first: float) -> None:
    """The losses of two runs: those of the first steps, and the mean of the last quarter."""
    parts = [abs(a - b) / b for a, b in zip(got[:10], want[:10], strict=True)]
    checks.at_most(f"{name}: first steps' losses", max(parts), first)
    a, b = (later(losses) for losses in (got, want))
    checks.at_most(f"{name}: last quarter's loss", abs(a - b) / b, LATER)


def later(losses: list[float]) -> float:
    part = losses[-max(1, len(losses) // 4) :]
    return math.fsum(part) / len(part)


def check_run(checks: Checks, runs: Runs, losses: list[float]) -> None:
    """The run in fp32: it learns, it is resumed half-way, and its model is the same on a CPU."""
    small = runs.config.is_small
    if small:
        checks.skip("fp32: loss falls", f"{runs.steps} steps are few, {NO_GPU}")
    else:
        checks.at_most("fp32: last loss over first", later(losses) / losses[0], LEARNT)
    half = runs.steps // 2
    with checks.guard("resumed"):
        run = shutil.copytree(runs.folder / "fp32", runs.folder / "resumed")
        shutil.rmtree(run / "checkpoints" / f"{runs.steps:07d}")
        again = runs.train("resumed", "fp32")
        said = "resumed from" in (run / "log.txt").read_text()
        checks.holds("resumed: from its checkpoint", said, half if said else 0, str(half))
        compare(checks, "resumed against fp32", again[half:], losses[half:], FIRST["fp32"])
    if small:
        checks.skip("the same seeds on CPU and GPU", NO_GPU)
        return
    with checks.guard("the same seeds on CPU and GPU"):
        settings = SamplerSettings("rectified_flow", num_steps=20, cfg_scale=2.0)
        labels = seeds = range(10)
        drawn = [
            generate(load_model(runs.folder / "fp32", device=device), labels, seeds, settings).cpu()
            for device in ("cpu", "cuda")
        ]
        error = ((drawn[0] - drawn[1]).norm() / drawn[0].norm()).item()
        checks.at_most("the same seeds on CPU and GPU: latents", error, 5e-2)
