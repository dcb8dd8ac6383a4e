"""Auxiliary losses compared with naive versions, and their use in a training run."""

import math
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import (
    TINY_MODEL,
    call_main,
    config_of_command,
    expect_error,
    only_run,
    relative_error,
    rows,
    step_folder,
)
from safetensors.torch import load_file

from checkpoints import config_of
from checkpoints.checkpoint import load_model
from diffusion import OBJECTIVES
from extras.auxiliary import Dispersive
from models import DiT, DiTConfig
from options.parts import Word
from runtime.processes import ALONE
from tools.benchmarks.common import make_engine, train_step
from training.auxiliary import AUXILIARY_LOSSES, Pass
from training.config import TrainConfig
from training.engine import new_weights
from training.engines.ddp import DDPEngine
from training.memory import planned_weights, state_bytes
from training.step import losses

EVERY = ["repa", "sra", "dispersive", "contrastive"]
CASES = {
    "repa": "repa", "repa-on-the-same-grid": "repa", "irepa": "repa:spatial=True,gamma=0.6",
    "sra": "sra:teacher_share=1", "sra-gaussian": "sra:teacher_share=1",
    "dispersive": "dispersive", "contrastive": "contrastive",
}  # fmt: skip


def tokens_after(model, block: int, z, t, y) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after a block, and the prediction of the model."""
    tokens = []
    hook = model.blocks[block].register_forward_hook(lambda _, given, out: tokens.append(out[0]))
    prediction = model(z, t, y)[0][:, :4]
    hook.remove()
    return tokens[0], prediction


def noised(x, noise, t) -> torch.Tensor:
    """Noisy latents, computed image by image."""
    if t.is_floating_point():
        return torch.stack([x[i] + t[i] * (noise[i] - x[i]) for i in range(len(x))])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    parts = [(kept[i].sqrt().float(), (1 - kept[i]).sqrt().float()) for i in t]
    return torch.stack([a * x[i] + b * noise[i] for i, (a, b) in enumerate(parts)])


def test_benchmarks_compute_the_auxiliary_losses(monkeypatch):
    called, loss = [], Dispersive.loss
    monkeypatch.setattr(Dispersive, "loss", lambda *args: called.append(1) or loss(*args))
    model = config_of("DiT-Ti/2", depth=2, input_size=8, num_classes=4)
    values = {"objective": "rectified_flow", "auxiliary": EVERY}
    config = replace(TrainConfig.default(), model=model)
    config = config.changed(values, shapes={"label": (), "tokens": (4, 8)})
    train_step(make_engine(config, ALONE), config.objective, 4)
    assert called


def naive(name: str, engine, objective, batch, t, noise) -> torch.Tensor:
    """Auxiliary loss computed by loops over images, tokens and pairs."""
    x, y, model = batch["latents"], batch["label"], engine.model
    tokens, prediction = tokens_after(model, 0, noised(x, noise, t), t, y)
    count = len(x)
    if name.startswith("contrastive"):
        others = [noise[(i + 1) % count] - x[(i + 1) % count] for i in range(count)]
        pairs = zip(prediction, others, strict=True)
        return -sum((v - o).square().mean() for v, o in pairs) / count
    if name.startswith("dispersive"):
        terms = [math.e ** (-(a - b).square().mean() / 0.5) for a in tokens for b in tokens]
        return torch.log(sum(terms) / count**2)
    if name.startswith("sra"):
        k = 0.2 * torch.rand(count)  # the last random numbers of a step
        if t.is_floating_point():
            earlier = torch.tensor([max(0.0, (t[i] - k[i]).item()) for i in range(count)])
        else:
            earlier = (t - 999 * k).clamp_min(0).long()
        teacher = DiT(model.config).eval()
        averages = dict(zip(engine.averaged, engine.emas[0].averages, strict=True))
        teacher.load_state_dict(averages, strict=False)
        z = noised(x, noise, earlier)
        target = tokens_after(teacher, 1, z, earlier, y)[0].detach()
        difference = (model.projectors["sra"](tokens) - target).abs()
        return torch.where(difference < 0.05, difference**2 / 0.1, difference - 0.025).mean()
    features = batch["tokens"].float()  # (6, S, 6)
    if name == "irepa":
        weights = model.projectors["repa"]
        grid = tokens.transpose(1, 2).unflatten(2, (4, 4))
        mapped = F.conv2d(grid, weights.weight, weights.bias, padding=1).flatten(2).transpose(1, 2)
        mean = torch.stack([one.sum(0) / len(one) for one in features])[:, None]
        spread = ((features - mean) ** 2).sum(1, keepdim=True) / (features.shape[1] - 1)
        features = (features - 0.6 * mean) / (spread.sqrt() + 1e-6)
    else:
        mapped = tokens
        for number in (0, 2, 4):
            layer = model.projectors["repa"][number]
            mapped = mapped @ layer.weight.T + layer.bias
            mapped = mapped * torch.sigmoid(mapped) if number < 4 else mapped
    if features.shape[1] < 16:  # 2 x 2 to 4 x 4: each new row and column is a mean of two
        mix = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
        features = torch.einsum("ar,bs,nrsf->nabf", mix, mix, features.unflatten(1, (2, 2)))
        features = features.flatten(1, 2)
    angles = [
        (a @ b) / (a.norm() * b.norm())
        for image, expected in zip(mapped, features, strict=True)
        for a, b in zip(image, expected, strict=True)
    ]
    return -sum(angles) / len(angles)


@pytest.mark.parametrize("case", CASES)
def test_an_auxiliary_loss_and_its_gradients_equal_the_naive_version(case):
    word = Word.parse(CASES[case], AUXILIARY_LOSSES)
    word.options["weight"] = 0.3
    objective = OBJECTIVES["gaussian" if case == "sra-gaussian" else "rectified_flow"]()
    torch.manual_seed(1)
    batch = {"latents": torch.randn(6, 4, 8, 8), "label": torch.arange(6) % 4}
    batch["tokens"] = torch.randn(6, 4 if case == "repa" else 16, 6).half()
    values = {"precision": "fp32", "ema": ("exponential:decay=0.9",), "auxiliary": (word,),
              "objective": "rectified_flow"}  # fmt: skip
    config = replace(TrainConfig.default(), model=DiTConfig(**TINY_MODEL, class_dropout_prob=0.0))
    config = config.changed(values, shapes={"tokens": batch["tokens"].shape[1:]})
    engine = DDPEngine(ALONE, config, new_weights(config))
    for weight in engine.parameters.values():  # gates initialised to zero would hide errors
        weight.data += 0.1 * torch.randn_like(weight)
    for average in engine.emas[0].averages:
        average += 0.1 * torch.randn_like(average)

    torch.manual_seed(3)
    terms = losses(engine, objective, batch)
    weights = dict(engine.model.named_parameters())
    got = torch.autograd.grad(terms["loss"] + terms["aux_loss"], weights.values(),
                              allow_unused=True)  # fmt: skip
    torch.manual_seed(3)
    drawn = objective.draw(batch["latents"])
    want = naive(case, engine, objective, batch, drawn["t"], drawn["noise"])
    plain = objective.losses(engine.model, batch["latents"], batch["label"], **drawn)
    assert terms[word.name].item() == pytest.approx(want.item(), rel=1e-4)
    total = plain["loss"].mean() + plain["aux_loss"] + 0.3 * want
    expected = torch.autograd.grad(total, weights.values(), allow_unused=True)
    for weight, one, other in zip(weights, got, expected, strict=True):
        assert (one is None) == (other is None), weight
        assert one is None or other.norm() < 1e-7 or relative_error(one, other) < 1e-3, weight


def test_the_contrastive_loss_of_a_flow_of_the_data_uses_its_target():
    objective = OBJECTIVES["flow_x"](noise_scale=2.0, clamp=0.5)
    x, noise, output = torch.randn(3, 5, 4, 8, 8)
    t = torch.tensor([0.1, 0.4, 0.6, 0.8, 0.9])
    z = objective.noised(x, noise, t)
    least = t.clamp_min(0.5)[:, None, None, None]
    velocity, target = (z - output) / least, (z - x) / least
    given = Pass(objective, {"latents": x}, noise, t, None, z, output)
    found = AUXILIARY_LOSSES["contrastive"]().loss(given, None)
    torch.testing.assert_close(found, -(velocity - target[[1, 2, 3, 4, 0]]).square().mean())


def test_repa_interpolates_a_square_of_features_to_a_grid_of_as_many_patches():
    features = torch.randn(2, 16, 6)  # 4 x 4
    grid = features.transpose(1, 2).unflatten(2, (4, 4))
    resized = F.interpolate(grid, (8, 2), mode="bilinear", antialias=True).flatten(2)
    part, latents = AUXILIARY_LOSSES["repa"](), torch.zeros(2, 4, 16, 4)
    given = Pass(None, {"latents": latents}, None, None, None)
    given.tokens["repa"] = resized.transpose(1, 2)
    assert part.loss(given, features).item() == pytest.approx(-1)


@pytest.fixture(scope="module")
def flags(train_flags, latent_cache):
    """Function that returns the flags of a run on latents with features of tokens."""

    def make(results, *more: str, **changes) -> list[str]:
        values = {
            "latents-path": latent_cache, "data-path": None, "image-size": None, "max-steps": 3,
            "global-batch-size": 8, "log-every": 1, "rf": True, "run-name": "run",
        }  # fmt: skip
        return [*train_flags(results, **values | changes), *more]

    return make


def test_a_branch_drops_and_adds_auxiliary_losses(flags, tmp_path, capsys):
    """One branch of a run with all losses drops them; a branch of it adds them."""
    words = ["contrastive:weight=0.1", "repa:width=16", "sra", "dispersive"]
    held_out = ["--val-share", "0.5", "--val-images", "20"]
    asked = ["--auxiliary", *words, *held_out]
    call_main("train.py", *flags(tmp_path / "whole", *asked))
    run, last = only_run(tmp_path / "whole"), step_folder(tmp_path / "whole", 3)
    assert {*EVERY, "val_loss"} <= rows(tmp_path / "whole")[-1].keys()
    assert "contrastive:weight=0.1" in (run / "config.yaml").read_text()
    weights = load_file(last / "model.safetensors")
    assert weights.keys() == load_model(run).state_dict().keys()
    (state,) = (last / "state").iterdir()
    moved = [name for name in load_file(state) if name.startswith("model/projectors.")]
    assert len(moved) == 6 + 4  # the projection layers of repa and sra

    branch = flags(tmp_path / "without", "--resume", str(last), **{"max-steps": 4})
    call_main("train.py", *branch, "--auxiliary", "none", *held_out)
    assert "repa" not in rows(tmp_path / "without")[-1]
    branch = flags(tmp_path / "with", "--resume", str(step_folder(tmp_path / "without", 4)))
    call_main("train.py", *branch, *asked, "--max-steps", "5")
    assert "repa" in rows(tmp_path / "with")[-1]
    log = (only_run(tmp_path / "with") / "log.txt").read_text()
    assert "changed: auxiliary loss repa begins" in log
    branch = flags(tmp_path / "wide", "--resume", str(last), "--auxiliary", "repa:width=9")
    line = expect_error(capsys, "train.py", *branch, "--max-steps", "4")
    assert "--auxiliary" in line and "got (9,), expected (16,)" in line


def test_a_branch_on_features_of_another_width_is_told_both_widths(
    flags, image_tree, tiny_vae, tmp_path, capsys
):
    options = dict(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    network = timm.create_model("vit_tiny_patch16_224", **options)
    timm.models.save_for_hf(network, tmp_path / "timm", model_args=options)
    call_main(
        "cache_latents.py", "--data-path", image_tree, "--vae-path", tiny_vae, "--image-size", 16,
        "--features", f"timm:local-dir:{tmp_path / 'timm'}@16", "--feature-tokens", "--output",
        tmp_path / "other", "--num-workers", 0,
    )  # fmt: skip
    asked = ("--auxiliary", "repa", "--max-steps")
    call_main("train.py", *flags(tmp_path / "wide", *asked, "1"))
    branch = ("--resume", str(step_folder(tmp_path / "wide", 1)), *asked, "2")
    narrow = {"latents-path": tmp_path / "other"}
    line = expect_error(capsys, "train.py", *flags(tmp_path / "narrow", *branch, **narrow))
    assert "--latents-path" in line and "damaged" not in line
    assert "got (8" in line and "expected (1280" in line


def test_impossible_auxiliary_losses_are_one_line_errors(flags, train_flags, tmp_path, capsys):
    for given, message in (
        (["--auxiliary", *EVERY, "--rf", "False"], "got contrastive, which needs a rectified flow"),
        ([*train_flags(tmp_path, objective="mean_flow"), "--auxiliary", "sra"],
         "--auxiliary: got sra"),
        ([*train_flags(tmp_path, rf=True), "--auxiliary", "repa"],
         "got repa, which needs latents"),
        (["--auxiliary", "dispersive", "--global-batch-size", "1"], "micro-batches of one image"),
        (["--auxiliary", "sra", "--ema", "none"], "got sra with --ema none, expected an EMA"),
        (["--auxiliary", "sra", "none"], "got none beside others"),
    ):  # fmt: skip
        arguments = given if len(given) > 10 else [*flags(tmp_path), *given]
        assert message in expect_error(capsys, "train.py", *arguments)
    assert not list(tmp_path.iterdir())


def test_the_plan_counts_no_projectors_in_an_ema():
    config = replace(TrainConfig.default(), model=config_of("DiT-Ti/2"))
    config = config.changed({"objective": "rectified_flow"})
    with_repa = config.changed({"auxiliary": ["repa"]}, shapes={"tokens": (16, 8)})
    plain, found = state_bytes(config), state_bytes(with_repa)
    assert found["weights"] > plain["weights"] and found["EMA"] == plain["EMA"]
    exact = sum(4 * weight.numel() for weight in planned_weights(config).values())
    assert plain["EMA"] == exact


def test_the_plan_refuses_micro_batches_of_one_image_as_the_run_does(capsys):
    contrastive = ("--rf", "--auxiliary", "contrastive", "--global-batch-size", 1)
    line = expect_error(capsys, "train.py", "--dry-run", "--model", "DiT-Ti/2", *contrastive)
    assert "expected at least two images" in line


def test_a_command_keeps_the_options_of_the_losses_of_a_recipe_in_the_order_of_the_table(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("auxiliary: ['dispersive:weight=0.4', sra]\nrf: 1\n")
    recipe = partial(config_of_command, "--config", file)
    config = recipe("--auxiliary", "contrastive", "dispersive")
    assert [one.weight for one in config.auxiliary] == [0.4, 0.05]
    for words in (("--auxiliary",), ("--auxiliary", "none")):
        assert recipe(*words).auxiliary == []


def test_wrong_words_of_auxiliary_losses_are_one_line_errors(tmp_path, capsys):
    (recipe := tmp_path / "recipe.yaml").write_text("auxiliary: [sra, sra]\n")
    for words, message in (
        (("--auxiliary", "sra", "sra"), "--auxiliary: got sra, sra"),
        (("--config", recipe), "--auxiliary: got sra, sra"),
        (("--auxiliary", "repa:weight=-1"), "--auxiliary: repa:weight: got -1.0, expected"),
        (("--auxiliary-repa-weight", 1), "--auxiliary repa:weight="),
    ):
        assert message in expect_error(capsys, "train.py", *words)
