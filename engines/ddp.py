"""The engine of train.py: every process holds the whole model (distributed data parallelism)."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints import Checkpoint, ema_file, read_checkpoint
from checkpoints.weights import as_user_error, shapes_of, write_pickle
from engines.flags import DDPFlags
from engines.state import STATE_FILE, check_state, read_state
from models import DiT
from runtime.devices import DTYPES
from runtime.errors import UserError, counted
from runtime.processes import Distributed, reseed
from training.config import TrainConfig
from training.engine import Parts
from training.freezing import freeze
from training.memory import activation_bytes, optimizer_bytes, refuse_if_too_large
from training.optimizers import load_state, state_of, step_unless

ALIGNMENT = 64  # numbers; grouped products on a GPU want weights that start at 16 bytes


class DDPEngine:
    """fp32 master weights and EMAs, autocast steps; see `training.engine.Engine`."""

    flags = DDPFlags

    def __init__(self, dist: Distributed, config: TrainConfig, weights: Checkpoint | None):
        self.dist, self.config, step = dist, config, config.step
        self.model = DiT(**vars(config.model))
        if weights is not None:
            self.model.load_state_dict(weights.state_dict)
        else:  # again, so that the draws follow from the seed only
            reseed(config.run.global_seed)
            self.model.initialize_weights()
        freeze(self.model, step)
        self.model.to(dist.device).train()
        self.model.gradient_checkpointing = step.gradient_checkpointing
        if step.compile:
            self.model.compile_blocks()
        self.weights = flatten_parameters(self.model)
        self.emas, self.grad_clip = config.emas, step.grad_clip
        for ema in self.emas:
            ema.start([self.weights])
        self.trained = {n: w for n, w in self.model.named_parameters() if w.requires_grad}
        self.optimizer = config.optimizer.make(self.trained, step.lr, self.model.matrices())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.precision = DTYPES[step.precision]
        self.scaler = torch.amp.GradScaler(
            dist.device.type, enabled=self.precision == torch.float16
        )
        self.scale = self.scaler.get_scale()  # of the loss, as the host knows it
        self.accumulates = step.accum_iter > 1 and dist.world_size > 1
        self.replica = self.parallel() if dist.world_size > 1 else self.model

    def parallel(self) -> nn.Module:
        if self.accumulates:
            # The sum of micro-batches then goes into DDP's own buckets, not into a second copy.
            for weight in self.trained.values():
                weight.grad = torch.zeros_like(weight)
        with warnings.catch_warnings():  # torch 2.13 has another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                self.model,
                device_ids=[self.dist.device] if self.dist.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    @classmethod
    def check(cls, config: TrainConfig, dist: Distributed) -> dict[str, Any]:
        refuse_if_too_large(cls, config, dist)
        return {}

    @classmethod
    def micro_batch(cls, config: TrainConfig, world_size: int) -> int:
        batch, parts = config.engine.global_batch_size, world_size * config.step.accum_iter
        if batch % parts:
            raise UserError(
                f"--global-batch-size: got {batch}, expected a multiple of {world_size} processes "
                f"x {config.step.accum_iter} micro-batches (--accum-iter)"
            )
        return batch // parts

    @classmethod
    def memory(
        cls, config: TrainConfig, world_size: int, micro_batch: int
    ) -> tuple[Parts, Parts, str]:
        with torch.device("meta"):
            model = DiT(**vars(config.model))
        freeze(model, config.step)
        total = sum(weight.numel() for weight in model.parameters())
        trained = {n: w.shape for n, w in model.named_parameters() if w.requires_grad}
        gradients = 4 * sum(shape.numel() for shape in trained.values())
        gpu = {
            "weights": 4 * total,
            "gradients": gradients,
            "optimizer": optimizer_bytes(config.optimizer, trained, model.matrices()),
            "EMA": 4 * total * len(config.emas),
            "activations": activation_bytes(config, micro_batch),
        }
        layout = f"{counted(world_size, 'process')}, each with the whole model"
        return gpu, {"EMA at a save": 4 * total}, layout

    def network(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        enabled = self.precision != torch.float32
        with torch.autocast(self.dist.device.type, self.precision, enabled=enabled):
            prediction, aux_loss = self.replica(x, t, y)
        return prediction.float(), aux_loss

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        if is_last or self.replica is self.model:
            return nullcontext()
        return self.replica.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def optimizer_step(self, step: int, rate: float, loss: Tensor) -> dict[str, Tensor] | None:
        self.scaler.unscale_(self.optimizer)
        grads = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        if self.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.grad_clip, grad_norm)
        for group, own in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = own * rate
        skipped = ~grad_norm.isfinite()
        overflowed = self.update_weights(skipped, loss)
        self.optimizer.zero_grad(set_to_none=not self.accumulates)
        if overflowed:
            return None
        for ema in self.emas:
            ema.update([self.weights], step, skipped)
        return {"grad_norm": grad_norm, "skipped": skipped}

    def update_weights(self, skipped: Tensor, loss: Tensor) -> bool:
        """Takes the optimizer's step unless it is to be skipped; returns whether fp16 overflowed.

        A loss that is itself broken, or gradients at scale 1, are no overflow: they would be the
        same at any scale.
        """
        if not self.scaler.is_enabled():
            step_unless(skipped, self.optimizer)
            return False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        before, self.scale = self.scale, self.scaler.get_scale()  # all that the host reads back
        if self.scale >= before:
            return False
        broken = self.dist.sum((~loss.isfinite()).float())
        if before > 1 and not broken:
            return True
        self.scale = before
        self.scaler.update(before)
        return False

    def is_finite(self) -> Tensor:
        tensors = [self.weights, *(average for ema in self.emas for average in ema.averages)]
        return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()

    @contextmanager
    def ema_weights(self, number: int = 0) -> Iterator[None]:
        averages, enabled = self.averages(number).values(), self.precision != torch.float32
        kept = [weight.data for weight in self.model.parameters()]
        try:
            self.model.eval()
            for weight, average in zip(self.model.parameters(), averages, strict=True):
                weight.data = average
            with torch.autocast(self.dist.device.type, self.precision, enabled=enabled):
                yield
        finally:
            for weight, data in zip(self.model.parameters(), kept, strict=True):
                weight.data = data
            self.model.train()

    def averages(self, number: int) -> dict[str, Tensor]:
        """An EMA's parts by the name of the parameter."""
        (flat,) = self.emas[number].averages
        names = [name for name, _ in self.model.named_parameters()]
        return dict(zip(names, parts_of(flat, self.model), strict=True))

    def ema_state_dict(self, number: int = 0) -> dict[str, Tensor]:
        return {**self.model.state_dict(), **self.averages(number)}

    def save_state(self, folder: Path) -> None:
        if self.dist.is_main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": state_of(self.optimizer, self.trained),
                "scaler": self.scaler.state_dict(),
            }
            write_pickle(folder / STATE_FILE, state)

    def load_state(self, folder: Path) -> None:
        rows = {name: slice(0, len(weight)) for name, weight in self.model.named_parameters()}
        state = read_state(folder, rows, self.dist.device)
        shapes = shapes_of(self.model.state_dict())
        with as_user_error(folder, "damaged, or of another model"):
            check_state(
                state, shapes, shapes_of(self.trained), self.config.optimizer, self.model.matrices()
            )
            load_state(self.optimizer, self.trained, state["optimizer"])
        self.model.load_state_dict(state["model"])
        if state["scaler"]:  # empty when it was saved in another precision
            self.scaler.load_state_dict(state["scaler"])
            self.scale = self.scaler.get_scale()
        for number, ema in enumerate(self.emas):
            stored = read_checkpoint(folder / ema_file(ema.name, is_first=not number)).state_dict
            for name, average in self.averages(number).items():
                average.copy_(stored[name])


@torch.no_grad()
def flatten_parameters(model: nn.Module) -> Tensor:
    """Moves all parameters of a model into one tensor, of which they become parts; returns it.

    They must be of one type and on one device. What is done to all of them, such as their moving
    average, is then one operation on the flat tensor.
    """
    parameters = list(model.parameters())
    flat = parameters[0].new_zeros(sum(padded(p.numel()) for p in parameters))
    for parameter, part in zip(parameters, parts_of(flat, model), strict=True):
        parameter.data = part.copy_(parameter)
    return flat


def parts_of(flat: Tensor, model: nn.Module) -> list[Tensor]:
    """The parts of a flat tensor that stand for the parameters of a model, in their shapes."""
    parts, start = [], 0
    for parameter in model.parameters():
        parts.append(flat[start : start + parameter.numel()].view_as(parameter))
        start += padded(parameter.numel())
    return parts


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
