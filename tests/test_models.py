"""The model: agreement with the published implementation, gradients, compilation and attention."""

import importlib.util
import itertools
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY_MODEL, assert_same_values, relative_error
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

import models
import routers
from checkpoints.layouts import to_stacked_layout
from checkpoints.meta import build_meta, initial_weights
from checkpoints.weights import read_pickle
from models import (
    Attention,
    DiT,
    DiT_models,
    DiTConfig,
    position_embedding,
    rotary_positions,
)
from moe_kernels import attention, operators
from moe_kernels.attention import attention_by_products
from routers import ROUTERS
from runtime.errors import UserError
from runtime.processes import ALONE
from training.step_metrics import MetricTracker, expert_metrics
from wrappers import wrap_blocks

REFERENCE = Path(__file__).parent / "reference"
BACKENDS = ("loop", "grouped")


def reference_model(name: str, backend: str) -> tuple[DiT, dict[str, torch.Tensor]]:
    fields = json.loads((REFERENCE / f"{name}.config.json").read_text())
    fields.pop("seed")
    model = DiT(qk_norm=fields.pop("use_flash_attn"), expert_backend=backend, **fields)
    stored = read_pickle(REFERENCE / f"{name}.pt")
    model.load_state_dict(stored.get("ema", stored))
    return model, load_file(REFERENCE / f"{name}.io.safetensors")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dit_moe_timm", "dit_moe_flash", "dit_moe_grads"])
@torch.no_grad()
def test_forward_and_guided_forward_match_the_published_model(name, backend):
    model, io = reference_model(name, backend)
    prediction, _ = model.eval()(io["x"], io["t"], io["y"])
    assert relative_error(prediction, io["output"]) < 1e-5
    if name != "dit_moe_grads":
        x, t = torch.cat([io["x"]] * 2), torch.cat([io["t"]] * 2)
        y = torch.cat([io["y"], torch.full_like(io["y"], model.config.num_classes)])
        assert relative_error(model.forward_with_cfg(x, t, y, 2.5), io["cfg_output"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_matches_the_published_model(backend):
    model, io = reference_model("dit_moe_grads", backend)
    prediction, aux_loss = model.train()(io["x"], io["t"], io["y"])
    ((prediction * io["cotangent"]).sum() + aux_loss).backward()
    want = to_stacked_layout(load_file(REFERENCE / "dit_moe_grads.grads.safetensors"))
    got = {name: weight.grad for name, weight in model.named_parameters()}
    assert got.keys() == want.keys()
    for name in got:
        assert relative_error(got[name], want[name]) < 1e-4, name


def test_rotary_attention_rotates_pairs_and_depends_only_on_relative_positions():
    """Pair j of a head is a complex number. The first half of the pairs is rotated by the row, the
    second half by the column, at frequencies 10000^(-j / (d/4)) (Heo et al. 2024)."""
    torch.manual_seed(0)
    grid, heads, d = 3, 2, 8
    layer, x = Attention(heads * d, heads), torch.randn(1, grid * grid, heads * d)
    places = torch.tensor([divmod(token, grid) for token in range(grid * grid)])
    frequencies = torch.tensor([10000 ** -(j / (d // 4)) for j in range(d // 4)])
    turns = (places[:, :, None] * frequencies).flatten(1)[:, None]
    turns = torch.polar(torch.ones_like(turns), turns)

    def rotated(pairs: torch.Tensor) -> torch.Tensor:
        z = torch.complex(pairs[..., : d // 2], pairs[..., d // 2 :]) * turns
        return torch.cat([z.real, z.imag], -1)

    q, k, v = layer.qkv(x).view(grid * grid, 3, heads, d).unbind(1)
    scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) / d**0.5
    want = layer.proj(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))
    rotation = rotary_positions(d, (grid, grid), x.device)
    torch.testing.assert_close(layer(x, rotation)[0], want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(x)[0], want, atol=1e-3)

    q, k = (models.rotate(a[:1].expand_as(a)[None], rotation)[0, :, 0] for a in (q, k))
    scores = (q @ k.t()).view(grid, grid, grid, grid)  # the same query and key at all positions
    torch.testing.assert_close(scores[1:, :, 1:], scores[:-1, :, :-1])
    torch.testing.assert_close(scores[:, 1:, :, 1:], scores[:, :-1, :, :-1])
    assert scores[1, 1].flatten().unique().numel() == grid * grid


def test_every_preset_can_be_built():
    names = {f"DiT-{size}/{p}" for size in ("S", "B", "L", "XL") for p in (2, 4, 8)}
    names |= {f"{kind}-{size}/16" for kind in ("JiT", "JiTMoE") for size in "BLH"}
    assert names | {"DiT-G/2", "DiT-Ti/2"} == set(DiT_models)
    with torch.device("meta"):
        for name, build in DiT_models.items():
            model = build(num_experts=3, num_experts_per_tok=1)
            assert model.config.patch_size == int(name.split("/")[1])


def tiny_batch(n: int = 4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.linspace(0, 999, n), torch.arange(n) % 10


def randomised(noise: float = 0.05, **fields) -> DiT:
    """Tiny model with noise added to all weights, including those initialised to zero."""
    torch.manual_seed(0)
    model = DiT(**{**TINY_MODEL, "class_dropout_prob": 0.0, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def resolved(config: DiTConfig) -> DiTConfig:
    """The config with the values of what it leaves to its defaults."""
    return replace(
        config, sparse_layers=config.sparse_blocks or "all", mlp_type=config.expert_mlp,
        dense_mlp_type=config.dense_mlp, dense_mlp_ratio=config.dense_ratio,
        class_dropout_prob=config.dropout,
    )  # fmt: skip


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity():
    model = DiT(**TINY_MODEL)
    assert not model(*tiny_batch())[0].any()
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(model.blocks[0](tokens, c)[0], tokens)


class Forgetful(routers.TopKRouter):
    """Router that makes a tensor and does not set it in `reset_parameters`."""

    def __post_init__(self):
        super().__post_init__()
        self.noise = nn.Parameter(torch.zeros(self.num_experts))


class ForgetfulCounter(routers.TopKRouter):
    def __post_init__(self):
        super().__post_init__()
        self.register_buffer("steps", torch.ones((), dtype=torch.int64))


class TableBlock(models.DiTBlock):
    """Block with a bare parameter, as in adaLN-single."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.table = nn.Parameter(torch.zeros(6, 32))


@pytest.mark.parametrize(
    "place, kind, name",
    [
        ((ROUTERS, "topk"), Forgetful, "blocks.0.moe.gate.noise: .* Forgetful.reset_parameters"),
        ((ROUTERS, "topk"), ForgetfulCounter, "blocks.0.moe.gate.steps: .*"),
        ((vars(models), "DiTBlock"), TableBlock, "blocks.0.table: .* TableBlock.reset_parameters"),
    ],
)
def test_a_parameter_or_buffer_without_initial_value_is_an_error_with_its_name(
    monkeypatch, request, place, kind, name
):
    """Also if the weights are drawn one module at a time."""
    monkeypatch.setitem(*place, kind)
    if kind is TableBlock:  # that a router has another class is noticed
        build_meta.cache_clear()
        request.addfinalizer(build_meta.cache_clear)
    config = DiTConfig(**TINY_MODEL)
    with pytest.raises(ValueError, match=f"^{name}"):
        DiT(config)
    with pytest.raises(UserError, match=f"cannot be built \\({name}"):
        dict(initial_weights(config))


def test_a_buffer_of_unsigned_integers_may_be_zero(monkeypatch):
    class MaskedBlock(models.DiTBlock):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("mask", torch.ones(3, dtype=torch.uint8))

        def reset_parameters(self) -> None:
            self.mask.zero_()

    monkeypatch.setattr(models, "DiTBlock", MaskedBlock)
    assert not DiT(**TINY_MODEL).blocks[0].mask.any()


def test_fp16_loss_scaling_does_not_scale_the_balance_loss():
    gradients = []
    for scale in (1.0, 2.0**14):
        scaler, model = torch.amp.GradScaler("cpu", scale), randomised(aux_loss_alpha=1.0)
        prediction, aux_loss = model(*tiny_batch())
        scaler.scale(0 * prediction.sum() + aux_loss).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters(), lr=1.0))
        gradients.append(model.blocks[0].moe.gate.weight.grad)
    assert gradients[0].any()
    assert relative_error(*reversed(gradients)) < 1e-5


class NoisyRouter(routers.TopKRouter):
    """Noisy top-k (Shazeer et al. 2017, arXiv 1701.06538), with one learned scale per expert."""

    def __post_init__(self):
        super().__post_init__()
        self.scale = nn.Parameter(torch.empty(self.num_experts))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.scale)

    def choose(self, logits: torch.Tensor) -> routers.Routing:
        routing = super().choose(logits + self.scale * torch.randn_like(logits))
        mean = logits.mean().detach()
        return routing._replace(metrics={"mean": mean, "mean_of": mean.view(1)})


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setitem(ROUTERS, "noisy", NoisyRouter)


@pytest.mark.parametrize(
    "fields", [{}, {"num_experts": 0}, {"sparse_layers": (1,)}, {"router": "noisy"}]
)
def test_gradient_checkpointing_changes_no_gradient(fields, monkeypatch, noisy):
    """Selective checkpointing computes attention and experts only once. A router that draws random
    numbers draws the same ones again."""
    calls, gradients, compute = [], [], operators.forward_rows
    monkeypatch.setattr(operators, "forward_rows", lambda *rows: calls.append(1) or compute(*rows))
    for recomputed, repeated in (("nothing", 1), ("all", 2), ("selective", 1)):
        model = randomised(**fields)
        wrap_blocks(model, recomputed=recomputed)
        gradients.append(gradients_of(model))
        assert len(calls) == repeated * len(model.config.sparse_blocks)
        calls.clear()
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_noise_that_an_edit_adds_to_a_router_is_drawn_again(monkeypatch):
    """Checkpointing asks no router whether it draws random numbers. test_routers.py has compiled
    blocks."""
    choose = routers.TopKRouter.choose
    monkeypatch.setattr(
        routers.TopKRouter, "choose", lambda gate, z: choose(gate, z + torch.randn_like(z))
    )
    want = gradients_of(randomised())
    for recomputed in ("all", "selective"):
        model = randomised()
        wrap_blocks(model, recomputed=recomputed)
        got = gradients_of(model)
        assert all(relative_error(*pair) < 1e-5 for pair in zip(got, want, strict=True))


def test_an_unknown_word_does_not_choose_what_is_recomputed():
    with pytest.raises(KeyError, match="everything"):
        wrap_blocks(randomised(), recomputed="everything")


def gradients_of(model: DiT) -> list[torch.Tensor | None]:
    torch.manual_seed(1)
    prediction, aux_loss = model.train()(*tiny_batch())
    (prediction.square().sum() + aux_loss).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_a_number_of_a_router_is_logged_as_a_mean_or_for_each_layer(noisy):
    model, tracker = randomised(router="noisy"), MetricTracker(ALONE)
    model(*tiny_batch())
    found = model.router_metrics
    assert found["router_mean_of"].shape == (2,) and found["router_mean"].shape == ()
    for _ in range(2):
        tracker.add({**found, "loss": torch.tensor(1.0), "skipped": torch.tensor(False)})
    means = tracker.means()
    assert means["router_mean_of"] == pytest.approx(found["router_mean_of"].tolist())
    assert means["router_mean"] == pytest.approx(found["router_mean_of"].mean().item())


def test_a_buffer_of_a_router_may_have_any_type_in_the_log(monkeypatch):
    class Masked(routers.TopKRouter):
        def __post_init__(self):
            super().__post_init__()
            self.register_buffer("is_used", torch.empty(4, dtype=torch.bool))

        def reset_parameters(self) -> None:
            super().reset_parameters()
            self.is_used.copy_(torch.tensor([False, True, False, False]))

    monkeypatch.setitem(ROUTERS, "masked", Masked)
    model = randomised(router="masked")
    model(*tiny_batch())
    assert expert_metrics(model, ALONE)["router_is_used"] == [1, 1]


@pytest.fixture
def compiled(quick_compile):
    """Function that returns a model with compiled blocks."""

    def make(**fields) -> DiT:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = randomised(**fields)
        wrap_blocks(model, compiled=True)
        return model

    return make


@pytest.mark.parametrize("fields", [
    {"num_experts": 0}, *({"router": name} for name in ROUTERS),
    {"expert_backend": "loop"}, {"router": "prototype:choice=expert"},
], ids=str)  # fmt: skip
def test_an_exported_graph_takes_any_batch_size(fields):
    model = randomised(**fields).eval()

    def inputs(number: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(number, 4, 8, 8), torch.rand(number), torch.arange(number) % 11

    count = torch.export.Dim("count", min=1, max=64)
    shapes = {"x": {0: count}, "t": {0: count}, "y": {0: count}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it does not keep `DiT.expert_load`
        traced = torch.export.export(model, inputs(3), dynamic_shapes=shapes).module()
        for number in (1, 2, 5):
            some = inputs(number)
            assert torch.equal(traced(*some)[0], model(*some)[0])
    assert model(*inputs(0))[0].shape == (0, 8, 8, 8)


class HubDiT(DiT, PyTorchModelHubMixin):
    def __init__(self, **fields):
        super().__init__(**fields)


def test_the_mixin_of_the_hub_saves_and_loads_a_model(tmp_path):
    fields = {"router": "topk:renormalize=true", "sparse_layers": (1,), "input_size": (8, 4)}
    model = HubDiT(**vars(randomised(**fields).config))
    model.save_pretrained(tmp_path)
    loaded = HubDiT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_values(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "fields, autocast, quick_compile",
    [({"router": name, "mlp_type": mlp}, name != "race",  # race in fp32; test_routers.py has swiglu
      "aot_eager" if name in ("topk", "prototype") else "eager")
     for name, mlp in zip(ROUTERS, itertools.cycle(("swiglu", "gelu")), strict=False)],
    indirect=["quick_compile"],
)  # fmt: skip
def test_a_compiled_block_has_no_graph_break_and_the_same_gradients(compiled, fields, autocast):
    blocks = randomised(**fields).blocks[0], compiled(**fields).blocks[0]
    about = {"time": torch.randn(2, 32), "no_class": torch.tensor([False, True])}
    for _ in range(3):  # different values and a different choice of experts need no new graph
        x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
        results = []
        for block in blocks:
            block.zero_grad()
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, routing = block(leaf, c, about)
            (y.square().sum() + routing.loss).backward()
            grads = [parameter.grad for parameter in block.parameters()]
            results.append([y, routing.weight, routing.load, leaf.grad, *grads])
        for got, want in zip(*reversed(results), strict=True):
            assert relative_error(got, want) < (1e-2 if autocast else 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_other_batch_sizes_need_one_more_graph(compiled):
    """Held-out batches, their rest and sample grids have other sizes than training."""
    model = compiled()
    for images in (4, 6, 8, 3):
        x, t, y = torch.randn(images, 4, 8, 8), torch.rand(images), torch.zeros(images).long()
        with torch.no_grad():
            model(x, t, y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("router", ["race", "batch_pool"])
def test_compiled_threshold_routers_run_uncompiled_in_eval_mode(compiled, router):
    got, want = compiled(router=router).eval(), randomised(router=router).eval()
    with torch.no_grad():
        assert torch.equal(got(*tiny_batch())[0], want(*tiny_batch())[0])


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_experts=2, num_experts_per_tok=3), "num_experts_per_tok: got 3"),
        (dict(input_size=9, patch_size=2), "input_size: got 9, expected a multiple of 2"),
        (dict(hidden_size=30, num_heads=4), "hidden_size: got 30, expected a multiple of 4"),
        (dict(hidden_size=24, num_heads=4, rope=True), "size: got 24, expected a multiple of 16"),
        (dict(depth=0), "depth: got 0"),
        (dict(expert_backend="fast"), "expert_backend: got 'fast', expected one of loop, grouped"),
        (dict(class_dropout_prob=1.0), "class_dropout_prob: got 1.0"),
    ],
)
def test_an_impossible_model_config_is_rejected_with_got_and_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**fields)


def test_a_model_is_made_from_a_config_or_from_fields_not_from_both():
    with pytest.raises(TypeError, match="got a config and depth, expected one or the other"):
        DiT(DiTConfig(depth=2), depth=1)


@pytest.mark.parametrize("tokens", [16, 256])
def test_bf16_attention_by_matrix_products_equals_attention(tokens):
    """Output and every gradient are compared with scaled_dot_product_attention in fp64."""
    torch.manual_seed(0)
    *rows, grad = torch.randn(4, 2, 3, tokens, 32).bfloat16()

    def results(attend, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [row.to(dtype).requires_grad_() for row in rows]
        output = attend(*inputs)
        return [output, *torch.autograd.grad(output, inputs, grad.to(dtype))]

    want = results(scaled_dot_product_attention, torch.float64)
    for got, reference in zip(results(attention_by_products, torch.bfloat16), want, strict=True):
        assert relative_error(got, reference) < 1e-2


def test_a_flash_attention_that_does_not_load_is_named(tmp_path, monkeypatch):
    """Such as a wheel for another PyTorch. Without the package there is nothing to say."""
    assert importlib.util.find_spec("flash_attn") or attention.load_flash_attention() == (None, "")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert attention.load_flash_attention() == (None, "undefined symbol: _ZN3c10")


@pytest.mark.parametrize("tokens, used", [(256, True), (257, False)])
def test_a_cpu_uses_matrix_products_for_bf16_attention_up_to_256_tokens(monkeypatch, tokens, used):
    calls = []

    def attend(*inputs):
        calls.append(inputs)
        return attention_by_products(*inputs)

    monkeypatch.setattr(attention, "attention_by_products", attend)
    models.Attention(64, num_heads=2).bfloat16()(torch.zeros(1, tokens, 64).bfloat16())
    assert bool(calls) == used


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_computes_bf16_and_follows_torchs_deterministic_setting(
    monkeypatch, deterministic
):
    """Uses fake CUDA tensors, because flash-attn is used only on a GPU."""
    received = []

    def flash_attention(q, k, v, *, deterministic):
        received.append(deterministic)
        return v

    monkeypatch.setattr(attention, "flash_attn_func", flash_attention)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with FakeTensorMode(), torch.no_grad():
            layer = Attention(32, 2)
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                options = dict(dtype=dtype, device="cuda")
                weights = {
                    name: torch.empty(w.shape, **options) for name, w in layer.named_parameters()
                }
                functional_call(layer, weights, torch.empty(2, 4, 32, **options))
    finally:
        torch.use_deterministic_algorithms(False)
    assert received == [deterministic]


@torch.no_grad()
def test_rectangular_latents_are_laid_out_row_by_row_and_other_shapes_are_rejected():
    """Position embeddings, rotations and pixels of a rectangle lie at the expected places."""
    model = randomised(input_size=(4, 12), rope=True).eval()
    assert model.pos_embed.shape == (1, 12, 32) and model.config.grid == (2, 6)
    square = position_embedding(DiTConfig(**{**TINY_MODEL, "input_size": 12})).view(6, 6, 32)
    assert torch.equal(model.pos_embed.view(2, 6, 32), square[:2])
    rotation = rotary_positions(16, (2, 6), torch.device("cpu")).view(2, 6, 16)
    square = rotary_positions(16, (6, 6), torch.device("cpu")).view(6, 6, 16)
    assert torch.equal(rotation, square[:2])
    tokens = torch.arange(12.0).view(1, 12, 1).expand(1, 12, 4 * model.out_channels)
    image = model.unpatchify(tokens)
    for row in range(4):
        for column in range(12):
            assert (image[0, :, row, column] == row // 2 * 6 + column // 2).all()
    t, y = torch.rand(2), torch.tensor([0, 1])
    assert model(torch.randn(2, 4, 4, 12), t, y)[0].shape == (2, 8, 4, 12)
    for shape in ((4, 12, 4), (4, 8, 6), (3, 4, 12)):
        with pytest.raises(ValueError, match=r"expected \(4, 4, 12\), the model's shape"):
            model(torch.randn(2, *shape), t, y)
    assert DiT(**{**TINY_MODEL, "input_size": (8, 8)}).config.input_size == 8


def test_rms_norm_with_weights_in_bf16_computes_in_fp32():
    """Sharding casts the weights of a block to bf16."""
    norm, x = models.RMSNorm(32), torch.randn(4, 32)
    nn.init.normal_(norm.weight)
    norm.bfloat16()
    got = norm(x)
    want = x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight.float()
    assert got.dtype == torch.float32 and relative_error(got, want) < 1e-6
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_a_token_that_the_model_does_not_know_is_refused():
    model = randomised(0.2)
    model.blocks[-1].register_forward_hook(
        lambda block, inputs, output: (nn.functional.pad(output[0], (0, 0, 0, 1)), *output[1:])
    )
    with pytest.raises(ValueError, match="17 tokens, expected 16 patches"):
        model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
