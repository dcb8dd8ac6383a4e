"""Engine of train_deepspeed.py: every process holds a shard (DeepSpeed's ZeRO)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import MODEL_FILE
from checkpoints.checkpoint import averages_of, read_record
from checkpoints.weights import as_user_error, check_shapes, open_safetensors
from conditions import Conditions
from runtime.processes import Distributed
from runtime.tensor_file import Box
from training.config import TrainConfig
from training.ema import Weights
from training.engines import zero
from training.engines.state import (
    STATE_FILES,
    read_box,
    stored_boxes,
    stored_shards,
    whole_shape,
)
from training.engines.zero_config import complete_config, zero_memory
from wrappers import wrap_blocks

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's fp16


class DeepSpeedEngine:
    """Every process holds a shard of the optimizer state, the EMA and, under ZeRO-3, the weights.

    See `training.engine.Engine`. This engine tracks one EMA.
    """

    def __init__(
        self, dist: Distributed, config: TrainConfig, weights: Iterable[tuple[str, Tensor]]
    ):
        self.dist, self.config, step = dist, config, config.step
        self.copy_size = dist.world_size
        self.engine = zero.start_engine(
            config, complete_config(config, dist.world_size), dist.device
        )
        self.model, self.lr = self.engine.module, step.lr
        wrap_blocks(self.model, recomputed=step.recomputed, compiled=step.compile)
        scaler = vars(self.engine.optimizer.loss_scaler)
        # DeepSpeed would raise an error at the smallest loss scale; the training loop saves the run
        # before it stops it.
        if "raise_error_at_min_scale" in scaler:
            scaler["raise_error_at_min_scale"] = False
        self.shards = zero.Shards(self.engine, config.model)
        for name, value in weights:
            self.set_weight(name, value)
        zero.publish_masters(self.engine.optimizer)
        self.emas = config.ema or [Weights()]
        self.ema = self.emas[0]
        self.ema.start(self.shards.masters)

    @classmethod
    def check(cls, config: TrainConfig, world_size: int) -> dict[str, Any]:
        ds_config = complete_config(config, world_size)
        return {"global_batch_size": ds_config["train_batch_size"]}

    @classmethod
    def micro_batch(cls, config: TrainConfig, world_size: int) -> int:
        return config.engine.train_batch_size

    memory = staticmethod(zero_memory)

    def set_weight(self, name: str, whole: Tensor) -> None:
        """Writes a buffer, or a parameter to the master weights (see `publish_masters`)."""
        if name in self.shards.buffers:
            self.shards.buffers[name].copy_(whole)
        else:
            self.shards.scatter(name, whole, self.shards.masters)

    def network(self, x: Tensor, t: Tensor, y: Conditions) -> tuple[Tensor, Tensor]:
        prediction, aux_loss = self.engine(x, t, y)
        return prediction.float(), aux_loss

    @contextmanager
    def micro_step(self, is_last: bool) -> Iterator[None]:
        yield
        if not is_last:
            self.engine.step()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def optimizer_step(self, step: int, rate: float) -> dict[str, Tensor]:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.lr * rate
        self.engine.step()
        skipped = not self.engine.was_step_applied()  # no wait: ZeRO has read the norm
        if not skipped:
            self.ema.update(self.shards.masters, step)
        values = {"grad_norm": self.engine.get_global_grad_norm(), "skipped": skipped}
        return {k: torch.as_tensor(v, device=self.dist.device) for k, v in values.items()}

    def is_finite(self) -> Tensor:
        shards = self.shards
        fine = [tensor.isfinite().all() for tensor in (*shards.masters, *self.ema.averages)]
        # A mask may be infinite.
        fine += [~buffer.isnan().any() for buffer in shards.buffers.values()]
        # Masters and averages are on the host with CPU offload.
        return torch.stack([one.to(self.dist.device) for one in fine]).all()

    @contextmanager
    def ema_weights(self, number: int = 0) -> Iterator[None]:
        self.exchange()
        self.model.eval()
        try:
            yield
        finally:
            self.exchange()
            self.model.train()

    def exchange(self) -> None:
        """Swaps the master weights with the EMA and publishes them."""
        self.ema.exchange(self.shards.masters)
        zero.publish_masters(self.engine.optimizer)

    def average(self, number: int) -> dict[str, Box]:
        boxes = self.shards.boxes("{}", self.ema.averages)
        buffers = self.shards.buffers if self.dist.is_main else {}
        return boxes | {name: Box.of_all(buffer) for name, buffer in buffers.items()}

    def state(self) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        """Returns the state as `training.engines.state` has it, in boxes of flattened parameters,
        so that any number of processes can resume the run."""
        optimizer, boxes = self.engine.optimizer, {}
        kept = [(optimizer.optimizer.state[master], master) for master in self.shards.masters]
        moments = {  # missing if all steps were skipped
            kind: [one[kind] if kind in one else torch.zeros_like(master) for one, master in kept]
            for kind in MOMENTS
        }
        for title, partitions in self.partitions(moments).items():
            boxes |= self.shards.boxes(title, partitions)
        scaler = vars(optimizer.loss_scaler)
        metadata = {
            "processes": self.dist.world_size, "numbers": {},
            "step": int(kept[0][0].get("step", 0)),
            "scaler": {key: scaler[key] for key in SCALER if key in scaler},
        }  # fmt: skip
        return STATE_FILES.format(self.dist.rank), *stored_boxes(boxes, metadata)

    def partitions(self, moments: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Returns the master weights and AdamW's moments by title in a state, without the name."""
        titles = {f"optimizer/{{}}/{kind}": values for kind, values in moments.items()}
        return {"model/{}": self.shards.masters, **titles}

    def load_state(self, folder: Path) -> None:
        """Loads the state of a step folder, which any number of processes may have saved; a damaged
        file is an error on all processes."""
        self.dist.run_on_all(lambda: self.read_state(folder))
        self.dist.run_on_all(lambda: self.load_ema(folder))
        zero.publish_masters(self.engine.optimizer)

    @torch.no_grad()
    def read_state(self, folder: Path) -> None:
        stored, _, metadata = stored_shards(folder)
        masters, optimizer = self.shards.masters, self.engine.optimizer
        moments = {kind: [torch.zeros_like(master) for master in masters] for kind in MOMENTS}
        with as_user_error(folder, "damaged, or of a different model"):
            partitions = self.partitions(moments)
            sizes = {
                title.format(name): (shape.numel(),)
                for title in partitions for name, shape in self.shards.shapes.items()
            }  # fmt: skip
            check_shapes({title: whole_shape(shards) for title, shards in stored.items()}, sizes)
            for title, values in partitions.items():
                for name, fragment in self.shards.fragments.items():
                    whole = title.format(name)
                    box = read_box(whole, stored[whole], (slice(fragment.start, fragment.stop),))
                    fragment.local(values).copy_(box)
            # A run may add or drop CPU offload. The step is a tensor in torch's AdamW, and a number
            # in DeepSpeed's Adam for the CPU.
            has_tensors = isinstance(optimizer.optimizer, torch.optim.AdamW)
            for number, master in enumerate(masters):
                step = torch.tensor(float(metadata["step"]), device=master.device)
                state = {kind: values[number] for kind, values in moments.items()}
                state["step"] = step if has_tensors else metadata["step"]
                optimizer.optimizer.state[master] = state
            scaler, kept = vars(optimizer.loss_scaler), metadata["scaler"]
            if scaler.keys() & kept.keys() >= set(SCALER):  # fp16 before and now
                scaler |= {key: kept[key] for key in SCALER}

    def load_ema(self, folder: Path) -> None:
        """Reads the buffers and the EMA, one tensor at a time."""
        shards, stored = self.shards, averages_of(folder)
        path = stored.get(self.ema.name, folder / MODEL_FILE)
        with (
            open_safetensors(path) as file,
            as_user_error(path, "damaged, or of a different model"),
        ):
            for name, buffer in shards.buffers.items():
                buffer.copy_(file.get_tensor(name))
            if self.ema.name not in stored:
                self.ema.start(shards.masters)
                return
            self.ema.start_share = read_record(path).ema_start_share
            for name in shards.shapes:
                shards.scatter(name, file.get_tensor(name), self.ema.averages)
