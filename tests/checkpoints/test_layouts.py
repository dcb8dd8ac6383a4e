"""Weights from other projects, and upcycling of dense weights, which keep the model's function."""

import json
import re
import socket
import time

import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers import (
    ROOT,
    TINY_MODEL,
    assert_same_values,
    relative_error,
)
from test_models import randomised

from checkpoints import load_model, read_checkpoint, save_model
from checkpoints.costs import count_macs
from checkpoints.from_diffusers import from_diffusers
from checkpoints.published import to_published
from checkpoints.weights import read_pickle
from latents.autoencoder import load_autoencoder
from models import DiT, DiT_models, DiTConfig, select_layers
from runtime import files
from runtime.errors import UserError

REFERENCE = ROOT / "tests" / "reference"
DENSE = dict(num_experts=0, class_dropout_prob=0.1)


def inputs(n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.tensor([0, 17, 500, 999])[:n], torch.tensor([0, 3, 9, 10])[:n]


@torch.no_grad()
def predict(model: DiT) -> torch.Tensor:
    return model.eval()(*inputs())[0]


def random_diffusers_model(**changes) -> DiTTransformer2DModel:
    """Tiny random DiT of diffusers. All blocks share one embedder, as in converted models."""
    torch.manual_seed(0)
    config = dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    model = DiTTransformer2DModel(**{**config, **changes}).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.mark.parametrize("changes", [{}, {"norm_eps": 1e-2, "out_channels": 4}], ids=["", "other"])
def test_a_dit_in_diffusers_format_gives_the_same_outputs(tmp_path, changes):
    theirs = random_diffusers_model(**changes)
    theirs.save_pretrained(tmp_path / "transformer")
    x, t, y = inputs()
    with torch.no_grad():
        want = theirs(x, timestep=t, class_labels=y).sample
    for path in (tmp_path, tmp_path / "transformer"):
        ours = load_model(path)
        assert ours.config.num_experts == 0 and ours.config.dense_mlp == "gelu"
        assert relative_error(predict(ours), want) < 1e-5


def test_diffusers_models_that_are_not_dits_are_rejected():
    weights, config = random_diffusers_model().state_dict(), dict(random_diffusers_model().config)
    with pytest.raises(ValueError, match="activation_fn: got 'geglu', expected"):
        from_diffusers(weights, {**config, "activation_fn": "geglu"})
    key = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    for name, value in ((key, weights[key] + 1), ("pos_embed.extra.weight", weights[key])):
        with pytest.raises(ValueError, match=f"got {name}, expected"):
            from_diffusers({**weights, name: value}, config)
    with pytest.raises(ValueError, match="input_size: got .*, expected"):
        from_diffusers(weights, {**config, "sample_size": 2**15})


def test_compute_of_a_dense_model_matches_the_dit_paper_and_experts_add_only_gates():
    model = randomised(**DENSE)
    _, aux_loss = model(*inputs())
    assert aux_loss == 0 and model.expert_load is None
    with torch.device("meta"):
        official = DiT_models["DiT-XL/2"](num_experts=0)
    assert count_macs(official.config) / 1e9 == pytest.approx(118.64, rel=2e-3)  # DiT, table 4
    few, many = (randomised(num_experts=n).config for n in (4, 8))
    gates = 2 * 16 * 32 * 4  # layers x tokens x width x additional experts
    assert count_macs(many) - count_macs(few) == gates


def test_compute_counts_the_products_of_the_router_and_of_its_loss():
    layers, tokens, width, experts = 2, 16, 32, 4
    topk, *others = (
        count_macs(randomised(router=name).config)
        for name in ("topk", "sigmoid", "expert_choice", "batch_pool", "race", "prototype")
    )
    per_token = (0, 0, width * (width + experts), width * width + 2 * experts**2, experts * width)
    per_image = (0, 0, 0, 0, experts**2 * width)
    for got, of_token, of_image in zip(others, per_token, per_image, strict=True):
        assert got - topk == layers * (tokens * of_token + of_image)
    assert count_macs(randomised(router="prototype:choice=expert").config) == topk


@pytest.mark.parametrize("name", ["dit_moe_timm", "dit_moe_flash"])
def test_converting_published_weights_to_ours_and_back_changes_nothing(name, tmp_path):
    heads = json.loads((REFERENCE / f"{name}.config.json").read_text())["num_heads"]
    published = read_pickle(REFERENCE / f"{name}.pt")
    stored = read_checkpoint(REFERENCE / f"{name}.pt", num_heads=heads)
    save_model(tmp_path / "model.safetensors", stored.state_dict, stored.record)
    ours = read_checkpoint(tmp_path)
    again = to_published(ours.state_dict, ours.config)
    assert_same_values(again, published.get("ema", published))


@pytest.mark.parametrize(
    "field, value, named",
    [("norm", "rms", ""), ("rope", True, ""), ("time_scale", 1000.0, ""), ("class_tokens", 2, ""),
     ("router", "race", ""), ("conditions", ("label", "vector:6"), ""),
     ("mlp_type", "gelu", "mlp_type"), ("sparse_layers", (1,), "sparse_layers"),
     ("patch_bottleneck", 8, "")],
)  # fmt: skip
def test_a_model_that_published_code_cannot_compute_is_refused_by_the_name_of_the_field(
    field, value, named
):
    model = randomised(**{field: value})
    expected = f"{named or field}: got .*, expected .*, as in the published code"
    with pytest.raises(ValueError, match=expected):
        to_published(model.state_dict(), model.config)


@pytest.mark.parametrize("other", [{"dense_mlp_type": "silu"}, {"mlp_type": "swiglu"}])
def test_a_dense_model_is_published_only_with_the_mlp_of_dit(other):
    model = randomised(num_experts=0, **other)
    with pytest.raises(ValueError, match="dense_mlp_type: got .*, expected gelu"):
        to_published(model.state_dict(), model.config)


def test_an_unreachable_hub_is_a_one_line_error_at_once(monkeypatch, capfd):
    from huggingface_hub import constants

    for hub_id in ("feizhengcong/DiT-MoE:dit_moe_s_8E2A.pt", "nobody/nothing@main"):
        with pytest.raises(UserError, match=f"^{hub_id}: the path does not exist[^\n]*$"):
            load_model(hub_id)  # the tests run in offline mode
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "HUB_SECONDS", 0.3)
    start = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # as behind a firewall: no answer
        for port in (9, silent.getsockname()[1]):
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            for load in (load_model, lambda path: load_autoencoder(path, "cpu", torch.float32)):
                with pytest.raises(UserError, match="^[^\n]*nobody/nothing[^\n]*$"):
                    load("nobody/nothing")
    assert time.perf_counter() - start < 10 and capfd.readouterr() == ("", "")


def test_weights_in_the_hub_cache_are_loaded_with_their_revision(monkeypatch, tmp_path):
    """The cache has the layout of huggingface_hub, so nothing is downloaded."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--lab--dit", "a" * 40
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    model = randomised(**DENSE)
    torch.save(model.state_dict(), repo / "blobs" / "dit")
    (repo / "snapshots" / commit / "dit.pt").symlink_to(repo / "blobs" / "dit")
    stored = read_checkpoint("lab/dit:dit.pt", num_heads=TINY_MODEL["num_heads"])
    assert stored.source == {"hub": "lab/dit:dit.pt", "revision": commit}
    assert torch.equal(stored.state_dict["pos_embed"], model.pos_embed)


def test_sparse_layers_are_selected_by_name_or_number():
    assert select_layers("all", 4) == (0, 1, 2, 3)
    assert select_layers("every-second", 5) == (1, 3)
    assert select_layers("deep-half", 5) == (2, 3, 4)
    assert select_layers("3,1", 4) == (1, 3)
    for wrong, depth in (("4", 4), ("shallow", 4), ("", 4), ((4,), 4), ("every-second", 1)):
        with pytest.raises(ValueError, match=re.escape(f"got {wrong!r}, expected all, every-")):
            DiTConfig(sparse_layers=wrong, depth=depth)
