"""Models without data, on the meta device: names, shapes and initial weights of a config."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from conditions import CONDITIONS, split_condition
from initialization import draw_weights
from models import DiT, DiTConfig
from routers import ROUTERS
from runtime.errors import reported_as


def meta_model(config: DiTConfig) -> DiT:
    """Returns the model of a config on the meta device, the same one until its router or a
    condition is another class, as after the cell of a notebook that defines it ran again."""
    names = [split_condition(word)[0] for word in config.conditions]
    kinds = (ROUTERS[config.router.name], *(CONDITIONS[name] for name in names))
    return build_meta(config, kinds)


@lru_cache(maxsize=16)
def build_meta(config: DiTConfig, kinds: tuple[type | None, ...]) -> DiT:
    with torch.device("meta"):
        return DiT(replace(config, expert_backend="grouped"))


def initial_weights(config: DiTConfig) -> Iterator[tuple[str, Tensor]]:
    """Draws the parameters (fp32, on the CPU) and buffers of a new model, with their names.

    They are those of `DiT(config)`, but only one module's weights are held at a time.
    """
    with reported_as("the model cannot be built", ValueError):
        yield from draw_weights(meta_model(config))
