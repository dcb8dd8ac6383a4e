"""Experts left out one by one, and models without the experts that are missed least."""

from pathlib import Path

import pytest
import test_export
import test_moe
import torch
from helpers import (
    call_main,
    expect_error,
    relative_error,
    save_checkpoint,
)
from test_analysis import random_model
from test_export import export
from test_models import randomised, tiny_batch

from checkpoints import Checkpoint, Record, build_model, read_checkpoint
from diffusion import RectifiedFlow
from evaluation.heldout import held_out_loss, latent_batches
from extras.ablation import Ablation, drop_experts, expert_removed, load_ablation, save_ablation
from latents.autoencoder import weights_digest
from latents.cache import CachedLatents
from latents.loading import evenly_spaced
from models import DiT

low_rank, trained = test_moe.low_rank, test_export.trained


@pytest.mark.parametrize("router", ["topk", "expert_choice"])
def test_an_expert_left_out_is_an_expert_whose_last_matrix_is_zero(router):
    model, inputs = random_model(router=router), tiny_batch()
    whole = model(*inputs)[0]
    with expert_removed(model, 1, 2):
        without = model(*inputs)[0]
    assert torch.equal(model(*inputs)[0], whole)
    model.blocks[1].moe.experts.down_proj[2] = 0
    assert torch.equal(without, model(*inputs)[0]) and not torch.equal(without, whole)


def test_experts_are_left_out_one_by_one_and_an_interrupted_command_continues(
    tiny_vae, latent_cache, tmp_path, capsys
):
    model, path = random_model(num_classes=4), tmp_path / "model.safetensors"
    facts = dict(objective="rectified_flow", vae_path=str(tiny_vae), image_size=16)
    save_checkpoint(model, path, **facts)
    flags = (
        "--ckpt", path, "--latents-path", latent_cache, "--num-images", 20, "--num-pictures", 2,
        "--num-sampling-steps", 1, "--output", tmp_path / "rows.jsonl",
    )  # fmt: skip
    call_main("expert_ablation.py", *flags)
    settings, rows = load_ablation(tmp_path / "rows.jsonl")
    assert [(row.layer, row.expert) for row in rows] == [(i, j) for i in (0, 1) for j in range(4)]
    cache = CachedLatents(latent_cache, "--latents-path")
    chosen = evenly_spaced(len(cache), 20)
    batches = list(latent_batches(cache, chosen, None, list("abcd"), batch_size=20))
    before = held_out_loss(model, RectifiedFlow(), batches).mean
    model.blocks[1].moe.experts.down_proj[2] = 0
    change = held_out_loss(model, RectifiedFlow(), batches).mean - before
    assert rows[6].loss == pytest.approx(change, abs=1e-7) and rows[6].pictures > 0
    assert rows[6].loss_error > 0
    marked = [rows[0]._replace(pictures=0.5), *rows[1:3]]  # a row that is there is not computed
    save_ablation(tmp_path / "rows.jsonl", settings, marked)
    call_main("expert_ablation.py", *flags)
    assert load_ablation(tmp_path / "rows.jsonl")[1] == [*marked, *rows[3:]]
    assert "seed: got 1, expected 0" in expect_error(capsys, "expert_ablation", *flags, "--seed", 1)
    flags = (*flags, "--cfg-scale", 2)
    (tmp_path / "rows.jsonl").unlink()
    call_main("expert_ablation.py", *flags)
    line = expect_error(capsys, "expert_ablation", *flags, "--guide-ckpt", path)
    assert "guide_sha256: got" in line and "delete it, or use another --output" in line


def test_dropping_experts_keeps_what_they_share(low_rank):
    model = DiT(low_rank)
    source = Checkpoint(Path("model"), model.state_dict(), Record(config=low_rank))
    smaller = DiT(drop_experts(source, [[1], [0]]).config)
    smaller.load_state_dict(drop_experts(source, [[1], [0]]).state_dict)
    got, want = (m.blocks[0].moe.experts for m in (smaller, model))
    assert torch.equal(got.up_base, want.up_base)
    assert torch.equal(got.up_a, want.up_a[[0, 2, 3]])


@pytest.mark.parametrize("router", ["topk", "sigmoid", "expert_choice"])
def test_a_model_without_some_experts_routes_as_if_their_gate_never_chose_them(router):
    model = randomised(router=router, num_experts_per_tok=1)
    source = Checkpoint(Path("model"), model.state_dict(), Record(config=model.config))
    with pytest.raises(ValueError, match="got 4 experts, expected at most 3"):
        drop_experts(source, 2 * [[0, 1, 2, 3]])
    smaller = build_model(drop_experts(source, [[1, 3], [0, 2]]))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])
    with torch.no_grad():
        whole = model.eval()(x, t, y)[0]
        for block, gone in zip(model.blocks, ([1, 3], [0, 2]), strict=True):
            gate, kept = block.moe.gate, [i for i in range(4) if i not in gone]
            score, choices = gate.score, torch.full((4,), -torch.inf)
            choices[kept] = 0
            gate.score = lambda x, score=score, choices=choices: score(x) + choices
            if router == "sigmoid":
                gate.e_score_correction_bias += choices
            if router == "expert_choice":  # the experts that are left take all rows
                gate.num_experts_per_tok = 2
        got, want = smaller(x, t, y)[0], model(x, t, y)[0]
    assert relative_error(got, want) < 1e-6 < relative_error(whole, want)


def test_the_experts_with_the_least_damage_are_dropped_and_the_rest_is_trained_further(
    trained, tmp_path, train_flags, capsys, monkeypatch
):
    path, file = trained["rectified_flow"], tmp_path / "ablation.jsonl"
    before = read_checkpoint(path)
    digest = weights_digest(build_model(read_checkpoint(path), dtype=torch.bfloat16))
    measured = {"checkpoint_sha256": digest, "precision": "bf16"}
    damage = [[0.3, 0.1, 0.2, 0.4], [0.1, 0.4, 0.3, 0.2]]
    rows = [Ablation(i, j, damage[i][j], 0.1, 0.5) for i in (0, 1) for j in range(4)]
    save_ablation(file, measured, rows)
    flags = ("--drop-experts", 1, "--ablation", file)
    out = export(path, tmp_path / "out", *flags)
    after = read_checkpoint(out)
    assert after.config.num_experts == 3
    small = read_checkpoint(export(path, tmp_path / "small", *flags, "--quantize", "int8"))
    assert small.config.num_experts == 3 and small.quantization == "int8"
    for layer, kept in enumerate(([0, 2, 3], [1, 2, 3])):
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            name = f"blocks.{layer}.moe.{name}"
            assert torch.equal(after.state_dict[name], before.state_dict[name][kept])
    flags = {"max-steps": 1, "finetune": out, "model": None, "num_experts": None, "rf": True}
    call_main("train.py", *train_flags(tmp_path, **flags, **{"run-name": "tuned"}))
    assert read_checkpoint(tmp_path / "tuned").config.num_experts == 3
    command = ("export", "--ckpt", path, "--output", tmp_path / "no", "--ablation", file)
    assert "no effect without --drop-experts" in expect_error(capsys, *command)
    dense = save_checkpoint(randomised(num_experts=0), tmp_path / "dense.safetensors")
    line = expect_error(capsys, *command[:2], dense, *command[3:-2], "--drop-experts", 1)
    assert "--drop-experts: has no effect on a dense model" in line
    assert "got 9, expected at most 2" in expect_error(capsys, *command, "--drop-experts", 9)
    save_ablation(file, measured, rows[:6])  # it was interrupted
    line = expect_error(capsys, *command, "--drop-experts", 1)
    assert "got an ablation of 6 experts, expected 2 layers x 4" in line
    save_ablation(file, {"checkpoint_sha256": "another"}, rows)
    assert "other weights" in expect_error(capsys, *command, "--drop-experts", 1)
    monkeypatch.chdir(tmp_path)
    line = expect_error(capsys, *command[:-2], "--drop-experts", 1)
    assert "results/expert_ablation.jsonl does not exist" in line and "--ckpt" in line
