"""The experts: the output and every gradient of each back end are correct."""

import copy
import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_MODEL, config_of_command, needs_gpu, needs_triton, relative_error
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moe
from checkpoints.costs import count_parameters
from checkpoints.meta import build_meta
from models import DiT, DiTConfig
from moe import Experts, ExpertWeights, SparseMoEBlock, SwiGLU, experts_grouped, experts_loop
from routers import Routing, TopKRouter
from runtime.errors import UserError
from training.engines.fsdp import FSDPEngine
from training.optimizers import hidden_matrices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {  # tokens, experts, experts per token, width, hidden units
    "one expert": (21, 5, 1, 32, 64),
    "any number of experts": (21, 5, None, 32, 64),
    "odd": (29, 3, 2, 70, 134),  # not multiples of any tile or of 16 bytes
}
WIDE = {name: (1024, 8, 2, d, 4 * d) for name, d in {"S": 384, "XL": 1152, "G": 1408}.items()}
# Only one side of a product has a multiple of 16 bytes; on a GPU.
WIDE |= {"odd width": (29, 3, 2, 36, 144), "odd hidden units": (29, 3, 2, 64, 90)}
# The case for Triton's slow interpreter. test_kernels.py has every kernel with every type.
INTERPRETED = {"odd": "fp32-swiglu"}
IDLE = 1  # the expert that no token chooses


@pytest.fixture(autouse=True)
def device():
    with torch.device(DEVICE):
        yield


def allowed(dtype: torch.dtype, kernels: str) -> float:
    """Tolerance of the error. Triton's interpreter truncates bf16 numbers; a GPU rounds them."""
    truncates = kernels == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    return TOLERANCES[dtype] * (2 if truncates else 1)


def route_top_k(logits: torch.Tensor, k: int) -> Routing:
    sizes = dict(hidden_size=1, num_experts=logits.shape[1], num_experts_per_tok=k)
    return TopKRouter(**sizes).choose(logits.float())


def any_rows(num_tokens: int, num_experts: int, num_rows: int) -> Routing:
    """Random routing with rows in any order, and none for tokens 0 and 1 or the expert IDLE."""
    token, weight = torch.randint(2, num_tokens, (num_rows,)), torch.rand(num_rows)
    expert, zero = torch.randint(num_experts, (num_rows,)), torch.tensor(0.0)
    expert = expert.where(expert != IDLE, IDLE + 1)
    return Routing(token, expert, weight, per_token=0, loss=zero, load=zero)


def random_weights(num_experts: int, d: int, h: int, kind: str = "swiglu") -> ExpertWeights:
    width = h if kind == "gelu" else 2 * h
    shapes = [(width, d), (d, h), *(() if kind == "swiglu" else ((width,), (d,)))]
    return ExpertWeights(*(torch.randn(num_experts, *s) / s[-1] ** 0.5 for s in shapes))


def results(
    compute, x, routing: Routing, weights: ExpertWeights, frozen: bool = False
) -> dict[str, torch.Tensor]:
    """Output, and gradients with respect to all inputs, which are copied to new leaf tensors."""
    x, weight = x.detach().requires_grad_(), routing.weight.detach().requires_grad_()
    leaves = {
        name: value.detach().requires_grad_(not frozen)
        for name, value in weights._asdict().items()
        if value is not None
    }
    y = compute(x, routing._replace(weight=weight), ExpertWeights(**leaves))
    inputs = {"x": x, "weight": weight, **({} if frozen else leaves)}
    generator = torch.Generator("cpu").manual_seed(7)
    cotangent = torch.randn(y.shape, generator=generator, device="cpu").to(y)
    grads = torch.autograd.grad(y, list(inputs.values()), cotangent)
    return {"y": y, **dict(zip(inputs, grads, strict=True))}


def assert_agree(got: dict, want: dict, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert relative_error(got[name], want[name]) < tolerance, name


def fill_free_memory_with_nan() -> None:
    """New tensors will use this memory, so that reading an unwritten value gives NaN."""
    sizes = [2**power for power in range(7, 26 if DEVICE == "cuda" else 16)]
    blocks = [torch.full((size,), torch.nan) for size in (*sizes, *sizes)]
    del blocks


def cases() -> Iterator:
    kinds, kernels = ("swiglu", "swiglu_bias", "gelu"), ("loop", "torch", "triton")
    for case in itertools.product((*SIZES, *WIDE), DTYPES, kinds, kernels):
        size, dtype, kind, back_end = case
        marks = [needs_triton] if back_end == "triton" else []
        is_slow = back_end == "triton" and f"{dtype}-{kind}" != INTERPRETED.get(size)
        if size in WIDE or (is_slow and DEVICE == "cpu"):
            marks.append(needs_gpu)
        yield pytest.param(*case, marks=marks, id="-".join(case))


@pytest.mark.gpu
@pytest.mark.parametrize("size, dtype, kind, kernels", cases())
def test_every_expert_back_end_agrees_with_the_loop_in_fp64(
    at_most, size, dtype, kind, kernels, monkeypatch
):
    """Compares output and every gradient, at aligned and unaligned addresses, twice."""
    tokens, experts, k, d, h = {**SIZES, **WIDE}[size]
    dtype = DTYPES[dtype]
    torch.manual_seed(0)
    x, logits = torch.randn(tokens, d).to(dtype), torch.randn(tokens, experts)
    logits[:, IDLE] -= 100
    routing = route_top_k(logits, k) if k else any_rows(tokens, experts, 2 * tokens)
    routing = routing._replace(weight=routing.weight.to(dtype).float())
    weights = [w.to(dtype).float() for w in random_weights(experts, d, h, kind) if w is not None]
    moved = [w.new_empty(w.numel() + 1)[1:].view_as(w).copy_(w) for w in weights]
    exact = routing._replace(weight=routing.weight.double())
    want = results(experts_loop, x.double(), exact, ExpertWeights(*(w.double() for w in weights)))
    compute = experts_loop if kernels == "loop" else experts_grouped
    if kernels != "loop":
        chosen = import_module(f"moe_kernels.{kernels}_kernels")
        monkeypatch.setattr("moe_kernels.operators.kernels_for", lambda x: chosen)

    fill_free_memory_with_nan()
    # Triton's interpreter reads at any address in the same way, and slowly.
    tried = [moved] if kernels == "triton" and DEVICE == "cpu" else [weights, moved]
    runs = [results(compute, x, routing, ExpertWeights(*w)) for w in tried]
    errors = [relative_error(run[name], want[name]) for run in runs for name in want]
    got = runs[0]
    at_most("largest error", torch.tensor(errors).max().item(), allowed(dtype, kernels))
    for name in got.keys() & ExpertWeights._fields:
        assert got[name].dtype == torch.float32
        assert got[name][IDLE].abs().sum() == 0, name
    # On a GPU the loop sums in any order. In Triton's interpreter these checks would show nothing.
    if kernels == "torch" or (kernels == "triton" and DEVICE == "cuda"):
        again = results(compute, x, routing, ExpertWeights(*weights))
        frozen = results(compute, x, routing, ExpertWeights(*weights), frozen=True)
        for name in got:
            assert torch.equal(again[name], got[name]), name
            assert torch.equal(frozen.get(name, got[name]), got[name]), name


@pytest.mark.parametrize("num_experts, d, h", [(1, 32, 64), (256, 32, 64), (5, 30, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_experts_agree_with_the_loop_at_any_size(num_experts, d, h, dtype):
    torch.manual_seed(0)
    x, weights = torch.randn(40, d, dtype=dtype), random_weights(num_experts, d, h)
    routing = route_top_k(torch.randn(40, num_experts), min(3, num_experts))
    want = results(experts_loop, x, routing, weights)
    assert_agree(results(experts_grouped, x, routing, weights), want, TOLERANCES.get(dtype, 1e-6))


def test_swiglu_gradients_are_exact_and_checkpointing_keeps_no_tensor():
    torch.manual_seed(0)
    mlp, x = SwiGLU(32, 48), torch.randn(2, 3, 32, requires_grad=True)
    leaves = [x, *mlp.parameters()]

    def gradients(y: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(enumerate(torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)))

    hidden = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    want = gradients(F.linear(hidden, mlp.down_proj.weight))
    y = mlp(x)
    for _ in range(2):  # the graph is retained, so a second backward pass is possible
        assert_agree(gradients(y), want, 1e-6)
    alive = []
    mlp.gate_proj.register_forward_hook(lambda _, inputs, y: alive.append(weakref.ref(y)))
    y = checkpoint(mlp, x, use_reentrant=False)
    assert alive[0]() is None  # gradient checkpointing keeps no intermediate tensor
    assert_agree(gradients(y), want, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
    assert y.dtype == torch.bfloat16
    assert_agree(gradients(y.float()), want, 2e-2)
    mlp.requires_grad_(False)
    mlp.down_proj.requires_grad_(True)
    mlp(x.detach()).square().sum().backward()
    assert relative_error(mlp.down_proj.weight.grad, want[3]) < 1e-6


def test_a_linear_layer_computes_what_its_type_says():
    """What hooks, adapters and FLOP counters of other projects rely on."""
    torch.manual_seed(0)
    model = DiT(**TINY_MODEL, mlp_type="swiglu_bias").eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)
        want, seen = model(x, t, y)[0], []

        def compare(layer, inputs, output):
            assert torch.equal(output, F.linear(*inputs, layer.weight, layer.bias))
            seen.append(layer)

        hooks = [layer.register_forward_hook(compare) for layer in layers]
        assert relative_error(model(x, t, y)[0], want) < 1e-6
        assert set(seen) == set(layers)
        for hook in hooks:
            hook.remove()
        for layer in layers:  # as accelerate puts a layer on another device for its call
            layer.forward = lambda x, call=layer.forward: 0 * call(x)
        assert not model(x, t, y)[0].any()


def test_lora_of_peft_on_every_linear_layer_is_merged_exactly():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = DiT(**TINY_MODEL).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    before = model(x, t, y)[0]
    for layers in ["down_proj"], "all-linear":
        settings = peft.LoraConfig(target_modules=layers, init_lora_weights=False)
        adapted = peft.get_peft_model(model, settings).eval()
        want = adapted(x, t, y)[0]
        assert relative_error(want, before) > 1e-3
        with adapted.disable_adapter():
            assert relative_error(adapted(x, t, y)[0], before) < 1e-6
        model = adapted.merge_and_unload()
        assert relative_error(model(x, t, y)[0], want) < 1e-5
        before = want


STACKED = ["moe.experts.gate_up_proj", "moe.experts.down_proj"]


@pytest.mark.parametrize("layers, names, per_block", [
    ([], STACKED, 2), ([], ["moe.gate.weight"], 1), (["qkv"], [], 1),
    (["qkv", "proj", "gate_proj", "up_proj", "down_proj"], [*STACKED, "moe.gate.weight"], 8),
], ids=["experts", "gate", "attention", "all"])  # fmt: skip
def test_lora_of_peft_is_trained_saved_and_merged(layers, names, per_block, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, target = DiT(**TINY_MODEL).eval(), torch.randn(2, 4, 8, 8)
    batch = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    base, before = copy.deepcopy(model), model(*batch)[0]
    settings = peft.LoraConfig(
        r=2, target_modules=layers, target_parameters=names, exclude_modules=["x_embedder.proj"]
    )
    adapted = peft.get_peft_model(model, settings)
    assert torch.equal(adapted(*batch)[0], before)
    trained = {n: w for n, w in adapted.named_parameters() if w.requires_grad}
    assert len(trained) == 2 * per_block * TINY_MODEL["depth"]
    optimizer, losses = torch.optim.Adam(trained.values(), lr=0.01), []
    for _ in range(5):
        loss = F.mse_loss(adapted(*batch)[0][:, :4], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(weight.grad.any() for weight in trained.values())
    want = adapted(*batch)[0]
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(*batch)[0], want)
    assert relative_error(loaded.merge_and_unload()(*batch)[0], want) < 1e-6
    assert torch.equal(adapted.unload()(*batch)[0], before)


def test_second_derivatives_work_with_the_loop_and_raise_with_grouped_experts():
    torch.manual_seed(0)
    experts, logits = Experts(8, 6, 3, "loop").double(), torch.randn(4, 3)

    def function(x: torch.Tensor) -> torch.Tensor:
        return experts(x, route_top_k(logits, 2)).square().sum()

    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    (want,) = torch.autograd.grad(function(x), x)
    assert relative_error(torch.func.grad(function)(x.detach()), want) < 1e-12
    experts.backend = "grouped"
    with pytest.raises(RuntimeError):
        torch.func.grad(function)(x.detach())
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@pytest.mark.parametrize("mlp_type", ["swiglu", "swiglu_bias", "gelu"])
def test_each_expert_slice_is_initialised_like_a_linear_layer(mlp_type):
    experts = Experts(64, 128, 6, mlp_type=mlp_type)
    bound = (6 / (64 + 128)) ** 0.5
    for weight in (parameter for parameter in experts.parameters() if parameter.dim() == 3):
        assert weight.abs().max() <= bound
        assert weight.std((1, 2)).tolist() == pytest.approx([bound / 3**0.5] * 6, rel=0.03)


class LowRankExperts(Experts):
    """SwiGLU experts that share a base; the matrices of an expert are base + b a, of rank 2."""

    per_expert = {"up_a": 1, "up_b": 1, "down_a": 1, "down_b": 1}
    shared = {"up_base": 2, "down_base": 1}

    def __init__(self, d, h, num_experts, backend="grouped", mlp_type="swiglu"):
        torch.nn.Module.__init__(self)
        self.backend = backend
        for side, (m, n) in {"up": (2 * h, d), "down": (d, h)}.items():
            shapes = {"base": (m, n), "a": (num_experts, 2, n), "b": (num_experts, m, 2)}
            for name, shape in shapes.items():
                self.register_parameter(f"{side}_{name}", torch.nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self):
        for weight in self.parameters():
            torch.nn.init.normal_(weight, std=0.1)

    def weights(self):
        return ExpertWeights(self.up_base + self.up_b @ self.up_a,
                             self.down_base + self.down_b @ self.down_a)  # fmt: skip


@pytest.fixture
def low_rank(monkeypatch) -> DiTConfig:
    """Config of a model whose experts share parameters."""
    monkeypatch.setattr(moe, "Experts", LowRankExperts)
    build_meta.cache_clear()
    yield DiTConfig(**TINY_MODEL)
    build_meta.cache_clear()


def test_a_parameter_that_the_experts_share_is_counted_and_updated_once(low_rank):
    model, d, h, e, k = DiT(low_rank), 32, 128, 4, 2
    factors, base = 2 * (2 * h + d + d + h), 2 * h * d + d * h  # of an expert, of a layer
    total, active = count_parameters(low_rank)
    assert total == sum(weight.numel() for weight in model.parameters())
    assert total - active == 2 * (e - k) * factors
    stacks = {name: model.get_parameter(name).shape[0] for name in model.expert_parameters()}
    assert set(stacks.values()) == {e} and len(stacks) == 2 * 4
    assert sum(w.numel() for n, w in model.named_parameters() if "_base" in n) == 2 * base
    matrices = hidden_matrices(model)
    assert {n: matrices[f"blocks.0.moe.experts.{n}"] for n in ("up_base", "down_base", "up_a")} == {
        "up_base": 2, "down_base": 1, "up_a": 1,
    }  # fmt: skip
    assert all(matrices[n] for n, _ in model.named_parameters() if ".experts." in n)


def test_experts_that_share_a_parameter_are_not_cut_over_processes(low_rank):
    flags = "--shard", "--expert-parallel=2", "--gpus-per-node=2", "--global-batch-size=4"
    config = dataclasses.replace(config_of_command(*flags), model=low_rank)
    with pytest.raises(UserError, match="--expert-parallel: got 2, expected 1, .*0.*up_base"):
        FSDPEngine.check(config, 2)
    sharded = dataclasses.replace(config.engine, expert_parallel=1)
    FSDPEngine.check(dataclasses.replace(config, engine=sharded), 2)


@pytest.mark.parametrize(
    "shape, declared, message",
    [
        ((4, 3), {}, "got the parameter scale, expected its name in per_expert, .* or in shared"),
        (
            (3,),
            {"scale": 0},
            r"per_expert: got scale \(3,\), expected \(4, ...\), a slice",
        ),
    ],
)
def test_a_parameter_of_experts_is_declared(monkeypatch, shape, declared, message):
    class Scaled(Experts):
        per_expert = Experts.per_expert | declared

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.scale = torch.nn.Parameter(torch.ones(shape))

    monkeypatch.setattr(moe, "Experts", Scaled)
    with pytest.raises(ValueError, match=f"Scaled.*{message}"):
        SparseMoEBlock(32, 4, 2)


@pytest.mark.parametrize("fields", [{}, {"mlp_type": "gelu"}, {"mlp_type": "swiglu_bias"}], ids=str)
def test_counters_of_flops_see_what_each_back_end_computes(fields):
    def count(backend: str) -> tuple[int, int]:
        torch.manual_seed(0)
        layer = SparseMoEBlock(8, num_experts=4, num_experts_per_tok=2, mlp_ratio=2.0,
                               expert_backend=backend, **fields)  # fmt: skip
        x = torch.randn(2, 6, 8, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            y = layer(x, {})[0]
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    of_bias = 2 * 12 * 4 * 8 if fields else 0  # grouped adds biases by a product (S, E) (E, D)
    forward, backward = count("loop")
    assert count("grouped") == (forward + of_bias, backward + 2 * of_bias)
