"""The start of a run: one function opens it, from the flags to the first step.

run = open_run(said, DDPFlags, dist)

    a new run         its flags over the preset
    --finetune        its flags over the model of the weights
    --resume RUN      the newest intact checkpoint and its settings; flags change what they say
    --resume STEP     a branch: a new run that goes on from a checkpoint in the same way
    the same command  the newest intact checkpoint of its folder, which must have equal settings
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from checkpoints import MODEL_FILE, Checkpoint, Record, read_record, step_folders
from checkpoints.weights import sampled_digest
from latents.autoencoder import Autoencoder
from latents.loading import BatchStream, split
from latents.sources import Batch, ImageSource, Source, size_notes
from options.settings import Layer, flat
from runtime.devices import be_deterministic
from runtime.errors import UserError, printable, reported_as
from runtime.files import wait_for_file
from runtime.processes import Distributed
from training.changes import check_earlier_names, compare, state_notes, step_notes
from training.config import (
    DATA_FACTS,
    DataFacts,
    TrainConfig,
    combine,
    complete,
    training_flags,
)
from training.engine import new_weights
from training.finetune import check_weights, data_notes, open_weights, start_weights
from training.log import RunLog
from training.manifest import find_fault
from training.run_folder import (
    CONFIG_FILE,
    default_folder,
    enter_run_folder,
    is_run,
    is_step_folder,
    named_folder,
    newest_record,
    not_resumable,
    stored_settings,
    write_config,
)
from training.setup import (
    check_model,
    held_out_batches,
    inputs_of,
    length_notes,
    open_dataset,
    remaining_steps,
    tensors_of,
)

OpenData = Callable[[Layer, Distributed], tuple[Source | None, DataFacts]]
FOLLOWS = ("image_size", "flip")  # settings that follow from --latents-path
BEGINNINGS = ("run_name", "resume", "finetune")  # of a run, which its branches do not share


@dataclass(kw_only=True)
class Run:
    """An opened run: all that training needs."""

    config: TrainConfig
    folder: Path
    facts: dict[str, Any]  # inputs besides the settings, see `FACTS`
    dataset: Source
    vae: Autoencoder | None  # None if no step needs it
    held_out: list[Batch] | None  # latents of --val-path or --val-share
    stream: BatchStream  # the remaining steps
    state_folder: Path | None  # step folder with the state that the run starts from
    weights: Iterable[tuple[str, Tensor]]  # or the weights, by name, until the engine has them
    origin: dict | None  # provenance of the weights that training began from, if any
    lock: BinaryIO | None  # on the main process; keeps other runs out of the folder
    log: RunLog

    def record(self, step: int) -> Record:
        """Returns the metadata of the checkpoint of a step: the config and the facts."""
        sections, dataset = self.config.sections(), self.dataset
        # The autoencoder of a cache may not exist on this machine, so its path is not resolved.
        sections["data"]["vae_path"] = self.vae.path if self.vae else dataset.vae_path
        facts = {name: value for name, value in self.facts.items() if name != "normalisation"}
        typed = {name: facts.pop(name) for name in ("images", "vae_sha256")}
        return Record.from_dict({
            "config": sections, "facts": facts, **typed, "step": step,
            "class_names": dataset.classes, "initialized_from": self.origin,
            "micro_batch": self.stream.micro_batch, "latents_norm": dataset.norm.to_dict(),
        })  # fmt: skip


@dataclass(kw_only=True)
class Plan:
    """What the flags, the data and the weights say, before a run folder is touched."""

    config: TrainConfig
    dataset: Source | None  # None with --dry-run, if the data are not on this machine
    notes: list[str]
    said: set[str]  # the flags
    folder: Path | None  # run folder; None for a run without a name
    found: list[Path]  # its checkpoints, the newest first
    steps: list[Path]  # checkpoints to go on from: `found`, or else that of a branch
    resumes: bool  # --resume RUN
    weights: Checkpoint | None  # of --finetune, unless the run has a checkpoint already
    start: str | None  # kind and digest of the checkpoint of a branch, or of `weights`


def open_run(said: Layer, engine_flags: type, dist: Distributed) -> Run:
    """Opens the run that the flags name; all processes call it together.

    said: flags of the recipe and the command
    The run folder is created after the checks of flags, data and weights. PyTorch's global options
    are set before latents are encoded.
    """
    plan = plan_run(said, engine_flags, open_dataset, dist)
    config, dataset, notes = plan.config, plan.dataset, plan.notes
    checked = config.engine.engine_class().check(config, dist.world_size)
    facts, vae = inputs_of(config, dataset, dist)
    facts = {**checked, **facts, "start": plan.start}
    if plan.folder is None:
        plan.folder = default_folder(config, facts)
        plan.found = dist.broadcast(step_folders(plan.folder))
        plan.steps = plan.found or plan.steps
        if not plan.found:
            dist.on_main(partial(check_earlier_names, plan.folder, config, facts))
    state_folder, before, changed, weights, origin = None, None, [], (), None
    if plan.steps:
        state_folder = newest_intact(plan, dist)
        changed = check_changes(plan, facts)
        before = read_record(state_folder)
        facts["start"] = plan.start or before.facts.get("start")
        origin = before.initialized_from
    elif plan.weights is not None:
        notes += data_notes(plan.weights, config, facts)
        weights = start_weights(plan.weights, config, dataset, notes).state_dict.items()
        origin = plan.weights.origin
    else:
        weights = new_weights(config)

    if config.run.deterministic:
        be_deterministic()
    if config.step.tf32:
        torch.set_float32_matmul_precision("high")
    trained, held_out_indices = split(dataset, config.data.val_share)
    stream = remaining_steps(config, trained, before, dist)
    held_out = None
    if config.data.val_path or config.data.val_share:
        held_out = held_out_batches(config, dataset, vae, facts, held_out_indices, notes)
    dataset.requested = tensors_of(config)
    if os.path.isdir(plan.folder) and not plan.found:
        start = f"training starts at step {stream.start_step}"
        notes.append(f"{plan.folder} has no checkpoint yet: {start}")
    if stream.start_step < stream.end_step:
        notes += length_notes(config, stream, is_pretrained=origin is not None)
    if before:
        notes += state_notes(config, before, state_folder) + step_notes(config, before, stream)
    if dist.is_main and isinstance(dataset, ImageSource):  # reads images
        notes += size_notes(dataset)

    lock, log = open_folder(plan, facts, stream, dist)
    for note in notes:
        log.text(printable(f"note: {note}"))
    if changed:
        log.changes(stream.start_step, changed)
    return Run(
        config=config, folder=plan.folder, facts=facts, dataset=dataset, vae=vae,
        held_out=held_out, stream=stream, state_folder=state_folder, weights=weights,
        origin=origin, lock=lock, log=log,
    )  # fmt: skip


def open_folder(
    plan: Plan, facts: dict[str, Any], stream: BatchStream, dist: Distributed
) -> tuple[BinaryIO | None, RunLog]:
    """Creates and locks the run folder; returns `Run.lock` and `Run.log`."""
    folder, config, is_finished = plan.folder, plan.config, stream.start_step >= stream.end_step
    if is_finished and not plan.found:
        raise UserError(
            f"--max-steps: the branch would end at step {stream.end_step}, expected a later step "
            f"than that of its checkpoint, {stream.start_step}"
        )
    lock = dist.on_main(partial(enter_run_folder, folder))
    if dist.broadcast(step_folders(folder)) != plan.found:  # listed without the lock
        raise UserError(
            f"{folder}: another process saved a checkpoint meanwhile; run the same command again"
        )
    dist.on_main(partial(write_config, folder, config, facts, is_finished))
    if not wait_for_file(folder / CONFIG_FILE):
        raise UserError(
            f"--results-dir: {folder} does not exist on rank {dist.rank}, expected a folder that "
            "all nodes share"
        )
    values = flat(*config.by_section.values())
    with reported_as(f"{folder}: cannot write the log", OSError):
        log = dist.run_on_all(
            lambda: RunLog(folder, stream, values, config.run.wandb, is_main=dist.is_main)
        )
    return lock, log


def plan_run(said: Layer, engine_flags: type, open_data: OpenData, dist: Distributed) -> Plan:
    """Opens the data and the weights that the flags name, and builds the config."""
    source = Path(said["resume"]) if said.get("resume") else None
    resumes = source is not None and is_run(source)
    branch = None if resumes else source
    if branch and os.path.basename(os.path.dirname(os.path.abspath(branch))) == "checkpoints":
        said = {"results_dir": os.path.normpath(branch / "../../.."), **said}  # beside its run
    folder = named_folder(said, source if resumes else None)
    found = dist.broadcast(step_folders(folder)) if folder else []
    own, stored = newest_record(found), None
    if resumes and found and own is None:
        read_record(found[0])  # says why it cannot be read, such as a router of a plugin
    record, weights, start = source_of(said, resumes, branch, own)
    if source is not None:
        stored, _ = stored_settings(record, training_flags(engine_flags))
        dropped = (FOLLOWS if "latents_path" in said else ()) + (BEGINNINGS if branch else ())
        stored = {name: value for name, value in stored.items() if name not in dropped}
    if resumes:
        said = {name: value for name, value in said.items() if name != "resume"}
    known = combine(said, engine_flags, stored=stored, weights=record)
    dataset, data = open_data(known, dist)
    if dataset is None and (trained := record or own):  # --dry-run without data
        has = {name: getattr(trained.config, name) for name in DATA_FACTS if name not in said}
        data = replace(data, **has)
    config = complete(known, said, engine_flags, weights=record, data=data)
    check_model(config)
    return Plan(
        config=config, dataset=dataset,
        notes=[*data.notes, *(check_weights(config, weights) if weights else ())],
        said={*said}, folder=folder, found=found, steps=found or ([branch] if branch else []),
        resumes=resumes, weights=weights, start=start,
    )  # fmt: skip


def source_of(
    said: Layer, resumes: bool, branch: Path | None, own: Record | None
) -> tuple[Record | None, Checkpoint | None, str | None]:
    """Returns the record whose settings the flags change, the weights of --finetune, and how a run
    begins, see `Plan.start`.

    own: record of the newest checkpoint of the run that the flags name
    """
    weights, began = said.get("finetune"), own.settings.get("run", {}) if own else {}
    goes_on = weights is not None and began.get("finetune") == weights
    if weights and (branch or resumes and not goes_on):
        expected = "unless --resume names a run that began with it"
        raise UserError(f"--resume: cannot be combined with --finetune, {expected}")
    if resumes:
        if own is None:
            run = said["resume"]
            raise UserError(
                f"--resume {run}: got a run without a checkpoint, expected one; run the command "
                f"that began it again, or begin a new run: --config {run}/{CONFIG_FILE}"
            )
        return own, None, None
    if branch is not None:
        if is_step_folder(branch):
            return read_record(branch), None, f"resume {sampled_digest(branch / MODEL_FILE)}"
        if began.get("resume") != said["resume"]:
            raise not_resumable(branch)
        return own, None, None  # the checkpoint was deleted after the branch had begun
    if weights and not goes_on:
        opened = open_weights(said)
        return opened.record, opened, f"finetune {sampled_digest(opened.path)}"
    return own if weights else None, None, None


def check_changes(plan: Plan, facts: dict[str, Any]) -> list[str]:
    """Refuses what the flags may not change in a run that goes on; returns what they change.

    facts: inputs besides the settings, or {} before they are known
    """
    # The settings of the newest checkpoint hold, even if it is damaged.
    folder, step = plan.folder, plan.steps[0]
    before = newest_record(plan.steps) or read_record(step)
    if not plan.found:  # a branch begins anew
        facts = {**facts, "start": None}
    said = plan.said if plan.resumes or not plan.found else None
    found = compare(before, plan.config, facts, said)
    if not (refused := "; ".join(found.state + found.unsaid)):
        return found.said
    if not plan.found:
        other = "--finetune starts from the weights only"
        expected = other if found.state else "expected the flags that are to change"
        raise UserError(
            f"--resume {step}: the state was saved with other settings: {refused}; {expected}"
        )
    expected = "the same settings, or a new run (--run-name NEW, without --resume)"
    if not found.state:
        expected += f", or --resume {folder} with the flags that are to change, or a branch "
        expected += f"(--resume {step} --run-name NEW)"
    raise UserError(f"{folder} was created with other settings: {refused}; expected {expected}")


def newest_intact(plan: Plan, dist: Distributed) -> Path:
    """Returns the first intact checkpoint to go on from; notes the damaged ones before it."""
    faults = []
    for folder in plan.steps:
        if (fault := find_fault(folder, dist)) is None:
            plan.notes += faults
            return folder
        if not plan.found:
            raise UserError(f"--resume {folder}: {fault}")
        faults.append(f"skipped the checkpoint {folder}: {fault}")
    raise UserError(
        f"{plan.folder}: got no intact checkpoint: {'; '.join(faults)}; expected one: restore the "
        "damaged files from a copy, or start a new run with a different --run-name"
    )
