"""--finetune: the weights that a run starts from."""

import os
from dataclasses import replace
from typing import Any

from checkpoints import Checkpoint, config_of, read_checkpoint
from checkpoints.adapting import adapt
from checkpoints.meta import meta_model
from checkpoints.weights import shapes_of
from latents.sources import Source, same_images
from options.settings import Layer, differences, flat, spelling
from runtime.errors import UserError, check_same, reported_as
from training.changes import difference, fact_differences
from training.config import TrainConfig
from training.engine import frozen_names


def open_weights(said: Layer) -> Checkpoint:
    """Reads the weights that --finetune names."""
    path, named = said["finetune"], said.get("model")
    # Published files do not record these fields.
    names = ("num_heads", "num_experts_per_tok")
    hints = {name: said[name] for name in names if name in said}
    # DiffMoE's files do not record the objective. Without this hint they are read as a flow.
    if said.get("objective") == "gaussian":
        hints["objective"] = "gaussian"
    try:
        source = read_checkpoint(path, hints).in_full_precision()
    except UserError as error:
        raise UserError(f"--finetune {error}") from None
    vae_path = source.record.vae_path or ""
    is_needed = not {"latents_path", "vae_path"} & said.keys()
    if is_needed and os.path.isabs(vae_path) and not os.path.isdir(vae_path):
        was = f"the weights were trained with the autoencoder {vae_path}"
        raise UserError(f"--finetune: {was}, which does not exist; pass --vae-path")
    if named is not None:
        sizes, preset = ("hidden_size", "depth", "patch_size"), flat(config_of(named)) | said
        got, has = ({spelling(n): of[n] for n in sizes} for of in (preset, flat(source.config)))
        check_same(f"--model {named}: {path} is a different model", got, has)
    if said.get("num_experts") and not source.config.num_experts:
        raise UserError(
            f"--num-experts: got {said['num_experts']}, but {path} is a dense model; first add "
            "experts: python upcycle.py --ckpt WEIGHTS --num_experts N --output FOLDER, then "
            "train: --finetune FOLDER"
        )
    return source


def check_weights(config: TrainConfig, source: Checkpoint) -> list[str]:
    """Checks that a run can start from these weights; returns a note on what the flags change.

    The flags may not change the shape of a weight that `adapt` does not replace.
    """
    adapted = ("class_dropout_prob", "conditions", "num_classes", "input_size")
    found = [
        difference(name, was, now)
        for name, flag, was, now in differences(source.config, config.model)
        if flag.change == "state" and name not in adapted
    ]
    if source.record.objective not in (None, config.step.objective.name):
        found.append(difference("objective", source.record.objective, config.step.objective.name))
    if not found:
        return []
    message = f"--finetune: {source.path} is a different model"
    kept = {name: getattr(source.config, name) for name in (*adapted, "absolute_positions")}
    with reported_as(message, ValueError):
        after = meta_model(replace(config.model, **kept))
    if shapes_of(after.state_dict()) != shapes_of(source.state_dict):
        raise UserError(f"{message}: {'; '.join(found)}")
    return [f"{source.path} was trained with other settings: {'; '.join(found)}"]


def start_weights(
    weights: Checkpoint, config: TrainConfig, dataset: Source, notes: list[str]
) -> Checkpoint:
    """Adapts the weights of --finetune to the config, and adds notes on what is new."""
    adapted, more = adapt(weights, config.model, dataset.classes, config.run.global_seed)
    notes += more
    notes += [
        f"{name} is new and frozen, so it does not learn"
        for name in frozen_names(meta_model(config.model), config.step)
        if adapted.state_dict[name] is not weights.state_dict.get(name)
    ]
    return adapted


def data_notes(source: Checkpoint, config: TrainConfig, facts: dict[str, Any]) -> list[str]:
    """Returns notes if autoencoder or normalisation differ from those that the weights were trained
    with, or if images are held out that they were trained on."""
    notes, path, before = [], source.path, source.record
    latents = {name: facts[name] for name in ("vae_sha256", "normalisation")}
    if found := [line for _, line in fact_differences(before, latents)]:
        notes.append(f"{path} was trained on other data: {'; '.join(found)}")
    share, wanted = before.settings.get("data", {}).get("val_share", 0.0), config.data.val_share
    if before.images and same_images(before.images, facts["images"]) and share < wanted:
        notes.append(
            f"--val-share {wanted:g} holds out images that {path} was trained on, because {path} "
            f"was trained with --val-share {share:g}"
        )
    return notes
