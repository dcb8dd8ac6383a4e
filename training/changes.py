"""What differs between a checkpoint and the command that goes on from it.

found = compare(before, was, config, facts, {"lr"})
found.said                                           # ["--lr: was 0.0001, is 5e-05"]
"""

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import Record
from checkpoints.checkpoint import averages_of
from latents.loading import BatchStream
from latents.sources import images_name, same_images
from options.settings import differences, spelling
from runtime.errors import UserError
from training.config import TrainConfig, complete, training_flags
from training.run_folder import newest_record, stored_settings
from training.schedule import rate_factor

# Inputs of a run besides its settings: their names in messages, and the flags that change them.
FACTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "images": ("--data-path", ("data_path", "latents_path")),
    "vae_sha256": ("--vae-path: weights", ("vae_path",)),
    "normalisation": ("--vae-path: normalisation", ("vae_path", "latents_norm")),
    "latents_norm_sha256": (
        "--latents-path: mean and standard deviation per channel",
        ("latents_path", "latents_norm"),
    ),
    "features_sha256": ("--latents-path: the network of the features", ("latents_path",)),
    "global_batch_size": ("the images of a step", ("train_batch_size", "accum_iter")),
    "start": ("the weights that the run started from", ()),
    "script": ("the script", ()),
}
DIGESTS = ", digests of two versions (the same images go on with --data-path beside --resume)"
UNRECORDED = ("images", "vae_sha256", "normalisation")  # by weights of other code
LABELS = {"input_size": "the latent size", "in_channels": "--vae-path: the number of channels"}


class Changes(NamedTuple):
    """What differs from a checkpoint, as "--lr: was 0.0001, is 5e-05"; see `Option.change`."""

    state: list[str]
    unsaid: list[str]  # decides the result, and no flag of the command says it
    said: list[str]


def stored_config(before: Record, engine_flags: type) -> tuple[TrainConfig, list[str]]:
    """Returns the config of a checkpoint, and notes on settings that this version lacks."""
    flags = training_flags(engine_flags)
    stored, notes = stored_settings(before, flags)
    return complete(stored, {}, engine_flags), notes


def compare(
    before: Record, was: TrainConfig, config: TrainConfig, facts: dict[str, Any], named: set[str]
) -> Changes:
    """Compares the settings and the facts of a checkpoint with those of a command."""
    found = Changes([], [], [])
    if was.preset != config.preset:
        found.state.append(difference("model", was.preset, config.preset))
    for section, part in config.by_section.items():
        for name, flag, old, new in differences(was.by_section[section], part):
            result = found.said if flag.field.name in named else found.unsaid
            lines = {"state": found.state, "result": result}.get(flag.change, [])
            lines.append(difference(name, old, new))
    known = {**before.facts, "images": before.images, "vae_sha256": before.vae_sha256}
    known["normalisation"] = before.norm and str(before.norm)
    for name in dict.fromkeys([*facts, *known]) if facts else ():
        old, new = known.get(name), facts.get(name)
        label, fields = FACTS.get(name, (spelling(name), ()))
        if old == new or old is None and name in UNRECORDED:
            continue
        if name == "images":
            if same_images(old, new):
                continue
            note = DIGESTS if old.keys() & new.keys() <= {"count"} else ""
            old, new = images_name(old), images_name(new) + note
        result = found.said if named & {*fields} else found.unsaid
        lines = result if fields else found.state
        lines.append(f"{label}: was {old!s:.300}, is {new!s:.300}")
    return found


def difference(name: str, was: Any, now: Any) -> str:
    was, now = ([*value] if isinstance(value, tuple) else value for value in (was, now))
    return f"{LABELS.get(name) or spelling(name)}: was {was!s:.300}, is {now!s:.300}"


def check_changes(
    before: Record, config: TrainConfig, facts: dict[str, Any], named: set[str], step: Path,
    folder: Path | None,
) -> None:  # fmt: skip
    """Refuses what the flags may not change in a run that goes on from a step folder.

    before: record of the newest checkpoint of the run, or of that which a branch starts from
    facts: inputs besides the settings, or {} before they are known
    named: fields that the command names and may change
    Raises UserError for a difference in the state, or one that no flag says.
    """
    is_own = folder is not None and step.is_relative_to(folder)
    if not is_own:  # a branch begins anew
        before = replace(before, facts={**before.facts, "start": facts.get("start")})
    was, _ = stored_config(before, type(config.engine))
    found = compare(before, was, config, facts, named)
    if found.state and not is_own:
        raise UserError(
            f"--resume {step}: the state was saved with other settings: {'; '.join(found.state)}; "
            "--finetune starts from the weights only"
        )
    if refused := found.state + found.unsaid:
        expected = "the same settings, or a new run (--run-name NEW, without --resume)"
        if not found.state:
            expected += f", or --resume {folder} with the flags that are to change, or a branch "
            expected += f"(--resume {step} --run-name NEW)"
        raise UserError(
            f"{folder} was created with other settings: {'; '.join(refused)}; expected {expected}"
        )


def check_earlier_names(folder: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Refuses a new run without a name that repeats a run which an earlier version named."""
    others = folder.parent.glob(glob.escape(folder.name[:-8]) + 8 * "[0-9a-f]")
    for other in () if folder.exists() else sorted(others):
        if (before := newest_record(other)) is None:
            continue
        try:
            was, _ = stored_config(before, type(config.engine))
        except UserError:
            continue
        now = facts
        if before.images and "sha256" in before.images:  # a digest of an earlier version
            now = facts | {"images": before.images | {"count": facts["images"]["count"]}}
        found = compare(before, was, config, now, set())
        if found.state or found.unsaid:
            continue
        raise UserError(
            f"{other} has the same settings, under the name of an earlier version; "
            f"continue it with --resume {other}, or begin a new run with --run-name NEW"
        )


def state_notes(config: TrainConfig, was: TrainConfig, step: Path) -> list[str]:
    """Returns notes on the EMAs and auxiliary losses that the state does not have."""
    names = {*averages_of(step)}
    notes = [
        f"EMA {ema.name} starts from the weights: {step} does not have it"
        for ema in config.emas if ema.name not in names
    ]  # fmt: skip
    trained = {one.name for one in was.step.auxiliary}
    notes += [
        f"auxiliary loss {one.name} starts with new weights: {step} does not have it"
        for one in config.auxiliary
        if one.name not in trained and one.projector(config.model, config.shapes) is not None
    ]
    return notes


def step_notes(config: TrainConfig, before: Record, stream: BatchStream) -> list[str]:
    """Returns notes on steps that differ from those of an uninterrupted run: images that another
    batch size repeats or skips, the noise, or a jump of the learning rate, which had decayed
    towards the end of a shorter run.
    """
    notes, batch, done = [], stream.global_batch, stream.start_step
    flag = before.settings.get("engine", {}).get("global_batch_size")
    if (was := before.facts.get("global_batch_size", flag)) not in (None, batch):
        does = "come again" if batch < was else "are skipped"
        notes.append(
            f"steps of {batch} images go on at image {done * batch} of all epochs, after {done} "
            f"steps of {was} images: some images {does}"
        )
    if before.micro_batch not in (None, stream.micro_batch):
        notes.append(
            f"micro-batches have {stream.micro_batch} images instead of {before.micro_batch}: the "
            "run continues, but the noise differs from the noise of an uninterrupted run"
        )
    run = before.settings.get("run", {})
    length = {name: run.get(name) for name in ("max_steps", "epochs")}
    shorter = replace(config, run=replace(config.run, **length))
    end = shorter.total_steps(stream.num_images, batch)
    fallen, now = (
        config.step.lr * rate_factor(config.schedule, config.step.warmup_steps, done, total)
        for total in (end, stream.end_step)
    )
    if now > 1.01 * fallen:
        notes.append(
            f"the learning rate fell to {fallen:.2g} by step {done}, as in a run of {end} "
            f"steps; in a run of {stream.end_step} steps, the learning rate jumps to {now:.2g}"
        )
    return notes
