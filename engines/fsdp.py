"""The engine of train.py --shard: every process holds some rows of each weight (torch's FSDP2).

A block's weights are gathered where it computes, in the training precision, and dropped again;
its gradient is summed in fp32 and every process keeps its own rows. Routers compute in fp32: they
belong to the group of embeddings and output, which is gathered once a pass, in fp32, and autocast
does the rest as in `DDPEngine`.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoints import Checkpoint
from checkpoints.weights import write_pickle
from engines.ddp import DDPEngine
from engines.initial import build_empty, draw_initial_weights
from engines.sharding import make_mesh, own_rows, processes_of_a_copy, shard, sharded_memory
from engines.state import PART_FILES
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.processes import Distributed
from training.config import TrainConfig
from training.engine import Parts
from training.freezing import freeze
from training.memory import refuse_if_too_large


class FSDPEngine(DDPEngine):
    """fp32 shards and EMAs, autocast steps on gathered weights; see `training.engine.Engine`."""

    def __init__(self, dist: Distributed, config: TrainConfig, weights: Checkpoint | None):
        self.dist, self.config, step = dist, config, config.step
        self.mesh = make_mesh(dist, config)
        shards = self.mesh["shard"]
        self.part, self.parts = shards.get_local_rank(), shards.size()
        self.model = build_empty(config.model, device=dist.device)
        freeze(self.model, step)
        precision, reshard = DTYPES[step.precision], config.engine.reshard_after_forward
        shard(self.model, self.mesh, precision, reshard)
        self.parameters: dict[str, DTensor] = dict(self.model.named_parameters())
        if weights is None:
            draw_initial_weights(config.model, config.run.global_seed, self.set_weight)
        else:
            for name, value in weights.state_dict.items():
                self.set_weight(name, value)
        self.prepare()

    @property
    @torch.no_grad()
    def shards(self) -> list[Tensor]:
        """This process's rows of each parameter, which the optimizer changes."""
        return [weight.to_local() for weight in self.parameters.values()]

    @torch.no_grad()
    def set_weight(self, name: str, whole: Tensor) -> None:
        """Takes this process's rows of a parameter, or a buffer."""
        if name in self.parameters:
            own = self.parameters[name].to_local()
            own.copy_(whole[own_rows(len(whole), self.part, self.parts)])
        else:
            self.model.get_buffer(name).copy_(whole)

    @classmethod
    def check(cls, config: TrainConfig, dist: Distributed) -> dict[str, Any]:
        if config.step.precision == "fp16":
            raise UserError(
                "--precision: got fp16 with --shard, expected bf16 or fp32: sharded gradients are "
                "not scaled"
            )
        processes_of_a_copy(config, dist.world_size)
        refuse_if_too_large(cls, config, dist)
        return {}

    @classmethod
    def memory(
        cls, config: TrainConfig, world_size: int, micro_batch: int
    ) -> tuple[Parts, Parts, str]:
        return sharded_memory(config, world_size, micro_batch)

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        self.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        return super().total_norm(grads).full_tensor()

    def exchange(self, number: int) -> None:
        for module in (self.model, *self.model.blocks):
            module.reshard()  # drops what was gathered of the others
        super().exchange(number)

    def averages(self, number: int) -> dict[str, Tensor]:
        return dict(zip(self.parameters, self.emas[number].averages, strict=True))

    @property
    def rows(self) -> dict[str, slice]:
        return {n: own_rows(len(w), self.part, self.parts) for n, w in self.parameters.items()}

    def local(self, value: Any) -> Any:
        return value.to_local() if isinstance(value, DTensor) else value

    def whole(self, name: str, value: Any) -> Any:
        if not torch.is_tensor(value) or not value.dim():
            return value
        like = self.parameters[name]
        return DTensor.from_local(
            value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def ema_state_dict(self, number: int = 0) -> dict[str, Tensor]:
        state_dict = dict(self.model.named_buffers())
        for name, rows in self.averages(number).items():
            whole = self.whole(name, rows).full_tensor()
            if self.dist.is_main:
                state_dict[name] = whole.cpu()
        return state_dict

    @torch.no_grad()
    def save_state(self, folder: Path) -> None:
        """Writes this process's rows, plain tensors and numbers: any number can go on from them.

        torch.distributed.checkpoint would write a pickle beside its shards and read that as code.
        """
        if self.dist.rank >= self.parts:  # another process wrote the same rows
            return
        path = folder / PART_FILES.format(self.part)
        path.parent.mkdir(exist_ok=True)
        write_pickle(path, {"parts": self.parts, **self.own_state()})
