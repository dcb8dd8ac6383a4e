"""Training from the weights of another model: what is kept, what is made anew, what is frozen.

config, source = open_source(config)                     # --finetune
model_config = target_config(config, source, num_classes=5, input_size=16, in_channels=4)
weights, notes = adapt(source, model_config, class_names, seed=0)
"""

from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint, config_of, read_checkpoint
from checkpoints.upcycling import upcycle, upcycled_config
from diffusion import objective_of
from models import SIZES, DiT, DiTConfig, sincos_position_embedding
from routers import ROUTERS
from runtime.errors import UserError
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
    have = source.config
    if config.model and config_of(config.model).hidden_size != have.hidden_size:
        raise UserError(
            f"--model: got {config.model}, expected {name_of(source)}, which {config.finetune} is"
        )
    if config.rf is None and source.record.objective not in (None, objective_of(False)):
        raise UserError(
            f"--rf: got nothing, expected --rf True to train on with {source.record.objective}, "
            f"which {config.finetune} was trained with, or --rf False for Gaussian diffusion"
        )
    is_dense = have.num_experts == 0
    values = {"rf": False, "model": name_of(source), "num_experts": have.num_experts}
    fixed = {"qk_norm": have.qk_norm, "mlp_type": have.mlp_type, "router": have.router}
    if is_dense:
        values |= {
            name: MODEL_DEFAULTS[name] for name in ("num_experts_per_tok", "n_shared_experts")
        }
    else:
        values["num_experts_per_tok"] = have.num_experts_per_tok
        fixed |= {"n_shared_experts": have.n_shared_experts, "num_experts": have.num_experts}
    filled = fill(config, {**values, **fixed})
    for name, value in fixed.items():
        if getattr(filled, name) != value:
            raise UserError(
                f"{spelling(config, name)}: got {getattr(filled, name)}, expected {value} as in "
                f"{config.finetune}"
            )
    return fill_alpha(filled), source


def fill_alpha(config: TrainConfig) -> TrainConfig:
    return fill(config, {"aux_loss_alpha": ROUTERS[config.router].default_alpha})


def name_of(source: Checkpoint) -> str:
    """The preset that weights are of, or else their depth and width."""
    config = source.config
    if source.record.model:
        return source.record.model
    for name, size in SIZES.items():
        if all(getattr(config, field) == size[field] for field in ("depth", "hidden_size")):
            return f"DiT-{name}/{config.patch_size}"
    return f"DiT-{config.depth}x{config.hidden_size}/{config.patch_size}"


def target_config(
    config: TrainConfig,
    source: Checkpoint,
    *,
    num_classes: int,
    input_size: int,
    in_channels: int,
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


def adapt(
    source: Checkpoint, config: DiTConfig, class_names: list[str], seed: int
) -> tuple[Checkpoint, list[str]]:
    """Fits weights to a config from `target_config`; notes list what was not loaded as it is."""
    state_dict, before, notes = dict(source.state_dict), source.config, []
    if before.num_experts == 0 and config.num_experts:
        state_dict, _ = upcycle(
            state_dict,
            before,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            n_shared_experts=config.n_shared_experts,
            seed=seed,
        )
        notes.append(
            f"blocks.*.moe: {config.num_experts} copies of each dense layer, a new router, a "
            "silent shared expert: the dense model's function"
        )
    if before.input_size != config.input_size:
        side = config.input_size // config.patch_size
        state_dict["pos_embed"] = sincos_position_embedding(config.hidden_size, side)
        notes.append(f"pos_embed: recomputed for {side} x {side} patches")
    table = "y_embedder.embedding_table.weight"
    if not has_same_labels(source, config, class_names):
        state_dict[table] = new_label_table(state_dict[table], before, config, seed)
        notes.append(f"{table}: new rows for {config.num_classes} classes")
    with torch.device("meta"):
        wanted = DiT(**vars(config)).state_dict()
    for name in wanted:
        got = tuple(state_dict[name].shape) if name in state_dict else "nothing"
        if got != tuple(wanted[name].shape):
            raise UserError(
                f"{source.path}: {name}: got {got}, expected {tuple(wanted[name].shape)}"
            )
    state_dict = {name: state_dict[name] for name in wanted}
    kept = sum(state_dict[name] is source.state_dict.get(name) for name in wanted)
    first = f"started from {source.path}: {kept} of {len(wanted)} weights as they are"
    record = replace(source.record, config=config, class_names=tuple(class_names))
    return Checkpoint(source.path, state_dict, record, source.source), [first, *notes]


def has_same_labels(source: Checkpoint, config: DiTConfig, class_names: list[str]) -> bool:
    """Whether the rows of the label table mean the same; unnamed classes are taken to."""
    before, names = source.config, source.record.class_names
    return (
        before.num_classes == config.num_classes
        and (before.class_dropout_prob > 0) == (config.class_dropout_prob > 0)
        and names in ((), tuple(class_names))
    )


def new_label_table(table: Tensor, before: DiTConfig, config: DiTConfig, seed: int) -> Tensor:
    """Rows (classes and, with label dropout, "no class"): new ones, but that for no class stays."""
    generator = torch.Generator().manual_seed(seed)
    had_null, has_null = before.class_dropout_prob > 0, config.class_dropout_prob > 0
    rows = torch.randn(config.num_classes + has_null, table.shape[1], generator=generator) * 0.02
    if had_null and has_null:
        rows[-1] = table[-1].float()
    return rows


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
