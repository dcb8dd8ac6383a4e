"""Adapts weights to other classes, conditions, image sizes or more modules, for --finetune.

weights, notes = adapt(read_checkpoint("dense.pt"), config, class_names, seed=0)
"""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.meta import initial_weights, meta_model
from checkpoints.weights import check_shapes, shapes_of
from conditions import split_condition
from models import DiTConfig, embedder_of, position_embedding
from runtime.errors import reported_as

LABEL_TABLE = "y_embedder.embedding_table.weight"


def adapt(
    source: Checkpoint, config: DiTConfig, class_names: list[str], seed: int
) -> tuple[Checkpoint, list[str]]:
    """Adapts weights to a config with other classes, conditions, modules or another input size.

    seed: seed of newly initialised weights
    Returns the checkpoint and notes about the changed weights.
    """
    state_dict, before, notes = dict(source.state_dict), source.config, []
    kind = "input_size", "absolute_positions"
    if any(getattr(before, name) != getattr(config, name) for name in kind):
        state_dict["pos_embed"] = position_embedding(config)
        if config.absolute_positions:
            rows, columns = config.grid
            notes.append(f"pos_embed: recomputed for {rows} x {columns} patches")
    if before.conditions != config.conditions:
        state_dict = without_changed(state_dict, before, config)
        added = ", ".join(w for w in config.conditions if w not in before.conditions) or "none"
        notes.append(f"conditions: {' '.join(config.conditions)}, new weights for {added}")
    if drawn := draw_missing(state_dict, config, seed):
        names = ", ".join(short_names(drawn, state_dict))
        notes.append(f"{source.path} has no {names}: drawn as in a new model")
    state_dict |= drawn
    had_null, has_null = before.dropout > 0, config.dropout > 0
    kept = kept_classes(source, config, class_names)
    is_same = kept == {row: row for row in range(before.num_classes)}
    is_same = is_same and before.num_classes == config.num_classes and had_null == has_null
    if LABEL_TABLE in source.state_dict and LABEL_TABLE in state_dict and not is_same:
        generator, table = Generator().manual_seed(seed), state_dict[LABEL_TABLE]
        size = config.num_classes + has_null, table.shape[1]
        rows, changes = torch.randn(size, generator=generator) * 0.02, []
        for row, old in kept.items():
            rows[row] = table[old].float()
        if number := config.num_classes - len(kept):
            changes.append(f"new rows for {number} of {config.num_classes} classes")
        if had_null and has_null:
            rows[-1] = table[-1].float()
        elif had_null or has_null:
            changes.append(f'{"new" if has_null else "without the"} row for "no class"')
        state_dict[LABEL_TABLE] = rows
        notes.append(f"{LABEL_TABLE}: {', '.join(changes) or 'rows of these classes'}")
    message = f"{source.path}: cannot start a model with conditions {' '.join(config.conditions)}"
    with reported_as(message, ValueError):
        check_shapes(shapes_of(state_dict), shapes_of(meta_model(config).state_dict()))
    same = sum(weight is source.state_dict.get(name) for name, weight in state_dict.items())
    first = f"started from {source.path}: {same} of {len(state_dict)} weights are unchanged"
    record = replace(source.record, config=config, class_names=tuple(class_names))
    return Checkpoint(source.path, state_dict, record, source.source), [first, *notes]


def kept_classes(source: Checkpoint, config: DiTConfig, class_names: list[str]) -> dict[int, int]:
    """Returns the numbers of the classes that the source has too, with their numbers there.

    Equal names are the same class. Without names, equal numbers of classes are the same classes, as
    is a single class, which is named after the folder of its images.
    """
    names, number = source.record.class_names, source.config.num_classes
    if len(names) < 2 and number == config.num_classes:
        return {row: row for row in range(number)}
    places = {name: row for row, name in enumerate(names)}
    return {row: places[name] for row, name in enumerate(class_names) if name in places}


def without_changed(
    state_dict: dict[str, Tensor], before: DiTConfig, config: DiTConfig
) -> dict[str, Tensor]:
    """Removes the weights of conditions that only one of the configs has: their embedders, and
    those that only a model with the condition has, such as cross-attention in its blocks.
    """
    changed = {split_condition(word)[0] for word in set(before.conditions) ^ set(config.conditions)}
    embedders = tuple(f"{embedder_of(name)}." for name in changed)
    had, has = (
        meta_model(replace(config, conditions=one.conditions)).state_dict().keys()
        for one in (before, config)
    )
    gone = {name for name in had if name not in has or name.startswith(embedders)}
    return {name: value for name, value in state_dict.items() if name not in gone}


def draw_missing(state_dict: dict[str, Tensor], config: DiTConfig, seed: int) -> dict[str, Tensor]:
    """Draws the weights of a config that are not in `state_dict`, as in a new model."""
    new, drawn = meta_model(config).state_dict().keys() - state_dict.keys(), {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, value in initial_weights(config) if new else ():
            drawn |= {name: value} if name in new else {}
            if len(drawn) == len(new):
                break
    return drawn


def short_names(new: Iterable[str], old: Iterable[str]) -> list[str]:
    """Returns the outermost modules without an old weight, or the new weights, over all blocks."""
    modules = {name[: dot.start()] for name in old for dot in re.finditer(r"\.", name)}
    short = []
    for name in new:
        parts = name.split(".")
        starts = (".".join(parts[: end + 1]) for end in range(len(parts)))
        module = next((start for start in starts if start not in modules), name)
        short.append(re.sub(r"^blocks\.\d+\.", "blocks.*.", module))
    return list(dict.fromkeys(short))
