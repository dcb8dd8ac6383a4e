"""Weights that a command names to start from, by --finetune or --resume.

source = open_weights(config, own_folder)          # None without any
notes = check_weights(config, source)
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from checkpoints import Checkpoint, config_of, read_checkpoint
from checkpoints.adapting import ADAPTED, upcycled_config
from checkpoints.weights import sampled_digest
from latents.autoencoder import LatentNorm
from models import DiT, DiTConfig
from runtime.errors import UserError, check_same
from runtime.flags import spelling
from training.config import TrainConfig
from training.run_folder import is_step_folder


def open_weights(config: TrainConfig, own: Path | None) -> Checkpoint | None:
    """Reads what --finetune or --resume names, None without them.

    own: the folder of a run that goes on: it is read, whatever became of the weights
    """
    path = config.run.finetune or config.run.resume
    if path is None:
        return None
    if own is not None:
        with suppress(UserError):  # none is whole
            return read_checkpoint(own)
    named = config.given.get("model")
    known = {"num_heads", *config.given} if named else config.given.keys()
    names = ("num_heads", "num_experts_per_tok")  # of which a published file says nothing
    names = [name for name in names if name in known or config.run.resume]
    hints = {name: config.given.get(name, getattr(config.model, name)) for name in names}
    if config.given.get("objective") == "gaussian":  # a DiffMoE's file does not say
        hints["objective"] = "gaussian"
    try:
        source = read_checkpoint(path, hints).in_full_precision()
    except UserError as error:
        flag = "--finetune" if config.run.finetune else "--resume"
        raise UserError(f"{flag} {error}") from None
    if named is not None:
        preset = config_of(named).flat() | config.given
        sizes = ("hidden_size", "depth", "patch_size")
        got, has = ({spelling(n): of[n] for n in sizes} for of in (preset, source.config.flat()))
        check_same(f"--model {named}: {path} is another model", got, has)
    return source


def how_started(config: TrainConfig, source: Checkpoint | None, before: dict | None) -> dict:
    """How a run starts, as settings: from which weights, by their digest, and what of them it uses.

    before: what a run that goes on was begun with
    """
    if source is None:
        return {"start": None, "started_from": None}
    if before is not None:
        return {name: before["settings"].get(name) for name in ("start", "started_from")}
    is_whole = config.run.resume and is_step_folder(Path(config.run.resume))
    start = "finetune" if config.run.finetune else "resume" if is_whole else "weights"
    return {"start": start, "started_from": sampled_digest(source.path)}


def check_weights(config: TrainConfig, source: Checkpoint) -> list[str]:
    """Checks that a run can start from these weights; returns notes on what the flags change.

    A flag that changes the function but no weight is obeyed. UserError, with the flags, for another
    model than the weights are.
    """
    path, before, model = source.path, source.config, config.model
    if config.run.resume:
        check_model(f"--resume {path}: another model", model, before)
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
    given = {k: v for k, v in model.flat().items() if k in config.given and own.flat().get(k) != v}
    others = {k: own.flat().get(k) for k in given}
    if weight_shapes(model) != weight_shapes(own):
        by_flag = lambda values: {spelling(k): v for k, v in values.items()}  # noqa: E731
        check_same(f"{path} is another model", by_flag(given), by_flag(others))
        raise UserError(f"--finetune: got {path}, whose weights are not those of this model")
    kept = "the dense model's function has" if is_upcycled else f"{path} was trained with"
    not_noted = ("expert_backend", "aux_loss_alpha" if is_upcycled else None)
    return [
        f"note: {spelling(name)} {value}, but {kept} {others[name]}"
        for name, value in given.items()
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
        state_dict = DiT(**vars(config)).state_dict()
    return {name: value.shape for name, value in state_dict.items() if name not in ADAPTED}


def check_model(message: str, got: DiTConfig, expected: DiTConfig) -> None:
    """Raises UserError unless both are one model, however experts are computed or balanced."""
    expected = replace(expected, expert_backend=got.expert_backend,
                       aux_loss_alpha=got.aux_loss_alpha)  # fmt: skip
    check_same(message, got.flat(), expected.flat())
