"""The engine of train.py --shard: every process holds some rows of each weight (torch's FSDP2).

A block's weights are gathered where it computes, in the training precision, and dropped again;
its gradient is summed in fp32 and every process keeps its own rows. Routers compute in fp32: they
belong to the group of embeddings and output, which is gathered once a pass, in fp32, and autocast
does the rest as in `DDPEngine`.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from checkpoints import Checkpoint
from engines.ddp import DDPEngine
from engines.initial import allocate, build_empty, draw_initial_weights
from engines.state import place_of
from models import DiT
from runtime.devices import DTYPES
from runtime.errors import UserError, counted
from runtime.processes import Distributed
from training.config import TrainConfig
from training.engine import Bytes, freeze, node_size
from training.memory import activation_bytes, copied_bytes, kept_bytes, planned_model
from training.muon import rows_of


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
    def shards(self) -> list[Tensor]:
        return [rows_of(weight.detach()) for weight in self.parameters.values()]

    def averages(self, number: int) -> dict[str, Tensor]:
        return dict(zip(self.parameters, self.emas[number].averages, strict=True))

    @torch.no_grad()
    def set_weight(self, name: str, whole: Tensor) -> None:
        """Takes this process's rows of a parameter, or a buffer."""
        if name in self.parameters:
            weight = self.parameters[name]
            weight.to_local().copy_(whole[place_of(weight)])
        else:
            self.model.get_buffer(name).copy_(whole)

    @classmethod
    def check(cls, config: TrainConfig, dist: Distributed) -> dict[str, Any]:
        processes_of_a_copy(config, dist.world_size)
        return super().check(config, dist)

    @classmethod
    def memory(
        cls, config: TrainConfig, world_size: int, micro_batch: int
    ) -> tuple[Bytes, Bytes, str]:
        """Gathered weights at the peak: the root group (with the routers), the current block and
        the next one, or all blocks with --reshard-after-forward False. Unsharded gradients at the
        peak: one block's, before and after the cast to fp32."""
        parts = processes_of_a_copy(config, world_size)
        item = DTYPES[config.step.precision].itemsize
        model = planned_model(config)
        blocks = [sum(w.numel() for w in block_parameters(block)) for block in model.blocks]
        total = sum(weight.numel() for weight in model.parameters())
        root, largest = total - sum(blocks), max(blocks)
        gathered = 2 * largest if config.engine.reshard_after_forward else sum(blocks)
        gpu = {
            **kept_bytes(config, model, parts),
            "gathered weights": 4 * root + item * gathered,
            "whole gradients": (4 + item) * largest,
            "activations": activation_bytes(config, micro_batch),
        }
        layout = f"{counted(world_size, 'process')}, each with 1/{parts} of the model"
        return gpu, copied_bytes(gpu, world_size // parts), layout

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        # Each micro-batch is reduced within a copy of the model, the last one between the copies.
        self.model.set_requires_all_reduce(is_last)
        return nullcontext()

    def abandon_forward(self) -> None:
        """Drops the weights that an interrupted forward pass gathered, or is still gathering.

        Until the forward pass ends, FSDP keeps the weights of a module that stays gathered after
        it. The root's next forward pass omits its waits, so this method waits for the device.
        """
        self.model.set_reshard_after_forward(True)
        for module in (self.model, *self.model.blocks):
            module.unshard()
            module.reshard()
        self.model.set_reshard_after_forward(self.config.engine.reshard_after_forward)
        self.model.set_reshard_after_forward(False, recurse=False)  # as FSDP begins
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize(self.dist.device)

    def exchange(self, number: int) -> None:
        for module in (self.model, *self.model.blocks):
            module.reshard()  # drops what was gathered of the others
        super().exchange(number)


def processes_of_a_copy(config: TrainConfig, world_size: int) -> int:
    """Over how many processes a copy of the model is cut: --shard-size, or those of a node.

    Raises UserError unless they divide all processes.
    """
    if size := config.engine.shard_size:
        if world_size % size:
            raise UserError(
                f"--shard-size: got {size}, expected a divisor of {world_size} processes"
            )
        return size
    node = node_size(config, world_size)
    return node if world_size % node == 0 else world_size


def make_mesh(dist: Distributed, config: TrainConfig) -> DeviceMesh:
    """The processes as (copies of the model, parts of a copy), or as the parts of the only one."""
    kind = dist.device.type
    if not torch.distributed.is_initialized():  # no launcher: it is alone
        torch.distributed.init_process_group(
            "nccl" if kind == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0,
            world_size=1,
        )  # fmt: skip
    parts = processes_of_a_copy(config, dist.world_size)
    if parts == dist.world_size:
        return init_device_mesh(kind, (parts,), mesh_dim_names=("shard",))
    shape = dist.world_size // parts, parts
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def block_parameters(block: nn.Module) -> list[nn.Parameter]:
    """The parameters of a block's own group: all but its router's."""
    routers = set() if block.moe is None else set(block.moe.gate.parameters())
    return [weight for weight in block.parameters() if weight not in routers]


def shard(
    model: DiT, mesh: DeviceMesh, precision: torch.dtype, reshard_after_forward: bool
) -> None:
    """Cuts up a model of placeholders, block by block, so that no more than a block is whole."""
    gates = [block.moe.gate for block in model.blocks if block.moe is not None]
    in_gates = {weight for gate in gates for weight in gate.parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Of a block's routing, parts of which are views: nothing here changes outputs in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module.*view", UserWarning)
    for block in model.blocks:
        allocate(block_parameters(block))
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward,
            ignored_params=in_gates,
        )  # fmt: skip
    allocate([weight for weight in model.parameters() if not isinstance(weight, DTensor)])
    model.gates = nn.ModuleList(gates)  # for the root to find: it does not look into blocks
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    del model.gates
