"""The conditions size and span beside the others: embedding, dropout, guidance, data."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import call_main, expect_error, only_run, relative_error
from test_conditions import as_checkpoint
from test_models import randomised

from checkpoints.adapting import adapt
from checkpoints.checkpoint import load_model, read_checkpoint
from conditions import (
    drop_conditions,
    without_conditions,
)
from diffusion import classifier_free_guidance
from runtime.errors import UserError
from sampling.generate import SamplerSettings, generate
from sampling.pipeline import open_pipeline
from sampling.sampling_config import SamplingConfig

ALL = ("label", "size", "vector:6", "span")


def some_conditions(count: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "label": torch.arange(count) % 10, "size": torch.rand(count, 4),
        "vector": torch.randn(count, 6), "span": torch.rand(count),
    }  # fmt: skip


def waves(number: float) -> list[float]:
    """256 sinusoidal features of a number."""
    angles = [number * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    return [*map(math.cos, angles), *map(math.sin, angles)]


@torch.no_grad()
def test_the_embeddings_of_all_conditions_are_added_to_the_time_embedding():
    """Compared with loops over images and numbers."""
    model, y = randomised(conditions=ALL).eval(), some_conditions()
    inputs = []
    hook = lambda _, given: inputs.extend(given)  # noqa: E731
    model.blocks[0].adaLN_modulation.register_forward_pre_hook(hook)
    t = torch.linspace(0, 1, 5)
    model(torch.randn(5, 4, 8, 8), t, y)
    for image in range(5):
        size = [wave for number in y["size"][image] for wave in waves(1000 * number.item())]
        parts = [
            model.t_embedder.mlp(torch.tensor(waves(t[image].item()))),
            model.y_embedder.embedding_table.weight[y["label"][image]],
            model.size_embedder.mlp(torch.tensor(size)),
            model.vector_embedder.mlp(y["vector"][image]),
            model.span_embedder.mlp(torch.tensor(waves(y["span"][image].item()))),
        ]
        torch.testing.assert_close(inputs[0][image], sum(parts), atol=2e-4, rtol=1e-4)
    before = model(torch.ones(5, 4, 8, 8), t, y)[0]
    model.y_embedder = copy.deepcopy(model.y_embedder)
    model.y_embedder.embedding_table.weight.neg_()  # an embedder that was assigned is used
    assert not torch.equal(model(torch.ones(5, 4, 8, 8), t, y)[0], before)


@torch.no_grad()
def test_conditions_may_be_labels_only_and_missing_ones_have_defaults():
    model, y = randomised(conditions=ALL).eval(), some_conditions()
    x, t = torch.randn(5, 4, 8, 8), torch.rand(5)
    defaults = {
        **y, "size": torch.tensor([[1.0, 1, 0, 0]]).expand(5, 4), "vector": torch.zeros(5, 6),
        "span": torch.zeros(5), "another": torch.zeros(5),
    }  # fmt: skip
    assert torch.equal(model(x, t, y["label"])[0], model(x, t, defaults)[0])
    with pytest.raises(ValueError, match="conditions: got no label"):
        model(x, t, {"size": y["size"]})


def test_label_and_vector_are_dropped_together_while_size_and_span_are_kept():
    model, y = randomised(conditions=ALL, class_dropout_prob=0.25), some_conditions(1000)
    batch = {**y, "latents": torch.zeros(1000)}
    got = drop_conditions(model.conditions, batch, model.config.dropout)
    assert got.keys() == y.keys()
    dropped = got["label"] == 10
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal((got["vector"] == 0).all(1), dropped)
    for name, value in y.items():
        assert torch.equal(got[name][~dropped], value[~dropped]), name
    assert torch.equal(got["size"], y["size"]) and torch.equal(got["span"], y["span"])


@torch.no_grad()
def test_guidance_removes_the_same_conditions_as_dropout_in_training():
    model, y = randomised(conditions=ALL, class_dropout_prob=0.1).eval(), some_conditions()
    x, t = torch.randn(5, 4, 8, 8), torch.rand(5)
    none = {**y, "label": torch.full((5,), 10), "vector": torch.zeros(5, 6)}
    guided = classifier_free_guidance(model, y, without_conditions(model.conditions, y), 3.0)(x, t)
    with_y, without = model(x, t, y)[0][:, :4], model(x, t, none)[0][:, :4]
    torch.testing.assert_close(guided[:, :4], without + 3 * (with_y - without))
    settings = SamplerSettings("rectified_flow", num_steps=2)
    drawn = [
        generate(model, [1], [0], settings, conditions={"vector": vector})
        for vector in torch.randn(2, 1, 6)
    ]
    assert not torch.allclose(*drawn)
    one, each = (
        generate(model, [1, 2], [0, 1], settings, conditions={"vector": vector})
        for vector in (torch.ones(6), torch.ones(2, 6))
    )
    assert torch.equal(one, each)
    for name, shape in (("vector", (1, 5)), ("colour", (1, 6))):
        with pytest.raises(UserError, match=f"conditions: got {name}"):
            generate(model, [1], [0], settings, conditions={name: torch.zeros(shape)})


def test_fine_tuning_adds_a_span_that_changes_no_output_and_drops_unused_conditions():
    model = randomised(conditions=("label", "size")).eval()
    config = replace(model.config, conditions=("label", "span"))
    adapted, notes = adapt(as_checkpoint(model), config, [], seed=0)
    assert any("new weights for span" in note for note in notes)
    new = type(model)(**vars(config)).eval()
    new.load_state_dict(adapted.state_dict)
    x, t, y = torch.randn(5, 4, 8, 8), torch.rand(5), some_conditions()
    with torch.no_grad():
        model.size_embedder.mlp[2].weight.zero_(), model.size_embedder.mlp[2].bias.zero_()
        assert torch.equal(new(x, t, y)[0], model(x, t, y)[0])


@pytest.fixture
def cached(train_flags, latent_cache, tmp_path):
    """Function that returns the flags of a two-step run on a latent cache with features."""

    def flags_of(**changes) -> list[str]:
        values = {"data-path": None, "latents-path": latent_cache, "max-steps": 2,
                  "global-batch-size": 8, "rf": True, "num-sample": 2, **changes}  # fmt: skip
        return train_flags(tmp_path / "results", **values)

    return flags_of


def test_conditions_of_images_and_caches_reach_the_model(cached, image_tree, tmp_path, capsys):
    """Images provide the size. A cache provides the size and a feature, whose width it stores."""
    others = ["--conditions", "label", "size"]
    images = {"data-path": image_tree, "latents-path": None, "num-sample": 0}
    call_main("train.py", *cached(**images), *others)
    run = only_run(tmp_path / "results")
    assert load_model(run).config.conditions == ("label", "size")
    line = expect_error(capsys, "train.py", *cached(**images), "--conditions", "vector")
    assert "--conditions: got vector, but the data have only label, size" in line
    line = expect_error(
        capsys, "train.py", *cached(**{"val-path": image_tree}), "--conditions", "label", "vector"
    )
    assert "held-out images: got no vector" in line
    call_main("train.py", *cached(**{"val-share": 0.5}), "--run-name", "all", *others, "vector")
    run = tmp_path / "results" / "all"
    checkpoint = read_checkpoint(run)
    assert checkpoint.config.conditions == ("label", "size", "vector:1280")
    assert checkpoint.state_dict["vector_embedder.mlp.0.weight"].shape == (32, 1280)
    call_main("train.py", "--resume", run, "--max-steps", 3)
    line = expect_error(
        capsys, "evaluate.py", "--ckpt", run, "--loss", "--data-path", image_tree,
    )  # fmt: skip
    assert "held-out images: got no vector" in line
    line = expect_error(capsys, "train.py", *cached(), "--conditions", "vector:5")
    assert "--conditions: got vector:5, expected vector:1280" in line

    # Sampling: numbers for all images, or rows by seed, which do not depend on the batch.
    rows = 3 * torch.randn(2, 1280)
    np.save(tmp_path / "rows.npy", rows.numpy())
    np.savez(tmp_path / "rows.npz", vector=rows.half().numpy(), label=[1])
    given = {"conditions": ("size=2,1,0,0.5", f"vector={tmp_path / 'rows.npy'}"), "cfg_scale": 3.0}
    pipeline = open_pipeline(SamplingConfig(ckpt=str(run), seed=5, num_sampling_steps=2, **given))
    for weight in pipeline.model.parameters():  # after three steps the output is almost zero
        torch.nn.init.normal_(weight, std=0.1)
    size = torch.tensor([2, 1, 0, 0.5]).repeat(3, 1)
    got = pipeline.latents([1, 2, 3], [5, 6, 7])
    want = pipeline.latents([1, 2, 3], [5, 6, 7],
                            conditions={"size": size, "vector": rows[[0, 1, 0]]})  # fmt: skip
    assert torch.equal(got, want)
    assert relative_error(pipeline.latents([3], [7]), want[2:]) < 1e-5
    assert relative_error(pipeline.latents([1], [5], conditions={}), want[:1]) > 1e-3
    (empty := tmp_path / "empty.npy").touch()
    command = ("sample.py", "--ckpt", run, "--num-sampling-steps", 1, "--output",
               tmp_path / "grid.png", "--conditions")  # fmt: skip
    call_main(*command, f"vector={tmp_path / 'rows.npz'}")
    for word, message in (
        ("span=1", "each of the model's conditions: size, vector"),
        ("label=1", "each of the model's conditions: size, vector"),
        ("size=1,1,0", "got size with shape (3,)"),
        ("size=1,1,0,x", "expected numbers and commas"),
        ("size=1,1,0,nan", "got size with inf or nan"),
        ("vector=missing.npy", "expected numbers and commas, or an array"),
        (f"size={tmp_path / 'rows.npz'}", "expected numbers and commas, or an array"),
        (f"size={empty}", "expected numbers and commas, or an array"),
    ):
        assert message in expect_error(capsys, *command, word)
