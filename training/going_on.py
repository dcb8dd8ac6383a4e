"""Going on with a run: where a command begins, and what it may change.

A command goes on with a run (--run-name, --resume RUN), branches from one of its checkpoints
(--resume RUN/checkpoints/STEP), or begins a new run. The settings of its checkpoint hold, and
what the command says changes them. Each difference is a line; what shapes the state is refused.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from checkpoints import Record, read_record, step_folders
from checkpoints.weights import as_user_error
from latents.loading import BatchStream
from latents.sources import Source, images_name, same_images
from models import MEANINGS, WITHOUT_EFFECT
from options.settings import differences
from runtime.errors import UserError
from runtime.processes import Distributed
from training.config import TrainConfig, setting_names
from training.finetune import latent_changes
from training.manifest import fault_of
from training.run_folder import CONFIG_FILE, LOCK_FILE, branch_of, is_step_folder, named_folder
from training.sections import CommandFlags

# A run cannot change what shapes its state: the model, and these, of components only the name.
SHAPES_STATE = ("objective", "optimizer", "freeze", "train_router_only")
MORE_STEPS = "a larger --max-steps adds steps"


def find_start(command: CommandFlags) -> tuple[Path | None, list[Path]]:
    """Returns the run folder to go on in, or None for a new run; and the checkpoints to go on from,
    the newest first.

    A run that --run-name names goes on if it has a checkpoint, also if it began with --finetune or
    from a checkpoint of another run.
    """
    named = None if command.run_name is None else named_folder(command)
    branch = branch_of(command)
    if command.finetune and command.resume:
        raise UserError("--resume: cannot be combined with --finetune")
    if command.resume and not branch:
        run = Path(command.resume)
        steps = step_folders(run)
        place = named or Path(command.results_dir or run.resolve().parent, run.resolve().name)
        if place.resolve() != run.resolve():
            new = f"--resume {steps[0]} --run-name NEW"
            got = f"a run keeps its folder, got {place}"
            raise UserError(f"--resume {run}: {got}; for a new run: {new}")
        return run, steps
    if named and (steps := step_folders(named)):  # a branch's first checkpoint may be deleted
        return named, steps
    if branch and not is_step_folder(branch):
        raise not_resumable(branch)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    is_restarted = restarts or os.environ.get("DIT_MOE_SAVED")  # by torchrun, or by slurm.sh
    if is_restarted and not named and not command.dry_run:
        raise UserError(
            f"--run-name: is required with {'--max-restarts' if restarts else 'slurm.sh'}: a "
            "restarted command goes on with the run of its name"
        )
    return None, [branch] if branch else []


def not_resumable(source: Path) -> UserError:
    """Describes the error for a --resume that names neither a run nor a checkpoint."""
    expected = "expected a run with a checkpoint or RUN/checkpoints/STEP"
    if os.path.exists(source):
        advice = f"to start from weights: --finetune {source}"
        if source.name == "checkpoints" and step_folders(source.parent):
            advice = f"to go on: --resume {source.parent}"
        if os.path.isfile(source / LOCK_FILE):  # a run that ended before its first step
            advice = "to begin it again: its command"
        if os.path.isfile(source / CONFIG_FILE):  # a run that has saved nothing
            advice = f"to begin it again: its command, or --config {source / CONFIG_FILE}"
        return UserError(f"--resume: got {source}, {expected}; {advice}")
    steps = [folder.name for folder in step_folders(source.parent.parent)]
    if source.parent.name == "checkpoints" and steps:
        expected = f"expected a checkpoint of the run: {', '.join(steps[:20])}"
    return UserError(f"--resume: {source} does not exist, {expected}")


def open_run(
    steps: list[Path], notes: list[str], dist: Distributed
) -> tuple[TrainConfig, Record, Path]:
    """Returns the settings, the record and the folder of the newest intact checkpoint.

    notes: receives the damaged checkpoints, and the settings that this version does not know
    """
    faults = []
    for step_folder in steps:
        if (fault := dist.from_main(partial(fault_of, step_folder))) is None:
            break
        faults.append(f"skipped the checkpoint {step_folder}: {fault}")
    else:
        raise UserError(
            f"got no intact checkpoint: {'; '.join(faults)}; expected one: restore the damaged "
            "files from a copy, or start a new run with another --run-name"
        )
    before = read_record(step_folder)
    if "version" not in before.facts:
        raise UserError(
            f"{step_folder} was saved by a version before 0.3, whose runs do not go on; start a "
            "new run from its weights (--finetune), or use that version"
        )
    notes += faults
    if unknown := before.settings.keys() - setting_names():
        notes.append(f"ignored unknown settings of the checkpoint: {', '.join(sorted(unknown))}")
    with as_user_error(step_folder, "cannot go on"):
        return TrainConfig.of_record(before), before, step_folder


def began_with(command: CommandFlags, before: Record | None, folder: Path | None) -> str | None:
    """Returns the path or hub id of --finetune or --resume with which the run began, or None.

    Refuses another one beside the name of a run.
    """
    branch = branch_of(command)
    said = command.finetune or branch
    if not folder:  # a new run
        return os.path.abspath(said) if said and os.path.exists(said) else said
    began = before.facts.get("began_with")
    if said and (began is None or os.path.realpath(said) != os.path.realpath(began)):
        if branch and not is_step_folder(branch):
            raise not_resumable(branch)
        raise UserError(
            f"--run-name: {folder} began with {began or 'new weights'} and has a checkpoint, so it "
            f"does not begin with {said}; expected another name for a new run"
        )
    return began


def changed_settings(
    before: Record, was: TrainConfig, now: TrainConfig, script: str, dataset: Source
) -> list[str]:
    """Returns what the command changes, as "--lr: was 0.0001, is 5e-05"; refuses what shapes the
    state."""
    changes, refused = [], []
    for section, config in now.by_section.items():
        for name, line in differences(was.by_section[section], config, MEANINGS):
            old, new = (getattr(c.by_section[section], name) for c in (was, now))
            if section == "model":
                shapes_state = name not in WITHOUT_EFFECT
            else:
                is_other = getattr(old, "name", old) != getattr(new, "name", new)
                shapes_state = name in SHAPES_STATE and is_other
            if name != "vae_path":  # it may have moved; `latent_changes` compares the weights
                (refused if shapes_state else changes).append(line)
    is_known = before.images and dataset.fingerprint.get("names")  # a plan may assume its images
    if is_known and not same_images(before.images, dataset.fingerprint):
        names = map(images_name, (before.images, dataset.fingerprint))
        changes.append("the images: was {}, is {}".format(*names))
    changes += begun_and_ended("EMA", was.ema, now.ema, "from these weights")
    changes += begun_and_ended("auxiliary loss", was.auxiliary, now.auxiliary, "anew")
    names, classes = before.class_names, tuple(dataset.classes)
    if any(classes) and len(names) > 1 and names != classes:  # a single class has no meaning
        refused.append(f"the class names ({names_difference(names, classes)})")
    if was.engine.script != script:
        refused.append(f"the script: was {was.engine.script}, is {script}")
    if refused:
        raise UserError(
            f"a run keeps what its state depends on: {'; '.join(refused)}; expected the same, or "
            "another --run-name for a new run, which --finetune can start from these weights if "
            "their shapes stay"
        )
    return changes


def names_difference(was: Sequence[str], now: Sequence[str]) -> str:
    """Returns "missing: A, B; new: C", or that only the order differs."""
    sides = {"missing": set(was) - set(now), "new": set(now) - set(was)}
    parts = [f"{side}: {', '.join(sorted(names)):.300}" for side, names in sides.items() if names]
    return "; ".join(parts) or "the same names in another order"


def begun_and_ended(kind: str, was: Sequence, now: Sequence, how: str) -> list[str]:
    """Returns a line for each EMA or auxiliary loss that begins or ends."""
    before, after = ({one.name for one in kept} for kept in (was, now))
    lines = [f"{kind} {name} begins {how}" for name in sorted(after - before)]
    return lines + [f"{kind} {name} ends" for name in sorted(before - after)]


def data_changes(was: Record, now: Record) -> list[str]:
    """Returns lines on the latents, features and images of a step, where they differ from those of
    a checkpoint."""
    lines = latent_changes(was, now)
    labels = {"features_sha256": "the network of the features", "captions_sha256": "the captions",
              "global_batch_size": "the images of a step"}  # fmt: skip
    for name, label in labels.items():
        old, new = was.facts.get(name), now.facts.get(name)
        if None not in (old, new) and old != new:
            lines.append(f"{label}: was {old!s:.12}, is {new!s:.12}")
    return lines


def check_end(config: TrainConfig, before: Record, stream: BatchStream) -> None:
    """Refuses larger batches, such as those of DeepSpeed on more GPUs, with which --epochs end
    before the step that the run has come to, although the batches so far would leave steps."""
    step, end, count = before.step, stream.end_step, stream.global_batch
    of_flag = before.settings.get("global_batch_size", count)
    batch = before.facts.get("global_batch_size", of_flag)
    if end <= step < config.total_steps(stream.num_images, batch):
        raise UserError(
            f"--epochs: the run has come to step {step} with {batch} images a step, but with "
            f"{count} it ends at step {end}; expected --max-steps, above {step}"
        )


def nothing_to_do(folder: Path | None, stream: BatchStream, dist: Distributed) -> int:
    """Says that a run is finished; returns the exit code. A branch without steps is an error."""
    step, end = stream.start_step, stream.end_step
    if folder is None:
        raise UserError(
            f"--max-steps: the branch would end at step {end}, expected a later step than that of "
            f"its checkpoint, {step}"
        )
    if dist.is_main:
        print(f"{folder} is finished: step {step} of {end}; {MORE_STEPS}")
    return 0
