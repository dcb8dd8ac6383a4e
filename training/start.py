"""The start of a run: one function opens it, from the flags to the first step.

run = open_run(said, DDPFlags, dist)

    a new run         its flags over the preset
    --finetune        its flags over the model of the weights
    --resume RUN      the newest intact checkpoint and its settings; flags change what they say
    --resume STEP     a branch: a new run that goes on from a checkpoint in the same way
    the same command  the newest intact checkpoint of its folder, which must have equal settings
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from checkpoints import MODEL_FILE, Checkpoint, Record, read_record, step_folders
from checkpoints.meta import meta_model
from checkpoints.weights import sampled_digest
from conditions import split_condition
from latents.autoencoder import Autoencoder, load_autoencoder
from latents.cache import FEATURES
from latents.loading import BatchStream, split
from latents.sources import Batch, ImageSource, Source, size_notes
from options.settings import Layer, flat
from runtime.devices import DTYPES, be_deterministic
from runtime.errors import UserError, printable, reported_as
from runtime.processes import Distributed
from training.changes import (
    check_changes,
    check_earlier_names,
    compare,
    state_notes,
    step_notes,
    stored_config,
)
from training.config import (
    DATA_FACTS,
    DataFacts,
    TrainConfig,
    combine,
    complete,
    training_flags,
)
from training.engine import frozen_names, new_weights
from training.finetune import check_weights, data_notes, open_weights, start_weights
from training.log import RunLog
from training.manifest import find_fault
from training.run_folder import (
    CONFIG_FILE,
    default_folder,
    enter_run_folder,
    is_step_folder,
    named_run,
    newest_record,
    not_resumable,
    run_of_step,
    stored_settings,
    write_config,
)
from training.setup import held_out_batches, length_notes, open_dataset

OpenData = Callable[[Layer], tuple[Source | None, DataFacts]]
FOLLOWS = ("image_size", "flip")  # settings that follow from --latents-path
SAVED_MEANWHILE = "{}: another process saved a checkpoint meanwhile; run the same command again"
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
    created: Path | None  # `folder`, if this process created it

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


class Beginning(NamedTuple):
    """Where training begins, as the flags say."""

    folder: Path | None  # run folder; None for a run without a name
    own: Record | None  # of the newest readable checkpoint of the run
    record: Record | None  # of the run, checkpoint or weights whose settings the flags change
    resumes: bool = False  # --resume RUN
    branch: Path | None = None  # step folder that a branch starts from
    weights: Checkpoint | None = None  # of --finetune, unless the run has a checkpoint already
    start: str | None = None  # kind and digest of `branch` or `weights`


class Plan(NamedTuple):
    """What the flags, the data and the weights say, before a run folder is touched."""

    begin: Beginning
    config: TrainConfig
    dataset: Source | None  # None with --dry-run, if the data are not on this machine
    named: set[str]  # fields that the flags set or make useless, or that follow from them
    notes: list[str]


def open_run(said: Layer, engine_flags: type, dist: Distributed) -> Run:
    """Opens the run that the flags name; all processes call it together.

    said: flags of the recipe and the command
    The run folder is created after the checks of flags, data and weights. PyTorch's global options
    are set before latents are encoded.
    """
    plan = plan_run(said, engine_flags, partial(open_dataset, dist=dist))
    begin, config, dataset, notes = plan.begin, plan.config, plan.dataset, plan.notes
    checked = config.engine.engine_class().check(config, dist.world_size)
    facts, vae = inputs_of(config, dataset, dist)
    facts = {**checked, **facts, "start": begin.start}
    folder = begin.folder or default_folder(config, facts)
    if begin.folder is None:
        dist.on_main(partial(check_earlier_names, folder, config, facts))
    frozen_names(meta_model(config.model), config.step)  # checks the patterns of --freeze
    found = dist.broadcast(step_folders(folder))
    state_folder, before, changed, weights, origin = None, None, [], (), None
    if found or begin.branch:
        state_folder, before, changed = starting_point(plan, facts, folder, found, dist)
        origin = before.initialized_from
    elif begin.weights is not None:
        notes += data_notes(begin.weights.record, begin.weights.path, config, facts)
        weights = start_weights(begin.weights, config, dataset, notes).state_dict.items()
        origin = begin.weights.origin
    else:
        weights = new_weights(config)

    if config.run.deterministic:
        be_deterministic()
    if config.step.tf32:
        torch.set_float32_matmul_precision("high")
    trained, held_out_indices = split(dataset, config.data.val_share)
    stream = remaining_steps(config, trained, before, dist)
    dataset.requested = [split_condition(word)[0] for word in config.model.conditions]
    held_out = None
    if config.data.val_path or config.data.val_share:
        held_out = held_out_batches(config, dataset, vae, facts, held_out_indices, notes)
    dataset.requested += [name for one in config.auxiliary for name in one.needs]
    if os.path.isdir(folder) and not found:
        start = f"training starts at step {stream.start_step}"
        notes.append(f"{folder} has no checkpoint yet: {start}")
    if stream.start_step < stream.end_step:
        notes += length_notes(config, stream, is_pretrained=origin is not None)
    notes += step_notes(config, before, stream) if before else []
    if dist.is_main and isinstance(dataset, ImageSource):  # reads images
        notes += size_notes(dataset)

    lock, log, created = open_folder(folder, config, facts, stream, found, dist)
    for note in notes:
        log.text(printable(f"note: {note}"))
    if changed:
        log.changes(stream.start_step, changed)
    return Run(
        config=config, folder=folder, facts=facts, dataset=dataset, vae=vae,
        held_out=held_out, stream=stream, state_folder=state_folder, weights=weights,
        origin=origin, lock=lock, log=log, created=created,
    )  # fmt: skip


def starting_point(
    plan: Plan, facts: dict[str, Any], folder: Path, found: list[Path], dist: Distributed
) -> tuple[Path, Record, list[str]]:
    """Returns the checkpoint that training goes on from, of this run or, if it has none, of a
    branch's source; its record; and what the flags change.

    found: checkpoints of the run
    Adds notes to the plan, and to facts how the run began.
    """
    begin, config, notes = plan.begin, plan.config, plan.notes
    state_folder = newest_intact(folder, found, notes, dist) if found else begin.branch
    if not found and (fault := find_fault(state_folder, dist)):
        raise UserError(f"--resume {state_folder}: {fault}")
    before = read_record(state_folder)
    newest = newest_record(folder) if found else before
    if found and begin.own is not None and begin.own.step != newest.step:
        raise UserError(SAVED_MEANWHILE.format(folder))
    facts["start"] = facts["start"] or before.facts.get("start")
    named = plan.named if begin.resumes or not found else set()
    # The settings of the newest checkpoint hold, even if it is damaged.
    check_changes(newest, config, facts, named, state_folder, folder)
    was, unknown = stored_config(before, type(config.engine))
    changed = compare(before, was, config, facts, {*training_flags(type(config.engine))}).said
    notes += unknown + state_notes(config, was, state_folder)
    return state_folder, before, changed


def remaining_steps(
    config: TrainConfig, trained: np.ndarray, before: Record | None, dist: Distributed
) -> BatchStream:
    """Returns the steps after those of a checkpoint, over the images with the indices `trained`."""
    micro_batch = config.engine.engine_class().micro_batch(config, dist.world_size)
    for one in config.auxiliary:
        if one.compares_images and micro_batch < 2:
            raise UserError(
                f"--auxiliary: got {one.name} with micro-batches of one image, expected at least "
                "two images (larger batches, or fewer --accum-iter)"
            )
    global_batch = micro_batch * config.step.accum_iter * dist.world_size
    return BatchStream(
        trained, micro_batch=micro_batch, accumulation=config.step.accum_iter,
        rank=dist.rank, world_size=dist.world_size, seed=config.run.global_seed,
        start_step=before.step if before else 0,
        end_step=config.total_steps(len(trained), global_batch),
        flip=config.data.flip,
    )  # fmt: skip


def open_folder(
    folder: Path, config: TrainConfig, facts: dict[str, Any], stream: BatchStream,
    found: list[Path], dist: Distributed,
) -> tuple[BinaryIO | None, RunLog, Path | None]:  # fmt: skip
    """Creates and locks the run folder; returns `Run.lock`, `Run.log` and `Run.created`.

    found: checkpoints of the run, listed before this process had the lock
    """
    is_finished = stream.start_step >= stream.end_step
    if is_finished and not found:
        raise UserError(
            f"--max-steps: the branch would end at step {stream.end_step}, expected a later step "
            f"than that of its checkpoint, {stream.start_step}"
        )
    created = folder if dist.is_main and not os.path.lexists(folder) else None
    lock = dist.on_main(partial(enter_run_folder, folder))
    if dist.broadcast(step_folders(folder)) != found:
        raise UserError(SAVED_MEANWHILE.format(folder))
    with deleted_on_error(created):
        dist.on_main(partial(write_config, folder, config, facts, is_finished))
        if not os.path.isfile(folder / CONFIG_FILE):
            raise UserError(
                f"--results-dir: {folder} does not exist on rank {dist.rank}, expected a folder "
                "that all nodes share"
            )
        values = flat(*config.by_section.values())
        with reported_as(f"{folder}: cannot write the log", OSError):
            log = dist.run_on_all(
                lambda: RunLog(folder, stream, values, config.run.wandb, is_main=dist.is_main)
            )
    return lock, log, created


@contextmanager
def deleted_on_error(folder: Path | None) -> Iterator[None]:
    """Deletes a folder, unless it is None, if the block raises an error."""
    try:
        yield
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def plan_run(said: Layer, engine_flags: type, open_data: OpenData) -> Plan:
    """Opens the data and the weights that the flags name, and builds the config."""
    source = said.get("resume")
    if run := source and run_of_step(source):  # a branch is put beside its run
        said = {"results_dir": os.path.normpath(os.path.join(run, os.pardir)), **said}
    begin, flags, stored = beginning_of(said), training_flags(engine_flags), None
    follows = FOLLOWS if "latents_path" in said else ()
    if said.get("resume"):
        stored, _ = stored_settings(begin.record, flags)
        dropped = (*follows, *(BEGINNINGS if begin.branch else ()))
        stored = {name: value for name, value in stored.items() if name not in dropped}
    if begin.resumes:
        said = {name: value for name, value in said.items() if name != "resume"}
    known = combine(said, engine_flags, stored=stored, weights=begin.record)
    dataset, data = open_data(known)
    notes = [*data.notes]
    if dataset is None and (record := begin.record or begin.own):  # --dry-run without data
        has = {name: getattr(record.config, name) for name in DATA_FACTS if name not in said}
        data = replace(data, **has)
    config = complete(known, said, engine_flags, weights=begin.record, data=data)
    with reported_as(f"{config.name} cannot be built", ValueError):
        model = meta_model(config.model)
        names, buffers = model.state_dict().keys(), dict(model.named_buffers()).keys()
        if lost := buffers - names:
            expected = "expected True, so that a run can resume"
            raise ValueError(f"{min(lost)}: got a buffer with persistent=False, {expected}")
        if tied := names - buffers - dict(model.named_parameters()).keys():
            expected = "expected parameters and buffers of its own for every module"
            raise ValueError(f"{min(tied)}: got state that is tied to another, {expected}")
    if begin.weights is not None:
        notes += check_weights(config, begin.weights)
    # What a flag makes useless, such as --val-path the share of --val-share, is named as well.
    named = {*said} | (stored or {}).keys() - known.keys()
    return Plan(config=config, begin=begin, dataset=dataset, notes=notes,
                named={*follows, *(flags[name].field.name for name in named)})  # fmt: skip


def beginning_of(said: Layer) -> Beginning:
    """Reads the record or the weights that training begins from."""
    folder, source = named_run(said)
    own = newest_record(folder) if folder else None
    began = own.settings.get("run", {}) if own else {}  # how the run itself began
    weights, begins_anew = said.get("finetune"), began.get("finetune") != said.get("finetune")
    if source is not None and source == folder:
        if weights and begins_anew:
            raise UserError("--resume: cannot be combined with the --finetune of another run")
        if own is None and (steps := step_folders(folder)):
            read_record(steps[0])  # says why it cannot be read, such as a router of a plugin
        if own is None:
            raise UserError(
                f"--resume {folder}: got a run without a checkpoint, expected one; run the command "
                f"that began it again, or begin a new run: --config {folder / CONFIG_FILE}"
            )
        return Beginning(folder, own, own, resumes=True)
    if source is not None:
        if weights:
            raise UserError("--resume: cannot be combined with --finetune in a new run")
        begins_anew = str(began.get("resume")) != said["resume"]
        if is_step_folder(source):
            start = f"resume {sampled_digest(source / MODEL_FILE)}" if begins_anew else None
            return Beginning(folder, own, read_record(source), branch=source, start=start)
        if begins_anew:
            raise not_resumable(source)
        return Beginning(folder, own, own)  # the checkpoint was deleted after the branch had begun
    if weights and begins_anew:
        opened = open_weights(said)
        start = f"finetune {sampled_digest(opened.path)}"
        return Beginning(folder, own, opened.record, weights=opened, start=start)
    return Beginning(folder, own, own if weights else None)


def inputs_of(
    config: TrainConfig, dataset: Source, dist: Distributed
) -> tuple[dict[str, Any], Autoencoder | None]:
    """Returns the digests of images, autoencoder and features; and the autoencoder, if needed."""
    # One process reads the sizes of the files, which are slow to read on a shared file system.
    dataset.fingerprint = dist.broadcast(dataset.fingerprint if dist.is_main else None)
    digest, path, vae = dataset.vae_sha256, config.data.vae_path, None
    if digest is None or config.run.num_sample or path != dataset.vae_path:
        moved = f"the latents were made with {dataset.vae_path}; if it has moved, pass --vae-path"
        with nullcontext() if digest is None else reported_as(moved, UserError):
            dtype = DTYPES[config.step.precision]
            load = partial(load_autoencoder, path, dist.device, dtype, dataset.norm)
            vae = dist.on_main(load) or load()  # the main process first: it may have to download
            got = dist.broadcast(vae.weights_sha256)
        if digest not in (None, got):
            raise UserError(
                f"--vae-path: got {path}, whose weights have the digest {got[:12]}, expected the "
                f"digest {digest[:12]} of {dataset.vae_path}, which encoded the latents of "
                f"{config.data.latents_path}"
            )
        digest, dataset.norm = got, vae.norm
    facts = {"images": dataset.fingerprint, "vae_sha256": digest}
    facts["normalisation"] = str(dataset.norm)
    if dataset.norm.is_per_channel:
        facts["latents_norm_sha256"] = dataset.norm.sha256
    read = {split_condition(word)[0] for word in config.model.conditions}
    if read.union(*(one.needs for one in config.auxiliary)) & set(FEATURES):
        facts["features_sha256"] = dataset.features_sha256
    return facts, vae


def newest_intact(run: Path, found: list[Path], notes: list[str], dist: Distributed) -> Path:
    """Returns the newest intact checkpoint of a run; notes the damaged ones."""
    faults = []
    for folder in found:
        if (fault := find_fault(folder, dist)) is None:
            notes += faults
            return folder
        faults.append(f"skipped the checkpoint {folder}: {fault}")
    raise UserError(
        f"{run}: got no intact checkpoint: {'; '.join(faults)}; expected one: restore the damaged "
        "files from a copy, or start a new run with a different --run-name"
    )
