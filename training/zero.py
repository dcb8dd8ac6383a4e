"""A DiT under DeepSpeed: built without a whole copy, its experts spread, its shards put together.

ZeRO cuts the fp32 master weights over the processes and AutoEP puts its own layers in the place of
our sparse blocks. All that knows about that is here; what has no public name in DeepSpeed is at the
end. Outside are whole fp32 tensors in the layout of `models.DiT`, one at a time, so no process
needs room for all of them.

Shape legend:
    N batch, T tokens per image, S = N*T tokens, D width, H expert width, E experts, K experts per
    token, E_local = E / expert-parallel size
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from models import DiT, DiTConfig, sincos_position_embedding
from moe import Experts
from routers import Routing
from runtime.errors import UserError, printable
from runtime.processes import reseed
from training.saving import save_tensors

PIECE = 2**26  # numbers that are swapped at a time


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
    a process allocates its own experts alone. Parameters that `freeze` freezes get no master
    weights and no optimizer state. UserError for a JSON that DeepSpeed refuses.
    """
    quieten()
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
    routers = [block.moe.gate for block in model.blocks if block.moe is not None]
    try:
        if stage == 3:
            cut_up(model, ds_config)
        engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        reason = printable(str(error))[:300]
        raise UserError(f"--deepspeed_config: got what DeepSpeed refuses ({reason})") from None
    layers = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)]
    for layer, router in zip(layers, routers if layers else [], strict=True):
        adopt(layer, router, dtype)
    return engine


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
    """Makes a DiT with uninitialised weights; the routers' state, fp32, is 0 as at the start.

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
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    side = config.input_size // config.patch_size
    model.pos_embed = sincos_position_embedding(config.hidden_size, side).to(device)
    return model


def cut_up(model: nn.Module, ds_config: dict) -> None:
    """Hands placeholders to ZeRO-3, module by module; those of one are whole for a moment."""
    for module in reversed(list(model.modules())):
        weights = list(module.parameters(recurse=False))
        for weight in weights:
            weight.data = weight.data.contiguous()
        if weights:
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)


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


def adopt(layer: AutoEPMoELayer, router: nn.Module, dtype: torch.dtype) -> None:
    """Makes AutoEP's layer keep the contract of `moe.SparseMoEBlock`: our router chooses.

    AutoEP's own has no fp32 logits under autocast and tells nobody what it chose. Ours takes over
    the live gate weight, which AutoEP's keeps in its own name for sharding and saving.
    """
    router.weight = layer.router.gate.weight
    vars(layer)["gate"] = router  # not as a sub-module, whose weights would count twice
    layer.forward = partial(forward_autoep, layer.forward, layer, dtype)


def forward_autoep(
    forward: Callable,
    layer: AutoEPMoELayer,
    dtype: torch.dtype,
    x: Tensor,
    unconditional: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """Routes x (N, T, D) as it is, and sends and computes the rows in the training precision.

    AutoEP computes in the type of its input, which autocast leaves in fp32 after a norm.
    """
    routing = layer.gate(x, unconditional)
    k, num_experts = routing.per_token, layer.num_experts
    counts = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, routing.expert, torch.ones_like(routing.expert, dtype=torch.int32))
    chosen = routing.weight.view(-1, k), routing.expert.view(-1, k), counts  # (S, K), (S, K), (E,)
    layer.router.forward = lambda *_: chosen
    try:
        return forward(x.to(dtype)), routing
    finally:  # also when recomputation stops early: the layer must not keep the graph alive
        del layer.router.forward


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


class Shards:
    """The fp32 master weights of an engine, as standard parameters.

    `masters` are the flat partitions that this process has of them. Frozen parameters are in none.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: DiTConfig, device: torch.device):
        self.optimizer, self.device = engine.optimizer, device
        self.masters = master_partitions(engine.optimizer)
        standard = build_empty(config, lambda _: True)
        self.shapes = {name: weight.shape for name, weight in standard.named_parameters()}
        self.buffers = {
            name: engine.module.get_buffer(name) for name, _ in standard.named_buffers()
        }
        self.parts: dict[str, list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]] = {
            name: [] for name in self.shapes
        }
        modules = engine.module.named_modules()
        layers = {name: module for name, module in modules if isinstance(module, AutoEPMoELayer)}
        for live_name, weight in engine.module.named_parameters():
            name, select = standard_parameter(live_name, layers)
            self.parts[name].append((weight, select))
        sizes = {layer.ep_size for layer in layers.values()} or {1}
        self.has_first_experts = torch.distributed.get_rank() < max(sizes)  # of all that have them

    def is_frozen(self, name: str) -> bool:
        return not self.parts[name][0][0].requires_grad

    @torch.no_grad()
    def set(self, name: str, whole: Tensor) -> None:
        """Writes this process's part of a standard parameter, which each process has.

        The model computes with it after `publish`.
        """
        for weight, select in self.parts[name]:
            part = select(whole)
            if not weight.requires_grad:
                with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
                    weight.copy_(part)
            elif hasattr(weight, "ds_id"):  # ZeRO-3, where the last partition is padded
                size, number = partition_of(weight)
                own = part.flatten()[number * size : (number + 1) * size]
                safe_set_local_fp32_param(weight, F.pad(own, (0, size - len(own))))
            else:
                safe_set_full_fp32_param(weight, part)

    @torch.no_grad()
    def gather(self, name: str) -> Tensor | None:
        """Puts a standard parameter together on rank 0, on the CPU; all processes call it."""
        parts = [(safe_get_full_fp32_param(weight), select) for weight, select in self.parts[name]]
        whole = parts[0][0]
        if ".moe.experts." in name:
            whole = torch.zeros(self.shapes[name], device=self.device)
            for part, select in parts if self.has_first_experts else []:
                select(whole).copy_(part)
            torch.distributed.reduce(whole, dst=0)  # each number is one process's; the rest are 0
        return whole.cpu() if torch.distributed.get_rank() == 0 else None

    @torch.no_grad()
    def swap(self, partitions: list[Tensor]) -> None:
        """Swaps the master weights with others; the model computes with them after `publish`."""
        for master, other in zip(self.masters, partitions, strict=True):
            for mine, theirs in zip(master.split(PIECE), other.split(PIECE), strict=True):
                kept = mine.clone()
                mine.copy_(theirs)
                theirs.copy_(kept)

    def publish(self) -> None:
        """Gives the model the master weights, rounded to its precision; all processes call it."""
        publish_masters(self.optimizer)


# Names that DeepSpeed does not document (version 0.19, see requirements.txt): all are below.
# test_deepspeed.py fails where one of them changes.


def quieten() -> None:
    """Keeps DeepSpeed from logging each step of its start, and from compiling a collective.

    On a CPU it would build one of its own in the first run. Gloo is there.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def master_partitions(optimizer) -> list[Tensor]:
    """The flat fp32 tensors that this process's optimizer updates, of ZeRO-3 or of ZeRO-1 and 2."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def partition_of(weight: nn.Parameter) -> tuple[int, int]:
    """The size of a ZeRO-3 parameter's partitions, and the number of this process's."""
    return weight.ds_tensor.numel(), weight.ds_zero_partition_rank


@torch.no_grad()
def publish_masters(optimizer) -> None:
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # cuts up what is still gathered
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # gathers again what always is


@contextmanager
def interceptable_writes(engine: deepspeed.DeepSpeedEngine) -> Iterator[list[OSError]]:
    """Has DeepSpeed's files flushed to disk, and collects the OSErrors that this process meets.

    DeepSpeed's processes wait for each other between their files, for ever if one of them raises:
    so it goes to the end first, writing nothing more. Its scripts to unpickle the files stay out.
    """
    failures: list[OSError] = []
    writer = engine.checkpoint_engine

    def guarded(write: Callable) -> Callable:
        def call(*args, **kwargs) -> None:
            try:
                if not failures:
                    write(*args, **kwargs)
            except OSError as error:
                failures.append(error)

        return call

    writer.save = guarded(lambda state_dict, path: save_tensors(state_dict, Path(path)))
    writer.makedirs = guarded(writer.makedirs)
    engine._copy_recovery_script = lambda folder: None
    try:
        yield failures
    finally:
        del writer.save, writer.makedirs, engine._copy_recovery_script


def load_universal_next(engine: deepspeed.DeepSpeedEngine, universal: bool) -> None:
    """Tells the engine whether the next checkpoint it loads is a converted one."""
    engine._config.load_universal_checkpoint = universal


def separate_steps(optimizer) -> None:
    """Puts a fault of DeepSpeed right: a converted checkpoint gives all partitions under ZeRO-3 the
    same step tensor, which then counts each of them."""
    for state in optimizer.optimizer.state.values():
        with suppress(KeyError, AttributeError):
            state["step"] = state["step"].clone()
