"""Muon against a loop over single matrices, and what it takes for one."""

import torch
from conftest import TINY_MODEL, relative_error

from models import DiT
from training.optimizers import Muon


def make(seed: int = 0, **fields) -> tuple[DiT, dict]:
    torch.manual_seed(seed)
    model = DiT(**{**TINY_MODEL, **fields})
    named = dict(model.named_parameters())
    for weight in named.values():
        weight.data = torch.randn_like(weight)
    return model, named


def draw_gradients(named: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in named.values():
        weight.grad = torch.randn(weight.shape, generator=generator)


def reference_step(matrix, grad, momentum, lr, decay):
    """One matrix in fp64: Jordan's Nesterov momentum and iteration, Moonlight's scale and decay."""
    momentum = 0.95 * momentum + 0.05 * grad
    x = 0.05 * grad + 0.95 * momentum
    x = x / x.norm()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    x = x.T if tall else x
    return matrix - lr * decay * matrix - lr * 0.2 * max(x.shape) ** 0.5 * x, momentum


def test_muon_moves_each_matrix_as_a_loop_over_them_does():
    model, named = make(qk_norm=True)
    muon = Muon(weight_decay=0.1, precision="fp32").make(named, 0.02, model.matrices())
    others = {name: w.detach().clone() for name, w in named.items() if name not in model.matrices()}
    adamw = torch.optim.AdamW(others.values(), 0.02, (0.9, 0.95), weight_decay=0.1)
    loop = {  # by parameter, each as single matrices with their momentum
        name: [(m, 0 * m) for m in named[name].detach().double().reshape(
            -1, named[name].shape[-2] // cut, named[name].shape[-1])]
        for name, cut in model.matrices().items()
    }  # fmt: skip
    for step in range(3):
        draw_gradients(named, step)
        for name, pairs in loop.items():
            grads = named[name].grad.double().reshape(len(pairs), *pairs[0][0].shape)
            loop[name] = [
                reference_step(m, g, v, 0.02, 0.1) for (m, v), g in zip(pairs, grads, strict=True)
            ]
        for name, weight in others.items():
            weight.grad = named[name].grad.clone()
        adamw.step()
        muon.step()
    for name, pairs in loop.items():
        want = torch.stack([matrix for matrix, _ in pairs]).view_as(named[name])
        assert relative_error(named[name].detach(), want) < 1e-5, name
    for name, weight in others.items():
        assert relative_error(named[name].detach(), weight) < 1e-5, name


def test_the_model_says_what_is_a_matrix_and_how_it_is_cut():
    found = make(router="batch_pool")[0].matrices()
    block = {k.removeprefix("blocks.0."): cut for k, cut in found.items() if "blocks.0" in k}
    assert block == {
        "attn.qkv.weight": 3, "attn.proj.weight": 1, "adaLN_modulation.1.weight": 6,
        "moe.gate.predictor.0.weight": 1, "moe.gate.predictor.2.weight": 1,
        "moe.experts.gate_up_proj": 2, "moe.experts.down_proj": 1,
        "moe.shared_experts.gate_proj.weight": 1, "moe.shared_experts.up_proj.weight": 1,
        "moe.shared_experts.down_proj.weight": 1,
    }  # fmt: skip
    outside = {name for name in found if not name.startswith("blocks.")}
    assert outside == {"t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"}
    assert "blocks.1.moe.gate.hidden" in make(router="race")[0].matrices()
    gelu = make(mlp_type="gelu")[0].matrices()
    assert "blocks.0.moe.experts.up_proj" in gelu and not [n for n in gelu if "bias" in n]
