"""Weights for another config than their own: other classes, another image size, experts.

weights, notes = adapt(read_checkpoint("dense.pt"), config, class_names, seed=0)
"""

from dataclasses import replace

import torch
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.upcycling import upcycle
from models import DiTConfig, position_embedding

LABEL_TABLE = "y_embedder.embedding_table.weight"
ADAPTED = (LABEL_TABLE, "pos_embed")  # what `adapt` makes anew where shapes differ


def adapt(
    source: Checkpoint, config: DiTConfig, class_names: list[str], seed: int
) -> tuple[Checkpoint, list[str]]:
    """Fits weights to a config of other classes, another input size or experts where there were
    none; returns them, and lines about what is not as it was. seed: of what is drawn anew."""
    state_dict, before, notes = dict(source.state_dict), source.config, []
    if before.num_experts == 0 and config.num_experts:
        state_dict = upcycle(state_dict, config, seed=seed)
        notes.append(
            f"blocks.*.moe: {config.num_experts} copies of each dense layer, a new router, a "
            "silent shared expert: the dense model's function"
        )
    if before.input_size != config.input_size:
        side = config.input_size // config.patch_size
        state_dict["pos_embed"] = position_embedding(config)
        notes.append(f"pos_embed: recomputed for {side} x {side} patches")
    if not has_same_labels(source, config, class_names):
        state_dict[LABEL_TABLE] = new_label_table(state_dict[LABEL_TABLE], before, config, seed)
        notes.append(f"{LABEL_TABLE}: new rows for {config.num_classes} classes")
    kept = sum(weight is source.state_dict.get(name) for name, weight in state_dict.items())
    first = f"started from {source.path}: {kept} of {len(state_dict)} weights as they are"
    record = replace(source.record, config=config, class_names=tuple(class_names))
    return Checkpoint(source.path, state_dict, record, source.source), [first, *notes]


def has_same_labels(source: Checkpoint, config: DiTConfig, class_names: list[str]) -> bool:
    """Whether the rows of the label table mean the same; classes without names count as equal."""
    before, names = source.config, source.record.class_names
    return (
        before.num_classes == config.num_classes
        and (before.class_dropout_prob > 0) == (config.class_dropout_prob > 0)
        and names in ((), tuple(class_names))
    )


def new_label_table(table: Tensor, before: DiTConfig, config: DiTConfig, seed: int) -> Tensor:
    """New rows for the classes; with label dropout the row for "no class" stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    had_null, has_null = before.class_dropout_prob > 0, config.class_dropout_prob > 0
    rows = torch.randn(config.num_classes + has_null, table.shape[1], generator=generator) * 0.02
    if had_null and has_null:
        rows[-1] = table[-1].float()
    return rows
