"""Weights that a command names to start from, by --finetune or --resume.

source = open_weights(config, own_folder)          # None without any
notes = check_weights(config, source)
"""

from dataclasses import replace
from pathlib import Path

import torch

from checkpoints import Checkpoint, read_checkpoint, step_folders
from checkpoints.adapting import ADAPTED, upcycled_config
from checkpoints.weights import sampled_digest
from models import DiT, DiTConfig
from runtime.errors import UserError, check_same
from runtime.flags import spelling
from training.config import TrainConfig


def open_weights(config: TrainConfig, own: Path | None) -> Checkpoint | None:
    """Reads what --finetune or --resume names, None without them.

    own: the folder of a run that has begun; it goes on from its own checkpoints if these weights
        are gone
    """
    path = config.run.finetune or config.run.resume
    if path is None:
        return None
    named = config.given.get("model")
    known = {"num_heads", *config.given} if named else config.given.keys()
    missing = ("num_heads", "num_experts_per_tok")  # in a published file
    hints = {
        name: config.given.get(name, getattr(config.model, name))
        for name in missing
        if name in known or config.run.resume
    }
    if config.given.get("objective") == "gaussian":  # a DiffMoE's file does not say
        hints["objective"] = "gaussian"
    try:
        source = read_checkpoint(path, hints)
    except UserError as error:
        if own is None or not step_folders(own):
            flag = "--finetune" if config.run.finetune else "--resume"
            raise UserError(f"{flag} {error}") from None
        source = read_checkpoint(own)
    width = source.config.hidden_size
    if named is not None and config.given.get("hidden_size", config.model.hidden_size) != width:
        raise UserError(
            f"--model: got {named}, expected {source.record.model_name}, which {path} is"
        )
    return source


def started_from(config: TrainConfig, source: Checkpoint | None) -> str | None:
    """A digest of the weights that a run starts from, whatever their path; None without any."""
    if source is None:
        return None
    stored = source.record.settings.get("started_from")
    is_own = not Path(config.run.finetune or config.run.resume).exists() and source.source is None
    return stored if is_own else sampled_digest(source.path)


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
        before = replace(before, shared_mlp_ratio=model.shared_mlp_ratio)
    own = replace(before, input_size=model.input_size, num_classes=model.num_classes,
                  class_dropout_prob=model.class_dropout_prob)  # fmt: skip
    given = {k: v for k, v in model.flat().items() if k in config.given and own.flat().get(k) != v}
    others = {k: own.flat().get(k) for k in given}
    if weight_shapes(model) != weight_shapes(own):
        by_flag = lambda values: {spelling(k): v for k, v in values.items()}  # noqa: E731
        check_same(f"{path} is another model", by_flag(given), by_flag(others))
        raise UserError(f"--finetune: got {path}, whose weights are not those of this model")
    kept = "the dense model's function has" if is_upcycled else f"{path} was trained with"
    unsaid = ("expert_backend", "aux_loss_alpha" if is_upcycled else None)
    return [
        f"note: {spelling(name)} {value}, but {kept} {others[name]}"
        for name, value in given.items()
        if name not in unsaid
    ]


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
