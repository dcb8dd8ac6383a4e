"""What a command asks for, before any folder is made.

given, own = resumed_run(given, training_flags(DDPFlags))
spec = specify_run(given, own, DDPFlags, choose_engine, dist)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoints import Checkpoint
from conditions import CONDITIONS, split_condition
from latents.autoencoder import DEFAULT_VAE, LatentNorm, load_autoencoder
from latents.cache import CachedLatents
from latents.sources import Source, open_images
from runtime.errors import UserError
from runtime.flags import Flag, Given, layered
from runtime.processes import Distributed
from training.config import DataConfig, DataFacts, TrainConfig, resolve
from training.engine import Engine
from training.given_weights import check_weights, compare_latents, how_started, open_weights
from training.run_folder import begun_run, choose_run_folder, is_run_folder, read_flags

ChooseEngine = Callable[[TrainConfig], type[Engine]]


@dataclass(kw_only=True)
class RunSpec:
    """What a command asks for: what is trained, on what, and in which folder."""

    config: TrainConfig
    settings: dict  # what decides the result, as settings.json has it
    engine: type[Engine]
    micro_batch: int  # images of one micro-step of one process
    folder: Path
    dataset: Source
    weights: Checkpoint | None  # that --finetune or --resume names
    notes: list[str]  # lines for the user


def specify_run(
    given: Given, own: Path | None, engine_flags: type, choose_engine: ChooseEngine,
    dist: Distributed,
) -> RunSpec:  # fmt: skip
    """Finds what the flags ask for, and reads what it depends on; all processes call it together.

    own: the folder of the run, if the command names one; see `resumed_run`
    Raises UserError for flags, data or weights that do not fit together.
    """
    config = resolve(given, engine_flags)
    own, before = begun_run(config, own)
    weights = open_weights(config, own if before else None)
    dataset, facts, vae_sha256 = open_inputs(config.data, dist)
    config = resolve(given, engine_flags, weights=weights and weights.record, data=facts)
    config = with_widths(config, dataset)
    notes = []
    if weights is not None:
        notes = check_weights(config, weights) + compare_latents(weights, vae_sha256, dataset.norm)
    engine = choose_engine(config)
    settings = {
        **config.settings(), **engine.check(config, dist), "images": dataset.listing,
        "vae_sha256": vae_sha256, **how_started(config, weights, before),
    }  # fmt: skip
    if dataset.norm.is_per_channel:  # as no run had it before there was this setting
        settings["latents_norm_sha256"] = dataset.norm.sha256
    return RunSpec(
        config=config, settings=settings, engine=engine, dataset=dataset, weights=weights,
        micro_batch=engine.micro_batch(config, dist.world_size),
        folder=own or choose_run_folder(config, settings), notes=notes,
    )  # fmt: skip


def with_widths(config: TrainConfig, dataset: Source) -> TrainConfig:
    """The config whose conditions have the widths that the data has: "vector" becomes "vector:768".

    UserError for a condition of which the data says nothing, or another width.
    """
    words = config.model.conditions
    if set(words) <= {"label"}:  # which all data has
        return config
    item, _ = dataset[0, False]
    fitted = []
    for name, width in map(split_condition, words):
        kind = CONDITIONS[name]
        if kind.in_batch and name not in item:
            known = ", ".join(sorted(item.keys() & CONDITIONS.keys()))
            raise UserError(f"--conditions: got {name}, but the data has only {known}")
        if kind.has_width and width not in (None, has := len(item[name])):
            raise UserError(
                f"--conditions: got {name}:{width}, expected {name}:{has} as in the data"
            )
        fitted.append(f"{name}:{len(item[name])}" if kind.has_width else name)
    return replace(config, model=replace(config.model, conditions=tuple(fitted)))


def resumed_run(given: Given, flags: dict[str, Flag]) -> tuple[Given, Path | None]:
    """The run folder that --resume names, None for what else it may name.

    Its flags are then those of the command that began the run, under those of this one.
    """
    run = Path(given.get("resume") or "")
    if not given.get("resume") or not is_run_folder(run):
        return given, None
    named = Path(given.get("results_dir", run.parent), given.get("run_name", run.resolve().name))
    if named.resolve() != run.resolve():
        other = f"--resume {run}/checkpoints/STEP --run-name NEW"
        raise UserError(f"--resume {run}: got {named}, expected that run (another one: {other})")
    now = {name: value for name, value in given.items() if name != "resume"}
    merged = layered(read_flags(run), now, flags)
    if "data_path" in given or "latents_path" in given:  # either stands for both
        for name in {"data_path", "latents_path"} - given.keys():
            merged.pop(name, None)
    return merged, run


def open_inputs(data: DataConfig, dist: Distributed) -> tuple[Source, DataFacts, str]:
    """Opens --latents-path or --data-path: the source with the `norm` of its latents, facts about
    it, and the digest of the autoencoder's weights."""
    if data.latents_path is None and data.data_path is None:
        raise UserError(
            "--data-path: got nothing, expected a folder of class folders, or --latents-path"
        )
    dataset, facts = open_dataset(data)
    # Reading the sizes of many files takes a while: one process does.
    dataset.listing = dist.broadcast(dataset.listing if dist.is_main else None)
    digest = dataset.vae_sha256
    if digest is None:

        def read_autoencoder() -> tuple[str, LatentNorm]:
            vae = load_autoencoder(facts.vae_path, "cpu", torch.float32)
            return vae.weights_sha256, vae.norm

        digest, dataset.norm = dist.broadcast(dist.on_main(read_autoencoder))
    return dataset, facts, digest


def open_dataset(data: DataConfig) -> tuple[Source, DataFacts]:
    """Opens the images or latents that flags name."""
    if data.latents_path is None:
        if data.latents_norm == "data":
            raise UserError("--latents-norm data: has no effect without --latents-path")
        dataset: Source = open_images(data.data_path, data.image_size or 256)
    else:
        dataset = CachedLatents(data.latents_path, norm=data.latents_norm)
    input_size, in_channels = dataset.geometry(data.vae_path or DEFAULT_VAE)
    facts = DataFacts(
        num_classes=len(dataset.classes), input_size=input_size, in_channels=in_channels,
        image_size=dataset.image_size, can_flip=dataset.can_flip,
        vae_path=data.vae_path or dataset.vae_path or DEFAULT_VAE,
    )  # fmt: skip
    return dataset, facts
