r"""Races recipes to the loss of the published one, on the same cores in turns; docs/speedrun.md has
the rules.

    data="--latents-path data/fashion-mnist-train-latents --val-path data/choosing-latents"
    python -m experiments.speedrun fast-fp32-400 "fast-fp32-400 --compile" $data \
        --output results/race
    python -m experiments.speedrun results/race/runs/1-fast-fp32-400-0/config.yaml $data \
        --report-path data/reporting-latents --output results/again

An entry is a recipe with all settings, or an arm of experiments/arms.yaml; flags of train.py
may follow in the same quotes. With each seed, the reference and all entries train once, each from
the start of train.py. OUTPUT receives the runs, rows.jsonl (one row per run) and race.json (the
table, the matrix peaks and the machine).
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import torch
from pandas import DataFrame

from checkpoints import build_model, read_checkpoint
from diffusion.rectified_flow import RectifiedFlow
from evaluation.heldout import held_out_loss, latent_batches
from experiments.arms import arm_flags
from experiments.comparisons import with_error
from experiments.routers import ema_decay_of
from experiments.rows import add_row
from latents.cache import CachedLatents
from latents.loading import available_cores
from latents.sources import same_images
from options.parts import option
from options.settings import spelling
from runtime.errors import UserError, reported_as, run_main
from runtime.files import check_new_folder, write_durably
from runtime.flags import parse_config
from tools.benchmarks.common import matrix_peaks, report
from training.config import TrainConfig, parse_training
from training.sections import TRAIN

ROOT = Path(__file__).resolve().parents[1]
# What experiments.routers says before the flags of an arm, besides the decay of the EMA.
OF_ARMS = "--model DiT-Ti/2 --objective rectified_flow --global-batch-size 128 --warmup-steps 50"
PATHS = "latents_path", "val_path", "report_path"
OBJECTIVES = ("rectified_flow", "flow_x")  # whose networks give a velocity at a time


@dataclass(frozen=True, kw_only=True)
class SpeedrunConfig:
    entries: tuple[str, ...] = option(
        (), positional=True, group="what is compared",
        help='recipes or arms, with flags, such as "config/recipes/race.yaml --compile"',
    )  # fmt: skip
    reference: str = option("published-ema-fp32-800", help="entry whose loss is the target")
    seeds: int = option(3, ge=1, help="runs per entry, with seeds 0, 1, ...")
    latents_path: str = option(group="data", help="training latents, from cache_latents.py")
    val_path: str = option(help="latents of the choosing images, whose loss decides")
    report_path: str | None = option(
        None, help="latents of the reporting images, for the final table only"
    )
    cores: int = option(2, ge=1, group="run", help="cores that a run may use")
    output: Path = option(Path("results/speedrun"), help="new folder for runs and rows")


def words_of(entry: str) -> list[str]:
    """Returns the flags of train.py that an entry means; files are relative to this folder or, for
    arms, to the repository."""
    first, *words = shlex.split(entry) or [""]
    if flags := arm_flags(first):
        flags = [str(ROOT / word) if word.endswith((".yaml", ".py")) else word for word in flags]
        pairs = pairwise(words := [*flags, *words])
        lengths = [int(n) for flag, n in pairs if flag == "--max-steps" and n.isdecimal()]
        decays = [f"--ema=exponential:decay={ema_decay_of(steps)}" for steps in lengths[-1:]]
        return [*OF_ARMS.split(), *decays, *words]
    if not first.endswith(".yaml"):
        expected = "a recipe FILE.yaml, or an arm of experiments/arms.yaml"
        raise UserError(f"got the entry {entry!r}, expected {expected}, and flags of train.py")
    return ["--config", first, *words]


def resolved(words: list[str], dataset: CachedLatents) -> TrainConfig:
    """Returns the settings of a run from new weights on these latents."""
    command, said = parse_training(TRAIN, None, words)
    if command.finetune or command.resume:
        raise UserError(f"got {' '.join(words)}, expected training from new weights")
    with reported_as(" ".join(words), ValueError):
        return TrainConfig.default(TRAIN).fitted(said, dataset)


def command_of(config: SpeedrunConfig, entry: str, seed: int, name: str) -> list[str]:
    """Returns the arguments of train.py for one run; of a flag, the last value counts."""
    return [
        *words_of(entry), "--latents-path", config.latents_path, "--num-sample", "0",
        "--save-minutes", "0", "--global-seed", str(seed),
        "--results-dir", str(config.output / "runs"), "--run-name", name,
    ]  # fmt: skip


def check_data(config: SpeedrunConfig) -> None:
    """Refuses equal images in two of the sets."""
    paths = {spelling(name): getattr(config, name) for name in PATHS if getattr(config, name)}
    images = {flag: CachedLatents(path, flag).fingerprint for flag, path in paths.items()}
    for one, other in combinations(images, 2):
        if same_images(images[one], images[other]):
            raise UserError(f"{other}: got {paths[other]}, which has the images of {one}")


def check_entry(trained: TrainConfig, entry: str) -> None:
    name = trained.step.objective.name
    if trained.run.max_steps is None:
        raise UserError(f"{entry}: got no --max-steps, expected the length of the run")
    if name not in OBJECTIVES:
        raise UserError(
            f"{entry}: got the objective {name}, expected {' or '.join(OBJECTIVES)}, because the "
            "target is a loss of velocities"
        )
    norm, scale = trained.data.latents_norm, trained.step.objective.options.get("noise_scale", 1)
    if norm != "autoencoder" or scale != 1:
        raise UserError(
            f"{entry}: got --latents-norm {norm} and noise of scale {scale:g}, expected "
            "autoencoder and 1: in other units, the loss is not that of the target"
        )


def race_loss(run: Path, path: str) -> float:
    """Returns the loss of a run's EMA on all latents of `path`: the squared error of the velocity
    at uniform times, whatever the run's own objective weighs."""
    checkpoint, latents, target = read_checkpoint(run), CachedLatents(path), RectifiedFlow()
    # The velocity of a network that predicts the data, too.
    target.velocity = TrainConfig.of_record(checkpoint.record).objective.velocity
    batches = latent_batches(latents, range(len(latents)), None, latents.classes, batch_size=250)
    return held_out_loss(build_model(checkpoint), target, batches).mean


def train_entry(config: SpeedrunConfig, entry: str, seed: int, number: int) -> dict:
    """Trains an entry with one seed; returns the row of the run."""
    label = Path(shlex.split(entry)[0])
    name = f"{number}-{(label.parent if label.stem == 'config' else label).stem}-{seed}"
    command, run = command_of(config, entry, seed, name), config.output / "runs" / name
    trained = resolved(command, CachedLatents(config.latents_path))
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.cores), "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as empty:  # so that each run compiles
        environment["TORCHINDUCTOR_CACHE_DIR"] = empty
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *command],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        after, end = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{run}: training failed with exit code {done.returncode}: {line}")
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "entry": entry, "seed": seed, "run": name,
        # The last row of the log is written after the last step, before the checkpoint.
        "seconds": (run / "log.jsonl").stat().st_mtime - start,
        "busy": worked / (end - start) / config.cores,
        "images": trained.run.max_steps * trained.engine.global_batch_size,
        "loss": race_loss(run, config.val_path),
    }  # fmt: skip


def race(config: SpeedrunConfig) -> list[dict]:
    """Trains all entries in turns, each seed in another order; returns the rows of the runs."""
    entries, rows = [config.reference, *config.entries], []
    for seed in range(config.seeds):
        order = list(enumerate(entries))
        for number, entry in order[seed % len(order) :] + order[: seed % len(order)]:
            rows.append(row := train_entry(config, entry, seed, number))
            add_row(config.output / "rows.jsonl", row)
            print(f"{row['run']:32} {row['seconds']:8.1f} s  {row['loss']:.4f}", flush=True)
    if config.report_path is not None:
        for row in rows:
            row["report_loss"] = race_loss(config.output / "runs" / row["run"], config.report_path)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_durably(config.output / "rows.jsonl", lines)
    return rows


def table(rows: list[dict], peaks: dict[str, float]) -> list[dict]:
    """Returns one line per entry, the reference first: means over the seeds, with the standard
    error where there are several seeds.

    peaks: FLOP/s of matrix products on the cores of a run, by precision
    """
    frame, lines = DataFrame(rows), []
    reference = frame[frame["entry"] == rows[0]["entry"]].set_index("seed")
    error = reference["loss"].sem() if len(reference) > 1 else 0.0
    target = reference["loss"].mean() + error
    for entry in frame["entry"].unique():
        runs = frame[frame["entry"] == entry].set_index("seed")
        line = {
            "entry": entry, "seeds": len(runs),
            "share of the time": with_error(runs["seconds"] / reference["seconds"], digits=3),
            "share of the images": f"{(runs['images'] / reference['images']).mean():.3f}",
            "loss, choosing": with_error(runs["loss"]),
            "target": f"{target:.4f}",
            "reached": "yes" if runs["loss"].mean() <= target else "no",
            "seconds": with_error(runs["seconds"], digits=1),
            "busy": f"{runs['busy'].mean():.0%}",
        }  # fmt: skip
        line |= {
            f"{name} peak x s, PFLOP": f"{runs['seconds'].mean() * peak / 1e15:.4g}"
            for name, peak in peaks.items()
        }
        if "report_loss" in runs:
            line["loss, reporting"] = with_error(runs["report_loss"])
        lines.append(line)
    return lines


def parse_args() -> SpeedrunConfig:
    return parse_config(SpeedrunConfig, __doc__)


def main(config: SpeedrunConfig) -> None:
    check_data(config)
    if not config.entries:
        raise UserError("got no entry, expected recipes or arms")
    config = replace(config, output=config.output.resolve())
    check_new_folder("--output", config.output)
    dataset = CachedLatents(config.latents_path)
    for entry in (config.reference, *config.entries):
        check_entry(resolved(command_of(config, entry, 0, "run"), dataset), entry)
    if config.cores > available_cores():
        raise UserError(f"--cores: got {config.cores}, expected at most {available_cores()}")
    if hasattr(os, "sched_setaffinity"):  # not on macOS; the runs inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.cores])
    torch.set_num_threads(config.cores)
    config.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    peaks = matrix_peaks(device, ("fp32", "bf16"))
    lines = table(race(config), peaks)
    report(replace(config, output=config.output / "race.json"), lines, device, peaks)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
