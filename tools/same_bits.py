r"""Trains the runs of same_bits.yaml at two commits, and compares all tensors and log rows.

    python -m tools.same_bits --base COMMIT --output data/same-bits
    python -m tools.same_bits --base COMMIT --only shard resume --output data/same-bits

The exit code is 1 if a run differs. Both commits run on this machine, from clones in --output, with
this Python. Finished runs are kept in --output and not trained again. The script compares the
weights, the EMAs and, under DDP, the training state of the last checkpoint, and the rows of
log.jsonl except times and speeds. A commit before version 0.3 gets the commands in the spelling of
that time. A value that only one commit has is listed, but is not a difference. A commit takes about
ten minutes on 2 CPU cores.
"""

import runtime  # isort: skip  # noqa: F401  # before torch: its threads, and Ctrl-C

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from options.parts import option
from runtime.errors import UserError, run_main
from runtime.flags import parse_config
from training.engines.state import read_state

ROOT = Path(__file__).resolve().parents[1]

UNTIMED = ("time", "epoch", "mfu", "tflops", "memory", "_per_sec", "wait")  # parts of names


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    base: str = option(help="commit to compare with")
    commit: str = option("HEAD", help="commit to compare")
    only: tuple[str, ...] = option((), help="runs whose names contain one of these words")
    output: Path = option(Path("data/same-bits"), help="folder for clones, data and runs")


def parse_args() -> CompareConfig:
    return parse_config(CompareConfig, __doc__)


def main(config: CompareConfig) -> int:
    plan = yaml.safe_load((Path(__file__).with_suffix(".yaml")).read_text())
    runs = {
        name: commands
        for name, commands in plan["runs"].items()
        if not config.only or any(word in name for word in config.only)
    }
    output = config.output.resolve()
    make_images(output / "images", classes=4)
    make_images(output / "few", classes=2)
    folders = [train_all(runs, plan, commit, output) for commit in (config.base, config.commit)]
    different = compare(list(runs), folders)
    print(f"{len(runs) - different} of {len(runs)} runs are the same")
    return int(different > 0)


def compare(names: list[str], folders: list[Path]) -> int:
    """Prints a line for each run of both commits; returns the number of runs that differ."""
    different = 0
    for name in names:
        base, other = (read_run(folder / name) for folder in folders)
        faults = [key for key in base.keys() & other.keys() if not is_same(base[key], other[key])]
        extra = sorted(base.keys() ^ other.keys())
        if not base.keys() & other.keys():
            faults = ["no value in common"]
        different += bool(faults)
        note = f"  in one only: {len(extra)}, such as {extra[0]}" if extra else ""
        state = f"DIFFERENT {', '.join(sorted(faults)[:3])}" if faults else "same"
        print(f"{name:24} {len(base.keys() & other.keys()):5} values  {state}{note}")
    return different


def make_images(folder: Path, classes: int) -> None:
    """Writes eight noisy 32 x 32 PNG images per class."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class-{label}").mkdir(parents=True, exist_ok=True)
        for number in range(8):
            pixels = rng.integers(0, 100, (32, 32, 3)) + 30 * label
            Image.fromarray(pixels.astype(np.uint8)).save(
                folder / f"class-{label}" / f"{number}.png"
            )


def train_all(runs: dict[str, str], plan: dict, commit: str, output: Path) -> Path:
    """Trains the missing runs at a commit; returns the folder of the commit's runs."""
    named = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if named.returncode:
        raise UserError(f"--base, --commit: got {commit}, expected a commit of this repository")
    folder = output / named.stdout[:12]
    clone = folder / "code"
    if not clone.exists():
        call("git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(clone))
        call("git", "checkout", "--quiet", "--detach", named.stdout.strip(), cwd=clone)
    if not understands_words(clone):
        before = plan["until_0.2"]
        plan = {**plan, "common": before["common"]}
        runs = {name: before["runs"].get(name, commands) for name, commands in runs.items()}
    places = {"data": output / "images", "vae": clone / "assets" / "vae-fashion-mnist"}
    for name, images in (("latents", "images"), ("few", "few")):
        places[name] = folder / name
        call_script(
            clone, folder / f"{name}.txt", "cache_latents.py", "--data-path", output / images,
            "--vae-path", places["vae"], "--image-size", "32", "--output", places[name],
        )  # fmt: skip
    for name, commands in runs.items():
        run = folder / "runs" / name
        if (run / "finished").exists():
            continue
        print(f"{commit}: training {name}", flush=True)
        for number, command in enumerate(commands.split(" then "), 1):
            places |= {"results": run / str(number), f"{name}-{number}": run / str(number) / "run"}
            if "--run-name" in command:  # use the folder of the first command again
                places["results"] = run / "1"
            processes, script, flags = re.fullmatch(r"(\d*) ?(\w+)(.*)", command).groups()
            common = "" if script == "upcycle" else plan["common"]
            words = shlex.split(f"{common} {plan[script]} {flags}")
            words = [word.format_map(places) for word in words]  # the last value of a flag counts
            if "--finetune" in words:  # the weights determine the model
                words = without(words, "--hidden-size", "--depth", "--num-heads", "--model")
            if "--data-path" in words:
                words = without(words, "--latents-path")
            path = "train_deepspeed.py" if script == "deepspeed" else f"{script}.py"
            call_script(clone, run / f"{number}.txt", path, *words, processes=int(processes or 1))
        (run / "finished").touch()
    return folder / "runs"


def understands_words(clone: Path) -> bool:
    """Returns whether a commit spells a component as one word, as since version 0.3."""
    code = "from models import DiTConfig; DiTConfig(router='sigmoid:scale=2.5')"
    asked = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True)
    return asked.returncode == 0


def without(words: list[str], *flags: str) -> list[str]:
    """Removes flags that have one value each."""
    return [
        word for i, word in enumerate(words)
        if word not in flags and (i == 0 or words[i - 1] not in flags)
    ]  # fmt: skip


def call_script(clone: Path, log: Path, script: str, *words: Any, processes: int = 1) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), script, *map(str, words)]
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=clone, stdout=file, stderr=file, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: got exit code {done.returncode}, see {log}")


def call(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True)


def read_run(folder: Path) -> dict[str, Any]:
    """Reads the tensors of the last checkpoint and the log rows of the last command's run."""
    (run,) = sorted(folder.glob("*/*/log.jsonl"))[-1:]
    run = run.parent
    step = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: path.name)
    values: dict[str, Any] = {}
    for path in step.glob("*.safetensors"):
        values |= {f"{path.name}: {name}": value for name, value in load_file(path).items()}
    if (step / "state").exists():
        state, _ = read_state(step, {}, {}, torch.device("cpu"))
        values |= flat(state, "state")
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        values |= {
            f"log {row['step']}: {name}": value
            for name, value in row.items()
            if not any(word in name for word in UNTIMED)
        }
    return values


def flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in flat(one, f"{name}: {key}").items()}
    return {name: value}


def is_same(one: Any, other: Any) -> bool:
    """Returns whether both values are tensors with equal bytes, or equal numbers or texts."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    return repr(one) == repr(other)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
