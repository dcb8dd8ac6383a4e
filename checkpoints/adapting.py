"""Adapts weights to other classes, conditions or image sizes, and adds or drops experts.

    weights, notes = adapt(read_checkpoint("dense.pt"), config, class_names, seed=0)
    config = upcycled_config(dense.config, num_experts=8, num_experts_per_tok=2)
    state_dict = upcycle(dense.state_dict, config)

Shape legend: D width, H hidden units of the dense layer, E experts, G parts of a copy
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from checkpoints.checkpoint import Checkpoint
from checkpoints.meta import initial_weights, meta_model
from checkpoints.weights import check_shapes, shapes_of
from conditions import split_condition
from models import DiTConfig, embedder_of, position_embedding
from moe import MLP_TYPES, width_of
from runtime.errors import reported_as

LABEL_TABLE = "y_embedder.embedding_table.weight"
# Routers whose weights and buffers have one row per expert.
LINEAR_ROUTERS = ("topk", "sigmoid", "expert_choice")


def adapt(
    source: Checkpoint, config: DiTConfig, class_names: list[str], seed: int
) -> tuple[Checkpoint, list[str]]:
    """Adapts weights to a config with other classes, conditions or another input size.

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
        state_dict = change_conditions(state_dict, before, config, seed)
        drawn = ", ".join(w for w in config.conditions if w not in before.conditions) or "none"
        notes.append(f"conditions: {' '.join(config.conditions)}, new weights for {drawn}")
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


def change_conditions(
    state_dict: dict[str, Tensor], before: DiTConfig, config: DiTConfig, seed: int
) -> dict[str, Tensor]:
    """Draws the weights of new conditions as in a new model, and removes those of the others.

    Such weights are the embedders, and those that only a model with the condition has, such as
    cross-attention in its blocks.
    """
    changed = {split_condition(word)[0] for word in set(before.conditions) ^ set(config.conditions)}
    embedders = tuple(f"{embedder_of(name)}." for name in changed)
    had, has = (
        meta_model(replace(config, conditions=one.conditions)).state_dict().keys()
        for one in (before, config)
    )
    new = {name for name in has if name not in had or name.startswith(embedders)}
    kept = {name: value for name, value in state_dict.items() if name not in new | (had - has)}
    drawn: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, value in initial_weights(config):
            drawn |= {name: value} if name in new else {}
            if len(drawn) == len(new):
                break
    return kept | drawn


def drop_experts(source: Checkpoint, dropped: Sequence[Sequence[int]]) -> Checkpoint:
    """Returns the model without some routed experts; the router chooses among the others.

    dropped: experts of each sparse layer, the same number in each
    The router must be a linear gate.
    """
    config, state_dict = source.config, dict(source.state_dict)
    if not config.num_experts or config.router.name not in LINEAR_ROUTERS:
        got = config.router.name if config.num_experts else "a dense model"
        raise ValueError(f"router: got {got}, expected {', '.join(LINEAR_ROUTERS)}")
    if (number := len(dropped[0])) > (most := config.num_experts - config.num_experts_per_tok):
        raise ValueError(f"got {number} experts, expected at most {most}")
    smaller = replace(config, num_experts=config.num_experts - number)
    of_experts = {*meta_model(config).expert_parameters()}
    for layer, gone in zip(config.sparse_blocks, dropped, strict=True):
        kept = torch.tensor([i for i in range(config.num_experts) if i not in gone])
        for name, weight in state_dict.items():
            is_gate = name.startswith(f"blocks.{layer}.moe.gate.")
            is_here = name.startswith(f"blocks.{layer}.moe.experts.")
            if is_gate or is_here and name.removesuffix("_scale") in of_experts:
                state_dict[name] = weight[kept]  # (E, ...)
    record = replace(source.record, config=smaller)
    return replace(source, state_dict=state_dict, record=record)


def upcycled_config(
    config: DiTConfig,
    *,
    num_experts: int,
    num_experts_per_tok: int = 2,
    n_shared_experts: float = 2,
    layers: str | tuple[int, ...] = "all",
    split: int = 1,
    renormalize: bool = True,
) -> DiTConfig:
    """Returns the config of the model that `upcycle` makes of a dense one, if that is possible."""
    if config.num_experts:
        raise ValueError(f"num_experts: got {config.num_experts}, expected 0, a dense model")
    if config.dense_mlp != config.expert_mlp:
        raise ValueError(
            f"dense_mlp_type: got {config.dense_mlp_type}, expected the type of the experts"
        )
    hidden_units = width_of(config.hidden_size, config.dense_ratio)
    counts = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
    for name, value in (counts | {"hidden units": hidden_units}).items():
        if value % split or value < 1:
            raise ValueError(f"{name}: got {value}, expected a multiple of the split, {split}")
    return replace(
        config, **counts, n_shared_experts=n_shared_experts, sparse_layers=layers,
        mlp_type=config.expert_mlp, mlp_ratio=hidden_units / split / config.hidden_size,
        dense_mlp_ratio=config.dense_ratio, router=f"topk:renormalize={renormalize}",
    )  # fmt: skip


@torch.no_grad()
def upcycle(
    state_dict: dict[str, Tensor], sparse: DiTConfig, *, split: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """Converts dense weights to the weights of a sparse model that computes the same function.

    Every expert of a layer is a copy of the dense feed-forward layer, the top-k weights sum to 1
    (`renormalize`), and the output of the shared expert is zero. A token therefore gets the
    output of the dense layer, whatever the router chooses (Komatsuzaki et al. 2023, arXiv
    2212.05055). The router is new, so the copies diverge during training.

    sparse: config of the sparse model, see `upcycled_config`
    split: G splits the dense layer into G parts along the hidden units, one expert per part (He et
        al. 2024, arXiv 2410.07524). The parts of a copy share a router row, so a token chooses
        complete copies. The router gives each part 1/G of the weight that its copy would get, so
        the down projections are multiplied by G.
    """
    generator, bound = Generator().manual_seed(seed), sparse.hidden_size**-0.5
    result = dict(state_dict)
    for layer in sparse.sparse_blocks:
        prefix = f"blocks.{layer}.mlp."
        dense = {k.removeprefix(prefix): result.pop(k) for k in state_dict if k.startswith(prefix)}
        rows = torch.empty(sparse.num_experts // split, sparse.hidden_size)
        rows.uniform_(-bound, bound, generator=generator)
        block = {
            "gate.weight": rows.repeat_interleave(split, dim=0),  # (E, D)
            **copied_experts(dense, sparse, split),
            **silent_shared_expert(sparse, generator),
        }
        result.update({f"blocks.{layer}.moe.{name}": value for name, value in block.items()})
    return result


def copied_experts(dense: dict[str, Tensor], config: DiTConfig, split: int) -> dict[str, Tensor]:
    """Returns the stacked experts (E, ...) of a layer; expert g*G + j is part j of copy g."""

    def stack(name: str, dim: int = 0, scale: int = 1) -> Tensor:
        """Splits a weight along `dim` and copies the parts; returns (E, ...)."""
        parts = torch.stack((scale * dense[name].float()).chunk(split, dim))
        return parts.repeat(config.num_experts // split, *[1] * dense[name].dim())

    if config.expert_mlp == "gelu":
        return {
            "experts.up_proj": stack("fc1.weight"),
            "experts.up_bias": stack("fc1.bias"),
            "experts.down_proj": stack("fc2.weight", dim=1, scale=split),
            # The weights of a token sum to 1 over its parts, so each part carries the full bias.
            "experts.down_bias": dense["fc2.bias"].float().repeat(config.num_experts, 1),
        }
    gate_up = torch.cat([stack("gate_proj.weight"), stack("up_proj.weight")], dim=1)
    down = stack("down_proj.weight", dim=1, scale=split)
    experts = {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
    if config.expert_mlp == "swiglu_bias":
        bias = torch.cat([stack("gate_proj.bias"), stack("up_proj.bias")], dim=1)
        down_bias = dense["down_proj.bias"].float().repeat(config.num_experts, 1)
        experts |= {"experts.gate_up_bias": bias, "experts.down_bias": down_bias}
    return experts


def silent_shared_expert(config: DiTConfig, generator: Generator) -> dict[str, Tensor]:
    """Returns a shared expert with zero output: its last matrix and bias are zero."""
    if not config.n_shared_experts:
        return {}
    width = width_of(config.hidden_size, config.n_shared_experts)
    with torch.device("meta"):
        shapes = MLP_TYPES[config.expert_mlp](config.hidden_size, width).state_dict()
    weights = {}
    for name, like in shapes.items():
        weights[f"shared_experts.{name}"] = value = torch.zeros(like.shape)
        if name in ("fc1.weight", "gate_proj.weight", "up_proj.weight"):
            nn.init.xavier_uniform_(value, generator=generator)
    return weights
