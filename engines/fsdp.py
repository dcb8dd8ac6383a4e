"""The engine of train.py --shard: every process holds some rows of each weight (torch's FSDP2).

A block's weights are gathered where it computes, in the training precision, and dropped again;
its gradient is summed in fp32 and every process keeps its own rows. Routers compute in fp32: they
belong to the group of embeddings and output, which is gathered once a pass, in fp32, and autocast
does the rest as in `DDPEngine`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from checkpoints import Checkpoint, ema_file
from checkpoints.weights import as_user_error, open_safetensors
from engines.ddp import DDPEngine
from engines.flags import DDPFlags
from engines.initial import build_empty, draw_initial_weights
from engines.sharding import make_mesh, own_rows, processes_of_a_copy, shard, sharded_memory
from engines.state import check_state, read_state, write_part
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.processes import Distributed
from training.config import TrainConfig
from training.engine import Parts
from training.freezing import freeze
from training.memory import refuse_if_too_large
from training.optimizers import load_state, state_of, step_unless


class FSDPEngine:
    """fp32 shards and EMAs, autocast steps on gathered weights; see `training.engine.Engine`."""

    flags = DDPFlags

    def __init__(self, dist: Distributed, config: TrainConfig, weights: Checkpoint | None):
        self.dist, self.config, step = dist, config, config.step
        self.precision = DTYPES[step.precision]
        self.mesh = make_mesh(dist, config)
        shards = self.mesh["shard"]
        self.part, self.parts = shards.get_local_rank(), shards.size()
        self.model = build_empty(config.model, device=dist.device)
        freeze(self.model, step)
        shard(self.model, self.mesh, self.precision, config.engine.reshard_after_forward)
        self.model.gradient_checkpointing = step.gradient_checkpointing
        if step.compile:
            self.model.compile_blocks()
        self.parameters: dict[str, DTensor] = dict(self.model.named_parameters())
        if weights is None:
            draw_initial_weights(config.model, config.run.global_seed, self.set_weight)
        else:
            for name, value in weights.state_dict.items():
                self.set_weight(name, value)
        self.emas, self.grad_clip = config.emas, step.grad_clip
        for ema in self.emas:
            ema.start(self.shards)
        self.trained = {n: w for n, w in self.parameters.items() if w.requires_grad}
        self.optimizer = config.optimizer.make(self.trained, step.lr, self.model.matrices())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

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
        if not config.optimizer.by_numbers:
            raise UserError(
                f"--optimizer: got {config.step.optimizer} with --shard, expected adamw: a process "
                "has some rows of a matrix, not all"
            )
        processes_of_a_copy(config, dist.world_size)
        refuse_if_too_large(cls, config, dist)
        return {}

    @classmethod
    def micro_batch(cls, config: TrainConfig, world_size: int) -> int:
        return DDPEngine.micro_batch(config, world_size)

    @classmethod
    def memory(
        cls, config: TrainConfig, world_size: int, micro_batch: int
    ) -> tuple[Parts, Parts, str]:
        return sharded_memory(config, world_size, micro_batch)

    def network(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            prediction, aux_loss = self.model(x, t, y)
        return prediction.float(), aux_loss

    def autocast(self) -> AbstractContextManager:
        enabled = self.precision != torch.float32
        return torch.autocast(self.dist.device.type, self.precision, enabled=enabled)

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        self.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def optimizer_step(self, step: int, rate: float, loss: Tensor) -> dict[str, Tensor] | None:
        weights = [weight for weight in self.trained.values() if weight.grad is not None]
        grad_norm = nn.utils.get_total_norm([weight.grad for weight in weights]).full_tensor()
        if self.grad_clip:
            nn.utils.clip_grads_with_norm_(weights, self.grad_clip, grad_norm)
        for group, own in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = own * rate
        skipped = ~grad_norm.isfinite()
        step_unless(skipped, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas:
            ema.update(self.shards, step, skipped)
        return {"grad_norm": grad_norm, "skipped": skipped}

    def is_finite(self) -> Tensor:
        averages = [average for ema in self.emas for average in ema.averages]
        return torch.stack([part.isfinite().all() for part in (*self.shards, *averages)]).all()

    @contextmanager
    def ema_weights(self, number: int = 0) -> Iterator[None]:
        self.exchange(number)
        self.model.eval()
        try:
            with self.autocast():
                yield
        finally:
            self.exchange(number)
            self.model.train()

    @torch.no_grad()
    def exchange(self, number: int) -> None:
        """Swaps the weights with an EMA, and drops what was gathered of them."""
        for module in (self.model, *self.model.blocks):
            module.reshard()
        for mine, average in zip(self.shards, self.emas[number].averages, strict=True):
            kept = mine.clone()
            mine.copy_(average)
            average.copy_(kept)

    def as_parameter(self, name: str, rows: Tensor) -> DTensor:
        """This process's rows of something like a parameter, as its part of the whole."""
        like = self.parameters[name]
        return DTensor.from_local(
            rows, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def ema_state_dict(self, number: int = 0) -> dict[str, Tensor]:
        state_dict = dict(self.model.named_buffers())
        for name, rows in zip(self.parameters, self.emas[number].averages, strict=True):
            whole = self.as_parameter(name, rows).full_tensor()
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
        kept = state_of(self.optimizer, self.trained)
        state = {
            "model": dict(zip(self.parameters, self.shards, strict=True))
            | dict(self.model.named_buffers()),
            "optimizer": {n: {k: local(v) for k, v in state.items()} for n, state in kept.items()},
        }
        write_part(folder, state, self.part, self.parts)

    def load_state(self, folder: Path) -> None:
        self.dist.together(lambda: self.read_state(folder))
        self.dist.together(lambda: self.read_emas(folder))

    def read_state(self, folder: Path) -> None:
        state = read_state(folder, self.rows, self.dist.device)
        shapes = {name: rows.shape for name, rows in zip(self.rows, self.shards, strict=True)}
        trained = {name: shapes[name] for name in self.trained}
        with as_user_error(folder, "damaged, or of another model"):
            buffers = {name: buffer.shape for name, buffer in self.model.named_buffers()}
            check_state(
                state, shapes | buffers, trained, self.config.optimizer, self.model.matrices()
            )
            for name, value in dict(self.model.named_buffers()).items():
                value.copy_(state["model"][name])
            for name, rows in zip(self.rows, self.shards, strict=True):
                rows.copy_(state["model"][name])
            optimizer = {
                name: {k: self.as_parameter(name, v) if is_rows(v) else v for k, v in kept.items()}
                for name, kept in state["optimizer"].items()
            }
            load_state(self.optimizer, self.trained, optimizer)

    def read_emas(self, folder: Path) -> None:
        for number, ema in enumerate(self.emas):
            path = folder / ema_file(ema.name, is_first=not number)
            with open_safetensors(path) as file, as_user_error(path, "damaged, or another model's"):
                for (name, rows), average in zip(self.rows.items(), ema.averages, strict=True):
                    if average.numel():
                        average.copy_(file.get_slice(name)[rows])

    @property
    def rows(self) -> dict[str, slice]:
        """Which rows of each parameter this process has."""
        return {n: own_rows(len(w), self.part, self.parts) for n, w in self.parameters.items()}


def is_rows(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value
