"""Training from the weights of another model: what is kept, what is made anew, what is frozen.

source = open_source(args)                               # --finetune
config = target_config(args, source, num_classes=5, input_size=16, in_channels=4)
weights, notes = adapt(source, config, class_names, seed=0)
"""

import argparse
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.checkpoint import Checkpoint, config_of, read_checkpoint, read_record
from checkpoints.upcycling import upcycle, upcycled_config
from diffusion import objective_of
from models import SIZES, DiT, DiTConfig, sincos_position_embedding
from runtime.errors import UserError
from runtime.options import MODEL_DEFAULTS, fill_flags


def open_source(args: argparse.Namespace) -> Checkpoint | None:
    """Reads --finetune, None without it; fills in the model flags that the command left out."""
    if args.finetune is None:
        fill_flags(args, MODEL_DEFAULTS)
        args.renormalize_top_k = False
        return None
    hints = {"num_heads": config_of(args.model).num_heads} if args.model else {}
    source = read_checkpoint(args.finetune, hints)
    config = source.config
    if args.model and config_of(args.model).hidden_size != config.hidden_size:
        raise UserError(
            f"--model: got {args.model}, expected {name_of(source)}, which {args.finetune} is"
        )
    dense = config.num_experts == 0
    values = {
        "model": name_of(source),
        "num_experts": config.num_experts,
        "num_experts_per_tok": MODEL_DEFAULTS["num_experts_per_tok"]
        if dense
        else config.num_experts_per_tok,
        "n_shared_experts": MODEL_DEFAULTS["n_shared_experts"]
        if dense
        else config.n_shared_experts,
        "qk_norm": config.qk_norm,
        "mlp_type": config.mlp_type,
    }
    fill_flags(args, values)
    args.renormalize_top_k = config.renormalize_top_k or (dense and args.num_experts > 0)
    fixed = ("qk_norm", "mlp_type") if dense else ("qk_norm", "mlp_type", "n_shared_experts")
    for name in fixed:
        if getattr(args, name) != values[name]:
            raise UserError(
                f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected {values[name]} "
                f"as in {args.finetune}"
            )
    return source


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
    args: argparse.Namespace,
    source: Checkpoint,
    num_classes: int,
    input_size: int,
    in_channels: int,
) -> DiTConfig:
    """The config of the source but for what the flags and the data change in it."""
    config = source.config
    if in_channels != config.in_channels:
        raise UserError(
            f"--vae-path: got {in_channels} latent channels, expected {config.in_channels} as in "
            f"{args.finetune}"
        )
    dropout = config.class_dropout_prob or 0.1
    try:
        changed = replace(
            config,
            input_size=input_size,
            num_classes=num_classes,
            class_dropout_prob=dropout if num_classes > 1 else 0.0,
            aux_loss_alpha=args.aux_loss_alpha,
            expert_backend=args.expert_backend,
        )
        return with_experts(changed, args)
    except ValueError as error:
        raise UserError(str(error)) from None


def with_experts(config: DiTConfig, args: argparse.Namespace) -> DiTConfig:
    """The config with the experts that the flags ask for; ValueError where those cannot be had."""
    before, wanted = config.num_experts, args.num_experts
    if before == 0 and wanted:
        return upcycled_config(
            config,
            num_experts=wanted,
            num_experts_per_tok=args.num_experts_per_tok,
            n_shared_experts=args.n_shared_experts,
        )
    if wanted != before:
        raise ValueError(f"--num_experts: got {wanted}, expected {before} as in {args.finetune}")
    return replace(config, num_experts_per_tok=args.num_experts_per_tok)


def adapt(
    source: Checkpoint, config: DiTConfig, class_names: list[str], seed: int
) -> tuple[Checkpoint, list[str]]:
    """Fits weights to a config from `target_config`; notes list what was not loaded as it is."""
    state_dict, before, notes = dict(source.state_dict), source.config, []
    if before.num_experts != config.num_experts:
        state_dict, note = add_experts(state_dict, before, config, seed)
        notes.append(note)
    if before.input_size != config.input_size:
        side = config.input_size // config.patch_size
        state_dict["pos_embed"] = sincos_position_embedding(config.hidden_size, side)
        notes.append(f"pos_embed: recomputed for {side} x {side} patches")
    table = state_dict["y_embedder.embedding_table.weight"]
    state_dict["y_embedder.embedding_table.weight"], note = label_table(
        table, source, config, class_names, seed
    )
    notes += [note] if note else []
    with torch.device("meta"):
        wanted = DiT(**vars(config)).state_dict()
    for name in wanted:
        got = tuple(state_dict[name].shape) if name in state_dict else "nothing"
        if got != tuple(wanted[name].shape):
            raise UserError(
                f"{source.path}: {name}: got {got}, expected {tuple(wanted[name].shape)}"
            )
    unused = sorted(state_dict.keys() - wanted.keys())
    if unused:
        notes.append(f"not used: {', '.join(unused)}")
    state_dict = {name: state_dict[name] for name in wanted}
    kept = sum(state_dict[name] is source.state_dict.get(name) for name in wanted)
    fitted = replace(source.record, config=config, class_names=tuple(class_names))
    first = f"started from {source.path}: {kept} of {len(wanted)} weights as they are"
    return replace(source, state_dict=state_dict, record=fitted), [first, *notes]


def note_objective(source: Checkpoint, rf: bool) -> list[str]:
    """Says so when a run trains for something else than its weights were trained for."""
    before, after = source.record.objective, objective_of(rf)
    if before in (None, after):
        return []
    return [f"another objective: the weights are of {before}, this run trains {after} (--rf {rf})"]


def add_experts(
    state_dict: dict[str, Tensor], before: DiTConfig, config: DiTConfig, seed: int
) -> tuple[dict[str, Tensor], str]:
    state_dict, _ = upcycle(
        state_dict,
        before,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        n_shared_experts=config.n_shared_experts,
        seed=seed,
    )
    return state_dict, (
        f"blocks.*.moe: {config.num_experts} copies of each dense layer, a new router, a "
        "silent shared expert: the dense model's function"
    )


def label_table(
    table: Tensor, source: Checkpoint, config: DiTConfig, class_names: list[str], seed: int
) -> tuple[Tensor, str]:
    """The rows (classes and, with label dropout, "no class") for other classes, and a note.

    Rows of classes of the same name are kept, as is the one for no class. Weights that name no
    classes are taken to have the same ones if there are as many.
    """
    before = source.config
    names = list(source.record.class_names)
    same = before.num_classes == config.num_classes and names in ([], class_names)
    had_null, has_null = before.class_dropout_prob > 0, config.class_dropout_prob > 0
    if same and had_null == has_null:
        return table, ""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(config.num_classes + has_null, table.shape[1], generator=generator) * 0.02
    old = list(range(before.num_classes)) if same else []
    kept = {label: label for label in old}
    if names and not same:
        kept = {i: names.index(name) for i, name in enumerate(class_names) if name in names}
    for label, row in kept.items():
        rows[label] = table[row].float()
    if had_null and has_null:
        rows[-1] = table[-1].float()
    null = "kept" if had_null and has_null else "new" if has_null else "none"
    return rows, (
        f"y_embedder.embedding_table: made anew for {config.num_classes} classes, "
        f"{len(kept)} of them kept; the row for no class: {null}"
    )


def origin_of(state_folder: Path | None, weights: Checkpoint | None) -> dict | None:
    """What a run's weights come from, for its checkpoints to say; a resumed run has it stored."""
    if state_folder is not None:
        return read_record(state_folder).initialized_from
    if weights is None:
        return None
    known = {"step": weights.record.step, "model": weights.record.model, **(weights.source or {})}
    known = {name: value for name, value in known.items() if value is not None}
    return {"path": str(weights.path), **known}


def freeze(model: nn.Module, patterns: list[str], router_only: bool = False) -> None:
    """Freezes the parameters that patterns name (shell style; a module stands for all in it), or
    with `router_only` all but the gates. UserError when that names nothing, or leaves nothing."""
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
            if not name.endswith(".moe.gate.weight"):
                weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in parameters.values()):
        flag = "--train-router-only" if router_only else "--freeze"
        raise UserError(f"{flag}: got a model with nothing left to train")
