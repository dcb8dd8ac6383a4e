"""Dense to sparse: the function is kept, on every layout, and what breaks it is said."""

import pytest
import torch
from conftest import call_main, expect_error, relative_error
from test_layouts import DENSE, inputs, predict, random_diffusers_model
from test_models import randomised

from checkpoints import Record, load_model, read_checkpoint, save_model
from checkpoints.adapting import upcycle, upcycled_config
from models import DiT, select_layers


def dense_checkpoint(layout: str, folder):
    """A random dense model as each layout stores it; what read_checkpoint makes of it."""
    if layout == "diffusers":
        random_diffusers_model().save_pretrained(folder)
        return read_checkpoint(folder)
    model = randomised(**DENSE, depth=3, mlp_type="swiglu" if layout == "swiglu" else "gelu")
    if layout == "official":
        torch.save(model.state_dict(), folder / "DiT.pt")
        return read_checkpoint(folder / "DiT.pt", num_heads=2)
    save_model(folder / "model.safetensors", model.state_dict(), Record(config=model.config))
    return read_checkpoint(folder)


def built(state_dict, config, **changes) -> DiT:
    model = DiT(**{**vars(config), **changes})
    model.load_state_dict(state_dict)
    return model


def upcycled(dense: DiT, **options) -> DiT:
    config = upcycled_config(dense.config, num_experts=4, **options)
    return built(upcycle(dense.state_dict(), config), config)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(num_experts=4, num_experts_per_tok=2),
        dict(num_experts=5, num_experts_per_tok=3, n_shared_experts=0, layers=(2,)),
        dict(num_experts=8, num_experts_per_tok=4, split=2, layers=(1, 2)),
        dict(num_experts=4, num_experts_per_tok=4, split=4),
    ],
    ids=["copies", "one layer", "halves", "quarters"],
)
@pytest.mark.parametrize("layout", ["official", "diffusers", "ours", "swiglu"])
def test_upcycling_keeps_the_function(layout, fields, backend, tmp_path):
    stored = dense_checkpoint(layout, tmp_path)
    want = predict(built(stored.state_dict, stored.config))
    config = upcycled_config(stored.config, **fields)
    state_dict = upcycle(stored.state_dict, config, split=fields.get("split", 1))
    sparse = built(state_dict, config, expert_backend=backend)
    assert relative_error(predict(sparse), want) < 1e-5
    assert config.router_options["renormalize"] and config.mlp_type == stored.config.mlp_type
    kinds = [block.moe is not None for block in sparse.blocks]
    assert kinds == [layer in fields.get("layers", range(3)) for layer in range(3)]
    assert sparse.expert_load.shape == (sum(kinds), fields["num_experts"])


def test_the_published_top_k_does_not_keep_it():
    dense = randomised(**DENSE)
    assert relative_error(predict(upcycled(dense, renormalize=False)), predict(dense)) > 1e-3


def test_the_copies_come_apart_in_training():
    sparse = upcycled(randomised(**DENSE)).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    prediction, aux_loss = sparse(*inputs())
    (prediction.square().mean() + aux_loss).backward()
    assert all(weight.grad is not None for weight in sparse.parameters())
    optimizer.step()
    experts = sparse.blocks[0].moe.experts.up_proj
    assert not torch.equal(experts[0], experts[1])
    assert sparse.blocks[0].moe.shared_experts.fc2.weight.abs().sum() > 0


def test_layers_are_selected_by_name_or_number():
    assert select_layers("all", 4) == (0, 1, 2, 3)
    assert select_layers("every-second", 5) == (1, 3)
    assert select_layers("deep-half", 5) == (2, 3, 4)
    assert select_layers("3,1", 4) == (1, 3)
    for wrong in ("4", "shallow", ""):
        with pytest.raises(ValueError, match="expected all, every-second"):
            select_layers(wrong, 4)


def test_upcycle_py_writes_a_model_and_says_that_the_function_is_kept(tmp_path, capsys):
    model = randomised(**DENSE, depth=4)
    facts = dict(objective="rectified_flow", class_names=tuple("abcdefghij"))
    dense, sparse = tmp_path / "dense.safetensors", tmp_path / "sparse"
    record = Record(config=model.config, step=5, settings={"lr": 1e-4}, **facts)
    save_model(dense, model.state_dict(), record)
    flags = ("--num_experts", 4, "--layers", "deep-half", "--n-shared-experts", 1)
    call_main("upcycle.py", "--ckpt", dense, "--output", sparse, *flags)
    assert "the dense model's function" in capsys.readouterr().out
    stored = read_checkpoint(sparse)
    assert stored.config.router_options["renormalize"] and stored.config.sparse_layers == (2, 3)
    assert stored.config.n_shared_experts == 1
    origin = {"path": str(dense), "step": 5}
    assert stored.record == Record(
        config=stored.config, step=0, model=record.model_name, initialized_from=origin, **facts
    )
    assert relative_error(predict(load_model(sparse)), predict(model)) < 1e-5
    again = ("upcycle.py", "--ckpt", sparse, "--output", tmp_path / "no")
    assert "num_experts: got 4, expected 0" in expect_error(capsys, *again)
    assert "--output: got" in expect_error(capsys, *again[:2], dense, "--output", sparse)
