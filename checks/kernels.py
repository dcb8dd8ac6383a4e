"""Every kernel and back end of the experts against fp64, and steps that wait for nothing.

Shape legend:
    S tokens, D width, H expert width, E experts, K experts per token, R = S*K rows
"""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import make_engine, train_step
from checkpoints import config_of
from checks.common import NO_GPU, CheckConfig, Checks
from diffusion import create_diffusion
from moe import ExpertWeights, experts_grouped, experts_loop
from moe_kernels import torch_kernels
from moe_kernels.experts import sort_rows
from routers import ROUTERS, RouterConfig, Routing, TopKRouter
from runtime.devices import DTYPES
from training.config import DDPConfig

# |error| / |value| on a GPU
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
IDLE = 1  # the expert that no token goes to


@dataclass(frozen=True)
class Size:
    name: str
    tokens: int
    experts: int
    width: int
    hidden: int


ODD = Size("odd", 29, 3, 70, 134)  # multiples of no tile, and of no 16 bytes
SIZES = (
    ODD,
    Size("odd, more tokens", 1045, 5, 70, 134),
    Size("S", 1024, 8, 384, 1536),
    Size("XL", 1024, 8, 1152, 4608),
    Size("G", 1024, 16, 1408, 5632),
)


def check(checks: Checks, config: CheckConfig) -> None:
    device = torch.device(config.device)
    kernels = ["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"]
    if "triton" not in kernels:
        checks.skip("Triton's kernels", "Triton is not installed")
    if config.is_small:
        checks.skip("widths of S, XL and G", f"{NO_GPU}; here the odd size alone, interpreted")
    elif config.quick:
        checks.skip("width of G", "--quick")
    sizes = SIZES[:1] if config.is_small else SIZES[:4] if config.quick else SIZES
    for precision, name in itertools.product(DTYPES, kernels):
        with checks.guard(f"steps, {name}, {precision}"):
            error, step = max(step_errors(name, precision, device))
            limit = tolerance(DTYPES[precision], device)
            checks.at_most(f"steps, {name}, {precision} ({step})", error, limit)
    for size, precision in itertools.product(sizes, DTYPES):
        check_experts(checks, size, precision, kernels, device)
    if config.is_small:
        checks.skip("no host sync in a warmed step", NO_GPU)
        return
    for router in ROUTERS:
        with checks.guard(f"no host sync in a warmed step, {router}"):
            take_steps_without_sync(router, device)
            checks.holds(f"no host sync in a warmed step, {router}", True, "none")


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Twice as much on a CPU: Triton's interpreter cuts the digits of bf16 off, a GPU rounds."""
    return TOLERANCES[dtype] * (2 if device.type == "cpu" else 1)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; infinite if a number is not finite where it should be."""
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else float("inf")


def step_errors(name: str, precision: str, device: torch.device) -> list[tuple[float, str]]:
    """The error of each step of the experts, by one set of kernels, against the same in fp64."""
    kernels = importlib.import_module(f"moe_kernels.{name}_kernels")
    torch.manual_seed(0)
    s, d, h, e, k = ODD.tokens, ODD.width, ODD.hidden, ODD.experts, 2
    expert = torch.randint(e, (s * k,), device=device)
    expert[expert == IDLE] = 0
    token = torch.arange(s * k, device=device) // k
    source, place, start, end = sort_rows(token, expert, s, e)
    randn = partial(torch.randn, device=device, dtype=DTYPES[precision])
    rows, grad, weight = randn(s * k, d), randn(s * k, h), randn(s * k)
    up, hidden = randn(e, h, d), randn(s * k, 2 * h)
    calls = {
        "gather": (rows, source),
        "combine": (rows, place, start, weight),
        "grouped_linear": (rows, up, end),
        "grouped_linear of a transpose": (grad, up.transpose(1, 2), end),
        "activate": (hidden[:, :h], hidden[:, h:]),
        "activate of GELU": (grad, None),
        "activate_backward": (hidden[:, :h], hidden[:, h:], grad, weight),
        "activate_backward of GELU": (grad, None, grad.flip(0), weight),
        "grouped_outer": (grad, rows, end, torch.float32),
    }
    errors = []
    for call, arguments in calls.items():
        exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a
                 for a in arguments]  # fmt: skip
        function = call.partition(" ")[0]
        got, want = getattr(kernels, function)(*arguments), getattr(torch_kernels, function)(*exact)
        pairs = zip(*((y,) if torch.is_tensor(y) else y for y in (got, want)), strict=True)
        errors.append((max(itertools.starmap(relative_error, pairs)), call))
    return errors


def draw_inputs(
    size: Size, dtype: torch.dtype, gated: bool, device: torch.device
) -> tuple[Tensor, Routing, ExpertWeights, Tensor]:
    """Tokens (S, D), their experts, fp32 weights of numbers that dtype has, and a gradient (S, D).

    No token goes to the expert IDLE.
    """
    torch.manual_seed(0)
    d, h, e = size.width, size.hidden, size.experts
    logits = torch.randn(size.tokens, e, device=device)
    logits[:, IDLE] -= 100
    routing = TopKRouter(RouterConfig(1, e, 2)).choose(logits)
    shapes = [(2 * h if gated else h, d), (d, h), *(() if gated else ((h,), (d,)))]
    weights = [torch.randn(e, *shape, device=device) / shape[-1] ** 0.5 for shape in shapes]
    x, grad = torch.randn(2, size.tokens, d, device=device).to(dtype)
    return x, routing, ExpertWeights(*(weight.to(dtype).float() for weight in weights)), grad


def results(
    compute: Callable, x: Tensor, routing: Routing, weights: ExpertWeights, grad: Tensor
) -> dict[str, Tensor]:
    """The output and the gradient of each input, in memory that is full of nan before."""
    leaves = {"x": x, "weight": routing.weight.to(x.dtype), **weights._asdict()}
    leaves = {
        name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None
    }
    dirty_memory(x.device)
    routed = routing._replace(weight=leaves["weight"])
    own = ExpertWeights(*(leaves.get(name) for name in ExpertWeights._fields))
    y = compute(leaves["x"], routed, own)
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"output": y.detach(), **dict(zip(leaves, grads, strict=True))}


def dirty_memory(device: torch.device) -> None:
    """Leaves nan in free memory of all sizes, which the next tensors get."""
    largest = 26 if device.type == "cuda" else 16
    blocks = [
        torch.full((2**n,), torch.nan, device=device) for n in range(7, largest) for _ in "ab"
    ]
    del blocks


def moved(weights: ExpertWeights) -> ExpertWeights:
    """The weights at addresses that are no multiple of 16 bytes, as ZeRO may leave them."""
    return ExpertWeights(*(
        None if weight is None else weight.new_empty(weight.numel() + 1)[1:].view_as(weight)
        .copy_(weight) for weight in weights
    ))  # fmt: skip


def check_experts(
    checks: Checks, size: Size, precision: str, kernels: list[str], device: torch.device
) -> None:
    """Each back end on SwiGLU and on GELU experts."""
    computes = {f"grouped by {name}": partial(experts_grouped, kernels=name) for name in kernels}
    computes["loop"] = experts_loop
    for gated in (True, False):
        kind = f"{size.name}, {precision}, {'SwiGLU' if gated else 'GELU'}"
        with checks.guard(f"{kind}, fp64"):
            x, routing, weights, grad = draw_inputs(size, DTYPES[precision], gated, device)
            exact = (weight if weight is None else weight.double() for weight in weights)
            want = results(experts_loop, x.double(), routing, ExpertWeights(*exact), grad.double())
            for name, compute in computes.items():
                with checks.guard(f"{kind}, {name}"):
                    given = x, routing, weights, grad
                    check_back_end(checks, f"{kind}, {name}", compute, given, want)


def check_back_end(
    checks: Checks, what: str, compute: Callable, given: tuple, want: dict[str, Tensor]
) -> None:
    """Output and every gradient against fp64; the grouped ones also again, and unaligned."""
    x, routing, weights, grad = given
    limit = tolerance(x.dtype, x.device)
    got = results(compute, *given)
    error, worst = worst_of(got, want)
    checks.at_most(f"{what}: worst is {worst}", error, limit)
    idle = max(got[part][IDLE].abs().max().item() for part in weights._fields if part in got)
    checks.at_most(f"{what}: gradient of an expert without tokens", idle, 0)
    if compute is experts_loop:
        return  # on a GPU it adds up rows in any order
    again = results(compute, *given)
    same = all(torch.equal(got[part], again[part]) for part in got)
    checks.holds(f"{what}: again", same, "equal bits" if same else "other bits", "equal bits")
    unaligned = results(compute, x, routing, moved(weights), grad)
    error, worst = worst_of(unaligned, want)
    checks.at_most(f"{what}: unaligned weights, worst is {worst}", error, limit)


def worst_of(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    return max((relative_error(got[name], want[name]), name) for name in want)


def take_steps_without_sync(router: str, device: torch.device) -> None:
    """Two steps, then one in which waiting for the GPU raises RuntimeError."""
    engine = make_engine(DDPConfig(), config_of("DiT-Ti/2", router=router), device)
    diffusion = create_diffusion()
    for mode in ("default", "default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train_step(engine, diffusion, images=8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
