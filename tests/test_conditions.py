"""Conditions of an image: embeddings, dropout, guidance, and their way from data to the model."""

from dataclasses import replace

import pytest
import torch
from test_models import randomised
from test_training import engine_of
from torch import nn

import models
from checkpoints import Record
from checkpoints.adapting import adapt
from checkpoints.checkpoint import Checkpoint
from conditions import (
    spell_condition,
    without_conditions,
)
from diffusion import RectifiedFlow
from latents.images import size_and_crop
from models import DiT
from runtime.errors import UserError
from sampling.generate import SamplerSettings, generate
from training.step import losses


def test_conditions_are_dropped_once_per_micro_batch_after_times_and_noise_are_drawn():
    """Random numbers are drawn in this order; a second pass of the network has the same labels."""
    engine, seen = engine_of(class_dropout_prob=0.5), []
    batch = {"latents": torch.randn(64, 4, 8, 8), "label": torch.arange(64) % 4}

    class TwoPasses(RectifiedFlow):
        def losses(self, network, x, y, t=None, noise=None):
            seen.append((t, noise, y["label"]))
            super().losses(spy, x, y, t, noise)
            return super().losses(spy, x, y, t, noise)

    def spy(x, t, y):
        seen.append(y["label"])
        return engine.network(x, t, y)

    torch.manual_seed(3)
    terms = losses(engine, TwoPasses(), batch)
    torch.manual_seed(3)
    t, noise = torch.randn(64).sigmoid(), torch.randn(64, 4, 8, 8)
    labels = torch.where(torch.rand(64) < 0.5, engine.model.config.num_classes, batch["label"])
    (got_t, got_noise, _), first, second = seen
    assert torch.equal(got_t, t) and torch.equal(got_noise, noise)
    assert torch.equal(first, labels) and torch.equal(second, labels)
    want = RectifiedFlow().losses(engine.network, batch["latents"], labels, t, noise)
    assert torch.equal(terms["loss"], want["loss"].mean())


def test_size_and_crop_are_measured_in_units_of_the_image_size():
    assert size_and_crop((64, 32), 16) == [2.0, 4.0, 0.0, 0.5]
    assert size_and_crop((8, 8), 16) == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "conditions", [("label", "colour"), ("label", "label"), ("size:3",), ("vector:x",)]
)
def test_an_unknown_condition_is_rejected_by_name(conditions):
    with pytest.raises(ValueError, match="conditions: got"):
        randomised(conditions=conditions)


def as_checkpoint(model: DiT) -> Checkpoint:
    return Checkpoint("x", model.state_dict(), Record(config=model.config))


def test_a_sequence_of_features_reaches_the_blocks_in_fine_tuning_guidance_and_sampling():
    assert spell_condition("tokens", (3, 6)) == "tokens:3x6"
    for wrong in ("tokens", "tokens:6", "tokens:3x0", "tokens:3x6x1"):
        with pytest.raises(ValueError, match="conditions: got .*tokens"):
            randomised(conditions=("label", wrong))
    fields = {"num_classes": 8, "class_dropout_prob": 0.1}  # of no other test: shapes are kept
    source = randomised(**fields).eval()
    config = replace(source.config, conditions=("label", "tokens:3x6"))
    adapted, (first, note, drawn) = adapt(as_checkpoint(source), config, [], seed=0)
    assert "new weights for tokens:3x6" in note and "blocks.*.cross_attn: drawn" in drawn
    kept = len(source.state_dict())
    assert f"{kept} of {len(adapted.state_dict)} weights are unchanged" in first
    model = DiT(config).eval()
    model.load_state_dict(adapted.state_dict)
    x, t, tokens = torch.randn(5, 4, 8, 8), torch.rand(5), torch.randn(5, 3, 6)
    y = {"label": torch.arange(5), "tokens": tokens}
    with torch.no_grad():
        assert torch.equal(model(x, t, y)[0], source(x, t, y["label"])[0])
        for block in model.blocks:
            nn.init.normal_(block.cross_attn.proj.weight)
        with_tokens, without = model(x, t, y)[0], model(x, t, y["label"])[0]
    assert not torch.allclose(with_tokens, without)
    assert not without_conditions(model.conditions, y)["tokens"].any()
    settings = SamplerSettings("rectified_flow", num_steps=2, cfg_scale=2.0)
    drawn = [generate(model, [1, 2], [0, 1], settings, conditions={"tokens": rows})
             for rows in (tokens[0], tokens[[0, 0]], tokens[:2])]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[1][1], drawn[2][1])
    with pytest.raises(UserError, match=r"got tokens of shape \(2, 6\), expected \(1, 3, 6\)"):
        generate(model, [1], [0], settings, conditions={"tokens": tokens[0, :2]})
    back, _ = adapt(as_checkpoint(model), source.config, [], seed=0)
    assert back.state_dict.keys() == source.state_dict().keys()


@pytest.mark.parametrize("was, now", [(0.1, 0.0), (0.0, 0.1)])
def test_fine_tuning_with_or_without_label_dropout_keeps_the_rows_of_the_same_classes(was, now):
    model, table = randomised(class_dropout_prob=was), "y_embedder.embedding_table.weight"
    config = replace(model.config, class_dropout_prob=now)
    adapted, (_, note) = adapt(as_checkpoint(model), config, [], seed=0)
    rows, count = adapted.state_dict[table], config.num_classes
    assert torch.equal(rows[:count], model.state_dict()[table][:count])
    assert len(rows) == count + (now > 0) and note.startswith(table) and "no class" in note


def test_fine_tuning_with_a_condition_that_changes_the_shape_of_another_weight_is_one_line(
    monkeypatch,
):
    class Block(models.DiTBlock):
        def __init__(self, config, layer=0):
            super().__init__(config, layer)
            self.read = nn.Linear(len(config.conditions), 8)

    monkeypatch.setattr(models, "DiTBlock", Block)
    model = randomised(num_classes=7)  # of no other test, because shapes are computed once a config
    config = replace(model.config, conditions=("label", "vector:6"))
    line = (
        r"x: .* conditions label vector:6 \(blocks.0.read.weight: got \(8, 1\), expected \(8, 2\)"
    )
    with pytest.raises(UserError, match=line):
        adapt(as_checkpoint(model), config, [], seed=0)
