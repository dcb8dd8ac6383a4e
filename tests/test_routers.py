"""Routers: chosen experts, weights, loss, gradients and state follow the papers' equations."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_MODEL, relative_error
from test_models import gradients_of, randomised
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import models
import routers
from analysis.recorder import RoutingRecorder, listen
from models import DiT, DiTBlock
from moe import SparseMoEBlock
from moe_kernels import operators
from routers import NOTHING, ROUTERS, Context, Router, Routing, TopKRouter, expert_load
from training.auxiliary import listening
from wrappers import wrap_blocks

N, T, D, E, K = 3, 8, 12, 4, 2


def router_of(name: str, **options) -> Router:
    """Router with well separated scores and, for sigmoid, a bias that changes the choice."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=D, num_experts=E, num_experts_per_tok=K)
    router = ROUTERS[name](**{**sizes, **options})
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.5)
    if name == "sigmoid":
        nn.init.normal_(router.e_score_correction_bias, std=0.3)
    return router


def tokens() -> Tensor:
    return torch.randn(N, T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()


def rows_of(routing: Routing) -> dict[tuple[int, int], Tensor]:
    """Total weight of each (token, expert)."""
    rows: dict[tuple[int, int], Tensor] = {}
    for token, expert, weight in zip(
        routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True
    ):
        rows[token, expert] = rows.get((token, expert), 0) + weight
    return rows


# The routers' equations, one token and one expert at a time. Each function returns (rows, loss).


def plain_topk(router, x):
    rows, counts, mean = {}, [0] * E, 0
    for s, token in enumerate(x):
        z = router.weight @ token
        p = {"softmax": z.softmax(0), "sigmoid": z.sigmoid(), "identity": z}[router.gating]
        mean = mean + z.softmax(0) / len(x)
        for i in sorted(range(E), key=lambda i: -p[i].item())[:K]:
            rows[s, i], counts[i] = p[i], counts[i] + 1
    return rows, sum(E * n / (K * len(x)) * m for n, m in zip(counts, mean, strict=True))


def plain_sigmoid(router, x):
    rows, k = {}, router.num_experts_per_tok
    for s, token in enumerate(x):
        p = (router.weight @ token).sigmoid()
        biased = p + router.e_score_correction_bias
        chosen = sorted(range(E), key=lambda i: -biased[i].item())[:k]
        total = p[chosen].sum() if k > 1 else 1
        rows.update({(s, i): router.scale * p[i] / total for i in chosen})
    return rows, 0


def plain_expert_choice(router, x):
    p, rows = (x @ router.weight.T).softmax(-1), {}
    capacity = -(-T * K // E)
    for image in range(N):
        places = range(image * T, (image + 1) * T)
        for i in range(E):
            for s in sorted(places, key=lambda s: -p[s, i].item())[:capacity]:
                rows[s, i] = p[s, i]
    return rows, 0


def plain_race(router, x):
    z = F.gelu(x @ router.hidden.T) @ router.weight.T
    order = sorted(((s, i) for s in range(len(x)) for i in range(E)), key=lambda c: -z[c].item())
    winners = order[: K * len(x)]
    p, loss = z.softmax(-1), 0
    won = torch.tensor([[float((s, i) in winners) for i in range(E)] for s in range(len(x))])
    both = won.T @ won  # (E, E) number of tokens that chose both experts
    diagonal, rest = both.trace(), both.sum() - both.trace()
    for i in range(E):
        for j in range(E):
            w = E * both[i][i] / diagonal if i == j else (E * E - E) * both[i][j] / rest
            loss = loss + w * (p[:, i] @ p[:, j]) / len(x)
    return {c: z[c] for c in winners}, loss


def plain_batch_pool(router, x):
    p, rows = (x @ router.weight.T).softmax(-1), {}
    first, _, last = router.predictor
    hidden = F.silu(x.detach() @ first.weight.T + first.bias)
    predicted, loss = (hidden @ last.weight.T + last.bias).sigmoid(), 0
    for i in range(E):
        best = sorted(range(len(x)), key=lambda s: -p[s, i].item())[: len(x) * K // E]
        rows.update({(s, i): p[s, i] for s in best})
        for s in range(len(x)):
            q = predicted[s, i]
            loss = loss - (q if s in best else 1 - q).log() / (E * len(x))
    return rows, loss


def plain_prototype(router, x, free=(1,)):
    rows, chosen = {}, {i: [] for i in range(E)}
    for s, token in enumerate(x):
        if s // T in free:
            rows[s, E] = torch.tensor(1.0)
            continue
        z = torch.stack([F.cosine_similarity(token, p, dim=0) for p in router.weight])
        for i in sorted(range(E), key=lambda i: -z[i].item())[:K]:
            rows[s, i] = z[i]
            chosen[i].append(token)
    means = {i: torch.stack(members).mean(0) for i, members in chosen.items() if members}
    losses = []
    for i in means:
        logits = [F.cosine_similarity(router.weight[i], m, dim=0) / 0.07 for m in means.values()]
        losses.append(torch.stack(logits).logsumexp(0) - logits[list(means).index(i)])
    return rows, sum(losses) / len(losses)


PLAIN = {
    "topk": plain_topk, "sigmoid": plain_sigmoid, "expert_choice": plain_expert_choice,
    "race": plain_race, "batch_pool": plain_batch_pool, "prototype": plain_prototype,
}  # fmt: skip


def call(router: Router, x: Tensor, no_class: tuple[bool, ...] = (False, True, False)) -> Routing:
    """Routes images, some of which have no class."""
    return router(x, Context({"no_class": torch.tensor(no_class)}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ROUTERS),
        ("topk", {"gating": "sigmoid"}),
        ("topk", {"gating": "identity"}),
        ("sigmoid", {"num_experts_per_tok": 1, "scale": 2.0}),
    ],
)
def test_a_router_follows_its_equations_in_choice_weights_loss_and_gradients(name, options):
    results = []
    for plain in (False, True):
        router, x = router_of(name, **options), tokens()
        if plain:
            rows, loss = PLAIN[name](router, x.flatten(0, 1))
        else:
            routing = call(router, x)
            rows, loss = rows_of(routing), routing.loss
            counts = routing.expert.bincount(minlength=len(routing.load))
            torch.testing.assert_close(routing.load, counts / counts.float().mean())
        cotangents = torch.randn(N * T, E + 1, generator=torch.Generator().manual_seed(2))
        (sum(w * cotangents[c] for c, w in rows.items()) + loss).backward()
        grads = {n: p.grad for n, p in router.named_parameters()}
        results.append((rows, torch.as_tensor(loss), {"x": x.grad, **grads}))
    (rows, loss, grads), (want_rows, want_loss, want_grads) = results
    torch.testing.assert_close(rows, want_rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.float(), want_loss.float(), rtol=1e-4, atol=1e-6)
    for key, grad in want_grads.items():
        if grad is None:
            assert grads[key] is None or not grads[key].any(), key
        else:
            torch.testing.assert_close(grads[key], grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["sigmoid", "race", "batch_pool"])
@torch.no_grad()
def test_router_state_after_ten_steps_follows_the_update_rule(name):
    router, generator = router_of(name), torch.Generator().manual_seed(3)
    got = router.e_score_correction_bias.zero_() if name == "sigmoid" else router.threshold
    state = torch.zeros_like(got)
    for step in range(10):
        seen, observed = torch.zeros_like(state), 0
        for x in torch.randn(2, N, T, D, generator=generator):  # two micro-batches
            rows, _ = PLAIN[name](router, x.flatten(0, 1))
            if name == "sigmoid":
                now = torch.tensor([expert for _, expert in rows]).bincount(minlength=E)
            elif name == "race":
                now = min(rows.values())
            else:
                q = router.predictor(x.flatten(0, 1)).sigmoid()
                now = q.sort(0).values[-(N * T * K // E)]
            seen += now / 2
            observed = observed + call(router, x).observed / 2
        router.update(observed, skipped=step == 4)
        if step == 4:
            continue
        if name == "sigmoid":
            move = 1e-3 * (seen.mean() - seen).sign()
            state += move - move.mean()
        else:
            momentum = 0.99 if name == "race" else 0.95
            state = momentum * state + (1 - momentum) * seen
    torch.testing.assert_close(got, state, rtol=1e-4, atol=1e-6)
    assert got.any()


@pytest.mark.parametrize("name", ROUTERS)
def test_in_eval_mode_the_routing_of_an_image_does_not_depend_on_its_batch(name):
    router, x = router_of(name).eval(), tokens()
    if name in ("race", "batch_pool"):
        router.threshold.fill_(0.4)
    routing, single = call(router, x), {}
    for image in range(N):
        rows = rows_of(call(router, x[image : image + 1], (image == 1,)))
        single |= {(s + image * T, i): weight for (s, i), weight in rows.items()}
    torch.testing.assert_close(single, rows_of(routing))
    assert routing.observed is None or name == "sigmoid"


def test_the_contrastive_loss_is_zero_if_fewer_than_two_experts_were_chosen():
    router = router_of("prototype", num_experts_per_tok=1)
    x = tokens()[:1]
    assert call(router, x, (True,)).loss == 0
    loss = call(router, x[:, :1].expand(1, T, D), (False,)).loss  # the same token T times
    assert loss == 0
    loss.backward()
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ROUTERS)
def test_under_autocast_experts_compute_in_bf16_and_routers_in_fp32(name):
    block = SparseMoEBlock(32, num_experts=4, num_experts_per_tok=2, router=name)
    x = torch.randn(2, 6, 32)
    _, want = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, got = block(x)
    assert y.dtype == torch.bfloat16 and got.weight.dtype == got.loss.dtype == torch.float32
    assert all(map(torch.equal, got[:3], want[:3])) and torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("name", ROUTERS)
def test_router_input_selects_the_input_of_the_router_and_not_of_the_experts(name):
    """Checks the inputs of the gate and of the experts in the second block of a model."""
    torch.manual_seed(0)
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3) * 999, torch.tensor([0, 10, 1])
    for option in ("modulated", "normalised", "normalised_time"):
        model = randomised(router=f"{name}:input={option}", class_dropout_prob=0.1).eval()
        block, got = model.blocks[1], {}

        def note(module, inputs, output, got=got) -> None:
            got[module] = *inputs, output

        adaln, time = block.adaLN_modulation, model.t_embedder
        for module in (block.norm2, block.moe, block.moe.gate, adaln, time):
            module.register_forward_hook(note)
        model(x, t, y)
        normed = got[block.norm2][-1]
        shift, scale = got[adaln][-1].chunk(6, dim=1)[3:5]
        modulated = normed * (1 + scale[:, None]) + shift[:, None]
        assert torch.equal(got[block.moe][0], modulated)
        time = got[time][-1][:, None].expand_as(normed)
        expected = {
            "modulated": [modulated], "normalised": [normed], "normalised_time": [normed, time],
        }[option]  # fmt: skip
        read, context, _ = got[block.moe.gate]
        assert torch.equal(read, torch.cat(expected, dim=-1))
        assert torch.equal(context["unmodulated"], normed)
        assert torch.equal(context["classes"], y)
        assert torch.equal(context["no_class"], y == 10)
        assert torch.equal(context["label"], model.y_embedder(y))
        width = 64 if option == "normalised_time" else 32
        assert block.moe.gate.weight.shape == (4, width)


class LastExpert(Router):
    """Router unlike all others: half of the tokens use the last expert, the rest no expert."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, context: Context) -> Routing:
        token = torch.arange(0, x.shape[0] * x.shape[1], 2)
        expert = torch.full_like(token, self.num_experts - 1)
        weight = x.flatten(0, 1)[token] @ self.weight[-1]
        load = expert_load(expert, self.num_experts)
        return Routing(token, expert, weight, 0, self.weight.square().sum(), load)


def test_tokens_that_are_no_patches_are_counted_apart():
    """Three tokens join in front of the patches before the second block."""
    torch.manual_seed(0)
    model, y = randomised(router="expert_choice").eval(), torch.tensor([0, 1, 1])
    model.front_tokens = 3
    joining = model.blocks[1].register_forward_pre_hook(
        lambda block, inputs: (torch.cat([torch.randn(3, 3, 32), inputs[0]], 1), *inputs[1:])
    )
    tokens, routings = {}, {}
    with (
        joining,
        listen(model, lambda layer, x, routing: routings.update({layer: routing})),
        listening(model, {"last": 1}, tokens),
        RoutingRecorder(model, num_steps=1) as recorder,
    ):
        recorder.start_batch(y.tolist())
        prediction, _ = model(torch.randn(3, 4, 8, 8), torch.rand(3), y)
    assert prediction.shape == (3, 8, 8, 8) and tokens["last"].shape == (3, 16, 32)
    for layer, length in enumerate((16, 19)):
        token, expert = routings[layer].token, routings[layer].expert
        is_patch = token % length >= length - 16
        for counts, keys, number in (
            (recorder.tables["by_class"], y[token // length], 10),
            (recorder.tables["by_position"], (token % length - (length - 16)), 16),
        ):
            pairs = keys[is_patch] * 4 + expert[is_patch]
            want = pairs.bincount(minlength=4 * number).view(number, 4)
            assert torch.equal(counts[:, layer], want)
        others = expert[~is_patch].bincount(minlength=4)
        assert torch.equal(recorder.tables["other_by_step"][0, layer], others)
        assert model.experts_per_token[layer] == len(token) / (3 * length)
    assert recorder.tables["by_step_and_position"][0].sum() == recorder.tables["by_position"].sum()


def test_experts_loss_load_and_counts_all_use_the_choice_of_a_custom_router(monkeypatch):
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
    assert recorder.tables["by_class"][0].tolist() == [[0, 0, 0, tokens / 2]] * layers
    assert recorder.tables["by_class"][1].tolist() == [[0, 0, 0, tokens]] * layers
    by_position = recorder.tables["by_position"]
    assert by_position[::2, :, 3].eq(3).all() and not by_position[1::2].any()
    prediction.square().sum().backward()
    for block in model.blocks:
        grad = block.moe.experts.down_proj.grad
        assert grad[3].any() and not grad[:3].any()
        assert block.moe.gate.weight.grad[3].any()


def test_prototypes_in_half_precision_receive_the_rounded_fp32_gradient():
    """The gradient comes from the scores, the contrastive loss and a term added here."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, num_experts=4, num_experts_per_tok=2)
        router = ROUTERS["prototype"](**sizes).train()
        with torch.no_grad():
            router.weight.copy_(torch.randn_like(router.weight).bfloat16())
        router = router.to(dtype)
        routing = call(router, torch.randn(4, 16, 32), (False,) * 4)
        (routing.loss + 0.01 * routing.weight.square().sum()).backward()
        grads.append(router.weight.grad)
    assert torch.equal(grads[0].bfloat16(), grads[1])


def test_an_expert_at_the_mean_load_keeps_its_bias():
    """As with integer counts (DeepSeek-V3), rounding errors move no bias, on any process."""
    for n in range(2, 100):
        router = ROUTERS["sigmoid"](hidden_size=4, num_experts=3, num_experts_per_tok=1)
        expert = torch.arange(3).repeat_interleave(torch.tensor([n - 1, n, n + 1]))
        router.update(expert_load(expert, 3), False)
        torch.testing.assert_close(
            router.e_score_correction_bias, torch.tensor([1e-3, 0, -1e-3]), rtol=0, atol=1e-9
        )


RECOMPUTED = ("nothing", "all", "selective")


class Heir(TopKRouter):
    """Adds the logits of the previous layer, and noise, to its own."""

    def forward(self, x: Tensor, context: Context) -> Routing:
        logits = self.score(x.flatten(0, 1))
        logits = logits + context.get("logits", torch.zeros_like(logits))
        noise = torch.randn_like(logits)
        return self.choose(logits + noise)._replace(passed_on={"logits": logits})


@pytest.mark.parametrize("quick_compile", ["aot_eager"], indirect=True)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_router_reads_what_the_previous_layer_passed_on(monkeypatch, quick_compile, is_compiled):
    """A block that is computed again after all blocks finds what it found the first time, and draws
    the same noise. Selective checkpointing computes no expert again, also if blocks are compiled.
    """
    monkeypatch.setitem(routers.ROUTERS, "heir", Heir)
    torch._dynamo.reset()
    want, seen, computed, compute = [], [], [], operators.forward_rows
    count = lambda *rows: computed.append(1) or compute(*rows)  # noqa: E731
    monkeypatch.setattr(operators, "forward_rows", count)
    for recomputed in RECOMPUTED:
        model = randomised(router="heir", depth=3)
        if not want:
            for block in model.blocks:
                block.moe.gate.register_forward_hook(
                    lambda gate, inputs, routing: seen.append(inputs[1].get("logits"))
                )
        wrap_blocks(model, recomputed=recomputed, compiled=is_compiled and bool(want))
        computed.clear()
        grads = gradients_of(model)
        want = want or grads
        assert all(relative_error(*pair) < 1e-5 for pair in zip(grads, want, strict=True))
        assert len(computed) == len(model.blocks) * (2 if recomputed == "all" else 1)
    first, second, third = seen
    assert first is None and not torch.equal(second, third)


class Writer(TopKRouter):
    def forward(self, x: Tensor, context: Context) -> Routing:
        context["logits"] = self.score(x)
        return super().forward(x, context)


class WritingBlock(DiTBlock):
    def forward(self, x, c, context=NOTHING, rotation=None):
        context.update(tokens=x)
        return super().forward(x, c, context, rotation)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_writing_into_the_context_is_an_error_that_says_what_to_do(
    monkeypatch, quick_compile, recomputed, is_compiled
):
    """A write would reach the other blocks, and be found by a block that is computed again."""
    torch._dynamo.reset()
    places = (routers.ROUTERS, "topk"), (vars(models), "DiTBlock")
    for place, kind in zip(places, (Writer, WritingBlock), strict=True):
        with monkeypatch.context() as patch:
            patch.setitem(*place, kind)
            model = randomised()
        wrap_blocks(model, recomputed=recomputed, compiled=is_compiled)
        error = RuntimeError if is_compiled else TypeError  # torch.compile quotes it
        with pytest.raises(error, match="only read the context.* returns as Routing.passed_on"):
            gradients_of(model)


class Eraser(TopKRouter):
    def forward(self, x: Tensor, context: Context) -> Routing:
        context["no_class"].logical_not_()
        return super().forward(x, context)


@pytest.mark.parametrize("recomputed", RECOMPUTED[1:])
def test_changing_a_tensor_of_the_context_in_place_is_an_error(monkeypatch, recomputed):
    """A block that is computed again would read what it or a later block has changed."""
    monkeypatch.setitem(routers.ROUTERS, "topk", Eraser)
    model = randomised()
    wrap_blocks(model, recomputed=recomputed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_of(model)


class Keeper(TopKRouter):
    """Adds the logits of the previous layer, from an attribute, to its own."""

    logits = 0.0

    def forward(self, x: Tensor, context: Context) -> Routing:
        own = self.score(x.flatten(0, 1))
        logits, Keeper.logits = own + Keeper.logits, own.detach()
        return self.choose(logits)


class Drawer(TopKRouter):
    """Draws noise from a generator of its own."""

    generator = torch.Generator()

    def choose(self, logits: Tensor) -> Routing:
        return super().choose(logits + torch.randn(logits.shape, generator=self.generator))


class KeepingBlock(DiTBlock):
    """Adds the tokens of the previous block, from an attribute, times a gate that starts at 0."""

    tokens = None

    def forward(self, x, c, context=NOTHING, rotation=None):
        before = torch.zeros_like(x) if KeepingBlock.tokens is None else KeepingBlock.tokens
        KeepingBlock.tokens = x.detach()
        output, routing = super().forward(x, c, context, rotation)
        gate = self.adaLN_modulation(c).chunk(6, dim=1)[2]
        return output + gate.unsqueeze(1) * before, routing


@pytest.mark.parametrize("kind, recomputed, is_compiled", [
    *itertools.product((Keeper, Drawer, KeepingBlock), RECOMPUTED[1:], (False,)),
    *itertools.product((Keeper, Drawer, KeepingBlock), RECOMPUTED[1:], (True,)),
])  # fmt: skip
def test_a_block_that_computes_something_else_the_second_time_is_an_error(
    monkeypatch, kind, recomputed, is_compiled
):
    """Also in a later call, and where torch.compile cannot trace a block and runs it as it is."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(Keeper, "logits", 0.0)
    monkeypatch.setattr(KeepingBlock, "tokens", None)
    of_block = issubclass(kind, DiTBlock)
    place = (vars(models), "DiTBlock") if of_block else (routers.ROUTERS, "topk")
    monkeypatch.setitem(*place, kind)
    torch.manual_seed(0)
    model = DiT(**TINY_MODEL | {"depth": 3})
    wrap_blocks(model, recomputed=recomputed, compiled=is_compiled)
    if of_block:
        gradients_of(model)  # the gates of adaLN-Zero hide what the blocks compute
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    with pytest.raises(RuntimeError, match="other (tokens|routing weights) the second time"):
        gradients_of(model)


def test_what_a_router_reports_keeps_no_graph(monkeypatch):
    """A graph would keep the inputs of all blocks until the next forward pass has ended."""

    class Reporter(TopKRouter):
        def choose(self, logits: Tensor) -> Routing:
            routing = super().choose(logits)
            mean = routing.weight.mean()
            return routing._replace(metrics={"mean": mean}, observed=mean, load=routing.load * mean)

    monkeypatch.setitem(routers.ROUTERS, "topk", Reporter)
    model = randomised()
    assert any(gradient.any() for gradient in gradients_of(model))
    for value in (model.expert_load, model.router_metrics["router_mean"], model.observed):
        assert not value.requires_grad


def test_the_error_for_an_unknown_name_lists_the_context():
    with pytest.raises(KeyError, match="got labels, expected one of time, no_class"):
        Context({"time": torch.zeros(1), "no_class": torch.zeros(1)})["labels"]


def test_sharding_finds_the_tensors_of_a_context():
    """FSDP2 puts hooks on them: from torch 2.13 it searches dataclasses, before that pytrees."""
    context = Context({"time": torch.zeros(1)})
    assert dataclasses.is_dataclass(context)
    (found,) = tree_leaves(tree_map(torch.ones_like, context))
    assert torch.equal(found, torch.ones(1))


@pytest.mark.parametrize("router", [*ROUTERS, "prototype:choice=expert"])
def test_a_layer_in_evaluation_takes_an_empty_batch(router):
    moe = randomised(0.2, router=router).eval().blocks[-1].moe
    x = torch.zeros(0, 16, moe.gate.weight.shape[1])
    y, routing = moe(x, Context({"no_class": torch.zeros(0, dtype=torch.bool)}))
    assert y.shape == x.shape and len(routing.token) == 0
