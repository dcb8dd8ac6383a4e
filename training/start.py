"""What a command trains: its config, data and weights, its folder, and where it starts.

run = specify_run(given, DDPFlags, choose_engine, open_dataset)
choose_start(run, dist)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints import Checkpoint, Record, read_record, step_folders
from checkpoints.adapting import adapt
from checkpoints.checkpoint import averages_of
from checkpoints.record import settings_of
from checkpoints.weights import sampled_digest
from latents.autoencoder import (
    DEFAULT_VAE,
    Autoencoder,
    LatentNorm,
    load_autoencoder,
    resolve_vae_path,
)
from latents.cache import CachedLatents
from latents.loading import BatchStream
from latents.sources import Batch, Source, open_images, same_images
from models import DiT
from parts import as_size
from runtime.errors import UserError
from runtime.flags import Flags, Given
from runtime.processes import Distributed
from training.config import (
    DATA_FACTS,
    DataConfig,
    DataFacts,
    TrainConfig,
    check_together,
    resolve,
    training_flags,
)
from training.engine import Engine, freeze
from training.given_weights import (
    began_there,
    check_weights,
    compare_latents,
    open_weights,
)
from training.log import RunLog
from training.manifest import find_fault
from training.run_folder import (
    RunLock,
    default_folder,
    differences,
    is_step_folder,
    named_run,
    read_run,
)

ChooseEngine = Callable[[TrainConfig], type[Engine]]
OpenData = Callable[[Given], tuple[Source | None, DataFacts, list[str]]]


@dataclass(kw_only=True)
class Run:
    """A run, filled in by `specify_run`, then `choose_start`, then `training.setup.open_run`."""

    config: TrainConfig
    given: Given  # the flags: of --resume RUN, its own under those of the command
    flags: Flags
    engine: type[Engine]
    dataset: Source | None  # None in a plan without data
    weights: Checkpoint | None  # those that it starts from, if any are given
    folder: Path | None  # None until a run without a name has one
    was: Given  # what config.yaml in the folder says; empty of a new run
    notes: list[str]  # lines for the user

    facts: dict[str, Any] | None = None  # what binds the run and is no flag
    state_folder: Path | None = None  # the step folder that it starts from, with full state
    start: Record | None = None  # of that, or of the weights
    origin: dict | None = None  # what the run's first weights were, if they were given

    stream: BatchStream | None = None  # from the first step that is left to the last
    vae: Autoencoder | None = None  # None: latents are cached and no samples drawn
    held_out: list[Batch] | None = None  # of --val-path or --val-share, with latents
    lock: RunLock | None = None  # on the main process: keeps other runs out as long as it lives
    log: RunLog | None = None

    def refuse_others(self) -> None:
        """Raises UserError where the folder's run was begun with other settings or facts."""
        now = settings_of(self.config.sections())
        unknown = {k: v for k, v in self.was.items() if k not in (*self.flags, *DATA_FACTS)}
        facts = unknown if self.facts is None else self.facts  # before they are found out
        if found := differences(self.was, now | facts, self.flags):
            raise UserError(f"{self.folder} was begun with other settings: {'; '.join(found)}")

    def record(self, step: int) -> Record:
        """The metadata of a step's checkpoint: the config, and facts that are no settings."""
        sections, dataset = self.config.sections(), self.dataset
        # Without an autoencoder it is that of the cache, whose folder need not be here.
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
    given: Given, engine_flags: type, choose_engine: ChooseEngine, open_data: OpenData
) -> Run:
    """Opens the data and the weights that the flags name, and resolves the flags.

    Raises UserError for flags, data or weights that do not fit together, and for settings that are
    not those of the run that the command names.
    """
    flags = training_flags(engine_flags)
    given, folder, was = named_run(given, flags)
    check_together(given, flags)
    weights = None
    if given.get("finetune") or given.get("resume"):
        weights = open_weights(given, folder, was)
    dataset, data, notes = open_data(given)
    config = resolve(given, engine_flags, weights=weights and weights.record, data=data)
    if weights is not None:
        notes = notes + check_weights(config, weights, given, flags)
    run = Run(
        config=config, given=given, flags=flags, engine=choose_engine(config), dataset=dataset,
        weights=weights, folder=folder, was=was, notes=notes,
    )  # fmt: skip
    if was:
        run.refuse_others()
    return run


def open_dataset(
    given: Given, dist: Distributed | None = None
) -> tuple[Source, DataFacts, list[str]]:
    """Opens --latents-path or --data-path; returns the source and what it says.

    dist: all processes call it together, and the main process alone lists the images
    """
    vae_path = given.get("vae_path")
    norm = given.get("latents_norm", DataConfig.latents_norm)
    if given.get("latents_path"):
        dataset: Source = CachedLatents(given["latents_path"], norm=norm)
    elif norm == "data":
        raise UserError("--latents-norm data: has no effect without --latents-path")
    elif given.get("data_path"):

        def list_images() -> Source:
            return open_images(given["data_path"], as_size(given.get("image_size", 256)))

        if dist and ":" not in given["data_path"]:  # files, and no dataset of another package
            dataset = dist.broadcast(dist.on_main(list_images))
        else:
            dataset = list_images()
    else:
        raise UserError("--data-path: images are required; pass this flag or --latents-path")
    input_size, in_channels = dataset.geometry(vae_path or DEFAULT_VAE)
    facts = DataFacts(
        num_classes=len(dataset.classes), input_size=input_size, in_channels=in_channels,
        image_size=dataset.image_size, can_flip=dataset.can_flip,
        shapes=dataset.shapes,
        vae_path=vae_path or dataset.vae_path or DEFAULT_VAE,
    )  # fmt: skip
    return dataset, facts, []


def choose_start(run: Run, dist: Distributed) -> None:
    """Starts from the run's newest whole checkpoint, else from --finetune or --resume, else anew.

    All processes call it. Raises UserError where the folder or the checkpoint is of another run.
    """
    config = run.config
    run.facts = facts_of(run, dist)
    if run.folder is None:
        run.folder = default_folder(config, run.given, run.facts)
        run.was = read_run(run.folder, run.flags)
    if run.was:
        run.refuse_others()
    if config.step.freezes:  # before there is a folder of a wrong pattern
        with torch.device("meta"):
            freeze(DiT(config.model), config.step)
    if run.weights is not None:
        run.notes += compare_latents(run.weights, run.facts["vae_sha256"], run.dataset.norm)
    if not find_newest(run, dist):
        if run.weights is not None:
            start_from_weights(run, dist)
        if run.was:
            run.notes.append(f"{run.folder} has no checkpoint yet: it begins as if it were new")
    if run.start is not None:
        compare_data(run)


def facts_of(run: Run, dist: Distributed) -> dict[str, Any]:
    """What decides the result and is no flag: script, images, autoencoder and first weights."""
    config, dataset, weights = run.config, run.dataset, run.weights
    # Reading the sizes of many files takes a while: one process does.
    dataset.listing = dist.broadcast(dataset.listing if dist.is_main else None)
    digest = dataset.vae_sha256
    if digest is None:

        def read_autoencoder() -> tuple[str, LatentNorm]:
            vae = load_autoencoder(config.data.vae_path, "cpu", torch.float32)
            return vae.weights_sha256, vae.norm

        digest, dataset.norm = dist.broadcast(dist.on_main(read_autoencoder))
    start = None
    if weights is not None:
        is_whole = config.run.resume and is_step_folder(Path(config.run.resume))
        kind = "finetune" if config.run.finetune else "resume" if is_whole else "weights"
        start = f"{kind} {sampled_digest(weights.path)}"
        if run.folder and began_there(run.given, run.was) and step_folders(run.folder):
            start = run.was.get("start")
    own = {"images": dataset.listing, "vae_sha256": digest, "start": start}
    if dataset.norm.is_per_channel:  # as no run had it before there was this setting
        own["latents_norm_sha256"] = dataset.norm.sha256
    return {**run.engine.check(config, dist), **own}


def find_newest(run: Run, dist: Distributed) -> bool:
    """Whether the run has a checkpoint that is as it was written: it starts from the newest one.

    Raises UserError when there are checkpoints and none is whole.
    """
    faults = []
    for folder in dist.broadcast(step_folders(run.folder)):
        if fault := find_fault(folder, dist):
            faults.append(f"passed over the checkpoint {folder}: {fault}")
            continue
        run.state_folder, run.start, run.weights = folder, read_record(folder), None
        run.origin = run.start.initialized_from
        run.notes += faults
        return True
    if faults:
        raise UserError(
            f"{run.folder}: got no whole checkpoint: {'; '.join(faults)}; expected one: restore a "
            "file from a copy, or start a new run with another --run-name"
        )
    return False


def start_from_weights(run: Run, dist: Distributed) -> None:
    """Takes the weights that a run is given, or the state of another run's checkpoint."""
    config, weights = run.config, run.weights
    run.start, run.origin = weights.record, weights.origin
    if config.run.finetune:
        classes, seed = run.dataset.classes, config.run.global_seed
        run.weights, notes = adapt(weights, config.model, classes, seed)
        run.notes += notes
        return
    step = Path(config.run.resume)
    if not is_step_folder(step):
        return
    if fault := find_fault(step, dist):
        raise UserError(f"--resume {step}: {fault}")
    if missing := {ema.name for ema in config.emas[1:]} - averages_of(step).keys():
        raise UserError(f"--ema: got {min(missing)}, expected those in {step}")
    now = settings_of(config.sections()) | run.facts
    if found := differences(run.start.values(), now, run.flags, ("branch",)):
        # The optimizer's state would be taken for that of another training.
        why = "its state is of another training (--finetune takes its weights only)"
        raise UserError(f"--resume {step}: {why}: {'; '.join(found)}")
    run.weights, run.state_folder, run.origin = None, step, run.start.initialized_from


def compare_data(run: Run) -> None:
    """Compares what a checkpoint says of its data with this command's; adds notes on it.

    Raises UserError when a run's own images are others now: their order would be another one.
    """
    stored, now, state_folder = run.start, run.facts["images"], run.state_folder
    if state_folder and stored.images and not same_images(stored.images, now):
        count = stored.images.get("count")
        change = (
            f"got {now['count']} images, expected the {count} that {state_folder} was trained on"
            f"{'' if count != now['count'] else ' (their names or sizes differ)'}"
        )
        if state_folder.parent.parent == run.folder:
            raise UserError(
                f"--data-path: {change}: put them back, or go on with these images as another run: "
                f"--resume {state_folder} --run-name NEW"
            )
        run.notes.append(f"note: {change}")
    share, wanted = stored.values().get("val_share", 0.0), run.config.data.val_share
    if stored.images == now and share < wanted:
        run.notes.append(
            f"note: --val-share {wanted:g} holds out images that the weights were trained on "
            f"before, under --val-share {share:g}"
        )
