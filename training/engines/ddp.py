"""Engine of train.py: every process holds the complete model (distributed data parallelism)."""

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from checkpoints.checkpoint import averages_of, read_record
from checkpoints.weights import (
    as_user_error,
    check_shapes,
    open_safetensors,
    shapes_of,
)
from conditions import Conditions
from models import DiT
from runtime.devices import DTYPES
from runtime.errors import UserError, pluralize, reported_as
from runtime.processes import Distributed
from runtime.tensor_file import Box
from training.auxiliary import PROJECTORS, is_of_model, projectors_of
from training.config import TrainConfig
from training.ema import Weights
from training.engine import Bytes, freeze, share_out
from training.engines.layout import Place
from training.engines.state import (
    STATE_FILES,
    read_state,
    rows_of,
    stored_boxes,
)
from training.memory import activation_bytes, copied_bytes, state_bytes
from training.optimizers import hidden_matrices, planned_state
from training.spikes import SpikeDetector
from wrappers import wrap_blocks


class DDPEngine:
    """fp32 master weights and EMAs, autocast steps; see `training.engine.Engine`."""

    copy_size = 1  # processes that together hold one copy of the model
    peers: ProcessGroup | None = None  # one process of each copy, with the same shards; None: all

    def __init__(
        self, dist: Distributed, config: TrainConfig, weights: Iterable[tuple[str, Tensor]]
    ):
        self.dist, self.config = dist, config
        with torch.device("meta"):
            self.model = DiT(config.model)
        freeze(self.model, config.step)
        projectors = projectors_of(
            config.model, config.auxiliary, config.shapes, config.run.global_seed
        )
        first = projectors.state_dict(prefix=f"{PROJECTORS}.")
        self.model.add_module(PROJECTORS, projectors.to("meta"))
        self.shapes = {n: weight.shape for n, weight in self.model.named_parameters()}  # whole
        self.distribute()
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        # This process's shards, which share the memory of the parameters.
        self.local: dict[str, nn.Parameter] = {
            n: nn.Parameter(w.detach().to_local(), w.requires_grad) if isinstance(w, DTensor) else w
            for n, w in self.parameters.items()
        }
        tensors = self.local_tensors()
        for name, whole in chain(first.items(), weights):
            tensors[name].copy_(whole[self.places.get(name, ...)])
        self.prepare()
        self.replica = self.replicated()

    def distribute(self) -> None:
        """Allocates the weights of this process, which may be shards, and the buffers."""
        self.model.to_empty(device=self.dist.device)

    def replicated(self) -> nn.Module:
        """Returns the model to call, which sums the gradients of all processes."""
        if self.dist.world_size == 1:
            return self.model
        if self.config.step.accum_iter > 1:
            # With gradients in place, micro-batches add up in DDP's buckets, not in a second copy.
            for weight in self.trained.values():
                weight.grad = torch.zeros_like(weight)
        device = self.dist.device
        is_new = torch.__version__ >= (2, 13)
        buffers = "forward_sync_buffers" if is_new else "broadcast_buffers"
        return DistributedDataParallel(
            self.model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{buffers: False},
        )

    def prepare(self) -> None:
        """Prepares a model for training once its weights are in place: checkpointing, compilation,
        EMAs, optimizer and loss scaler."""
        step = self.config.step
        if step.compile:
            # Otherwise PyTorch splits the graph of a block wherever a gradient bucket is full.
            torch._dynamo.config.optimize_ddp = False
        wrap_blocks(self.model, recomputed=step.recomputed, compiled=step.compile)
        self.averaged = {n: w for n, w in self.local.items() if is_of_model(n)}  # by EMAs
        self.emas = self.config.ema or [Weights()]
        for ema in self.emas:
            ema.start(self.averaged.values())
        # The tensors that the optimizer updates. An elementwise optimizer needs only local shards.
        tensors = self.local if self.config.optimizer.is_elementwise else self.parameters
        self.trained = {n: w for n, w in tensors.items() if w.requires_grad}
        self.optimizer = self.config.optimizer.make(
            self.trained, step.lr, hidden_matrices(self.model)
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.find_spikes = SpikeDetector(step.grad_skip, self.dist.device)
        self.precision = DTYPES[step.precision]
        self.scaler = torch.amp.GradScaler(
            self.dist.device.type, enabled=self.precision == torch.float16
        )

    @cached_property
    def places(self) -> dict[str, Place]:
        """Position of this process's shard within each parameter."""
        return {name: tuple(slice(0, n) for n in shape) for name, shape in self.shapes.items()}

    def box(self, name: str, values: Tensor) -> Box:
        """Returns the values of this process's shard of a parameter or EMA, with their position."""
        offset = tuple(limits.start for limits in self.places[name])
        return Box(tuple(self.shapes[name]), offset, values)

    @classmethod
    def check(cls, config: TrainConfig, world_size: int) -> dict[str, Any]:
        return {}

    @classmethod
    def micro_batch(cls, config: TrainConfig, world_size: int) -> int:
        batch, count = config.engine.global_batch_size, world_size * config.step.accum_iter
        if batch % count:
            raise UserError(
                f"--global-batch-size: got {batch}, expected a multiple of {world_size} processes "
                f"x {config.step.accum_iter} micro-batches (--accum-iter)"
            )
        return batch // count

    @classmethod
    def memory(cls, config: TrainConfig, world_size: int) -> tuple[Bytes, Bytes, str]:
        gpu, host = state_bytes(config), copied_bytes(config, world_size)
        gpu["activations"] = activation_bytes(config, cls.micro_batch(config, world_size))
        layout = f"{pluralize(world_size, 'process')}, each with the complete model"
        return gpu, host, layout

    def network(self, x: Tensor, t: Tensor, y: Conditions) -> tuple[Tensor, Tensor]:
        with self.autocast():
            prediction, aux_loss = self.replica(x, t, y)
        return prediction.float(), aux_loss

    def autocast(self) -> AbstractContextManager:
        enabled = self.precision != torch.float32
        return torch.autocast(self.dist.device.type, self.precision, enabled=enabled)

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        if is_last or self.replica is self.model:
            return nullcontext()
        return self.replica.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def optimizer_step(self, step: int, rate: float) -> dict[str, Tensor]:
        if isinstance(self.replica, DistributedDataParallel):
            self.check_gradients()
        self.scaler.unscale_(self.optimizer)
        weights = self.local_weights()
        grad_norm = self.total_norm([weight.grad for weight in weights])
        if most := self.config.step.grad_clip:
            nn.utils.clip_grads_with_norm_(weights, most, grad_norm)
        for group, initial_rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = initial_rate * rate
        skipped = ~grad_norm.isfinite() | self.find_spikes(grad_norm)
        # An optimizer with this attribute skips the step on the device, without a host sync.
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = skipped.float()
            self.optimizer.step()
        elif not skipped:  # the host waits for the value
            self.optimizer.step()
        self.scaler.update()
        if self.replica is not self.model and self.config.step.accum_iter > 1:
            self.optimizer.zero_grad(set_to_none=False)
        else:
            for name in self.trained:
                self.parameters[name].grad = self.local[name].grad = None
        for ema in self.emas:
            ema.update(self.averaged.values(), step, skipped)
        return {"grad_norm": grad_norm, "skipped": skipped}

    def check_gradients(self) -> None:
        """Raises UserError with the parameters that have no gradient: DDP did not sum the gradients
        of their buckets, and would say so only in the next step."""
        try:
            self.replica._check_reducer_finalized()
        except RuntimeError as error:
            named = [n for n, weight in self.parameters.items() if weight.requires_grad]
            numbers = re.findall(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            names = ", ".join(named[int(number)] for number in " ".join(numbers).split())
            raise UserError(
                f"{names}: got no gradient, expected one, because DDP sums gradients in buckets; "
                "make the loss depend on every parameter, or --freeze what is not used, or train "
                "with --shard"
            ) from error

    def local_weights(self) -> list[nn.Parameter]:
        """Returns this process's shards of the weights that have a gradient, with the gradient."""
        weights = []
        for name in self.trained:
            if (gradient := self.parameters[name].grad) is not None:
                self.local[name].grad = rows_of(gradient)
                weights.append(self.local[name])
        return weights

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Returns the norm of all gradients, given the shards of this process."""
        return nn.utils.get_total_norm(gradients)

    def is_finite(self) -> Tensor:
        averages = (average for ema in self.emas for average in ema.averages)
        fine = [tensor.isfinite().all() for tensor in (*self.averaged.values(), *averages)]
        fine += [~buffer.isnan().any() for buffer in self.model.buffers()]  # a mask may be infinite
        return torch.stack(fine).all()

    @contextmanager
    def ema_weights(self, number: int = 0) -> Iterator[None]:
        self.exchange(number)
        self.model.eval()
        try:
            with self.autocast():
                yield
        except Exception:
            self.abandon_forward()
            raise
        finally:
            self.exchange(number)
            self.model.train()

    def abandon_forward(self) -> None:
        """Cleans up after a forward pass that raised an exception."""

    def exchange(self, number: int) -> None:
        """Swaps the weights with an EMA."""
        self.emas[number].exchange(self.averaged.values())

    def average(self, number: int) -> dict[str, Box]:
        averages = zip(self.averaged, self.emas[number].averages, strict=True)
        boxes = {name: self.box(name, values) for name, values in averages if name in self.written}
        return boxes | self.written_buffers()

    def state(self) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        boxes: dict[str, Box] = {f"model/{n}": box for n, box in self.written_buffers().items()}
        numbers: dict[str, dict] = {}
        for name in self.written:
            box = boxes[f"model/{name}"] = self.box(name, self.local[name].detach())
            kept = self.optimizer.state[self.trained[name]] if name in self.trained else {}
            for key, value in kept.items():
                if not torch.is_tensor(value):
                    numbers.setdefault(name, {})[key] = value
                elif (values := rows_of(value)).shape == box.values.shape:
                    boxes[f"optimizer/{name}/{key}"] = replace(box, values=values)
                else:  # such as the step, a scalar
                    boxes[f"optimizer/{name}/{key}"] = Box.of_all(values)
        metadata = {
            "processes": self.dist.world_size, "numbers": numbers,
            "scaler": self.scaler.state_dict(), "spikes": self.find_spikes.state_dict(),
        }  # fmt: skip
        return STATE_FILES.format(self.dist.rank), *stored_boxes(boxes, metadata)

    @cached_property
    def written(self) -> set[str]:
        """Names of the parameters that this process writes to checkpoints.

        Of several processes with the same shards, one writes a parameter.
        """
        sizes = {name: weight.numel() for name, weight in self.parameters.items()}
        dist = self.dist
        copy, copies = dist.rank // self.copy_size, dist.world_size // self.copy_size
        return {name for name, writer in share_out(sizes, copies).items() if writer == copy}

    def written_buffers(self) -> dict[str, Box]:
        buffers = self.model.named_buffers() if self.dist.is_main else ()
        return {name: Box.of_all(buffer) for name, buffer in buffers}

    def local_tensors(self) -> dict[str, Tensor]:
        tensors = {name: weight.detach() for name, weight in self.local.items()}
        return tensors | dict(self.model.named_buffers())

    def load_state(self, folder: Path) -> None:
        """Reads the state in the first copy of the model, which broadcasts it to the others."""
        reads = self.dist.rank < self.copy_size
        self.dist.run_on_all(lambda: self.read_state(folder) if reads else None)
        self.dist.run_on_all(lambda: self.read_averages(folder) if reads else None)
        if self.dist.world_size > self.copy_size:
            self.share_state(reads)

    @torch.no_grad()
    def share_state(self, reads: bool) -> None:
        """Broadcasts the state from the first copy; shards of every copy have the same shapes."""
        kept = {name: self.optimizer.state[weight] for name, weight in self.trained.items()}
        # Tensors on the meta device stand for those that follow.
        box: list[Any] = [
            {name: {k: without_data(v) for k, v in state.items()} for name, state in kept.items()},
            self.scaler.state_dict(), self.find_spikes.state_dict(),
            [ema.start_share for ema in self.emas],  # in the header that all processes write
        ]  # fmt: skip
        torch.distributed.broadcast_object_list(box, group=self.peers, group_src=0)
        if not reads:
            states, scaler, spikes, shares = box
            for ema, share in zip(self.emas, shares, strict=True):
                ema.start_share = share
            for name, state in states.items():
                empty = {k: allocated(v, self.dist.device) for k, v in state.items()}
                kept[name] |= {k: distributed_as(self.trained[name], v) for k, v in empty.items()}
            self.scaler.load_state_dict(scaler)
            self.find_spikes.load_state_dict(spikes)
        tensors = [*self.local_tensors().values(), *(v for s in kept.values() for v in s.values())]
        tensors += [average for ema in self.emas for average in ema.averages]
        for tensor in map(rows_of, filter(torch.is_tensor, tensors)):
            if tensor.numel():
                torch.distributed.broadcast(tensor, group=self.peers, group_src=0)

    @torch.no_grad()
    def read_state(self, folder: Path) -> None:
        state, stored = read_state(folder, self.shapes, self.places, self.dist.device)
        tensors = self.local_tensors()
        # A branch may add or drop auxiliary losses, with their projectors.
        changed = {n for n in tensors.keys() ^ stored.keys() if not is_of_model(n)}
        local, stored = (
            {n: value for n, value in has.items() if n not in changed} for has in (tensors, stored)
        )
        expected = {name: self.shapes.get(name, tensor.shape) for name, tensor in local.items()}
        projectors = [name for name in local if not is_of_model(name)]
        trained = {name: local[name].shape for name in self.trained if name in local}
        planned = planned_state(self.config.optimizer, trained, hidden_matrices(self.model))
        source = f"the auxiliary losses of {folder}"
        other = f"--auxiliary: other options or features (--latents-path) than {source}"
        with reported_as(other, ValueError):
            check_shapes({n: expected[n] for n in projectors}, {n: stored[n] for n in projectors})
        with as_user_error(folder, "damaged, or of a different model"):
            check_shapes(stored, expected)
            kept = state["optimizer"]
            for name, moments in planned.items():
                if name in kept or not kept:  # a parameter that never had a gradient has no state
                    check_shapes(shapes_of(kept.get(name, {})), shapes_of(moments))
            for name, tensor in local.items():
                tensor.copy_(state["model"][name])
            for name in trained:
                weight, own = self.trained[name], kept.get(name, {}).items()
                self.optimizer.state[weight] = {k: distributed_as(weight, v) for k, v in own}
            # The scale is missing after a save in another precision, and below 1 after many nan
            # steps.
            if state["scaler"].get("scale", 0) >= 1:
                self.scaler.load_state_dict(state["scaler"])
            self.find_spikes.load_state_dict(state["spikes"])

    def read_averages(self, folder: Path) -> None:
        stored = averages_of(folder)  # a resumed run may have other EMAs, or another order
        for ema in self.emas:
            if ema.name not in stored:
                ema.start(self.averaged.values())
                continue
            path = stored[ema.name]
            ema.start_share = read_record(path).ema_start_share
            with (
                open_safetensors(path) as file,
                as_user_error(path, "damaged, or of a different model"),
            ):
                for name, average in zip(self.averaged, ema.averages, strict=True):
                    if average.numel():
                        average.copy_(file.get_slice(name)[self.places[name]])


def without_data(value: Any) -> Any:
    """Replaces the shard of a tensor by a tensor on the meta device."""
    return rows_of(value).to("meta") if torch.is_tensor(value) else value


def allocated(value: Any, device: torch.device) -> Any:
    """Replaces a tensor on the meta device by a tensor without values."""
    return torch.empty_like(value, device=device) if torch.is_tensor(value) else value


def distributed_as(weight: Tensor, shard: Any) -> Any:
    """Converts a shard to a DTensor with the layout of the weight, if the weight is a DTensor."""
    if not isinstance(weight, DTensor) or not torch.is_tensor(shard) or not shard.dim():
        return shard
    return DTensor.from_local(
        shard, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )
