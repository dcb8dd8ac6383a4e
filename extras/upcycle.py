"""Upcycling: the weights of a sparse model from those of a dense one.

    config = upcycled_config(dense.config, num_experts=8, num_experts_per_tok=2)
    state_dict = upcycle(dense.state_dict, config)

Shape legend: D width, H hidden units of the dense layer, E experts, G parts of a copy
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from models import DiTConfig
from moe import MLP_TYPES, width_of


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
