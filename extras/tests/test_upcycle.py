"""Upcycling: a dense model becomes a sparse one that computes the same."""

from itertools import product

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import (
    call_main,
    expect_error,
    relative_error,
    save_checkpoint,
)
from test_export import assert_same_weights, export
from test_layouts import DENSE, inputs, predict, random_diffusers_model
from test_models import randomised

from checkpoints import Record, load_model, read_checkpoint
from extras.upcycle import upcycle, upcycled_config
from models import DiT

UPCYCLED = {
    "copies": dict(num_experts=4, num_experts_per_tok=2),
    "one layer": dict(num_experts=5, num_experts_per_tok=3, n_shared_experts=0, layers=(2,)),
    "halves": dict(num_experts=8, num_experts_per_tok=4, split=2, layers=(1, 2)),
    "quarters": dict(num_experts=4, num_experts_per_tok=4, split=4),
}


MLPS = ("ours", "swiglu", "swiglu_bias")  # layouts of models with different MLPs


def dense_checkpoint(layout: str, folder):
    """Saves a random dense model in a layout and returns the checkpoint that is read from it."""
    if layout == "diffusers":
        random_diffusers_model().save_pretrained(folder)
        return read_checkpoint(folder)
    model = randomised(**DENSE, depth=3, mlp_type=layout if layout.startswith("swiglu") else "gelu")
    if layout == "official":
        torch.save(model.state_dict(), folder / "DiT.pt")
        return read_checkpoint(folder / "DiT.pt", num_heads=2)
    return read_checkpoint(save_checkpoint(model, folder / "model.safetensors"))


def built(state_dict, config, **changes) -> DiT:
    model = DiT(**{**vars(config), **changes})
    model.load_state_dict(state_dict)
    return model


def upcycled(dense: DiT, **options) -> DiT:
    config = upcycled_config(dense.config, num_experts=4, **options)
    return built(upcycle(dense.state_dict(), config), config)


@pytest.mark.parametrize(
    "layout, kind",
    [*product(MLPS, UPCYCLED), ("official", "copies"), ("diffusers", "copies")],
)
def test_upcycling_keeps_the_function_of_a_dense_model(layout, kind, tmp_path):
    fields = UPCYCLED[kind]
    stored = dense_checkpoint(layout, tmp_path)
    want = predict(built(stored.state_dict, stored.config))
    config = upcycled_config(stored.config, **fields)
    state_dict = upcycle(stored.state_dict, config, split=fields.get("split", 1))
    sparse = built(state_dict, config, expert_backend="grouped")
    assert relative_error(predict(sparse), want) < 1e-5
    assert config.router.options["renormalize"] and config.expert_mlp == stored.config.dense_mlp
    kinds = [block.moe is not None for block in sparse.blocks]
    assert kinds == [layer in fields.get("layers", range(3)) for layer in range(3)]
    assert sparse.expert_load.shape == (sum(kinds), fields["num_experts"])


def test_upcycling_without_renormalisation_changes_the_function():
    dense = randomised(**DENSE)
    assert relative_error(predict(upcycled(dense, renormalize=False)), predict(dense)) > 1e-3


def test_upcycled_copies_of_an_expert_diverge_in_training():
    sparse = upcycled(randomised(**DENSE)).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    prediction, aux_loss = sparse(*inputs())
    (prediction.square().mean() + aux_loss).backward()
    assert all(weight.grad is not None for weight in sparse.parameters())
    optimizer.step()
    experts = sparse.blocks[0].moe.experts.up_proj
    assert not torch.equal(experts[0], experts[1])
    assert sparse.blocks[0].moe.shared_experts.fc2.weight.abs().sum() > 0


def test_upcycle_py_writes_a_model_and_reports_that_the_function_is_kept(tmp_path, capsys):
    model = randomised(**DENSE, depth=4)
    facts = dict(objective="rectified_flow", class_names=tuple("abcdefghij"))
    dense, sparse = tmp_path / "dense.safetensors", tmp_path / "sparse"
    save_checkpoint(model, dense, step=5, settings={"lr": 1e-4}, **facts)
    flags = ("--num_experts", 4, "--layers", "deep-half", "--n-shared-experts", 1)
    call_main("upcycle.py", "--ckpt", dense, "--output", sparse, *flags)
    assert "same function as the dense model" in capsys.readouterr().out
    stored = read_checkpoint(sparse)
    assert stored.config.router.options["renormalize"] and stored.config.sparse_blocks == (2, 3)
    assert stored.config.n_shared_experts == 1
    origin = {"path": str(dense), "step": 5}
    name = read_checkpoint(dense).record.model_name
    want = Record(config=stored.config, step=0, model=name, initialized_from=origin, **facts)
    assert stored.record == want
    assert relative_error(predict(load_model(sparse)), predict(model)) < 1e-5
    again = ("upcycle.py", "--ckpt", sparse, "--output", tmp_path / "no")
    assert "num_experts: got 4, expected 0" in expect_error(capsys, *again)
    assert "--output: got" in expect_error(capsys, *again[:2], dense, "--output", sparse)


def test_an_upcycled_model_is_exported_as_a_pipeline(tmp_path, tiny_vae):
    config = upcycled_config(randomised(**DENSE, num_classes=4).config, num_experts=4)
    model, path = randomised(**vars(config)), tmp_path / "up.safetensors"
    upcycled = save_checkpoint(model, path, objective="rectified_flow")
    out = export(upcycled, tmp_path / "out", "--format", "pipeline", "--vae-path", tiny_vae)
    assert_same_weights(read_checkpoint(out), read_checkpoint(upcycled))
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    got, want = pipeline.transformer, load_model(upcycled).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([1, 4]))
    with torch.no_grad():
        assert relative_error(got(*inputs)[0], want(*inputs)[0]) < 1e-6
    half = DiffusionPipeline.from_pretrained(out, trust_remote_code=True, dtype=torch.half)
    assert half.transformer.dtype == half.vae.dtype == torch.half
