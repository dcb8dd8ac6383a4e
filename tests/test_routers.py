"""Routers: what they choose, their weights, loss and load; one choice travels everywhere."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_MODEL
from torch import Tensor, nn

import routers
from analysis.recorder import RoutingRecorder
from models import DiT
from moe import SparseMoEBlock
from routers import Routing, TopKRouter, share_of_rows


def choose(logits: Tensor, k: int, **options) -> Routing:
    return TopKRouter(1, logits.shape[1], k, **options).choose(logits)


def test_top_k_weights_are_not_renormalised():
    logits = torch.randn(7, 4)
    got = choose(logits, 2).weight.view(7, 2).sum(-1)
    want = logits.softmax(-1).topk(2, dim=-1).values.sum(-1)
    torch.testing.assert_close(got, want)
    assert (want < 1).all()


def test_renormalised_weights_of_a_token_sum_to_one():
    got = choose(torch.randn(7, 4), 2, renormalize=True).weight.view(7, 2).sum(-1)
    torch.testing.assert_close(got, torch.ones(7))


def test_balance_loss_is_one_when_balanced_and_grows_with_skew():
    balanced = choose(torch.eye(4).repeat(5, 1) * 1e-4, 1)
    torch.testing.assert_close(balanced.loss, torch.tensor(1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(balanced.load, torch.ones(4))
    collapsed = choose(torch.tensor([[9.0, 0, 0, 0]]).repeat(20, 1), 1)
    assert collapsed.loss > 3.9
    torch.testing.assert_close(collapsed.load, torch.tensor([4.0, 0, 0, 0]))


def test_balance_loss_is_the_paper_formula():
    torch.manual_seed(0)
    logits = torch.randn(40, 5)
    scores = logits.softmax(-1)
    chosen = F.one_hot(scores.topk(2, dim=-1).indices, 5).sum(1).float()
    f = chosen.mean(0) * 5 / 2
    torch.testing.assert_close(choose(logits, 2).loss, (f * scores.mean(0)).sum())


def test_scores_are_fp32_under_autocast():
    block = SparseMoEBlock(32, num_experts=4, num_experts_per_tok=2)
    x = torch.randn(2, 6, 32)
    _, want = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, got = block(x)
    assert y.dtype == torch.bfloat16 and got.weight.dtype == torch.float32
    assert torch.equal(got.weight, want.weight) and torch.equal(got.expert, want.expert)


class LastExpert(nn.Module):
    """A router that is nothing like the others: the last expert for half of the tokens, no more."""

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int, **options):
        super().__init__()
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, unconditional: Tensor | None = None) -> Routing:
        token = torch.arange(0, x.shape[0] * x.shape[1], 2)
        expert = torch.full_like(token, self.num_experts - 1)
        weight = x.flatten(0, 1)[token] @ self.weight[-1]
        load = share_of_rows(expert, self.num_experts)
        return Routing(token, expert, weight, 0, self.weight.square().sum(), load)


def test_another_router_changes_experts_loss_load_and_counts_alike(monkeypatch):
    monkeypatch.setitem(routers.ROUTERS, "last", LastExpert)
    torch.manual_seed(0)
    model = DiT(**TINY_MODEL, router="last")
    nn.init.normal_(model.final_layer.linear.weight)
    for block in model.blocks:
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 1])
    with RoutingRecorder(model, num_steps=1) as recorder:
        recorder.start_batch(y.tolist())
        prediction, aux_loss = model.eval()(x, t, y)
    alpha, layers, width = 0.01, 2, TINY_MODEL["hidden_size"]
    assert aux_loss.item() == pytest.approx(alpha * layers * 4 * width)
    assert torch.equal(model.expert_load, torch.tensor([[0.0, 0, 0, 4]] * layers))
    tokens = 16
    assert recorder.by_class[0].tolist() == [[0, 0, 0, tokens / 2]] * layers
    assert recorder.by_class[1].tolist() == [[0, 0, 0, tokens]] * layers
    assert recorder.by_position[::2, :, 3].eq(3).all() and not recorder.by_position[1::2].any()
    prediction.square().sum().backward()
    for block in model.blocks:
        grad = block.moe.experts.down_proj.grad
        assert grad[3].any() and not grad[:3].any()
        assert block.moe.gate.weight.grad[3].any()
