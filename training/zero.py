"""A DiT under DeepSpeed: built without a whole copy, and its shards put together again.

ZeRO cuts the fp32 master weights over the processes and AutoEP puts its own layers in the place of
our MoE blocks. Here is all that knows about that. Everything outside sees whole fp32 tensors in the
layout of `models.DiT`, one at a time, so no process ever needs room for all of them.

Shape legend: E experts, E_local = E / expert-parallel size, H expert width, D width
"""

import logging
import os
import re
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum, get_zero_config
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from models import DiT, DiTConfig, sincos_position_embedding
from moe import Experts, SparseMoEBlock
from routers import Routing, TopKRouter
from runtime.errors import UserError, printable
from runtime.processes import reseed
from training.saving import save_tensors

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# All that DeepSpeed's files hold besides tensors and plain values.
STORED_CLASSES = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]


def start_engine(
    config: DiTConfig,
    ds_config: dict,
    *,
    dtype: torch.dtype,
    device: torch.device,
    freeze: Callable[[nn.Module], None],
) -> deepspeed.DeepSpeedEngine:
    """Builds a DiT whose weights hold nothing yet and hands it to DeepSpeed.

    Under ZeRO-3 each parameter is cut up before the next one is allocated; under expert parallelism
    a process allocates its own experts alone. What `freeze` takes the gradient of gets no master
    weights and no optimizer state.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    check_zero_config(ds_config)
    # On a CPU, DeepSpeed would compile a collective of its own in the first run. Gloo is there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    stage = ds_config["zero_optimization"]["stage"]
    expert_parallel = ds_config.get("expert_parallel", {}).get("enabled", False)
    model = build_empty(
        config,
        lambda module: stage == 3 or (expert_parallel and isinstance(module, Experts)),
        dtype=dtype,
        device=device,
    )
    freeze(model)
    if stage == 3 and expert_parallel:
        refuse_frozen_experts(model)
    # The casts that DDP takes, which DeepSpeed would not let through from outside.
    enabled = dtype != torch.float32
    model.forward = torch.autocast(device.type, dtype, enabled=enabled)(model.forward)
    if stage == 3:
        zero_init = deepspeed.zero.Init(config_dict_or_path=ds_config)
        for weight in model.parameters():
            weight.data = weight.data.contiguous()  # whole for a moment, then cut up
            zero_init._convert_to_zero_parameters([weight])
    routers = [block.moe.gate for block in model.blocks if block.moe is not None]
    declare_router_logits()
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    fix_autoep(model, routers)
    return engine


def check_zero_config(ds_config: dict) -> None:
    """Raises UserError for fields of "zero_optimization" that DeepSpeed does not take."""
    try:
        get_zero_config(ds_config)
    except (ValueError, TypeError, AssertionError) as error:  # pydantic's is a ValueError
        reason = printable(str(error))[:300]
        raise UserError(
            f"--deepspeed_config: zero_optimization: got what DeepSpeed refuses ({reason})"
        ) from None


def refuse_frozen_experts(model: nn.Module) -> None:
    """Raises UserError at once for what DeepSpeed would refuse when it saves."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    if not all(weight.requires_grad for module in experts for weight in module.parameters()):
        raise UserError(
            "--freeze: got experts under ZeRO-3 with expert parallelism, which DeepSpeed cannot "
            "save, expected ZeRO-2 (config/zero2_ep.json) or no expert parallelism (zero3.json)"
        )


def build_empty(
    config: DiTConfig,
    is_placeholder: Callable[[nn.Module], bool],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DiT:
    """Makes a DiT with uninitialised weights.

    The parameters of the modules for which `is_placeholder` says so have their shape but, all
    strides being 0, the memory of a single number.
    """
    with torch.device("meta"):
        model = DiT(**vars(config))
    for module in model.modules():
        placeholder = is_placeholder(module)
        for name, weight in module.named_parameters(recurse=False):
            shape = (1,) * weight.dim() if placeholder else weight.shape
            data = torch.zeros(shape, dtype=dtype, device=device).expand(weight.shape)
            setattr(module, name, nn.Parameter(data))
    side = config.input_size // config.patch_size
    model.pos_embed = sincos_position_embedding(config.hidden_size, side).to(device)
    return model


def declare_router_logits() -> None:
    """Tells AutoEP, in Hugging Face's convention, that our block has router logits to return."""
    SparseMoEBlock._can_record_outputs = {"router_logits": TopKRouter}


def fix_autoep(model: DiT, routers: list[TopKRouter]) -> None:
    """Makes AutoEP's layers keep the contract of `moe.SparseMoEBlock`: (y, routing).

    AutoEP returns router logits alone; our router makes of them what it decided. Two faults of
    deepspeed 0.19 (requirements.txt pins it) are put right: a layer whose block declares its logits
    in `_can_record_outputs` returns None in their place, or, told to take them from the router,
    their softmax. And its gate computes in the autocast precision.

    routers: those of the sparse blocks, in their order
    """
    layers = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)]
    for layer, router in zip(layers, routers if layers else [], strict=True):
        assert layer.return_router_logits, "AutoEP did not see that our block returns logits"
        layer.router_logits_capture_target = "router"
        layer.router_logits_capture_mode = "raw"
        layer.router.gate.forward = types.MethodType(TopKRouter.score, layer.router.gate)
        layer.forward = partial(forward_autoep, layer.forward, router.choose)


def forward_autoep(
    forward: Callable, choose: Callable, x: Tensor, unconditional: Tensor | None = None
) -> tuple[Tensor, Routing]:
    y, logits = forward(x)
    return y, choose(logits)


def draw_initial_weights(
    config: DiTConfig, seed: int, write: Callable[[str, Tensor], None]
) -> None:
    """Calls write(name, fp32 weight on the CPU) with what a DiT gets from `initialize_weights`.

    The draws follow from the seed alone and every process makes them all, but only one module's
    weights exist at a time.
    """
    model = build_empty(config, lambda _: True)
    names = {weight: name for name, weight in model.named_parameters()}

    @contextmanager
    def allocate(weights: list[nn.Parameter]) -> Iterator[None]:
        placeholders = [weight.data for weight in weights]
        for weight in weights:
            weight.data = torch.empty(weight.shape)
        yield
        for weight, placeholder in zip(weights, placeholders, strict=True):
            write(names[weight], weight.data)
            weight.data = placeholder

    reseed(seed)
    model.initialize_weights(gather=allocate)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str, client_state: dict
) -> None:
    """Writes DeepSpeed's state, flushed to disk; raises the OSError that this process met.

    DeepSpeed's processes wait for each other between their files, for ever if one of them raises:
    so it goes to the end first, writing nothing more.
    """
    failures: list[OSError] = []

    def guarded(write: Callable) -> Callable:
        def call(*args, **kwargs):
            try:
                return None if failures else write(*args, **kwargs)
            except OSError as error:
                failures.append(error)

        return call

    def save(state_dict: dict, path: str) -> None:
        save_tensors(state_dict, Path(path))

    writer = engine.checkpoint_engine
    write, make_folder, copy_script = writer.save, writer.makedirs, engine._copy_recovery_script
    writer.save, writer.makedirs = guarded(save), guarded(make_folder)
    engine._copy_recovery_script = guarded(copy_script)
    try:
        engine.save_checkpoint(folder, tag=tag, client_state=client_state, save_latest=False)
    finally:
        writer.save, writer.makedirs = write, make_folder
        engine._copy_recovery_script = copy_script
    if failures:
        raise failures[0]


def check_files(folder: Path, rank: int, world_size: int) -> None:
    """Checks a process's share of the files before any is read; UserError for a damaged one."""
    for path in sorted(folder.rglob("*.pt"))[rank::world_size]:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: damaged: got no zip file, expected what torch.save writes")


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str, *, universal: bool
) -> None:
    """Loads DeepSpeed's state, or what ds_to_universal made of it, without executing anything.

    DeepSpeed asks torch.load to unpickle whatever is there; the variable below overrules it.
    UserError when a file is no zip file of torch.save's.
    """
    check_files(folder / tag, torch.distributed.get_rank(), torch.distributed.get_world_size())
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in engine.optimizer.param_groups
    ]
    engine._config.load_universal_checkpoint = universal
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(STORED_CLASSES):
            engine.load_checkpoint(folder, tag=tag)
    finally:
        os.environ.pop(FORCE_WEIGHTS_ONLY)
        if before is not None:
            os.environ[FORCE_WEIGHTS_ONLY] = before
    for group, as_flags_say in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(as_flags_say)
    # A fault of deepspeed 0.19: a universal checkpoint gives all partitions under ZeRO-3 the same
    # step tensor, which then counts each of them.
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


@dataclass(frozen=True)
class Fragment:
    """The part of a standard parameter whose fp32 master weights this process owns.

    `select` takes from the standard parameter the live one that this process computes with, and
    [start, stop) is the fragment's place in that, flattened. It lies in the `group`-th flat
    partition from `offset` on.
    """

    select: Callable[[Tensor], Tensor]
    start: int
    stop: int
    group: int
    offset: int

    def local(self, partitions: list[Tensor]) -> Tensor:
        return partitions[self.group][self.offset : self.offset + self.stop - self.start]


class Shards:
    """The fp32 master weights of an engine, and what is cut like them, as standard parameters.

    `partitions` arguments are lists of flat tensors like `masters`: those, or their EMA. Frozen
    parameters are in none of them: `frozen` has the live ones, by the name of the standard one.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: DiTConfig, device: torch.device):
        self.optimizer, self.device = engine.optimizer, device
        self.is_stage_3 = hasattr(self.optimizer, "fp32_partitioned_groups_flat")
        self.masters: list[Tensor] = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.is_stage_3
            else self.optimizer.single_partition_of_fp32_groups
        )
        standard = build_empty(config, lambda _: True)
        self.shapes = {name: weight.shape for name, weight in standard.named_parameters()}
        self.fragments: dict[str, list[Fragment]] = {name: [] for name in self.shapes}
        self.frozen: dict[str, list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]] = {}
        layers = {
            name: module
            for name, module in engine.module.named_modules()
            if isinstance(module, AutoEPMoELayer)
        }
        for live_name, weight in engine.module.named_parameters():
            name, select = standard_parameter(live_name, layers)
            if not weight.requires_grad:
                self.frozen.setdefault(name, []).append((weight, select))
            elif place := self.find(weight):
                self.fragments[name].append(Fragment(select, *place))
        for name in self.frozen:
            del self.fragments[name]

    def find(self, weight: nn.Parameter) -> tuple[int, int, int, int] | None:
        """Returns (start, stop, group, offset) of a live parameter's fragment, see `Fragment`."""
        if self.is_stage_3:
            key = self.optimizer.get_param_id(weight)
            group, offset, size = self.optimizer.grad_position[key]
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
    def scatter(self, name: str, whole: Tensor, partitions: list[Tensor]) -> None:
        """Writes this process's part of a standard parameter, which each process has."""
        for fragment in self.fragments[name]:
            part = fragment.select(whole).flatten()[fragment.start : fragment.stop]
            fragment.local(partitions).copy_(part)

    @torch.no_grad()
    def set_frozen(self, name: str, whole: Tensor) -> None:
        """Gives the model a frozen standard parameter, rounded to its precision; then `publish`."""
        for weight, select in self.frozen[name]:
            part = select(whole)
            if self.is_stage_3:
                own = weight.ds_tensor
                start = weight.ds_zero_partition_rank * own.numel()
                part = part.flatten()[start : start + own.numel()]
                own[: len(part)].copy_(part)  # the last partitions are padded
            else:
                weight.copy_(part)

    @torch.no_grad()
    def gather(self, name: str, partitions: list[Tensor]) -> Tensor:
        """Puts a standard parameter together on rank 0, on the CPU; all processes call it."""
        whole = torch.zeros(self.shapes[name], device=self.device)
        for fragment in self.fragments[name]:
            live = fragment.select(whole)
            rows = live.new_zeros(live.numel())
            rows[fragment.start : fragment.stop] = fragment.local(partitions)
            live += rows.view_as(live)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.reduce(whole, dst=0)  # each number is one process's; the rest are 0
        return whole.cpu()

    @torch.no_grad()
    def publish(self) -> None:
        """Gives the model the master weights, rounded to its precision; all processes call it."""
        if not self.is_stage_3:
            self.optimizer.update_lp_params()
            return
        self.optimizer.checkpoint_event_prologue()  # cuts up what is still gathered
        for group in range(len(self.masters)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.optimizer.checkpoint_event_epilogue()  # gathers again what always is

    @torch.no_grad()
    def exchange(self, partitions: list[Tensor]) -> None:
        """Swaps the master weights with others and publishes them."""
        for master, other in zip(self.masters, partitions, strict=True):
            kept = master.clone()
            master.copy_(other)
            other.copy_(kept)
        self.publish()


AUTOEP_WEIGHT = re.compile(r"(blocks\.\d+\.moe)\.(experts\.w[123]|router\.gate\.weight)")


def standard_parameter(
    live_name: str, layers: dict[str, AutoEPMoELayer]
) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Says of which standard parameter a live one is a part, and what part.

    w1 and w3 (E_local, H, D) are the gate and the up rows of gate_up_proj (E, 2H, D); w2
    (E_local, D, H) is of down_proj (E, D, H).
    """
    match = AUTOEP_WEIGHT.fullmatch(live_name)
    if match is None:
        return live_name, lambda whole: whole
    block, part = match.groups()
    if part == "router.gate.weight":
        return f"{block}.gate.weight", lambda whole: whole
    layer = layers[block]
    first = layer.ep_rank * layer.num_local_experts
    mine = slice(first, first + layer.num_local_experts)
    return {
        "experts.w1": (f"{block}.experts.gate_up_proj", lambda whole: whole[mine].chunk(2, 1)[0]),
        "experts.w3": (f"{block}.experts.gate_up_proj", lambda whole: whole[mine].chunk(2, 1)[1]),
        "experts.w2": (f"{block}.experts.down_proj", lambda whole: whole[mine]),
    }[part]
