"""The engine of train.py: every process holds the whole model (distributed data parallelism)."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints import MODEL_FILE, Checkpoint, read_checkpoint
from checkpoints.weights import (
    as_user_error,
    check_shapes,
    read_pickle,
    shapes_of,
    write_pickle,
)
from models import DiT, DiTConfig
from runtime.devices import DTYPES
from runtime.errors import UserError
from runtime.processes import Distributed, reseed
from training.config import TrainConfig
from training.finetune import freeze

STATE_FILE = "training_state.pt"
ALIGNMENT = 64  # numbers; grouped products on a GPU want weights that start at 16 bytes


class DDPEngine:
    """fp32 master weights and EMA, autocast steps; see `training.loop` for what an engine does."""

    def __init__(
        self,
        dist: Distributed,
        config: TrainConfig,
        model_config: DiTConfig,
        weights: Checkpoint | None,
    ):
        self.dist = dist
        self.model = DiT(**vars(model_config))
        if weights is not None:
            self.model.load_state_dict(weights.state_dict)
        else:  # again, so that the draws follow from the seed alone
            reseed(config.global_seed)
            self.model.initialize_weights()
        freeze(self.model, config.freeze, config.train_router_only)
        self.model.to(dist.device).train()
        self.model.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            self.model.compile_blocks()
        self.weights = flatten_parameters(self.model)
        self.ema = self.weights.clone()
        self.ema_decay, self.grad_clip = config.ema_decay, config.grad_clip
        self.optimizer = torch.optim.AdamW(
            [weight for weight in self.model.parameters() if weight.requires_grad],
            lr=config.lr, betas=config.adam_betas, weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.precision = DTYPES[config.precision]
        self.scaler = torch.amp.GradScaler(
            dist.device.type, enabled=self.precision == torch.float16
        )
        self.scale = self.scaler.get_scale()  # of the loss, as the host knows it
        self.replica = self.model
        if dist.world_size > 1:
            with warnings.catch_warnings():  # torch 2.13 has another name for broadcast_buffers
                warnings.simplefilter("ignore", FutureWarning)
                self.replica = DistributedDataParallel(
                    self.model,
                    device_ids=[dist.device] if dist.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )

    def network(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The model in the training precision; returns (prediction fp32, aux_loss)."""
        enabled = self.precision != torch.float32
        with torch.autocast(self.dist.device.type, self.precision, enabled=enabled):
            prediction, aux_loss = self.replica(x, t, y)
        return prediction.float(), aux_loss

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of a micro-batch: gradients travel in the last."""
        if is_last or self.replica is self.model:
            return nullcontext()
        return self.replica.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients those of a micro-batch's share of the loss."""
        self.scaler.scale(loss).backward()

    def optimizer_step(self, lr: float, loss: Tensor) -> tuple[Tensor, Tensor] | None:
        """Updates weights and EMA; returns the gradient's norm and whether the step was skipped.

        A step whose gradient is infinite or nan, on the device (N) bool, is skipped. None when fp16
        gradients overflowed: nothing was updated, and they have to be computed again at the loss
        scale that this lowered. loss is the step's own, which says whether that can help.
        """
        self.scaler.unscale_(self.optimizer)
        grads = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        if self.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.grad_clip, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        skipped = ~grad_norm.isfinite()
        overflowed = self.update_weights(skipped, loss)
        self.optimizer.zero_grad(set_to_none=True)
        if overflowed:
            return None
        # A skipped step adds nothing, and the device is not waited for to know it.
        self.ema.lerp_(self.weights, torch.where(skipped, 0.0, 1 - self.ema_decay))
        return grad_norm, skipped

    def update_weights(self, skipped: Tensor, loss: Tensor) -> bool:
        """Takes the optimizer's step unless it is to be skipped; returns whether fp16 overflowed.

        A loss that is itself broken, or gradients at scale 1, are no overflow: they would be the
        same at any scale.
        """
        if not self.scaler.is_enabled():
            if self.optimizer.defaults.get("fused"):  # the device skips it, as GradScaler has it
                self.optimizer.found_inf = skipped.float()
                self.optimizer.step()
            elif not skipped:
                self.optimizer.step()
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
        """Whether all weights and their EMA are finite, a bool scalar."""
        return self.weights.isfinite().all() & self.ema.isfinite().all()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The model computes with its EMA weights, in eval mode, in the training precision."""
        averages, enabled = parts_of(self.ema, self.model), self.precision != torch.float32
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

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The whole EMA, fp32, in the layout of `DiT`."""
        names = [name for name, _ in self.model.named_parameters()]
        averages = dict(zip(names, parts_of(self.ema, self.model), strict=True))
        return {**self.model.state_dict(), **averages}

    def save_state(self, folder: Path) -> None:
        """Writes what is needed to go on beside the EMA."""
        if self.dist.is_main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            write_pickle(folder / STATE_FILE, state)

    def load_state(self, folder: Path) -> None:
        """Takes up what a step folder has; UserError when it does not fit."""
        path = folder / STATE_FILE
        if not path.is_file():
            raise UserError(f"{folder}: no {STATE_FILE} in it, expected a checkpoint of train.py")
        state = read_pickle(path, self.dist.device, mmap=False)
        with as_user_error(path, "damaged"):
            moments = self.check_state(state)
        averages = read_checkpoint(folder / MODEL_FILE).state_dict
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # as the flags now say
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if state["scaler"]:  # empty when it was saved in another precision
            self.scaler.load_state_dict(state["scaler"])
            self.scale = self.scaler.get_scale()
        for (name, _), average in zip(
            self.model.named_parameters(), parts_of(self.ema, self.model), strict=True
        ):
            average.copy_(averages[name])

    def check_state(self, state: dict) -> dict[int, dict[str, Tensor]]:
        """Returns the optimizer's part of a stored state, by the number of the parameter.

        Raises what `as_user_error` turns into a UserError if tensors are missing or do not fit.
        """
        check_shapes(shapes_of(state["model"]), shapes_of(self.model.state_dict()))
        moments = {}
        for number, weight in enumerate(self.optimizer.param_groups[0]["params"]):
            moments[number] = state["optimizer"]["state"].get(number, {})
            shapes = {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
            check_shapes(shapes_of(moments[number]), shapes)
        return moments


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
