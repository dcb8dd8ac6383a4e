"""--finetune: the weights that a run starts from."""

import os
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from checkpoints import Checkpoint, Record, read_checkpoint
from checkpoints.adapting import adapt
from checkpoints.meta import meta_model
from checkpoints.weights import shapes_of
from latents.sources import Source, same_images
from models import MEANINGS, WITHOUT_EFFECT
from options.settings import Settings, difference, differences
from runtime.errors import UserError, reported_as
from training.config import TrainConfig, sizes_of
from training.engine import frozen_names


def open_weights(path: str, said: Settings) -> Checkpoint:
    """Reads the weights that --finetune names."""
    # Published files do not record these fields.
    names = ("num_heads", "num_experts_per_tok")
    known = (sizes_of(said["model"]) if "model" in said else {}) | said
    hints = {name: known[name] for name in names if name in known}
    # DiffMoE's files do not record the objective. Without this hint they are read as a flow.
    if "objective" in said and said["objective"].name == "gaussian":
        hints["objective"] = "gaussian"
    try:
        source = read_checkpoint(path, hints).in_full_precision()
    except UserError as error:
        raise UserError(f"--finetune {error}") from None
    vae_path = source.record.vae_path or ""
    is_needed = not (said.get("latents_path") or said.get("vae_path"))
    if is_needed and os.path.isabs(vae_path) and not os.path.isdir(vae_path):
        was = f"the weights were trained with the autoencoder {vae_path}"
        raise UserError(f"--finetune: {was}, which does not exist; pass --vae-path")
    if said.get("num_experts") and not source.config.num_experts:
        raise UserError(
            f"--num-experts: got {said['num_experts']}, but {path} is a dense model; first add "
            "experts: python upcycle.py --ckpt WEIGHTS --num_experts N --output FOLDER, then "
            "train: --finetune FOLDER"
        )
    return source


def check_source(config: TrainConfig, source: Checkpoint) -> list[str]:
    """Checks that a run can start from these weights; returns a note on what the flags change.

    The flags may add weights, but not remove or reshape one that `adapt` does not replace.
    """
    adapted = ("class_dropout_prob", "conditions", "num_classes", "input_size")
    found = [
        line
        for name, line in differences(source.config, config.model, MEANINGS)
        if name not in (*adapted, *WITHOUT_EFFECT)
    ]
    was, now = source.record.objective, config.step.objective
    if was and was.name != now.name:
        found.append(difference("objective", was.name, now.name))
    if not found:
        return []
    message = f"--finetune: {source.path} is a different model"
    kept = {name: getattr(source.config, name) for name in (*adapted, "absolute_positions")}
    with reported_as(message, ValueError):
        after = meta_model(replace(config.model, **kept))
    if not shapes_of(source.state_dict).items() <= shapes_of(after.state_dict()).items():
        raise UserError(f"{message}: {'; '.join(found)}")
    return [f"{source.path} was trained with other settings: {'; '.join(found)}"]


def start_weights(
    weights: Checkpoint, config: TrainConfig, dataset: Source
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapts the weights of --finetune to the config; returns them, and notes on what is new."""
    adapted, more = adapt(weights, config.model, dataset.classes, config.run.global_seed)
    more += [
        f"{name} is frozen, but not as in {weights.path}"
        for name in frozen_names(meta_model(config.model), config.step)
        if adapted.state_dict[name] is not weights.state_dict.get(name)
    ]
    return adapted.state_dict, more


def weights_notes(source: Checkpoint, record: Record) -> list[str]:
    """Returns notes if the latents differ from those that the weights were trained on, or if images
    are held out that they were trained on.

    record: of the run
    """
    notes, path, before = [], source.path, source.record
    if found := latent_changes(before, record):
        notes.append(f"{path} was trained on other latents: {'; '.join(found)}")
    return notes + held_out_notes(path, before, record)


def held_out_notes(path: str | Path, before: Record, now: Record) -> list[str]:
    """Returns a note if a run holds out images that the weights at `path` were trained on."""
    share, wanted = (one.settings.get("val_share", 0.0) for one in (before, now))
    if share >= wanted or not same_images(before.images, now.images):
        return []
    return [
        f"--val-share {wanted:g} holds out images that {path} was trained on, because {path} "
        f"was trained with --val-share {share:g}"
    ]


def latent_changes(was: Record, now: Record) -> list[str]:
    """Returns lines on the autoencoder and the normalisation that differ."""
    lines, digests = [], (was.vae_sha256, now.vae_sha256)
    if None not in digests and was.vae_sha256 != now.vae_sha256:
        lines.append("the autoencoder: was {:.12}, is {:.12}".format(*digests))
    if was.norm and was.norm != now.norm:
        lines.append(f"the normalisation of latents: was {was.norm}, is {now.norm}")
    return lines
