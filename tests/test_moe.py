"""The mixture of experts: back ends agree, the balance loss does what the paper says."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_triton, relative_error
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from moe import (
    Experts,
    GeluExperts,
    SparseMoEBlock,
    SwiGLU,
)
from routers import RouterConfig, Routing, TopKRouter

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    ),
]

FAST = ["grouped", pytest.param("triton", marks=needs_triton)]
BF16 = 2e-2


def route_top_k(logits: torch.Tensor, k: int) -> Routing:
    return TopKRouter(RouterConfig(1, logits.shape[1], k)).choose(logits.float())


def allowed(backend: str, tolerance: float) -> float:
    """Triton's interpreter cuts the digits of bf16 numbers off; a GPU rounds."""
    is_cut = backend == "triton" and tolerance == BF16 and not torch.cuda.is_available()
    return 2 * tolerance if is_cut else tolerance


def run_backend(backend: str, x, logits, k, dtype):
    torch.manual_seed(1)
    experts = Experts(32, 64, logits.shape[1], backend).to(x.device, dtype)
    x = x.to(dtype).requires_grad_()
    logits = logits.clone().requires_grad_()
    y = experts(x, route_top_k(logits, k))
    y.float().square().sum().backward()
    return y, x.grad, logits.grad, experts.gate_up_proj.grad, experts.down_proj.grad


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 1e-5), (torch.bfloat16, BF16), (torch.float16, 3e-3)],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize(
    "k, idle",
    [(1, False), (2, False), (1, True), (2, True), (5, False)],
    ids=["1", "2", "1, one expert idle", "2, one expert idle", "all 5"],
)
def test_fast_back_ends_agree_with_the_loop(backend, device, dtype, tolerance, k, idle):
    torch.manual_seed(0)
    x, logits = torch.randn(50, 32, device=device), torch.randn(50, 5, device=device)
    if idle:
        logits[:, 3] -= 100  # no token ever chooses expert 3
    loop = run_backend("loop", x, logits, k, dtype)
    fast = run_backend(backend, x, logits, k, dtype)
    for name, got, want in zip(("y", "x", "logits", "gate_up", "down"), fast, loop, strict=True):
        assert got.dtype == want.dtype
        assert relative_error(got, want) < allowed(backend, tolerance), name
    assert (fast[-1][3].abs().sum() == 0) == idle


def routing_of(token, expert, weight, per_token: int = 0) -> Routing:
    return Routing(token, expert, weight, per_token, torch.tensor(0.0), torch.tensor(0.0))


def any_rows() -> Routing:
    """As an expert-choice router would ask: token 0 three times, token 1 never, token 2 once."""
    return routing_of(
        token=torch.tensor([0, 0, 2, 0]),
        expert=torch.tensor([1, 0, 1, 2]),
        weight=torch.tensor([0.5, 1.0, 2.0, 0.25], requires_grad=True),
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("expert_type", [Experts, GeluExperts])
@pytest.mark.parametrize("regular", [True, False], ids=["top-k", "any number of rows per token"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_every_gradient_of_every_expert_type(backend, expert_type, regular, autocast):
    def run(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        experts = expert_type(32, 64, 3, name)
        for parameter in experts.parameters():
            parameter.data.normal_(std=0.2)  # biases too
        x = torch.randn(3, 32, requires_grad=True)
        logits = torch.randn(3, 3, requires_grad=True)
        routing = route_top_k(logits, 2) if regular else any_rows()
        routing.weight.retain_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = experts(x, routing)
        y.float().square().sum().backward()
        grads = {key: parameter.grad for key, parameter in experts.named_parameters()}
        return {"y": y, "x": x.grad, "weight": routing.weight.grad, **grads}

    got, want, tolerance = run(backend), run("loop"), BF16 if autocast else 1e-5
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert relative_error(got[name], want[name]) < allowed(backend, tolerance), name
    if not regular:
        assert got["y"][1].abs().sum() == 0


@pytest.mark.parametrize("num_experts", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
def test_the_layer_keeps_its_input_the_rows_before_activation_and_little_else(num_experts, dtype):
    d, h, k, tokens = 64, 256, 2, 512
    block = SparseMoEBlock(d, num_experts, k)
    x = torch.randn(2, tokens // 2, d, requires_grad=True)
    parameters = {parameter.data_ptr() for parameter in block.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        y, _ = block(x)
    size = dtype.itemsize
    gate_input = 4 * tokens * d if size < 4 else 0  # the fp32 gate reads the input before its cast
    shared = (
        3 * d * 2 * d * size if size < 4 else 0
    )  # the three cast weights of three linear layers
    budget = size * (tokens * d + tokens * k * 2 * h + tokens * 4 * d) + gate_input + shared
    assert budget - size * tokens * d <= sum(kept.values()) <= 1.1 * budget


def test_gradient_checkpointing_keeps_nothing_of_a_swiglu_and_its_gradients_agree():
    torch.manual_seed(0)
    mlp, x = SwiGLU(32, 48), torch.randn(6, 32, requires_grad=True)
    alive = []
    mlp.gate_proj.register_forward_hook(lambda _, inputs, y: alive.append(weakref.ref(y)))

    def gradients(y: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()], retain_graph=True)

    y = checkpoint(mlp, x, use_reentrant=False)
    assert alive[0]() is None
    plain = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    for got, want in zip(gradients(y), gradients(plain), strict=True):
        assert relative_error(got, want) < 1e-6
    y = mlp(x)
    for _ in range(2):  # the graph is kept, so it can be gone through again
        for got, want in zip(gradients(y), gradients(plain), strict=True):
            assert relative_error(got, want) < 1e-6
    (alone,) = torch.autograd.grad(mlp(x).square().sum(), [mlp.down_proj.weight])
    assert relative_error(alone, gradients(plain)[-1]) < 1e-6
    mlp.requires_grad_(False)
    mlp.down_proj.requires_grad_(True)
    mlp(x.detach()).square().sum().backward()
    assert relative_error(mlp.down_proj.weight.grad, alone) < 1e-6


@pytest.mark.filterwarnings("error")
def test_the_layer_runs_on_fake_tensors():
    """As --dry-run counts what a step keeps, without a warning of theirs."""
    with FakeTensorMode():
        y, _ = SparseMoEBlock(32, 4, 2)(torch.randn(2, 8, 32, requires_grad=True))
        y.sum().backward()


def test_weights_may_lie_anywhere_in_memory():
    torch.manual_seed(0)
    experts, x, routing = Experts(32, 64, 2), torch.randn(6, 32), route_top_k(torch.randn(6, 2), 1)
    want = experts(x, routing)
    for parameter in experts.parameters():
        moved = torch.empty(parameter.numel() + 1)[1:].view_as(parameter).copy_(parameter.data)
        parameter.data = moved
        assert moved.data_ptr() % 16
    torch.testing.assert_close(experts(x, routing), want)


def test_the_layer_repeats_itself_bit_for_bit():
    torch.manual_seed(0)
    block = SparseMoEBlock(32, 4, 2)
    x = torch.randn(2, 64, 32)
    results = []
    for _ in range(2):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        y, _ = block(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(parameter.grad for parameter in block.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_frozen_experts_get_no_gradient_and_the_router_still_does():
    experts = Experts(32, 64, 3).requires_grad_(False)
    logits = torch.randn(6, 3, requires_grad=True)
    experts(torch.randn(6, 32), route_top_k(logits, 2)).sum().backward()
    assert experts.gate_up_proj.grad is None and experts.down_proj.grad is None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["loop", *FAST])
def test_an_expert_without_tokens_gets_a_zero_gradient_not_none(backend):
    logits = torch.tensor([[5.0, 0.0, -9.0]]).expand(8, 3)
    x = torch.randn(8, 32)
    _, _, _, gate_up_grad, down_grad = run_backend(backend, x, logits, 1, torch.float32)
    assert gate_up_grad[0].abs().sum() > 0
    assert gate_up_grad[2].abs().sum() == 0
    assert down_grad[2].abs().sum() == 0


@pytest.mark.parametrize("num_experts, k", [(1, 1), (256, 3)])
def test_one_expert_and_many(num_experts, k):
    torch.manual_seed(0)
    x, logits = torch.randn(40, 32), torch.randn(40, num_experts)
    loop, fast = (run_backend(name, x, logits, k, torch.float32) for name in ("loop", "grouped"))
    for got, want in zip(fast, loop, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_forward_mode_and_torch_func_take_the_loop():
    """For them an operator without a rule would be a constant, silently."""
    torch.manual_seed(0)
    block, x = SparseMoEBlock(32, 4, 2).double(), torch.randn(1, 6, 32, dtype=torch.float64)
    direction, step = torch.randn_like(x), 1e-3  # the gate is fp32

    def function(x: torch.Tensor) -> torch.Tensor:
        return block(x)[0]

    with torch.no_grad():
        want = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
    _, got = torch.func.jvp(function, (x,), (direction,))
    assert relative_error(got, want) < 1e-3
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
    assert relative_error(got, want) < 1e-3

    block.float()
    x = x.float().requires_grad_()
    (want,) = torch.autograd.grad(function(x).square().sum(), x)
    got = torch.func.grad(lambda x: function(x).square().sum())(x.detach())
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_compiled_derivatives_of_torch_func_are_the_eager_ones(mlp_type):
    """A compiler that took the operators into a forward-mode graph made constants of them."""
    torch.manual_seed(0)
    block = SparseMoEBlock(32, 4, 2, mlp_type=mlp_type)
    x, direction = torch.randn(1, 6, 32), torch.randn(1, 6, 32)

    def tangent(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: block(x)[0], (x,), (direction,))[1]

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: block(x)[0].square().sum())(x)

    for function in (tangent, gradient):
        torch.compiler.reset()
        got = torch.compile(function, backend="aot_eager")(x)
        torch.testing.assert_close(got, function(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_the_layer_can_be_vectorised(mlp_type):
    torch.manual_seed(0)
    block, x = SparseMoEBlock(32, 4, 2, mlp_type=mlp_type), torch.randn(3, 6, 32)
    results = []
    for y in (block(x)[0], torch.func.vmap(lambda x: block(x[None])[0][0])(x)):
        grads = torch.autograd.grad(y.square().sum(), list(block.parameters()))
        results.append([y.detach(), *grads])
    for want, got in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-5


def test_the_loop_has_second_derivatives_and_the_others_refuse_them():
    torch.manual_seed(0)
    experts, logits = Experts(32, 16, 3, "loop"), torch.randn(6, 3)

    def function(x: torch.Tensor) -> torch.Tensor:
        return experts(x, route_top_k(logits.to(x), 2))

    experts.double()
    x = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    experts.float().backend = "grouped"
    x = torch.randn(6, 32, requires_grad=True)
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def test_fp64_takes_the_loop_and_says_so():
    """Triton's kernels, which are to be taken or nothing, would add up in fp32."""
    experts = Experts(32, 64, 2, "grouped").double()
    x, routing = torch.randn(6, 32, dtype=torch.float64), route_top_k(torch.randn(6, 2), 1)
    with pytest.warns(UserWarning, match="float64"):
        y = experts(x, routing)
    experts.backend = "loop"
    assert torch.equal(y, experts(x, routing))
    experts.backend = "triton"
    with pytest.raises(ValueError, match="got 'triton' with torch.float64, expected fp32"):
        experts(x, routing)


def test_unaligned_width_takes_the_loop_and_says_so():
    experts, x = Experts(30, 62, 2, "grouped"), torch.randn(6, 30)
    routing = route_top_k(torch.randn(6, 2), 1)
    with pytest.warns(UserWarning, match="width 30"):
        got = experts(x, routing)
    experts.backend = "loop"
    assert torch.equal(got, experts(x, routing))


def test_each_expert_slice_is_initialised_as_the_linear_layer_it_is():
    experts = Experts(64, 128, 6)
    bound = (6 / (64 + 128)) ** 0.5
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert weight.abs().max() <= bound
        for expert in weight:
            assert expert.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_triton_where_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="got 'triton' with tensors on cpu"):
        Experts(32, 64, 2, "triton")(torch.randn(6, 32), route_top_k(torch.randn(6, 2), 1))


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="got 'fast', expected"):
        Experts(32, 64, 2, "fast")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("expert_type", [Experts, GeluExperts])
def test_no_tokens_at_all_give_no_rows_and_zero_gradients(backend, expert_type):
    experts, x = expert_type(32, 64, 3, backend), torch.zeros(0, 32, requires_grad=True)
    y = experts(x, route_top_k(torch.zeros(0, 3), 2))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 32)
    assert all(parameter.grad.abs().sum() == 0 for parameter in experts.parameters())


@pytest.mark.parametrize("backend", FAST)
def test_tensors_that_are_not_contiguous_are_read_right(backend):
    torch.manual_seed(0)
    experts, x = Experts(32, 64, 3, backend), torch.randn(32, 6).t()
    expert = torch.tensor([[0, 9], [2, 9], [1, 9], [1, 9], [0, 9], [2, 9]])[:, 0]
    for per_token in (0, 1):
        routing = routing_of(torch.arange(6), expert, torch.tensor([0.5]).expand(6), per_token)
        got = experts(x, routing)
        experts.backend = "loop"
        assert relative_error(got, experts(x, routing)) < 1e-5
        experts.backend = backend


def test_a_shared_expert_goes_back_on_the_meta_device():
    expert, x = SwiGLU(8, 16).to("meta"), torch.empty(3, 8, device="meta")
    expert(x).sum().backward()
    assert expert.down_proj.weight.grad.shape == (8, 16)
