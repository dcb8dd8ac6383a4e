"""Builds a DiT under DeepSpeed without an unsharded copy, and finds its shards.

ZeRO shards the fp32 master weights over the processes, in a layout that only this module knows.
Other modules see the parameters of `models.DiT`, flattened, and a range of each on every process.
"""

import logging
import os
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from checkpoints.meta import meta_model
from models import DiT, DiTConfig
from runtime.devices import DTYPES
from runtime.errors import print_safely, reported_as
from runtime.tensor_file import Box
from training.config import TrainConfig

STARTED = time.time()


def start_engine(
    config: TrainConfig, ds_config: dict, device: torch.device
) -> deepspeed.DeepSpeedEngine:
    """Builds a DiT with uninitialised weights and passes it to DeepSpeed.

    Under ZeRO-3 each parameter is sharded before the next one is allocated.
    """
    quieten()
    deepspeed.init_distributed(verbose=False)
    dtype = DTYPES[config.step.precision]
    with torch.device("meta"):
        model = DiT(config.model)
    # Autocast, as under DDP. The model itself enables autocast, because DeepSpeed disables any
    # autocast that is enabled outside its engine.
    enabled = dtype != torch.float32
    model.forward = torch.autocast(device.type, dtype, enabled=enabled)(model.forward)
    announce_compilation(ds_config)
    refusals = (ValueError, TypeError, AssertionError, DeepSpeedConfigError)
    with reported_as("--deepspeed_config: DeepSpeed rejects the settings", *refusals):
        allocate_modules(model, ds_config, dtype, device)
        engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    return engine


def announce_compilation(ds_config: dict) -> None:
    """Prints where DeepSpeed compiles its Adam for the CPU, and names the lock of a stopped run,
    for whose deletion DeepSpeed waits silently.
    """
    is_offloaded = (
        ds_config["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu"
    )
    if not is_offloaded or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/cpu_adam/lock"):
        with suppress(OSError):  # the other process has just finished
            if lock.stat().st_mtime < STARTED - 1:  # file systems round
                print_safely(
                    f"WARNING: {lock}: another process compiles DeepSpeed's Adam, and this run "
                    "waits; if no other run is starting, a stopped run left the lock: delete it"
                )
    if not any(root.glob("**/cpu_adam/*.so")):
        print_safely(f"DeepSpeed compiles its Adam for the CPU in {root}, which takes a minute")


def allocate_modules(
    model: nn.Module, ds_config: dict, dtype: torch.dtype, device: torch.device
) -> None:
    """Allocates the weights, in `dtype`, and the buffers of a model on the meta device.

    ZeRO-3 shards each module before the next one is allocated.
    """
    is_stage_3 = ds_config["zero_optimization"]["stage"] == 3
    for module in reversed(list(model.modules())):
        weights = list(module.parameters(recurse=False))
        for weight in weights:
            weight.data = weight.data.to(dtype)
        module.to_empty(device=device, recurse=False)
        if is_stage_3 and weights:
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)


@dataclass(frozen=True)
class Fragment:
    """A process's part of a flattened parameter: the elements from `start` to `stop`."""

    start: int
    stop: int
    group: int  # index of the flat partition that contains the elements
    offset: int  # position of the first element in the partition

    def local(self, partitions: list[Tensor]) -> Tensor:
        return partitions[self.group][self.offset : self.offset + self.stop - self.start]


class Shards:
    """Converts between partitions and parameters.

    `partitions` are lists of flat fp32 tensors: the master weights, the EMA or AdamW's moments.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: DiTConfig):
        model = engine.module
        self.masters = master_partitions(engine.optimizer)
        standard = meta_model(config)
        self.shapes = {name: weight.shape for name, weight in standard.named_parameters()}
        self.buffers = {name: model.get_buffer(name) for name, _ in standard.named_buffers()}
        self.fragments: dict[str, Fragment] = {}  # of this process
        for name, weight in model.named_parameters():
            if (fragment := find_master(engine.optimizer, weight)) is not None:
                self.fragments[name] = fragment

    @torch.no_grad()
    def scatter(self, name: str, whole: Tensor, partitions: list[Tensor]) -> None:
        """Writes this process's part of an unsharded parameter, which every process passes."""
        if fragment := self.fragments.get(name):
            values = whole.flatten()[fragment.start : fragment.stop]
            fragment.local(partitions).copy_(values)

    def boxes(self, title: str, partitions: list[Tensor]) -> dict[str, Box]:
        """Returns this process's part of each parameter, as a box of the flattened parameter.

        title: of a box, with {} for the name of the parameter
        """
        return {
            title.format(name): Box(
                (self.shapes[name].numel(),), (fragment.start,), fragment.local(partitions).detach()
            )
            for name, fragment in self.fragments.items()
        }


# The functions below use attributes that DeepSpeed does not document (version 0.19, see
# requirements.txt). If one of these attributes changes, test_deepspeed.py fails.


def quieten() -> None:
    """Keeps DeepSpeed from logging its start and from compiling an operator for collectives.

    On a CPU, DeepSpeed would compile its own collectives in the first run, although gloo works.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Otherwise DeepSpeed probes its operators, which calls compilers and prints each failure.
    vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}


def master_partitions(optimizer) -> list[Tensor]:
    """Returns the flat fp32 tensors that this process's optimizer updates, for any ZeRO stage."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def find_master(optimizer, weight: nn.Parameter) -> Fragment | None:
    """Returns this process's part of a parameter of the model; None: it has none."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(weight)]
        start = weight.ds_zero_partition_rank * size
        stop = min(start + size, weight.ds_numel)  # the last partitions are padded
    elif mapping := weight._hp_mapping:
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
        stop = start + size
    else:
        return None
    return Fragment(start, stop, group, offset) if stop > start else None


@torch.no_grad()
def publish_masters(optimizer) -> None:
    """Copies the master weights to the model, rounded to its precision; all processes call it."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # shards all gathered parameters
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # gathers persistent ones again
