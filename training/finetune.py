"""Training from the weights of another model: what the flags may change in it, what is frozen.

config, source = open_source(config)                     # --finetune
model_config = target_config(config, source, num_classes=5, input_size=16, in_channels=4)
freeze(model, config.freeze, config.train_router_only)
"""

from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from checkpoints import Checkpoint, config_of, read_checkpoint
from checkpoints.upcycling import upcycled_config
from diffusion import objective_of
from models import DiTConfig
from routers import ROUTERS
from runtime.errors import UserError, check_same
from runtime.flags import spelling
from training.config import MODEL_DEFAULTS, TrainConfig, fill


def open_source(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Reads --finetune, None without it; fills in the model flags that the command left out.

    Raises UserError for flags that contradict the weights, and when the weights are of another
    objective and the command does not say --rf.
    """
    if config.finetune is None:
        return fill_alpha(fill(config, {**MODEL_DEFAULTS, "rf": False})), None
    hints = {"num_heads": config_of(config.model).num_heads} if config.model else {}
    source = read_checkpoint(config.finetune, hints)
    have, model = source.config, source.record.model_name
    if config.model and config_of(config.model).hidden_size != have.hidden_size:
        raise UserError(
            f"--model: got {config.model}, expected {model}, which {config.finetune} is"
        )
    if config.rf is None and source.record.objective not in (None, objective_of(False)):
        raise UserError(
            f"--rf: got nothing, expected --rf True to train on with {source.record.objective}, "
            f"which {config.finetune} was trained with, or --rf False for Gaussian diffusion"
        )
    fixed, free = ["qk_norm", "mlp_type", "router"], ["num_experts"]
    if have.num_experts:  # a dense model may get experts of any number and kind
        fixed += ["num_experts", "n_shared_experts"]
        free += ["num_experts_per_tok"]
    own = {name: getattr(have, name) for name in fixed + free}
    filled = fill(config, {**MODEL_DEFAULTS, "rf": False, **own, "model": model})
    got = {spelling(config, name): getattr(filled, name) for name in fixed}
    expected = {spelling(config, name): own[name] for name in fixed}
    check_same(f"{config.finetune} is another model", got, expected)
    return fill_alpha(filled), source


def fill_alpha(config: TrainConfig) -> TrainConfig:
    return fill(config, {"aux_loss_alpha": ROUTERS[config.router].default_alpha})


def target_config(
    config: TrainConfig, source: Checkpoint, *, num_classes: int, input_size: int, in_channels: int
) -> DiTConfig:
    """The config of the source but for what the flags and the data change in it."""
    before = source.config
    if in_channels != before.in_channels:
        raise UserError(
            f"--vae-path: got {in_channels} latent channels, expected {before.in_channels} as in "
            f"{config.finetune}"
        )
    dropout = before.class_dropout_prob or 0.1
    try:
        changed = replace(
            before,
            input_size=input_size,
            num_classes=num_classes,
            class_dropout_prob=dropout if num_classes > 1 else 0.0,
            aux_loss_alpha=config.aux_loss_alpha,
            expert_backend=config.expert_backend,
        )
        if before.num_experts == 0 and config.num_experts:
            return upcycled_config(
                changed,
                num_experts=config.num_experts,
                num_experts_per_tok=config.num_experts_per_tok,
                n_shared_experts=config.n_shared_experts,
            )
        return replace(changed, num_experts_per_tok=config.num_experts_per_tok)
    except ValueError as error:
        raise UserError(str(error)) from None


def freeze(model: nn.Module, patterns: tuple[str, ...], router_only: bool = False) -> None:
    """Freezes the parameters that patterns name (shell style; a module stands for all in it).

    router_only: freezes all but the gates. UserError when a pattern names nothing, or nothing is
    left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [
            n for n in parameters if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")
        ]
        if not matching:
            raise UserError(
                f"--freeze: got {pattern}, expected the name of a parameter, such as "
                f"{next(iter(parameters))}"
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if router_only:
        for name, weight in parameters.items():
            weight.requires_grad_(weight.requires_grad and ".moe.gate." in name)
    if not any(weight.requires_grad for weight in parameters.values()):
        flag = "--train-router-only" if router_only else "--freeze"
        raise UserError(f"{flag}: got a model with nothing left to train, expected some of it")
