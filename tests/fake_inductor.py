"""Lowers a DiT block for an H100 with Inductor and builds its kernels for sm_90, without a GPU.

fake_cuda.py imports this module after replacing the functions of torch.cuda.
"""

import copy
import os
import re
from typing import Any

os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
import torch._dynamo.device_interface
import torch._inductor.config
import torch._inductor.runtime.triton_helpers
import torch._inductor.utils
import torch.nn.functional as F
import torch.utils._triton
import triton
from functorch.compile import make_boxed_func
from torch._inductor import compile_fx, graph
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from models import DiTBlock, DiTConfig

# Name and source of each Triton kernel in the code that Inductor generates.
KERNEL = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.M | re.S)


class Driver:
    """Replaces Triton's GPU driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> None:
        return None


class Captured(Exception):
    """Raised once Inductor has generated its code, which cannot run without a GPU."""


def install(codes: list[str]) -> None:
    """Makes Inductor append the code it generates for an H100 to `codes`."""
    cuda, interface = torch.cuda, torch._dynamo.device_interface.CudaInterface
    # Two separate functions: Dynamo keeps a table of the functions of torch.cuda.
    cuda._exchange_device, cuda._maybe_exchange_device = lambda _: 0, lambda _: 0
    cuda._set_stream_by_id = lambda *_, **__: None
    properties = staticmethod(lambda device=None: cuda.get_device_properties(device))
    interface.get_device_properties = interface.Worker.get_device_properties = properties
    interface.get_compute_capability = staticmethod(lambda device=None: 90)
    interface.is_available = staticmethod(lambda: True)
    interface.is_bf16_supported = staticmethod(lambda *_, **__: True)
    interface.is_triton_capable = staticmethod(lambda device=None: True)
    interface.raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    interface.get_raw_stream = staticmethod(lambda _: 0)
    torch.utils._triton.has_triton = torch._inductor.utils.has_triton = lambda: True
    torch.utils._triton.triton_hash_with_backend = lambda: "none"
    torch._inductor.utils.get_gpu_dram_gbps = lambda: 3350
    torch._inductor.utils.get_device_tflops = lambda *_: 989
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    triton.runtime.driver.set_active(Driver())
    config = torch._inductor.config
    config.compile_threads, config.triton.cudagraphs = 1, False
    config.joint_graph_constant_folding = False  # would compute on the device

    def capture(self, *_: Any, **__: Any) -> None:
        wrapper, _ = self.codegen()
        codes.append(getattr(wrapper, "value", str(wrapper)))
        raise Captured

    lowering = graph.GraphLowering
    lowering.compile_to_module = lowering._compile_to_module = capture
    # Dynamo cannot trace this method of a fake tensor, because the method calls its base class.
    torch.Tensor.unflatten = lambda x, dim, sizes: torch.unflatten(x, dim, sizes)
    # The kernel that an H100 uses; without the CUDA library torch would choose plain products.
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    F.scaled_dot_product_attention = lambda q, k, v: flash(q, k, v)[0]


def build(config: DiTConfig, images: int) -> dict[str, Any]:
    """Lowers the forward and backward pass of a block and builds its kernels with ptxas.

    Returns the numbers of graphs and built kernels, the graph breaks and the failures.
    """
    codes: list[str] = []
    install(codes)

    def inner(module: torch.fx.GraphModule, inputs: list, **options: Any):
        original, before = copy.deepcopy(module), len(codes)
        try:
            compile_fx.compile_fx_inner(module, inputs, **options)
        except Exception:
            if len(codes) == before:
                raise
        return make_boxed_func(original.forward)

    def backend(module: torch.fx.GraphModule, inputs: list):
        return compile_fx.compile_fx(module, inputs, inner_compile=inner)

    with FakeTensorMode(), torch.device("cuda", 0):
        block = DiTBlock(config, 0)
        tokens = (config.input_size // config.patch_size) ** 2
        x = torch.randn(images, tokens, config.hidden_size, requires_grad=True)
        c = torch.randn(images, config.hidden_size, requires_grad=True)
        about = {"time": c, "no_class": torch.zeros(images, 1, dtype=torch.bool)}
        compiled = torch.compile(block.forward, backend=backend)
        with torch.autocast("cuda", torch.bfloat16):
            y, routing = compiled(x, c, about)
        (y.square().sum() + routing.loss).backward()
    built, failed = 0, []
    for name, source in (kernel for code in codes for kernel in KERNEL.findall(code)):
        try:
            module = PyCodeCache.load(source)
            tuner = getattr(module, name, None) or module.triton_
            tuner._precompile_config(tuner.configs[0])
            built += 1
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}"[:300])
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    return {"graphs": len(codes), "breaks": breaks, "kernels": built, "failed": failed}
