"""What differs between a checkpoint and the command that goes on from it.

found = compare(before, config, facts, said={"lr"})
found.said                                           # ["--lr: was 0.0001, is 5e-05"]
"""

import glob
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import Record, step_folders
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
    "normalisation": ("--vae-path: normalisation", ("vae_path", "latents_path", "latents_norm")),
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
LABELS = {"input_size": "the latent size", "in_channels": "--vae-path: the number of channels"}


class Changes(NamedTuple):
    """What differs from a checkpoint, as "--lr: was 0.0001, is 5e-05"; see `Option.change`."""

    state: list[str]
    unsaid: list[str]  # decides the result, and no flag of the command says it
    said: list[str]


def compare(
    before: Record, config: TrainConfig, facts: dict[str, Any], said: set[str] | None
) -> Changes:
    """Compares the settings and the facts of a checkpoint with those of a command.

    said: flags beside --resume, which change what they say; None: the same command
    """
    engine_flags, found = type(config.engine), Changes([], [], [])
    was = complete(stored_settings(before, training_flags(engine_flags))[0], {}, engine_flags)
    if was.preset != config.preset:
        found.state.append(difference("model", was.preset, config.preset))
    for section, part in config.by_section.items():
        for name, flag, old, new in differences(was.by_section[section], part):
            result = found.unsaid if said is None else found.said
            lines = {"state": found.state, "result": result}.get(flag.change, [])
            lines.append(difference(name, old, new))
    for name, line in fact_differences(before, facts):
        _, fields = FACTS.get(name, ("", ()))
        result = found.said if said and said & {*fields} else found.unsaid
        (result if fields else found.state).append(line)
    return found


def fact_differences(before: Record, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, "LABEL: was X, is Y") for facts that differ from those of a record.

    What only one of them knows does not count, except the weights that a run started from.
    """
    known = {**before.facts, "images": before.images, "vae_sha256": before.vae_sha256}
    known["normalisation"] = before.norm and str(before.norm)
    for name, new in facts.items():
        old = known.get(name)
        if old == new or new is None or old is None and name != "start":
            continue
        if name == "images":
            if same_images(old, new):
                continue
            note = DIGESTS if old.keys() & new.keys() <= {"count"} else ""
            old, new = images_name(old), images_name(new) + note
        label, _ = FACTS.get(name, (spelling(name), ()))
        yield name, f"{label}: was {old!s:.300}, is {new!s:.300}"


def difference(name: str, was: Any, now: Any) -> str:
    was, now = ([*value] if isinstance(value, tuple) else value for value in (was, now))
    return f"{LABELS.get(name) or spelling(name)}: was {was!s:.300}, is {now!s:.300}"


def check_earlier_names(folder: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Refuses a new run without a name that repeats a run which an earlier version named."""
    for other in sorted(folder.parent.glob(glob.escape(folder.name[:-8]) + 8 * "[0-9a-f]")):
        now = facts
        try:
            before = newest_record(step_folders(other))
            if before and "sha256" in (before.images or {}):  # a digest of an earlier version
                now = facts | {"images": before.images | {"count": facts["images"]["count"]}}
            if before is None or any(compare(before, config, now, None)):
                continue
        except UserError:  # a damaged one, or one of a component that is not imported
            continue
        raise UserError(
            f"{other} has the same settings, under the name of an earlier version; "
            f"continue it with --resume {other}, or begin a new run with --run-name NEW"
        )


def state_notes(config: TrainConfig, before: Record, step: Path) -> list[str]:
    """Returns notes on stored settings that this version lacks, and on the EMAs and auxiliary
    losses that the state of a step folder does not have."""
    stored, notes = stored_settings(before, training_flags(type(config.engine)))
    names = {*averages_of(step)}
    notes += [
        f"EMA {ema.name} starts from the weights: {step} does not have it"
        for ema in config.ema if ema.name not in names
    ]  # fmt: skip
    notes += [
        f"auxiliary loss {one.name} starts with new weights: {step} does not have it"
        for one in config.auxiliary
        if one.name not in stored.get("auxiliary", ())
        and one.projector(config.model, config.shapes) is not None
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
        config.step.lr * rate_factor(config.lr_schedule, config.step.warmup_steps, done, total)
        for total in (end, stream.end_step)
    )
    if now > 1.01 * fallen:
        notes.append(
            f"the learning rate fell to {fallen:.2g} by step {done}, as in a run of {end} "
            f"steps; in a run of {stream.end_step} steps, the learning rate jumps to {now:.2g}"
        )
    return notes
