"""A DiT under DeepSpeed: built without a whole copy, its experts spread, its shards put together.

ZeRO cuts the fp32 master weights over the processes and AutoEP puts its own layers in the place of
our sparse blocks. All that knows about that is here. Outside are whole fp32 tensors in the layout
of `models.DiT`, one at a time, so no process needs room for all of them.

Shape legend:
    N batch, T tokens per image, S = N*T tokens, D width, H expert width, E experts, K experts per
    token, E_local = E / expert-parallel size
"""

import logging
import re
import warnings
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor, nn

from engines.initial import allocate, build_empty
from engines.zero_config import is_expert_parallel
from models import DiTConfig
from moe import Experts
from routers import Routing
from runtime.devices import DTYPES
from runtime.errors import reported_as
from training.config import TrainConfig


def start_engine(
    config: TrainConfig, ds_config: dict, device: torch.device
) -> deepspeed.DeepSpeedEngine:
    """Builds a DiT whose weights hold nothing yet and hands it to DeepSpeed.

    Under ZeRO-3 each parameter is cut up before the next one is allocated; under expert parallelism
    a process allocates only its own experts. UserError for a JSON that DeepSpeed refuses.
    """
    quieten()
    deepspeed.init_distributed(verbose=False)
    dtype = DTYPES[config.step.precision]
    model = build_empty(config.model, dtype, device)
    # The casts that DDP takes, which DeepSpeed would not let through from outside.
    enabled = dtype != torch.float32
    model.forward = torch.autocast(device.type, dtype, enabled=enabled)(model.forward)
    routers = [block.moe.gate for block in model.blocks if block.moe is not None]
    refusals = (ValueError, TypeError, AssertionError, DeepSpeedConfigError)
    with reported_as("--deepspeed_config: got what DeepSpeed refuses", *refusals):
        allocate_module(model, ds_config)
        engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    layers = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)]
    for layer, router in zip(layers, routers if layers else [], strict=True):
        adopt(layer, router, dtype)
    return engine


def allocate_module(model: nn.Module, ds_config: dict) -> None:
    """Gives placeholders their memory, module by module; ZeRO-3 cuts each up at once.

    Experts that AutoEP is going to cut stay placeholders, of which it copies its part.
    """
    is_stage_3 = ds_config["zero_optimization"]["stage"] == 3
    for module in reversed(list(model.modules())):
        if isinstance(module, Experts) and is_expert_parallel(ds_config) and not is_stage_3:
            continue
        weights = list(module.parameters(recurse=False))
        allocate(weights)
        if is_stage_3 and weights:
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)


def adopt(layer: AutoEPMoELayer, router: nn.Module, dtype: torch.dtype) -> None:
    """Makes AutoEP's layer keep the contract of `moe.SparseMoEBlock`: our router chooses.

    AutoEP's own has no fp32 logits under autocast and tells nobody what it chose. Ours takes over
    the live gate weight, which AutoEP's keeps in its own name for sharding and saving.
    """
    router.weight = layer.router.gate.weight
    vars(layer)["gate"] = router  # not as a sub-module, whose weights would count twice
    compute, k, num_experts = layer.forward, router.num_experts_per_tok, layer.num_experts

    def forward(x: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Routes x (N, T, D) as it is; sends and computes the rows in the training precision."""
        routing = layer.gate(x if seen is None else seen)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, routing.expert, torch.ones_like(routing.expert, dtype=torch.int32))
        chosen = routing.weight.view(-1, k), routing.expert.view(-1, k), counts  # (S, K) x 2, (E,)
        layer.router.forward = lambda *_: chosen
        try:  # autocast leaves x in fp32 after a norm, and AutoEP computes in the type of its input
            return compute(x.to(dtype)), routing
        finally:  # also when recomputation stops early: the layer must not keep the graph alive
            del layer.router.forward

    layer.forward = forward


AUTOEP_WEIGHT = re.compile(r"(blocks\.\d+\.moe)\.(experts\.w[123]|router\.gate\.weight)")
# AutoEP's w1 and w3 (E_local, H, D) are the gate and the up rows of gate_up_proj (E, 2H, D); w2
# (E_local, D, H) is of down_proj (E, D, H).
HALVES = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)}


@dataclass(frozen=True)
class Fragment:
    """What a process has of a standard parameter, flattened: numbers of all or of some experts."""

    name: str  # of the standard parameter
    first: int  # expert
    count: int  # of experts; 0: the whole parameter
    half: int | None  # of the rows of gate_up_proj; None: all of them
    start: int  # of the numbers of that part, flattened
    stop: int
    group: int  # of the flat tensors that have such numbers, and where they begin there
    offset: int

    def part(self, whole: Tensor) -> Tensor:
        part = whole[self.first : self.first + self.count] if self.count else whole
        return part if self.half is None else part.chunk(2, dim=1)[self.half]

    def local(self, partitions: list[Tensor]) -> Tensor:
        return partitions[self.group][self.offset : self.offset + self.stop - self.start]

    def add_to(self, whole: Tensor, partitions: list[Tensor]) -> None:
        """Adds the numbers to their place in a standard parameter."""
        part = self.part(whole)
        rows = part.new_zeros(part.numel())
        rows[self.start : self.stop] = self.local(partitions)
        part += rows.view_as(part)


def standard_part(live_name: str, model: nn.Module) -> tuple[str, int, int, int | None]:
    """Of what standard parameter a live one is a part: the first four fields of a `Fragment`."""
    match = AUTOEP_WEIGHT.fullmatch(live_name)
    if match is None:
        return live_name, 0, 0, None
    block, weight = match.groups()
    if weight == "router.gate.weight":
        return f"{block}.gate.weight", 0, 0, None
    layer, (name, half) = model.get_submodule(block), HALVES[weight.removeprefix("experts.")]
    count = layer.num_local_experts
    return f"{block}.experts.{name}", layer.ep_rank * count, count, half


class Shards:
    """The fp32 master weights of an engine, and what is cut like them, as standard parameters.

    `partitions` are lists of flat tensors like `masters`: those, their EMA or AdamW's moments.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: DiTConfig, device: torch.device):
        self.device, model = device, engine.module
        self.masters = master_partitions(engine.optimizer)
        standard = build_empty(config)
        self.shapes = {name: weight.shape for name, weight in standard.named_parameters()}
        self.buffers = {name: model.get_buffer(name) for name, _ in standard.named_buffers()}
        self.fragments: dict[str, list[Fragment]] = {name: [] for name in self.shapes}
        for live_name, weight in model.named_parameters():
            name, *part = standard_part(live_name, model)
            if (place := find_master(engine.optimizer, weight)) is not None:
                self.fragments[name].append(Fragment(name, *part, *place))

    @torch.no_grad()
    def scatter(self, name: str, whole: Tensor, partitions: list[Tensor]) -> None:
        """Writes this process's part of a standard parameter, which each process has."""
        for fragment in self.fragments[name]:
            own = fragment.part(whole).flatten()[fragment.start : fragment.stop]
            fragment.local(partitions).copy_(own)

    @torch.no_grad()
    def gather(self, name: str, partitions: list[Tensor]) -> Tensor | None:
        """Puts a standard parameter together on the CPU of rank 0; all processes call it."""
        whole = torch.zeros(self.shapes[name], device=self.device)
        for fragment in self.fragments[name]:
            fragment.add_to(whole, partitions)
        torch.distributed.reduce(whole, dst=0)  # each number is one process's; the rest are 0
        return whole.cpu() if torch.distributed.get_rank() == 0 else None


# Names that DeepSpeed does not document (version 0.19, see requirements.txt): those of its
# optimizers are below, those of AutoEP's layer in `adopt` and `standard_part`. test_deepspeed.py
# fails where one of them changes.


def quieten() -> None:
    """Keeps DeepSpeed from logging each step of its start, and from compiling a collective.

    On a CPU it would build one of its own in the first run. Gloo is there.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Or it would probe every operator of its own: compilers are called, and each failure is a line.
    vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}


def master_partitions(optimizer) -> list[Tensor]:
    """The flat fp32 tensors that this process's optimizer updates, of ZeRO-3 or of ZeRO-1 and 2."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def find_master(optimizer, weight: nn.Parameter) -> tuple[int, int, int, int] | None:
    """Returns (start, stop, group, offset) of this process's master weights of a live parameter."""
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
    return (start, stop, group, offset) if stop > start else None


@torch.no_grad()
def publish_masters(optimizer) -> None:
    """Gives the model the master weights, rounded to its precision; all processes call it."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # cuts up what is still gathered
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # gathers again what always is
