"""How --shard cuts a model up: over which processes, in which groups, and what each then keeps."""

import os
import warnings

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from models import DiT
from runtime.devices import DTYPES
from runtime.errors import UserError, counted
from runtime.processes import Distributed
from training.config import TrainConfig
from training.engine import Parts
from training.memory import activation_bytes, kept_bytes, planned_model


def own_rows(count: int, part: int, parts: int) -> slice:
    """The rows of part number `part`, as FSDP cuts: equal parts but for the last ones."""
    size = -(-count // parts)
    return slice(min(count, part * size), min(count, part * size + size))


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
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", min(8, world_size)))
    node = config.run.gpus_per_node or launched
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
    routers = [] if block.moe is None else list(block.moe.gate.parameters())
    in_router = set(routers)
    return [weight for weight in block.parameters() if weight not in in_router]


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


def allocate(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.data = weight.data.contiguous()


def sharded_memory(
    config: TrainConfig, world_size: int, micro_batch: int
) -> tuple[Parts, Parts, str]:
    """What a process keeps under --shard.

    Of gathered weights there are those of the root, routers included, of the block that computes
    and of the next one; of whole gradients those of a block, before and after the cast to fp32, or
    with accumulation those of all blocks.
    """
    parts = processes_of_a_copy(config, world_size)
    item = DTYPES[config.step.precision].itemsize
    model = planned_model(config)
    blocks = [sum(w.numel() for w in block_parameters(block)) for block in model.blocks]
    total = sum(weight.numel() for weight in model.parameters())
    root, largest = total - sum(blocks), max(blocks)
    gathered = 2 * largest if config.engine.reshard_after_forward else sum(blocks)
    whole = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    gpu = {
        **kept_bytes(config, model, parts),
        "gathered weights": 4 * root + item * gathered,
        "whole gradients": 4 * (whole if config.step.accum_iter > 1 else largest) + item * largest,
        "activations": activation_bytes(config, micro_batch),
    }
    layout = f"{counted(world_size, 'process')}, each with 1/{parts} of the model"
    return gpu, {"EMA at a save": 4 * total}, layout
