"""Weights that a command names to start from, by --finetune or --resume.

source = open_weights(given, folder, was)
notes = check_weights(config, source, given, flags)
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from checkpoints import Checkpoint, config_of, read_checkpoint, step_folders
from checkpoints.adapting import ADAPTED, upcycled_config
from latents.autoencoder import LatentNorm
from models import DiT, DiTConfig
from runtime.errors import UserError, check_same
from runtime.flags import Flags, Given, spelling
from training.config import PresetConfig, TrainConfig
from training.run_folder import differences


def open_weights(given: Given, folder: Path | None, was: Given) -> Checkpoint:
    """Reads what --finetune or --resume names.

    A run that began there and has checkpoints is read instead, whatever became of the weights.
    """
    flag = "finetune" if given.get("finetune") else "resume"
    path, named = given.get(flag), given.get("model")
    if folder and began_there(given, was) and step_folders(folder):
        with suppress(UserError):  # none is whole
            return read_checkpoint(folder)
    preset = config_of(named or PresetConfig.model).flat() | given
    names = ("num_heads", "num_experts_per_tok")  # of which a published file says nothing
    known = {"num_heads", *given} if named else given.keys()
    hints = {name: preset[name] for name in names if name in known or flag == "resume"}
    if given.get("objective") == "gaussian":  # a DiffMoE's file does not say
        hints["objective"] = "gaussian"
    try:
        source = read_checkpoint(path, hints).in_full_precision()
    except UserError as error:
        raise UserError(f"{spelling(flag)} {error}") from None
    if named is not None:
        sizes = ("hidden_size", "depth", "patch_size")
        got, has = ({spelling(n): of[n] for n in sizes} for of in (preset, source.config.flat()))
        check_same(f"--model {named}: {path} is another model", got, has)
    return source


def began_there(given: Given, was: Given) -> bool:
    """Whether a run was begun from the weights that these flags name."""
    return all(given.get(name) == was.get(name) for name in ("finetune", "resume"))


def check_weights(config: TrainConfig, source: Checkpoint, given: Given, flags: Flags) -> list[str]:
    """Checks that a run can start from these weights; returns notes on what the flags change.

    A flag that changes the function but no weight is obeyed. UserError, with the flags, for another
    model than the weights are.
    """
    path, before, model = source.path, source.config, config.model
    if config.run.resume:
        if found := differences(before.flat(), model.flat(), flags, ("branch",)):
            raise UserError(f"--resume {path}: another model: {'; '.join(found)}")
        return []
    if model.in_channels != before.in_channels:
        raise UserError(
            f"--vae-path: got {model.in_channels} latent channels, expected {before.in_channels} "
            f"as in {path}"
        )
    is_upcycled = before.num_experts == 0 and model.num_experts > 0
    if is_upcycled:  # by `adapt`
        before = upcycled_config(
            before, num_experts=model.num_experts, num_experts_per_tok=model.num_experts_per_tok,
            n_shared_experts=model.n_shared_experts, layers=model.sparse_layers,
        )  # fmt: skip
    own = replace(before, input_size=model.input_size, num_classes=model.num_classes,
                  class_dropout_prob=model.class_dropout_prob,
                  conditions=model.conditions)  # fmt: skip
    was = own.flat()
    now = {k: v for k, v in model.flat().items() if k in given and was.get(k) != v}
    if weight_shapes(model) != weight_shapes(own):
        found = differences({name: was.get(name) for name in now}, now, flags)
        reasons = "; ".join(found) or "its weights are not those of this model"
        raise UserError(f"--finetune: {path} is another model: {reasons}")
    kept = "the dense model's function has" if is_upcycled else f"{path} was trained with"
    not_noted = ("expert_backend", "aux_loss_alpha" if is_upcycled else None)
    return [
        f"note: {spelling(name)} {value}, but {kept} {was.get(name)}"
        for name, value in now.items()
        if name not in not_noted
    ]


def compare_latents(source: Checkpoint, vae_sha256: str, norm: LatentNorm) -> list[str]:
    """Notes on latents that differ from the latents that a run's first weights were trained on."""
    record, notes = source.record, []
    if (before := record.vae_sha256) not in (None, vae_sha256):
        notes.append(
            f"note: the latents are of an autoencoder with weights {vae_sha256[:12]}, but "
            f"{source.path} was trained with {before[:12]}"
        )
    if (before := record.norm) not in (None, norm):
        notes.append(
            f"note: the latents are normalised by {norm}, but {source.path} was trained with "
            f"{before}"
        )
    return notes


def weight_shapes(config: DiTConfig) -> dict[str, torch.Size]:
    """The shapes of all weights but those that `adapt` makes anew."""
    with torch.device("meta"):
        state_dict = DiT(config).state_dict()
    return {name: value.shape for name, value in state_dict.items() if name not in ADAPTED}
