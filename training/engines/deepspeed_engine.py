"""Engine of train_deepspeed.py: every process holds a shard (DeepSpeed's ZeRO)."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import MODEL_FILE
from checkpoints.checkpoint import averages_of, read_record
from checkpoints.weights import (
    as_user_error,
    check_shapes,
    open_safetensors,
    read_tensors,
    shapes_of,
)
from conditions import Conditions
from runtime.errors import UserError
from runtime.processes import Distributed
from runtime.tensor_file import Box
from training.config import TrainConfig
from training.engines import zero
from training.engines.state import FACTS_KEY
from training.engines.zero_config import complete_config, zero_memory
from wrappers import wrap_blocks

STATE_FILES = "deepspeed/rank_{:05d}_optim_states.safetensors"
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
        self.shards = zero.Shards(self.engine, config.model, dist.device)
        for name, value in weights:
            self.set_weight(name, value)
        zero.publish_masters(self.engine.optimizer)
        self.emas = config.ema
        self.ema = self.emas[0]
        self.ema.start(self.shards.masters)

    @classmethod
    def check(cls, config: TrainConfig, world_size: int) -> dict[str, Any]:
        if config.objective.uses_jvp:
            raise UserError(
                f"--objective: got {config.step.objective.name}, which needs torch.func.jvp; "
                "DeepSpeed does not support it, use train.py, with --shard for a large model"
            )
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
        tensors = (*shards.masters, *self.ema.averages, *shards.buffers.values())
        device = self.dist.device  # masters and averages are on the host with CPU offload
        return torch.stack([tensor.isfinite().all().to(device) for tensor in tensors]).all()

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
        """Gathers the EMA on the first process, which writes it: a process's shard, a range of a
        flattened tensor, is no `Box`."""
        whole = dict(self.shards.buffers) if self.dist.is_main else {}
        for name in self.shards.shapes:
            values = self.shards.gather(name, self.ema.averages)
            if self.dist.is_main:
                whole[name] = values
        return {name: Box.of_all(values) for name, values in whole.items()}

    def state(self) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        """Returns this process's tensors with their positions, which allow any number of processes
        to resume the run."""
        masters, optimizer = self.shards.masters, self.engine.optimizer
        adam = [optimizer.optimizer.state[master] for master in masters]
        tensors = {f"masters/{n}": master.detach() for n, master in enumerate(masters)}
        for kind in MOMENTS:  # missing if all steps were skipped
            for n, (master, kept) in enumerate(zip(masters, adam, strict=True)):
                tensors[f"{kind}/{n}"] = kept[kind] if kind in kept else torch.zeros_like(master)
        step = adam[0].get("step", torch.zeros(()))  # a number in DeepSpeed's Adam for the CPU
        if torch.is_tensor(step):
            tensors["step"], step = step, None
        scaler = vars(optimizer.loss_scaler)
        facts = {
            "world_size": self.dist.world_size, "fragments": self.places(), "step": step,
            "scaler": {key: scaler[key] for key in SCALER if key in scaler},
        }  # fmt: skip
        return STATE_FILES.format(self.dist.rank), tensors, {FACTS_KEY: json.dumps(facts)}

    def places(self) -> dict[str, list[dict]]:
        """Returns the positions of this process's fragments, as plain values."""
        return {n: list(map(asdict, fragments)) for n, fragments in self.shards.fragments.items()}

    def load_state(self, folder: Path) -> None:
        """Loads the state of a step folder, which any number of processes may have saved; a damaged
        file is an error on all processes."""
        self.dist.run_on_all(lambda: self.read_state(folder))
        self.dist.run_on_all(lambda: self.load_ema(folder))
        zero.publish_masters(self.engine.optimizer)

    def read_state(self, folder: Path) -> None:
        files = sorted(folder.glob(STATE_FILES.replace("{:05d}", "*")))
        if not files:
            raise UserError(
                f"{folder}: got no {STATE_FILES.format(0)}, expected one per process "
                "(--finetune reads only the weights)"
            )
        path = files[self.dist.rank % len(files)]
        stored = read_part(path)
        with as_user_error(path, "damaged, or of a different model"):
            if len(files) != stored["world_size"]:
                raise ValueError(f"got {len(files)} files, expected {stored['world_size']}")
            partitions = stored["partitions"]
            if len(files) != self.dist.world_size or stored["fragments"] != self.places():
                partitions = self.repartition([read_part(path) for path in files])
            self.set_state(partitions, stored["step"])
        scaler = vars(self.engine.optimizer.loss_scaler)
        if scaler.keys() >= set(SCALER):  # dynamic, as under fp16
            scaler |= {k: v for k, v in stored.get("scaler", {}).items() if k in SCALER}

    def set_state(self, partitions: dict[str, list[Tensor]], step: Tensor | int) -> None:
        """Sets master weights and AdamW's state."""
        optimizer = self.engine.optimizer.optimizer
        # A run may add or drop CPU offload. The step is a tensor in torch's AdamW, and a number in
        # DeepSpeed's Adam for the CPU.
        has_tensors = isinstance(optimizer, torch.optim.AdamW)
        for number, master in enumerate(self.shards.masters):
            values = {kind: tensors[number] for kind, tensors in partitions.items()}
            check_shapes(shapes_of(values), dict.fromkeys(("masters", *MOMENTS), master.shape))
            with torch.no_grad():
                master.copy_(values.pop("masters"))
            state = {kind: torch.empty_like(master).copy_(part) for kind, part in values.items()}
            count = torch.tensor(float(step), device=master.device)
            state["step"] = count if has_tensors else int(step)
            optimizer.state[master] = state

    def repartition(self, states: list[dict]) -> dict[str, list[Tensor]]:
        """Repartitions the state of other processes, one complete tensor at a time."""
        masters, shards = self.shards.masters, self.shards
        result = {kind: list(map(torch.zeros_like, masters)) for kind in ("masters", *MOMENTS)}
        for name in shards.shapes:
            stored = [[zero.Fragment(**f) for f in state["fragments"][name]] for state in states]
            got = sum(part.stop - part.start for fragments in stored for part in fragments)
            if got != (expected := shards.shapes[name].numel()):
                raise ValueError(f"{name}: got {got} numbers, expected {expected}")
            for kind, partitions in result.items():
                whole = torch.zeros(shards.shapes[name])
                for fragments, state in zip(stored, states, strict=True):
                    for fragment in fragments:
                        fragment.copy_to(whole, state["partitions"][kind])
                shards.scatter(name, whole, partitions)
        return result

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


def read_part(path: Path) -> dict[str, Any]:
    """Reads the file of one process: "partitions", "fragments", "world_size" and "step"."""
    tensors, metadata = read_tensors(path)
    with as_user_error(path, "damaged, or of a different model"):
        stored = json.loads(metadata[FACTS_KEY])
        count = sum(name.startswith("masters/") for name in tensors)
        kinds = ("masters", *MOMENTS)
        stored["partitions"] = {k: [tensors[f"{k}/{n}"] for n in range(count)] for k in kinds}
        stored["step"] = tensors.get("step", stored["step"])
    return stored
