"""Engine of train.py --shard: every process holds a shard of each weight (torch's FSDP2).

The weights of a block are gathered in the training precision when the block computes, and then
freed. The gradient of a block is summed in fp32, and every process keeps the shard that matches its
weights. A weight is sharded along its first divisible dimension (experts first). Routers compute in
fp32: they belong to the group of embeddings and output, gathered once per pass in fp32. Autocast
handles the rest as in `DDPEngine`.
"""

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from checkpoints.meta import meta_model
from diffusion import Objective
from models import DiT
from moe import Experts, SparseMoEBlock
from runtime.devices import DTYPES
from runtime.errors import UserError, pluralize
from runtime.processes import Distributed
from runtime.tensor_file import cut_dim
from training.config import TrainConfig
from training.engine import Bytes, node_size
from training.engines.ddp import DDPEngine
from training.engines.expert_parallel import keep_experts, spread
from training.engines.layout import (
    Layout,
    Place,
    experts_of_each,
    shard_dim,
    stored_of_each,
)
from training.memory import (
    activation_bytes,
    copied_bytes,
    planned_weights,
    received_rows,
    state_bytes,
    state_tensors,
)

MOST_RUNS = 10_000  # runs of contiguous bytes that a process writes to model.safetensors
MOST_PADDING = 1  # elements of padding per weight


class FSDPEngine(DDPEngine):
    """fp32 shards and EMAs, autocast steps on gathered weights; see `training.engine.Engine`."""

    def distribute(self) -> None:
        meshes = make_meshes(self.dist, self.config)
        shard(self.model, meshes, self.config)
        super().distribute()
        if meshes.model.ndim == 2:
            self.peers = meshes.model["replicate"].get_group()
        self.layout = layout_of(self.config, self.dist.world_size)
        self.copy_size = self.layout.size

    @cached_property
    def places(self) -> dict[str, Place]:
        index = self.dist.rank % self.layout.size
        return {name: self.layout.place(name, shape, index) for name, shape in self.shapes.items()}

    def replicated(self) -> DiT:
        return self.model  # FSDP2 sums the gradients

    @classmethod
    def check(cls, config: TrainConfig, world_size: int) -> dict[str, Any]:
        if config.step.precision == "fp16":
            expected = "bf16 or fp32: --shard does not support the loss scaling of fp16"
            raise UserError(f"--precision: got fp16 with --shard, expected {expected}")
        # Older versions allocate and fill the gathered weights within the transform, which fails.
        if config.objective.uses_jvp and torch.__version__ < (2, 13):
            raise UserError(
                f"--objective: got {config.step.objective} with --shard and torch "
                f"{torch.__version__}, expected torch 2.13 or newer, whose FSDP2 supports "
                "torch.func.jvp"
            )
        layout = layout_of(config, world_size)
        if layout.size > 1:
            check_state(config)
        if layout.spread > 1:
            check_experts(config)
        weights = planned_weights(config)
        if scalars := [name for name, weight in weights.items() if not weight.dim()]:
            expected = "a dimension, such as torch.empty(1)"
            raise UserError(f"--shard: got the scalar parameter {scalars[0]}, expected {expected}")
        check_layout(layout, weights)
        return super().check(config, world_size)

    @classmethod
    def memory(cls, config: TrainConfig, world_size: int) -> tuple[Bytes, Bytes, str]:
        """Returns the memory at the peak, see `training.engine.Engine`.

            gathered    weights of the root group (with the routers), the current block and the next
                        group, or of all blocks with --reshard-after-forward False
            unsharded   gradient of one group, both before and after its cast to fp32
            kept        rows from other processes, for the backward pass: on average as many as a
                        process sends
        A block is one group, or two with --expert-parallel: the experts, and all other weights.
        """
        layout, micro_batch = layout_of(config, world_size), cls.micro_batch(config, world_size)
        item = DTYPES[config.step.precision].itemsize
        model, weights = meta_model(config.model), planned_weights(config)
        shapes = {name: w[layout.place(name, w.shape, 0)].shape for name, w in weights.items()}
        padded = {w: layout.gathered(name) * shapes[name].numel() for name, w in weights.items()}
        experts = {weights[name] for name in layout.experts}
        groups = [
            [sum(padded[w] for w in group) for group in (block - experts, block & experts)]
            for block in map(set, map(block_parameters, model.blocks))
        ]
        blocks, largest = list(map(sum, groups)), max(map(max, groups))
        root = sum(padded.values()) - sum(blocks)
        is_freed = config.engine.reshard_after_forward
        gathered = max(blocks) + largest if is_freed else sum(blocks)
        gpu = {
            **state_bytes(config, shapes),
            "gathered weights": 4 * root + item * gathered,
            "whole gradients": (4 + item) * largest,
            "activations": activation_bytes(config, micro_batch),
        }
        if layout.spread > 1:
            rows = received_rows(config, micro_batch)
            # Selective checkpointing also keeps the rows that are returned, here and there.
            copies = 3 if config.step.recomputed == "selective" else 1
            gpu["exchanged rows"] = copies * item * rows * config.model.hidden_size
        total = sum(weight.numel() for weight in weights.values())
        text = f"{pluralize(world_size, 'process')}, each with 1/{layout.size} of the model"
        if layout.spread > 1:
            text += f", experts in parallel on {layout.spread}"
        if (padding := layout.size * sum(s.numel() for s in shapes.values()) / total - 1) >= 0.005:
            text += f", {padding:.0%} more on the fullest"
        return gpu, copied_bytes(config, world_size // layout.size, shapes), text

    def micro_step(self, is_last: bool) -> AbstractContextManager:
        # Each micro-batch reduces gradients within a copy of the model. The last micro-batch then
        # reduces the accumulated gradients between the copies.
        self.model.set_requires_all_reduce(is_last)
        return nullcontext()

    def abandon_forward(self) -> None:
        """Frees the weights that an interrupted forward pass gathered or is gathering.

        `reshard` ignores modules with reshard_after_forward False, so it is set first. The next
        forward pass of the root omits FSDP's waits between streams, so the device is awaited here.
        """
        self.model.set_reshard_after_forward(True)
        for module in groups_of(self.model):
            module.unshard()
            module.reshard()
        self.model.set_reshard_after_forward(self.config.engine.reshard_after_forward)
        self.model.set_reshard_after_forward(False, recurse=False)  # FSDP's default for the root
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize(self.dist.device)

    def local_weights(self) -> list[nn.Parameter]:
        weights = super().local_weights()
        if self.layout.spread > 1:
            # An expert's gradient sums over the processes that send it rows, but FSDP averages only
            # over those that hold it.
            spread = [self.local[n] for n in self.trained if n in self.layout.experts]
            if gradients := [weight.grad for weight in spread if weight.grad is not None]:
                torch._foreach_div_(gradients, self.layout.spread)
        return weights

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        # Over all processes, so that every copy of the model gets the same bits.
        copies = self.dist.world_size // self.layout.size
        return (self.dist.sum(super().total_norm(gradients).square()) / copies).sqrt()

    def exchange(self, number: int) -> None:
        for module in groups_of(self.model):
            module.reshard()  # free the gathered weights, which are not exchanged
        super().exchange(number)


def layout_of(config: TrainConfig, world_size: int) -> Layout:
    """Returns the layout for --shard-size and --expert-parallel; by default one copy per node."""
    node, spread = node_size(config, world_size), config.engine.expert_parallel
    size = config.engine.shard_size or (node if world_size % node == 0 else world_size)
    if world_size % size:
        raise UserError(f"--shard-size: got {size}, expected a divisor of {world_size} processes")
    if size % spread:
        raise UserError(
            f"--expert-parallel: got {spread}, expected a divisor of the {size} processes that "
            "share a copy of the model (--shard-size)"
        )
    experts = config.model.num_experts
    if spread > max(1, experts):
        raise UserError(f"--expert-parallel: got {spread}, expected at most {experts} experts")
    extra = config.model.experts_per_layer - experts
    names = meta_model(config.model).expert_parameters() if spread > 1 else ()
    return Layout(size // spread, spread, extra, frozenset(names))


def count_runs(layout: Layout, weights: dict[str, Tensor]) -> dict[str, int]:
    """Returns the number of runs in which a process writes its shard of each weight to a file."""
    runs = {}
    for name, weight in weights.items():
        size = weight[layout.place(name, weight.shape, 0)].shape
        runs[name] = math.prod(size[: cut_dim(size, weight.shape)])
    return runs


def count_padding(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns the number of elements that FSDP2 adds to each weight to make its shards equal."""
    padding, alone = {}, replace(layout, shards=1)
    for name, weight in weights.items():
        gathered = layout.gathered(name) * weight[layout.place(name, weight.shape, 0)].numel()
        whole = alone.gathered(name) * weight[alone.place(name, weight.shape, 0)].numel()
        padding[name] = gathered - whole
    return padding


def fault_of(layout: Layout, weights: Mapping[str, Tensor]) -> str:
    """Says what is wrong with shards that are scattered over so many rows of a checkpoint's tensors
    that a save would take minutes, or that are padded so much that most traffic would be padding.
    """
    runs, padding = count_runs(layout, weights), count_padding(layout, weights)
    share = sum(padding.values()) / sum(weight.numel() for weight in weights.values())
    if sum(runs.values()) > MOST_RUNS:
        worst = max(runs, key=runs.get)
        what, how = "scatters", f"over {sum(runs.values()):,} pieces of a checkpoint per process"
    elif share > MOST_PADDING:
        worst = max(padding, key=padding.get)
        what, how = "pads", f"by {share:.0%} of the model, expected at most {MOST_PADDING:.0%}"
    else:
        return ""
    return f"{what} the shards of {worst} {tuple(weights[worst].shape)} and others {how}"


def check_layout(layout: Layout, weights: Mapping[str, Tensor]) -> None:
    """Refuses a layout with a fault, see `fault_of`."""
    if not (fault := fault_of(layout, weights)):
        return
    sizes = range(layout.shards - 1, 0, -1)
    smaller = (replace(layout, shards=n) for n in sizes if layout.shards % n == 0)
    fits = next((x for x in smaller if not fault_of(x, weights)), None)
    expected = f"{fits.size} or fewer" if fits else "a larger --expert-parallel"
    if fits and fits.size == 1:
        expected = "another number of processes"
    raise UserError(f"--shard-size: got {layout.size}, which {fault}; expected {expected}")


def check_state(config: TrainConfig) -> None:
    """Refuses an optimizer whose state has other shapes than its weights, such as Adafactor's means
    of rows: their shards cannot be saved.
    """
    shapes, _, state = state_tensors(config)
    for name, kept in state.items():
        for key, value in kept.items():
            if torch.is_tensor(value) and value.dim() and value.shape != shapes[name]:
                raise UserError(
                    f"--optimizer: {config.step.optimizer} keeps {key} {tuple(value.shape)} for "
                    f"{name} {tuple(shapes[name])}; --shard requires tensors of the same shape"
                )


def check_experts(config: TrainConfig) -> None:
    """Refuses expert parallelism of experts that share a parameter, whose gradient each process
    would sum over other processes, and of extra experts with a forward pass of their own, which
    would read parameters of other experts.
    """
    for name, module in meta_model(config.model).named_modules():
        if not isinstance(module, SparseMoEBlock):
            continue
        experts, fault = module.experts, ""
        if experts.shared:
            shared = ", ".join(f"{name}.experts.{one}" for one in experts.shared)
            fault = f"the experts share {shared}; --shard alone can cut them"
        elif module.gate.extra_experts and type(experts).forward is not Experts.forward:
            fault = f"{type(experts).__name__} overrides forward, and {config.model.router} has "
            fault += "experts that every process computes"
        if fault:
            got = f"--expert-parallel: got {config.engine.expert_parallel}"
            raise UserError(f"{got}, expected 1, because {fault}")


class Meshes(NamedTuple):
    model: DeviceMesh  # (copies, processes per copy), or (processes,) for a single copy
    experts: DeviceMesh | None = None  # (copies, processes that share experts)
    spread: DeviceMesh | None = None  # processes that hold different experts


def make_meshes(dist: Distributed, config: TrainConfig) -> Meshes:
    kind = dist.device.type
    if not torch.distributed.is_initialized():  # one process, without a launcher
        torch.distributed.init_process_group(
            "nccl" if kind == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0,
            world_size=1,
        )  # fmt: skip
    layout = layout_of(config, dist.world_size)
    shards, spread = layout.shards, layout.spread
    copies = dist.world_size // (shards * spread)
    names = ("replicate", "shard") if copies > 1 else ("shard",)

    # A single copy has no dimension "replicate", so the first size is then left out.
    def mesh(*sizes: int, names: tuple[str, ...]) -> DeviceMesh:
        return init_device_mesh(kind, sizes[-len(names) :], mesh_dim_names=names)

    model = mesh(copies, shards * spread, names=names)
    if spread == 1:
        return Meshes(model)
    both = mesh(copies, shards, spread, names=(*names, "spread"))
    return Meshes(model, both[names], both["spread"])


def groups_of(model: DiT) -> list[FSDPModule]:
    """Returns the modules whose weights are gathered together: root, blocks and spread experts."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def block_parameters(block: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters in the groups of a block: all except the router's."""
    routers = set() if block.moe is None else set(block.moe.gate.parameters())
    return [weight for weight in block.parameters() if weight not in routers]


def shard(model: DiT, meshes: Meshes, config: TrainConfig) -> None:
    """Shards a model on the meta device, block by block."""
    gates = [block.moe.gate for block in model.blocks if block.moe is not None]
    in_gates = {weight for gate in gates for weight in gate.parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.step.precision], reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )  # fmt: skip

    def wrap(module: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
        num_shards = mesh["shard"].size()
        options |= {"shard_placement_fn": lambda weight: Shard(shard_dim(weight.shape, num_shards))}
        fully_shard(module, mesh=mesh, **options)

    # The routing that a block returns contains views, but this code never changes outputs in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module.*view", UserWarning)
    options = {"mp_policy": policy, "ignored_params": in_gates}
    options["reshard_after_forward"] = config.engine.reshard_after_forward
    # Mean flow calls the network with parts of a batch, of a random number of images.
    is_whole = type(config.objective).draw is Objective.draw
    for block in model.blocks:
        if meshes.spread is not None and block.moe is not None:
            experts = block.moe.experts
            size, extra = meshes.spread.size(), block.moe.gate.extra_experts
            number = config.model.num_experts
            stored = stored_of_each(number, size, extra)
            keep_experts(experts, stored, meshes.spread.get_local_rank())
            routed, group = experts_of_each(number, size), meshes.spread.get_group()
            spread(experts, group, routed, extra, has_equal_batches=is_whole)
            wrap(experts, meshes.experts, **options)
        wrap(block, meshes.model, **options)
    model.gates = nn.ModuleList(gates)  # for the root to find: it does not look into blocks
    wrap(model, meshes.model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    del model.gates
    # Processes may use different parameters. Without zeros for those that a process does not use,
    # its gradients would be added to those of other parameters.
    if hasattr(model, "set_reduce_scatter_unused_params"):  # from PyTorch 2.13
        model.set_reduce_scatter_unused_params(True)
    # The host waits for numbers of rows in a layer, and issues the next gathers before that.
    for number, block in enumerate(model.blocks if meshes.spread is not None else ()):
        _, *experts = groups_of(block)
        following = model.blocks[number + 1 : number + 2]
        block.set_modules_to_forward_prefetch([*experts, *following])
