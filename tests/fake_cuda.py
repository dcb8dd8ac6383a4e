"""Training steps on fake CUDA tensors, and in process groups of fake ranks, without a GPU.

    python tests/fake_cuda.py '[["step_of", {"model": "DiT-S/2", "router": "race"}]]'
    python tests/fake_cuda.py '[["traffic_of", {"model": "DiT-XL/2", "ranks": 64}]]'

A fake tensor has a shape, a type and a device, and no data: a read by the host raises an exception,
and so does an operation on two devices. The command prints one JSON line per case.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def load_guard() -> None:
    """Builds cuda_guard.cpp and loads the library into this process, before torch is imported."""
    assert "torch" not in sys.modules
    torch = Path(importlib.util.find_spec("torch").origin).parent
    lib, include = torch / "lib", torch / "include"
    with tempfile.TemporaryDirectory() as folder:
        guard = Path(folder, "cuda_guard.so")
        subprocess.run(
            ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{include}",
             f"-I{include / 'torch/csrc/api/include'}", Path(__file__).with_name("cuda_guard.cpp"),
             "-o", guard, f"-L{lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10",
             f"-Wl,-rpath,{lib}"], check=True,
        )  # fmt: skip
        ctypes.CDLL(str(lib / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(guard))


load_guard()
import runtime  # noqa: E402, F401, I001
import torch  # noqa: E402
import torch.distributed  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from tools.benchmarks.common import train_step  # noqa: E402
from checkpoints import config_of  # noqa: E402
from diffusion.objectives import Gaussian  # noqa: E402
from training.engines import fsdp  # noqa: E402
from training.engines.ddp import DDPEngine  # noqa: E402
from models import DiTConfig  # noqa: E402
from routers import ROUTERS, Routing, TopKRouter  # noqa: E402
from runtime.processes import ALONE, Distributed  # noqa: E402
from training.config import TrainConfig  # noqa: E402

DEVICE = torch.device("cuda", 0)


class FakeStream:
    """Replaces every CUDA stream and event."""

    device, device_index, device_type, stream_id = DEVICE, 0, 1, 0

    def __init__(self, *_, **__):
        pass

    def wait_event(self, *_) -> None: ...

    def wait_stream(self, *_) -> None: ...

    def wait(self, *_) -> None: ...

    def record_event(self, event: object = None) -> object:
        return event or FakeStream()

    def record(self, *_) -> object:
        return self

    def synchronize(self) -> None: ...


class H100:
    """Device properties of an H100, as torch.cuda.get_device_properties returns them."""

    name, major, minor, total_memory = "NVIDIA H100 80GB HBM3", 9, 0, 85 * 10**9
    multi_processor_count, warp_size, regs_per_multiprocessor = 132, 32, 65536
    max_threads_per_multi_processor, max_threads_per_block = 2048, 1024
    shared_memory_per_block_optin, L2_cache_size, gcnArchName = 232448, 50 * 2**20, ""


def move(module: nn.Module, device: torch.device, *_, **__) -> nn.Module:
    """Replaces `nn.Module.to`, which rejects fake tensors."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(weight.detach().to(device), weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
    return module


empty_of = nn.Module.to_empty


def to_empty(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces `nn.Module.to_empty`, which rejects fake tensors that are not sharded."""
    is_sharded = isinstance(module, FSDPModule)
    return empty_of(module, device=device) if is_sharded else move(module, device)


def install() -> None:
    """Replaces the functions of torch.cuda that a training step calls."""
    torch.set_num_threads(1)
    stream, cuda = FakeStream(), torch.cuda
    cuda.Stream = cuda.Event = FakeStream
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_: stream)
    for name in ("set_device", "synchronize", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda *_: None)
    cuda.stream = cuda.device = lambda _: contextlib.nullcontext()
    # The state of a CUDA generator is a tensor of the host, as that of any generator.
    cuda._initialized, cuda.default_generators = True, (torch.Generator(),)
    cuda.current_device = cuda.random.current_device = lambda: 0
    cuda.device_count = lambda: 8
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties, cuda.get_device_name = lambda *_: H100, lambda *_: H100.name
    cuda.amp.common.amp_definitely_not_available = lambda: False
    nn.Module.to, nn.Module.to_empty = move, to_empty


class NoisyRouter(TopKRouter):
    """Top-k with noise on the logits, which the backward pass of a recomputed block draws again."""

    def choose(self, logits: torch.Tensor) -> Routing:
        return super().choose(logits + torch.randn_like(logits))


ROUTERS["noisy"] = NoisyRouter


def objective_of() -> Gaussian:
    """The published objective. Its tables are computed here, so they are real tensors."""
    objective = Gaussian()
    assert objective.diffusion
    return objective


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def model_of(name: str, **fields: Any) -> DiTConfig:
    experts = 16 if name.startswith("DiT-G") else 8
    return config_of(name, **{"input_size": 32, "num_experts": experts, "qk_norm": True} | fields)


def step_of(
    model: str, images: int = 8, flags: dict | None = None, **fields: Any
) -> dict[str, Any]:
    """Takes two steps with DDPEngine; returns the exception that a host read raised, or None."""
    fault, flags = None, {"precision": "bf16", "grad_clip": 1.0} | (flags or {})
    objective = objective_of()
    with fake_mode():
        config = replace(TrainConfig.default().changed(flags), model=model_of(model, **fields))
        engine = DDPEngine(replace(ALONE, device=DEVICE), config, ())  # weights have no data
        try:
            for _ in range(2):
                train_step(engine, objective, images)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            fault = f"{type(error).__name__}: {error}"
    return {"fault": fault, "parameters": sum(w.numel() for w in engine.parameters.values())}


class Traffic(TorchDispatchMode):
    """Records the kind and the unsharded bytes of each collective."""

    kinds = {
        "_allgather_base_": "gathered", "_reduce_scatter_base_": "scattered",
        "allreduce_": "reduced", "exchange": "exchanged",
        "all_gather_into_tensor": "gathered", "shard_dim_alltoall": "exchanged",
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kind = self.kinds.get(func._schema.name.split("::")[1])
        if kind and func.namespace in ("c10d", "_c10d_functional", "_dtensor", "dit_moe"):
            self.calls.append((kind, max(map(size_of, pytree.tree_leaves((args, out))))))
        return out


def size_of(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def traffic_of(
    model: str, ranks: int, images: int = 2, flags: dict | None = None, **fields: Any
) -> dict[str, Any]:
    """Takes steps with FSDPEngine as rank 0 of fake ranks.

    Returns the unsharded bytes of each kind of collective and the bytes of the weights that the
    process holds, next to an even share and to the memory plan.
    """
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    common = {"precision": "bf16", "grad_clip": 1.0, "shard": True, "gpus_per_node": 8}
    config = TrainConfig.default().changed(common | (flags or {}))
    config = replace(config, model=model_of(model, **fields))
    dist, make_meshes = Distributed(0, 0, ranks, DEVICE), fsdp.make_meshes
    meshes = make_meshes(dist, config)  # a mesh reads a tensor of ranks, which must not be fake
    fsdp.make_meshes = lambda *_: meshes
    objective, passes = objective_of(), config.step.accum_iter
    try:
        with fake_mode():
            engine = fsdp.FSDPEngine(dist, config, ())
            train_step(engine, objective, images, passes)
            with Traffic() as traffic:
                train_step(engine, objective, images, passes)
    finally:
        fsdp.make_meshes = make_meshes
        torch.distributed.destroy_process_group()
    sent, number, before_exchanges = Counter(), Counter(), []
    for kind, size in traffic.calls:
        sent[kind] += size
        number[kind] += 1
        if kind == "exchanged":
            before_exchanges.append(number["gathered"])
    gathers = [size for kind, size in traffic.calls if kind == "gathered"]
    total = sum(shape.numel() for shape in engine.shapes.values())
    blocks = sum(s.numel() for n, s in engine.shapes.items() if n.startswith("blocks.")
                 and ".moe.gate." not in n)  # fmt: skip
    copies = ranks // engine.layout.size
    plan, _, layout = engine.memory(config, ranks)
    even = {
        "gathered": passes * (4 * (total - blocks) + 2 * 2 * blocks),
        "scattered": passes * 4 * total,
        "reduced": 4 * total / engine.layout.size if copies > 1 else 0,
        "weights": 4 * total / engine.layout.size,
    }  # fmt: skip
    return {
        **dict.fromkeys(even, 0), **sent, "weights": sum(map(size_of, engine.local.values())),
        "root and two blocks": gathers[0] + 2 * max(gathers[1:]), "even": even, "plan": plan,
        "layout": layout, "gathers before each exchange": before_exchanges,
    }  # fmt: skip


if __name__ == "__main__":
    install()
    for name, options in json.loads(sys.argv[1]):
        print(json.dumps(globals()[name](**options)), flush=True)
    os._exit(0)  # tensors of fake devices cannot be freed at exit
