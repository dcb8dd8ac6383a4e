"""Forward-mode derivatives (torch.func.jvp) through the sparse layer and the whole model."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import needs_triton, relative_error
from test_models import randomised
from test_moe import any_rows
from torch import nn

from moe import Experts, ExpertWeights, experts_grouped, experts_loop
from moe_kernels import forward_mode, operators, torch_kernels
from moe_kernels.gated_linear import gated_linear
from routers import ROUTERS
from wrappers import wrap_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, EXPERTS, WIDTH, HIDDEN = 21, 4, 24, 40


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["swiglu", "swiglu_bias", "gelu"])
@pytest.mark.parametrize("along", [("x",), ("x", "weight"), ("up_proj", "down_proj", "up_bias")])
def test_grouped_experts_have_the_same_tangents_as_the_loop(kind, along):
    """Tangents along tokens, row weights and parameters. The tangent itself is differentiable."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        routing, width = any_rows(TOKENS, EXPERTS, 50), (1 if kind == "gelu" else 2) * HIDDEN
        shapes = {"up_proj": (width, WIDTH), "down_proj": (WIDTH, HIDDEN)}
        if kind != "swiglu":
            shapes |= {"up_bias": (width,), "down_bias": (WIDTH,)}
        values = {name: torch.randn(EXPERTS, *s).double() / 5 for name, s in shapes.items()}
        values |= {"x": torch.randn(TOKENS, WIDTH).double(), "weight": routing.weight.double()}
        moved = {name: value for name, value in values.items() if name in along}
        directions = tuple(torch.randn_like(value) for value in moved.values())

    def tangent(backend: Callable, *starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def compute(*moved_to: torch.Tensor) -> torch.Tensor:
            v = values | dict(zip(moved, moved_to, strict=True))
            weights = ExpertWeights(*(v.get(name) for name in ExpertWeights._fields))
            return backend(v["x"], routing._replace(weight=v["weight"]), weights)

        return torch.func.jvp(compute, starts, directions)

    with torch.no_grad():
        got, want = (tangent(b, *moved.values()) for b in (experts_grouped, experts_loop))
    assert want[1].abs().max() > 0
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-12
    starts = tuple(value.requires_grad_() for value in moved.values())
    with_gradients = tangent(experts_grouped, *starts)[1]
    assert relative_error(with_gradients, want[1]) < 1e-12
    assert torch.autograd.grad(with_gradients.sum(), starts)[0].isfinite().all()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_triton_experts_have_the_same_tangents_as_pytorch(kind, monkeypatch):
    from moe_kernels import triton_kernels

    torch.manual_seed(0)
    with torch.device(DEVICE):
        experts = Experts(WIDTH, HIDDEN, EXPERTS, mlp_type=kind).requires_grad_(False)
        routing = any_rows(TOKENS, EXPERTS, 50)
        x, direction = torch.randn(2, TOKENS, WIDTH)
    found = []
    for module in (triton_kernels, torch_kernels):
        for user in (operators, forward_mode):
            monkeypatch.setattr(user, "kernels_for", lambda x, module=module: module)
        found.append(torch.func.jvp(lambda x: experts(x, routing), (x,), (direction,)))
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 1e-5


def test_a_gated_linear_layer_has_the_tangent_of_its_formula():
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, WIDTH, bias=False).double()
    gate, up, gate_t, up_t = torch.randn(4, 7, HIDDEN).double()
    _, got = torch.func.jvp(
        lambda gate, up: gated_linear(gate, up, layer), (gate, up), (gate_t, up_t)
    )
    slope = gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
    want = (slope * gate_t * up + gate * gate.sigmoid() * up_t) @ layer.weight.T
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_tangent_of_a_model_matches_the_loop_and_finite_differences(router, training):
    torch.manual_seed(6)
    x, direction = torch.randn(2, 3, 4, 8, 8)
    t, y = torch.rand(3), torch.tensor([1, 2, 10])
    found = {}
    for backend in ("grouped", "loop"):
        fields = dict(router=router, qk_norm=True, rope=True, expert_backend=backend)
        model = randomised(0.2, class_dropout_prob=0.1, **fields).train(training).double()
        with torch.no_grad():
            found[backend] = torch.func.jvp(
                lambda x, t, model=model: model(x, t, y)[0],
                (x.double(), t.double()), (direction.double(), torch.ones(3).double()),
            )  # fmt: skip
    for got, want in zip(*found.values(), strict=True):
        assert relative_error(got, want) < 1e-12
    assert model.expert_load is None  # a pass with tangents does not change the attributes
    with torch.no_grad():
        step = 1e-3  # router and times are fp32; a longer step would change the chosen experts
        ahead, behind = (model(x.double() + s * direction, t + s, y)[0] for s in (step, -step))
    differences = (ahead - behind) / (2 * step)
    assert relative_error(found["grouped"][1], differences) < 2e-3


def test_a_compiled_and_checkpointed_model_has_the_same_tangent(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = randomised(0.2, depth=1)
    x, direction = torch.randn(2, 3, 4, 8, 8)
    t, y = torch.rand(3), torch.tensor([1, 2, 5])

    def tangent() -> torch.Tensor:
        with torch.no_grad():
            return torch.func.jvp(lambda x: model(x, t, y)[0], (x,), (direction,))[1]

    want = tangent()
    wrap_blocks(model, recomputed="all", compiled=True)
    model(x, t, y)[0].sum().backward()  # compiles
    assert torch.equal(tangent(), want)
