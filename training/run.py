"""Run folders: named by the settings, so that the same command finds its run again."""

import argparse
import hashlib
import json
from pathlib import Path

from models import DiTConfig
from training.checkpoint import MODEL_FILE
from training.errors import UserError

SETTINGS_FILE = "settings.json"

# Flags that may change when a run goes on: they do not change what a step computes.
FREE = {
    "results_dir", "run_name", "epochs", "max_steps", "log_every", "ckpt_every", "num_sample",
    "sample_every", "sample_cfg_scale", "num_workers", "dry_run", "compile",
    "gradient_checkpointing", "expert_backend", "pretraining_tp", "local_rank",
    "max_skipped_steps", "timeout", "deterministic", "deepspeed", "deepspeed_config", "gpus",
    "gpus_per_node", "gpu_memory",
}  # fmt: skip


def settings_of(args: argparse.Namespace) -> dict:
    """The flags that decide what a run computes."""
    # Beside a batch size per process and a global one, --accum_iter only says who computes what.
    free = FREE | {"accum_iter"} if "train_batch_size" in vars(args) else FREE
    return {name: value for name, value in sorted(vars(args).items()) if name not in free}


def choose_run_folder(args: argparse.Namespace) -> Path:
    """Names the run folder of a command, without touching the disk.

    `--resume RUN` stays in that run. Otherwise the name is --run-name, or the model and a digest of
    the settings: the same command comes back to its run, another one never lands in it.
    """
    if args.resume and is_run_folder(Path(args.resume)):
        return Path(args.resume)
    results = Path(args.results_dir)
    if args.run_name:
        if Path(args.run_name).name != args.run_name or args.run_name in (".", ".."):
            raise UserError(f"--run-name: got {args.run_name!r}, expected a plain folder name")
        return results / args.run_name
    digest = hashlib.sha256(json.dumps(settings_of(args)).encode()).hexdigest()[:8]
    model = name_of_experts(args.model.replace("/", "-"), args)
    return results / f"{model}{'-rf' if args.rf else ''}-{digest}"


def name_of_experts(model: str, config: argparse.Namespace | DiTConfig) -> str:
    """A model's name with its experts, such as DiT-S/2-8E2A, or DiT-S/2-dense."""
    experts = f"{config.num_experts}E{config.num_experts_per_tok}A"
    return f"{model}-{experts if config.num_experts else 'dense'}"


def is_run_folder(path: Path) -> bool:
    return (path / SETTINGS_FILE).is_file()


def is_step_folder(path: Path) -> bool:
    return (path / MODEL_FILE).is_file()


def check_settings(run: Path, args: argparse.Namespace) -> None:
    """Raises UserError when a run folder was begun with other settings than this command's."""
    if not is_run_folder(run):
        return
    stored, wanted = json.loads((run / SETTINGS_FILE).read_text()), settings_of(args)
    ignored = {"resume"} if args.resume and Path(args.resume) == run else set()
    differing = [
        f"--{name.replace('_', '-')} got {wanted.get(name)}, expected {stored.get(name)}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name) and name not in ignored
    ]
    if differing:
        raise UserError(f"{run} was begun with other settings: {'; '.join(differing)}")


def open_run_folder(run: Path, args: argparse.Namespace) -> None:
    """Makes a run folder and writes its settings; UserError when it cannot be written."""
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not is_run_folder(run):
            temporary = run / (SETTINGS_FILE + ".tmp")
            temporary.write_text(json.dumps(settings_of(args), indent=1))
            temporary.replace(run / SETTINGS_FILE)
        else:
            (run / "log.txt").open("a").close()
    except OSError as error:
        raise UserError(f"--results-dir: cannot write to {run} ({error.strerror})") from None
