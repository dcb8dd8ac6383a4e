"""The specification of a run: config, data, weights, run folder, and the start of training.

run = specify_run(user_flags, DDPFlags, choose_engine, open_dataset)
choose_start(run, dist)
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from checkpoints import Checkpoint, Record, config_of, read_checkpoint, read_record, step_folders
from checkpoints.adapting import ADAPTED, adapt
from checkpoints.checkpoint import averages_of
from checkpoints.record import settings_of
from checkpoints.weights import sampled_digest
from conditions import split_condition
from latents.autoencoder import Autoencoder, load_autoencoder, resolve_vae_path
from latents.cache import FEATURES
from latents.loading import BatchStream
from latents.sources import Batch, Source
from models import DiT, DiTConfig
from runtime.devices import DTYPES
from runtime.errors import UserError, check_same, reported_as
from runtime.flags import Flags, FlagValues, spelling
from runtime.processes import Distributed
from training.config import (
    DATA_FACTS,
    DataFacts,
    TrainConfig,
    check_together,
    resolve,
    training_flags,
)
from training.engine import Engine, freeze
from training.log import RunLog
from training.manifest import find_fault
from training.run_folder import (
    DATA,
    default_folder,
    differences,
    is_step_folder,
    named_run,
    newest_record,
    stored_values,
    unknown_settings,
)

ChooseEngine = Callable[[TrainConfig], type[Engine]]
OpenData = Callable[[FlagValues], tuple[Source | None, DataFacts]]


@dataclass(kw_only=True)
class Run:
    """A run, filled by `specify_run`, then `choose_start`, then `training.setup.prepare_run`."""

    config: TrainConfig
    user_flags: FlagValues  # for --resume RUN, with the stored flags of the run
    flags: Flags
    engine: type[Engine]
    dataset: Source | None  # None with --dry-run, if the data are not on this machine
    weights: Checkpoint | None  # the weights that the flags name, until a checkpoint replaces them
    folder: Path | None  # for a run without a name: None until `choose_start`
    was: FlagValues  # settings and facts of the newest checkpoint in the folder, if any
    notes: list[str]  # lines for the user

    facts: dict[str, Any] = field(default_factory=dict)  # inputs besides the flags, see `facts_of`
    found: list[Path] = field(default_factory=list)  # step folders of the run, newest first
    state_folder: Path | None = None  # step folder with the full state that the run starts from
    start: Record | None = None  # record of the state folder or of the weights
    origin: dict | None = None  # provenance of the weights that training began from, if any

    stream: BatchStream | None = None  # the remaining steps
    # None if the latents are cached, the run draws no grids, and the path of the autoencoder is the
    # path that the cache records.
    vae: Autoencoder | None = None
    held_out: list[Batch] | None = None  # latents of --val-path or --val-share
    lock: BinaryIO | None = None  # on the main process; keeps other runs out of the folder
    log: RunLog | None = None

    def values(self) -> FlagValues:
        """Returns the settings and, after `choose_start` has found them, the facts of the run."""
        facts = self.facts and self.facts | {"normalisation": str(self.dataset.norm)}
        return settings_of(self.config.sections()) | facts

    def refuse_others(self, was: FlagValues) -> None:
        """Raises UserError if the checkpoint of the run has other settings or facts.

        was: settings and facts of the checkpoint; settings only, before `facts_of`
        """
        if not (was and (found := differences(was, self.values(), self.flags))):
            return
        separate = "or a new run (--run-name NEW, without --resume)"
        if not differences(was, self.values(), self.flags, ("branch",)):
            step = self.state_folder or step_folders(self.folder)[0]
            separate += f", or a branch (--resume {step} --run-name NEW)"
        raise UserError(
            f"{self.folder} was created with other settings: {'; '.join(found)}; expected the same "
            f"settings, {separate}"
        )

    def record(self, step: int) -> Record:
        """Returns the metadata of the checkpoint of a step: the config and the facts."""
        sections, dataset = self.config.sections(), self.dataset
        # The autoencoder of a cache may not exist on this machine, so its path is not resolved.
        vae_path = dataset.vae_path
        if self.vae is not None:
            vae_path = resolve_vae_path(self.config.data.vae_path)
        sections["data"]["vae_path"] = vae_path
        facts = dict(self.facts)
        typed = {name: facts.pop(name) for name in ("images", "vae_sha256")}
        return Record.from_dict({
            "config": sections, "facts": facts, **typed, "step": step,
            "class_names": dataset.classes, "initialized_from": self.origin,
            "micro_batch": self.stream.micro_batch, "latents_norm": dataset.norm.to_dict(),
        })  # fmt: skip


def specify_run(
    user_flags: FlagValues, engine_flags: type, choose_engine: ChooseEngine, open_data: OpenData
) -> Run:
    """Opens the data and the weights that the flags name, and resolves the flags.

    Raises UserError if flags, data and weights do not fit together, or if the settings differ from
    the stored settings of the run that the command names.
    """
    flags = training_flags(engine_flags)
    user_flags, folder, notes = named_run(user_flags, flags)
    # This check runs before weights and data are read. It leaves out options of components, which
    # `resolve` checks.
    plain = {name: value for name, value in user_flags.items() if not flags[name].belongs_to}
    check_together(plain, user_flags, flags)
    stored = folder and newest_record(folder)
    was, weights, record = stored_values(stored, flags), None, None
    if user_flags.get("finetune") or user_flags.get("resume"):
        # If the run began from these weights, use the record of its newest checkpoint, because the
        # weights may no longer exist.
        record = stored
        if not was or any(user_flags.get(n) != was.get(n) for n in ("finetune", "resume")):
            weights = open_weights(user_flags)
            record = weights.record
    dataset, data = open_data(user_flags)
    if dataset is None:  # --dry-run without data: use classes and latent shape of run or weights
        known = (stored or record).config.flat() if stored or record else {}
        names = [name for name in DATA_FACTS if name in known and name not in user_flags]
        data = replace(data, **{name: known[name] for name in names})
    config = resolve(user_flags, engine_flags, weights=record, data=data)
    notes += data.notes
    if weights is not None:
        notes += check_weights(config, weights, flags)
    run = Run(
        config=config, user_flags=user_flags, flags=flags, engine=choose_engine(config),
        dataset=dataset, weights=weights, folder=folder, was=was, notes=notes,
    )  # fmt: skip
    run.refuse_others({k: v for k, v in was.items() if k in flags and k not in stored.facts})
    return run


def open_weights(user_flags: FlagValues) -> Checkpoint:
    """Reads the weights that --finetune or, for a branch, --resume names."""
    flag = "finetune" if user_flags.get("finetune") else "resume"
    path, named = user_flags.get(flag), user_flags.get("model")
    if flag == "resume" and not is_step_folder(Path(path)):
        expected = "a run folder or RUN/checkpoints/STEP"
        raise UserError(
            f"--resume: got {path}, expected {expected}; to start from weights: --finetune {path}"
        )
    # Published files do not record these fields.
    names = ("num_heads", "num_experts_per_tok")
    hints = {name: user_flags[name] for name in names if name in user_flags}
    # DiffMoE's files do not record the objective. Without this hint they are read as a flow.
    if user_flags.get("objective") == "gaussian":
        hints["objective"] = "gaussian"
    try:
        source = read_checkpoint(path, hints).in_full_precision()
    except UserError as error:
        raise UserError(f"{spelling(flag)} {error}") from None
    if named is not None:
        sizes, preset = ("hidden_size", "depth", "patch_size"), config_of(named).flat() | user_flags
        got, has = ({spelling(n): of[n] for n in sizes} for of in (preset, source.config.flat()))
        check_same(f"--model {named}: {path} is a different model", got, has)
    if flag == "finetune" and user_flags.get("num_experts") and not source.config.num_experts:
        raise UserError(
            f"--num-experts: got {user_flags['num_experts']}, but {path} is a dense model; first "
            "add experts: python upcycle.py --ckpt WEIGHTS --num_experts N --output FOLDER, then "
            "train: --finetune FOLDER"
        )
    return source


def check_weights(config: TrainConfig, source: Checkpoint, flags: Flags) -> list[str]:
    """Checks that a run can start from these weights; returns a note on what the flags change.

    The flags may not change a field of the model whose `Option.binds` is "branch". With --finetune,
    they may, unless this changes the shape of a weight that `adapt` does not replace.
    """
    model, before, kind = config.model, source.config, "resume"
    if config.run.finetune:
        adapted = ("class_dropout_prob", "conditions", "num_classes", "input_size")
        kind = "finetune"
        before = replace(before, **{name: getattr(model, name) for name in adapted})
    was, now = before.flat(), model.flat()
    if config.run.finetune and source.record.objective:
        was["objective"], now["objective"] = source.record.objective, config.step.objective
    found = "; ".join(differences(was, now, flags, ("branch",)))
    if found and (kind == "resume" or weight_shapes(model) != weight_shapes(before)):
        raise UserError(f"--{kind}: {source.path} is a different model: {found}")
    return [f"{source.path} was trained with other settings: {found}"] if found else []


def weight_shapes(config: DiTConfig) -> dict[str, torch.Size]:
    """Returns the shapes of all weights, except of the weights that `adapt` replaces."""
    with torch.device("meta"):
        state_dict = DiT(config).state_dict()
    return {name: value.shape for name, value in state_dict.items() if name not in ADAPTED}


def frozen_names(config: TrainConfig) -> list[str]:
    """Returns the names of the parameters that --freeze and --train-router-only freeze."""
    with torch.device("meta"):
        model = DiT(config.model)
    freeze(model, config.step)
    return [name for name, weight in model.named_parameters() if not weight.requires_grad]


def choose_start(run: Run, dist: Distributed) -> None:
    """Chooses the start: the newest intact checkpoint of the run. A run without checkpoints starts
    from the weights or the state that --finetune or --resume names, or from initial weights.

    All processes call it together. Raises UserError if the folder or the checkpoint belongs to a
    different run, or if the run has checkpoints but all are damaged.
    """
    config = run.config
    run.facts = facts_of(run, dist)
    if run.folder is None:
        run.folder = default_folder(config, run.user_flags, run.facts)
    if config.step.freezes:
        frozen_names(config)  # checks the patterns before the run folder is created
    faults = []
    run.found = dist.broadcast(step_folders(run.folder))
    for folder in run.found:
        if (fault := find_fault(folder, dist)) is None:
            run.state_folder, run.start, run.weights = folder, read_record(folder), None
            run.origin = run.start.initialized_from
            break
        faults.append(f"skipped the checkpoint {folder}: {fault}")
    run.was = stored_values(run.start, run.flags)
    run.refuse_others(run.was)
    if run.state_folder:
        run.notes += faults
        run.notes += unknown_settings(
            settings_of(run.start.sections()), run.flags, run.state_folder
        )
        return
    if faults:
        raise UserError(
            f"{run.folder}: got no intact checkpoint: {'; '.join(faults)}; expected one: restore "
            "the damaged files from a copy, or start a new run with a different --run-name"
        )
    if run.weights is not None:
        start_from_weights(run, dist)
    if os.path.isdir(run.folder):
        step = run.start.step if run.state_folder else 0
        run.notes.append(f"{run.folder} has no checkpoint yet: training starts at step {step}")


def facts_of(run: Run, dist: Distributed) -> dict[str, Any]:
    """Returns the inputs besides the flags: script, images, autoencoder, features and weights.

    Also loads the autoencoder into `run.vae`, if the run needs one.
    """
    config, dataset, weights = run.config, run.dataset, run.weights
    # One process reads the sizes of the files, which are slow to read on a shared file system.
    dataset.fingerprint = dist.broadcast(dataset.fingerprint if dist.is_main else None)
    digest, path = dataset.vae_sha256, config.data.vae_path
    if digest is None or config.run.num_sample or path != dataset.vae_path:
        moved = f"the latents were made with {dataset.vae_path}; if it has moved, pass --vae-path"
        with nullcontext() if digest is None else reported_as(moved, UserError):
            vae = dist.on_main(partial(load_autoencoder, path, "cpu", torch.float32))
            got, norm = dist.broadcast(vae and (vae.weights_sha256, vae.norm))
        if digest not in (None, got):
            raise UserError(
                f"--vae-path: got {path}, whose weights have the digest {got[:12]}, expected the "
                f"digest {digest[:12]} of {dataset.vae_path}, which encoded the latents of "
                f"{config.data.latents_path}"
            )
        digest, dataset.norm = got, dataset.norm or norm
        run.vae = load_autoencoder(path, dist.device, DTYPES[config.step.precision], dataset.norm)
    start = None
    if weights is None and (config.run.finetune or config.run.resume):
        start = run.was.get("start")  # a checkpoint of the run was read, not the weights
    elif weights is not None:
        kind = "finetune" if config.run.finetune else "resume"
        start = f"{kind} {sampled_digest(weights.path)}"
    inputs = {"images": dataset.fingerprint, "vae_sha256": digest, "start": start}
    if dataset.norm.is_per_channel:  # omitted otherwise, as in runs older than this setting
        inputs["latents_norm_sha256"] = dataset.norm.sha256
    read = {split_condition(word)[0] for word in config.model.conditions}
    if read.union(*(one.needs for one in config.auxiliary)) & set(FEATURES):
        inputs["features_sha256"] = dataset.features_sha256
    return {**run.engine.check(config, dist), **inputs}


def start_from_weights(run: Run, dist: Distributed) -> None:
    """Starts from the weights that the flags name, or from the state of a different run.

    Adds notes if the data differ from the data that the weights were trained on.
    """
    config, weights, now = run.config, run.weights, run.values()
    start = run.start = weights.record
    run.origin = weights.origin
    has_state, step = now["start"].startswith("resume"), Path(config.run.resume or "")
    was = stored_values(start, run.flags if has_state else {})
    names = DATA if has_state else DATA[1:]  # fine-tuning usually uses other images
    if found := differences({n: was[n] for n in names}, {n: now[n] for n in names}, {}):
        run.notes.append(f"{weights.path} was trained on other data: {'; '.join(found)}")
    share, wanted = settings_of(start.settings).get("val_share", 0.0), config.data.val_share
    if start.images == now["images"] and share < wanted:
        run.notes.append(
            f"--val-share {wanted:g} holds out images that {weights.path} was trained on, because "
            f"{weights.path} was trained with --val-share {share:g}"
        )
    if config.run.finetune:
        classes, seed = run.dataset.classes, config.run.global_seed
        run.weights, notes = adapt(weights, config.model, classes, seed)
        run.notes += notes
        if config.step.freezes:
            run.notes += [
                f"{name} is new and frozen, so it does not learn"
                for name in frozen_names(config)
                if run.weights.state_dict[name] is not weights.state_dict.get(name)
            ]
    if not has_state:
        return
    if fault := find_fault(step, dist):
        raise UserError(f"--resume {step}: {fault}")
    stored, (first, *others) = averages_of(step), (ema.name for ema in config.emas)
    if missing := set(others) - stored.keys():
        raise UserError(f"--ema: got {min(missing)}, expected an EMA that {step} has")
    if stored and first not in stored:
        run.notes.append(f"EMA {first} starts from the average {next(iter(stored))} of {step}")
    if found := differences(was, now, run.flags, ("branch",)):
        # The stored state of the optimizer belongs to different parameters or settings.
        why = f"the state was saved with other settings: {'; '.join(found)}"
        raise UserError(f"--resume {step}: {why}; --finetune starts from the weights only")
    run.weights, run.state_folder, run.origin = None, step, start.initialized_from
