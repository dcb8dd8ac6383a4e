r"""Trains the arms of experiment questions with several seeds, and compares held-out losses.

    data="--latents-path data/train-latents --val-path data/test-latents"
    python -m experiments.routers $data --questions 2 --steps 600
    python -m experiments.routers $data --questions 8 --output results/quality \
        --report-path data/report-latents --arms published-4e-3-800 fast-1.6e-2-400 --seeds 3

Each run is a run of train.py with the flags of an arm (see arms.yaml). Arms are paired:
runs with the same seed see the same images, noise and times in the same order. Arms that differ
only in the router start from the same weights, because routers are initialised last. The exception
is prototype, whose additional expert changes the random numbers of other weights.

A finished run adds a row to OUTPUT/rows.jsonl and updates the tables (tables.md, question-N.csv)
and figures (question-N.png) in OUTPUT. Run the same command again to train the missing runs and to
go on with an interrupted one. A run that went on with other settings gets no row.

--times measures the time per step of the arms, in turns, without training them. Use it while the
machine is otherwise idle.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

from checkpoints import build_model, read_checkpoint, step_folders
from checkpoints.costs import count_macs, count_parameters
from evaluation.heldout import held_out_loss, latent_batches
from experiments.arms import QUESTIONS, arm_flags
from experiments.rows import add_row, read_lines, read_log
from experiments.training_tables import training_tables
from latents.cache import CachedLatents, read_settings
from latents.loading import available_cores
from options.parts import option
from options.settings import spelling
from runtime.errors import STOPPED, UserError, check_same, run_main
from runtime.files import read_json, write_durably
from runtime.flags import parse_config
from tools.benchmarks.common import best_times, make_engine, open_processes, train_step
from training.config import TrainConfig, parse_training

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    questions: tuple[int, ...] = option(
        (1, 2), group="what is compared", choices=tuple(QUESTIONS),
        help="numbers of the questions in experiments/arms.yaml",
    )  # fmt: skip
    arms: tuple[str, ...] = option((), help="train only these arms (default: all)")
    seeds: int = option(5, ge=1, help="runs per arm, with consecutive seeds")
    first_seed: int = option(0, ge=0, help="the first of these seeds")
    latents_path: str = option(group="data", help="training latents, from cache_latents.py")
    val_path: str = option(help="held-out latents")
    val_images: int = option(2000, ge=1, help="number of held-out latents to use")
    report_path: str | None = option(
        None, help="test latents, which no choice is based on; the tables then show the test loss"
    )
    model: str = option("DiT-Ti/2", group="training", help="size and patch size")
    steps: int = option(1250, ge=1, help="steps per run")
    batch_size: int = option(128, ge=1, help="images per step")
    lr: float = option(2e-3, gt=0, help="learning rate, constant after 50 steps")
    precision: str = option(
        "bf16", choices=("fp32", "bf16", "fp16"), help="precision of matrix products"
    )
    jobs: int = option(1, group="run", ge=1, help="number of concurrent runs, which share the CPU")
    times: bool = option(False, help="measure the time per step of each arm, and stop")
    output: Path = option(Path("results/experiments"), help="folder of rows, tables and runs")


def arms_of(config: ExperimentConfig, questions: Sequence[int]) -> list[str]:
    """Returns the arms of these questions, restricted to --arms."""
    arms = list(dict.fromkeys(arm for number in questions for arm in QUESTIONS[number].arms))
    if unknown := set(config.arms) - set(arms):
        raise UserError(f"--arms: got {min(unknown)}, expected some of {', '.join(arms)}")
    return [arm for arm in arms if arm in config.arms or not config.arms]


def steps_of(config: ExperimentConfig, arm: str) -> int:
    """Returns the number of steps of an arm's runs: the arm's --max-steps, or --steps."""
    flags = arm_flags(arm)
    return int(flags[flags.index("--max-steps") + 1]) if "--max-steps" in flags else config.steps


def ema_decay_of(steps: int) -> str:
    """Returns the decay of an EMA that averages over a sixth of the run; 0.9952 for 1,250 steps."""
    return f"{max(0.0, 1 - 6 / steps):.6g}"


def command_of(config: ExperimentConfig, arm: str, seed: int) -> list[str]:
    """Returns the arguments of train.py that train an arm."""
    steps = steps_of(config, arm)
    every = str(max(1, steps // 10))
    is_file = (".yaml", ".py")
    words = [str(ROOT / word) if word.endswith(is_file) else word for word in arm_flags(arm)]
    filled = {"runs": config.output / "runs", "partner": seed ^ 1, "other": seed + 100}
    if any("{classes}" in word for word in words):
        latents = read_settings("--latents-path", Path(config.latents_path))
        tokens = math.prod(latents.latent_shape[1:]) // 4
        filled |= {"classes": len(latents.classes), "tokens": tokens}
    words = [word.format(**filled) for word in words]
    return [
        "--model", config.model, "--objective", "rectified_flow",
        "--latents-path", config.latents_path, "--val-path", config.val_path,
        "--val-images", str(config.val_images), "--val-times", "uniform",
        "--val-every", every, "--log-every", every, "--max-steps", str(steps),
        "--global-batch-size", str(config.batch_size), "--lr", str(config.lr),
        "--warmup-steps", "50", "--ema", f"exponential:decay={ema_decay_of(steps)}",
        "--precision", config.precision, *words,  # the last value of a flag counts
        "--num-sample", "0", "--global-seed", str(seed), "--save-minutes", "2",
        "--results-dir", str(config.output / "runs"), "--run-name", f"{arm}-{seed}",
    ]  # fmt: skip


def train_config(config: ExperimentConfig, arm: str) -> TrainConfig:
    _, said = parse_training("train.py", None, command_of(config, arm, seed=0))
    return TrainConfig.default().fitted(said, CachedLatents(config.latents_path))


def check_protocol(config: ExperimentConfig) -> None:
    """Refuses a folder with rows of another protocol."""
    names = ("val_images", "model", "steps", "batch_size", "lr", "precision")
    protocol = {name: getattr(config, name) for name in names}
    protocol["ema_decay"] = ema_decay_of(config.steps)
    for name in ("latents_path", "val_path", "report_path"):
        if getattr(config, name) is None:
            continue
        latents = CachedLatents(getattr(config, name), spelling(name))
        protocol[f"images of {name}"] = latents.fingerprint
        protocol[f"autoencoder of {name}"] = latents.settings.vae_sha256
    path = config.output / "protocol.json"
    if path.exists():
        message = f"--output: {config.output} has rows of a different protocol; use a new folder"
        check_same(message, protocol, read_json(path))
    config.output.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(protocol, indent=1) + "\n")


def finished_rows(output: Path) -> list[dict]:
    """Returns the rows of finished runs; UserError if the flags of an arm have changed."""
    path = output / "rows.jsonl"
    rows = read_lines(path)
    for row in rows:
        if row["flags"] != arm_flags(row["arm"]):
            expected = " ".join(arm_flags(row["arm"])) or "no such arm"
            raise UserError(
                f"{path}: got {row['arm']} as {' '.join(row['flags'])}, expected {expected}; use a "
                "new folder for changed arms"
            )
    return rows


def report(output: Path) -> None:
    """Writes the tables and figures of a folder, with the measured times if there are any."""
    times = output / "times.json"
    text = training_tables(
        finished_rows(output), output=output, times=times if times.exists() else None
    )
    write_durably(output / "tables.md", text)


def run_arm(config: ExperimentConfig, arm: str, seed: int) -> Path:
    """Trains an arm, or resumes its training; returns the run folder."""
    threads = max(1, available_cores() // config.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    folder = config.output / "runs" / f"{arm}-{seed}"
    last = (read_log(folder) or [{}])[-1]
    saved = [int(path.name) for path in step_folders(folder)[:1]]  # empty if the last save failed
    steps = steps_of(config, arm)
    if last.get("step") != steps or "val_loss" not in last or saved != [steps]:
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *command_of(config, arm, seed)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode == STOPPED:
            raise UserError(f"{folder}: training was stopped; run the same command to go on")
        if code := done.returncode:
            line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{folder}: training failed with exit code {code}: {line}")
    return folder


def row_of(config: ExperimentConfig, arm: str, seed: int, folder: Path) -> dict:
    """Collects the final losses and expert use of a finished run, and the size of the model."""
    lines = read_log(folder)
    measured, last = [line for line in lines if "val_loss" in line], lines[-1]
    model = train_config(config, arm).model
    total, active = count_parameters(model)
    row = {
        "arm": arm, "seed": seed, "flags": arm_flags(arm),
        "val_loss": last["val_loss"], "val_error": last["val_error"],
        "val_bins": last["val_bins"],
        "val_loss_by_ema": {k: v for k, v in last.items() if k.startswith("val_loss_ema_")},
        "total_parameters": total, "active_parameters": active,
        "macs": count_macs(model),
        "curve": [[line["step"], line["val_loss"]] for line in measured],
    }  # fmt: skip
    if config.report_path is not None:
        row["report_loss"] = report_loss(config, arm, folder)
    if "expert_load" in last:
        spent = last.get("ema_experts_per_token") or last["experts_per_token"]
        late = [line for line in lines if line["step"] > 0.75 * last["step"]]
        row |= {
            "max_violation": mean(max(line["expert_load"]) - 1 for line in late),
            "dead_experts": mean(line["dead_experts"] for line in late),
            "experts_per_token": sum(spent) / len(spent),
        }
    return row


def report_loss(config: ExperimentConfig, arm: str, folder: Path) -> float:
    """Returns the EMA's loss on all latents of --report-path, at uniform times."""
    latents, checkpoint = CachedLatents(config.report_path), read_checkpoint(folder)
    latents.norm = checkpoint.record.norm or latents.norm
    every = range(len(latents))
    batches = latent_batches(latents, every, None, latents.classes, batch_size=250)
    objective = train_config(config, arm).objective
    return held_out_loss(build_model(checkpoint), objective, batches).mean


def run_missing(config: ExperimentConfig, arms: list[str]) -> None:
    """Trains the runs without a row: all arms with one seed, then all arms with the next seed."""
    rows = finished_rows(config.output)
    done = {(row["arm"], row["seed"]) for row in rows}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    missing = [(a, s) for s in seeds for a in arms if (a, s) not in done]
    print(f"{len(missing)} of {len(arms) * config.seeds} runs are missing", flush=True)
    with ThreadPoolExecutor(config.jobs) as pool:
        jobs = {pool.submit(run_arm, config, *run): run for run in missing}
        try:
            for job in as_completed(jobs):
                folder = job.result()
                # In this thread: the fake tensors that count multiply-adds are not thread-safe.
                row = row_of(config, *jobs[job], folder)
                add_row(config.output / "rows.jsonl", row)
                report(config.output)
                for state in folder.glob("checkpoints/*/state/*"):
                    state.unlink()  # not needed any more, and three quarters of a run's size
                print(f"{row['arm']:24} seed {row['seed']}  {row['val_loss']:.4f}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def measure_times(config: ExperimentConfig, question: int) -> None:
    """Measures the shortest step of each arm of a question; writes milliseconds to times.json."""
    dist, steps = open_processes(), {}
    for arm in arms_of(config, [question]):
        training = train_config(config, arm)
        engine = make_engine(training, dist)
        steps[arm] = partial(train_step, engine, training.objective, config.batch_size)
    times = best_times(steps, seconds=5, device=dist.device)
    times = {arm: 1000 * value for arm, value in times.items()}
    path = config.output / "times.json"
    kept = read_json(path) if path.exists() else {}
    kept[str(question)] = kept.get(str(question), {}) | times
    write_durably(path, json.dumps(kept, indent=1) + "\n")
    print(*(f"{arm:24} {value:8.1f} ms per step" for arm, value in times.items()), sep="\n")


def parse_args() -> ExperimentConfig:
    return parse_config(ExperimentConfig, __doc__)


def main(config: ExperimentConfig) -> None:
    config = replace(config, output=config.output.resolve())
    check_protocol(config)
    if config.times:
        for question in config.questions:
            measure_times(config, question)
    else:
        run_missing(config, arms_of(config, config.questions))
    if finished_rows(config.output):
        report(config.output)
        print(f"tables and figures: {config.output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
