"""Muon compared with a loop over matrices."""

import test_flags
import torch
from helpers import (
    relative_error,
)
from test_optimizers import draw_gradients, make

from extras.muon import Muon
from training.optimizers import (
    hidden_matrices,
    planned_state,
)

help_of = test_flags.help_of


def reference_step(matrix, grad, momentum, lr, decay):
    """Muon step of one fp64 matrix: momentum, iteration (Jordan), scale and decay (Moonlight)."""
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


def test_the_state_of_an_empty_shard_of_a_matrix_is_planned():
    shapes = {"a": torch.Size([0, 128]), "b": torch.Size([4, 8])}
    found = planned_state(Muon(), shapes, {"a": 1, "b": 1})
    assert {name: state["momentum"].shape for name, state in found.items()} == shapes


def test_muon_equals_a_reference_loop_over_matrices():
    model, named = make(qk_norm=True)
    hidden = {name: count for name, count in hidden_matrices(model).items() if count}
    muon = Muon(weight_decay=0.1, precision="fp32").make(named, 0.02, hidden_matrices(model))
    others = {name: w.detach().clone() for name, w in named.items() if name not in hidden}
    adamw = torch.optim.AdamW(others.values(), 0.02, (0.9, 0.95), weight_decay=0.1)
    loop = {  # for each parameter, a list of (matrix, momentum)
        name: [(m, 0 * m) for m in named[name].detach().double().reshape(
            -1, named[name].shape[-2] // cut, named[name].shape[-1])]
        for name, cut in hidden.items()
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


def test_muon_gives_the_same_weights_in_small_and_large_batches(monkeypatch):
    found = []
    for largest in (1, 2**14, 2**25):  # elements: one matrix, a few, and all of one shape
        monkeypatch.setattr("extras.muon.CACHED", largest)
        model, named = make(qk_norm=True)
        optimizer = Muon(precision="fp32").make(named, 0.02, hidden_matrices(model))
        for step in range(3):
            draw_gradients(named, step)
            optimizer.step()
        group, _ = optimizer.param_groups
        sizes = {len(stacks) * stacks[0][0].numel() for stacks, *_ in optimizer.batches(group)}
        found.append((max(sizes), named))
    assert found[0][0] < found[1][0] < found[2][0]
    for name, weight in found[-1][1].items():
        for _, other in found[:-1]:
            assert relative_error(other[name].detach(), weight.detach()) < 1e-6, name


def test_the_help_of_train_py_has_the_components_of_extras(help_of):
    words = " ".join(help_of("train.py", "--help", "all").split())
    for line in ("precision={bf16,fp32}", "--auxiliary dispersive", "--objective mean_flow"):
        assert line in words
