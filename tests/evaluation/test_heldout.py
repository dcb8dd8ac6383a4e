"""The held-out loss is deterministic and estimates the mean loss of the objective over time."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import call_main, expect_error, only_run, rows, save_checkpoint
from test_models import randomised

import diffusion
from diffusion import RectifiedFlow
from evaluation.heldout import held_out_loss, latent_batches
from latents.autoencoder import load_autoencoder
from latents.cache import CachedLatents
from latents.loading import evenly_spaced, split
from latents.sources import ImageTree, open_images
from runtime.errors import UserError
from training import start

OBJECTIVES = {name: kind() for name, kind in diffusion.OBJECTIVES.items()}


def batches(number: int, size: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 4, 8, 8, generator=generator)
    y = torch.randint(10, (number,), generator=generator)
    pairs = zip(x.split(size), y.split(size), strict=True)
    return [{"latents": latents, "label": labels} for latents, labels in pairs]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_held_out_loss_is_deterministic_and_changes_neither_model_nor_rng(objective):
    model = randomised(class_dropout_prob=0.1).train()
    state = torch.get_rng_state()
    first = held_out_loss(model, objective, batches(40, 7))
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.manual_seed(5)
    other = held_out_loss(model, objective, batches(40, 40))
    assert other.mean == pytest.approx(first.mean, rel=1e-5)
    assert other.bins == pytest.approx(first.bins, rel=1e-4)
    assert first.num_images == 40 and len(first.bins) == 10 and len(first.edges) == 9
    assert first.mean == pytest.approx(sum(first.bins) / 10)
    assert held_out_loss(model, objective, batches(40, 40), seed=1).mean != other.mean
    with pytest.raises(UserError, match="got 19 images, expected at least 20"):
        held_out_loss(model, objective, batches(19, 19))


@pytest.mark.parametrize("name", ["gaussian", "rectified_flow"])
def test_the_held_out_loss_estimates_the_training_loss_within_its_standard_error(name):
    """Compared with the loss of the images at random times and noises, drawn as in training."""
    objective = OBJECTIVES[name]
    model, (data,) = randomised().eval(), batches(400, 400)
    torch.manual_seed(0)
    with torch.no_grad():
        five_times = (torch.cat([part] * 5) for part in data.values())
        losses = objective.losses(model, *five_times)["loss"]
    got = held_out_loss(model, objective, batches(400, 100), times="training")
    error = (got.standard_error**2 + losses.var().item() / len(losses)) ** 0.5
    assert abs(got.mean - losses.mean().item()) < 4 * error
    assert 0 < got.standard_error < 1.3 * losses.std().item() / 20


def test_the_held_out_time_of_image_i_lies_in_bin_i_modulo_ten():
    seen = []

    class Spy(torch.nn.Linear):
        experts_per_token = ()

        def forward(self, x, t, y):
            seen.extend(t.tolist())
            return torch.zeros_like(x)

    for times in ("uniform", "training"):
        seen.clear()
        loss = held_out_loss(Spy(1, 1), RectifiedFlow(), batches(30, 4), times=times)
        edges = [0.0, *loss.edges, 1.0]
        assert all(edges[i % 10] <= t <= edges[i % 10 + 1] for i, t in enumerate(seen))
        assert len(set(seen)) == 30
        is_uniform = loss.edges == pytest.approx([i / 10 for i in range(1, 10)])
        assert is_uniform == (times == "uniform")


def test_posterior_noise_and_held_out_loss_noise_are_independent(image_tree):
    """If all images are used, the index and the number of an image would be the same seed."""
    images = open_images(str(image_tree), 16)
    zeros = torch.zeros(30, 4, 4, 4)
    images.to_latents = lambda vae, batch, noise_fn: {**batch, "latents": noise_fn(zeros)}
    (batch,) = latent_batches(images, range(30), None, images.classes, batch_size=30)
    noise = diffusion.PerImageNoise(range(30)).randn((4, 4, 4))
    both = torch.stack([batch["latents"].flatten(), noise.flatten()])
    assert torch.corrcoef(both)[0, 1].abs() < 0.1


def test_held_out_latents_do_not_depend_on_batches_and_labels_match_by_name(image_tree, tiny_vae):
    images = open_images(str(image_tree), 16)
    vae = load_autoencoder(str(tiny_vae), "cpu", torch.float32)
    names = ["other", *reversed(images.classes)]
    chosen = evenly_spaced(len(images), 8)
    several, one = (
        list(latent_batches(images, chosen, vae, names, batch_size=size)) for size in (3, 8)
    )
    latents, labels = (
        torch.cat([batch[name] for batch in several]) for name in ("latents", "label")
    )
    torch.testing.assert_close(latents, one[0]["latents"])
    assert latents.shape == (8, 4, 8, 8)
    assert labels.tolist() == one[0]["label"].tolist() == [4, 4, 3, 3, 2, 2, 1, 1]
    with pytest.raises(UserError, match="got 4 classes .* expected the 3 classes of the model"):
        next(latent_batches(images, chosen, vae, ["a", "b", "c"], batch_size=3))


@pytest.mark.parametrize("objective", ["gaussian", "mean_flow"])
def test_evaluate_loss_reports_the_held_out_loss(
    objective, tiny_vae, image_tree, latent_cache, tmp_path, capsys
):
    model, names = randomised(), tuple(f"class-{label}" for label in range(10))
    facts = dict(objective=objective, image_size=16, vae_path=str(tiny_vae), class_names=names)
    path = save_checkpoint(model, tmp_path / "model.safetensors", **facts)

    def measured(*data) -> dict:
        flags = ("--num-images", 20, "--batch-size", 6, "--output", tmp_path)
        call_main("evaluate.py", "--ckpt", path, "--loss", *data, *flags)
        return json.loads((tmp_path / "results.json").read_text())["metrics"]

    got = measured("--data-path", image_tree)
    note = f"note: {path} was trained on {image_tree}, so the loss is not a held-out one"
    assert note not in capsys.readouterr().out
    images = open_images(str(image_tree), 16)
    vae = load_autoencoder(str(tiny_vae), "cpu", torch.float32)
    chosen = evenly_spaced(len(images), 20)
    latents = latent_batches(images, chosen, vae, names, batch_size=20)
    want = asdict(held_out_loss(model, OBJECTIVES[objective], latents))
    for name in ("mean", "standard_error", "bins"):
        assert got[name] == pytest.approx(want[name], rel=1e-4)
    cached = measured("--latents-path", latent_cache)
    assert cached["mean"] == pytest.approx(got["mean"], rel=2e-3)
    save_checkpoint(model, path, images=images.fingerprint, **facts)
    measured("--data-path", image_tree)
    assert note in capsys.readouterr().out
    # The data set of a run that held out a part of it has changed.
    of_run = {"val_share": 0.5, "data_path": str(image_tree)}
    save_checkpoint(model, path, images={"count": 39, "names": "x"}, settings=of_run, **facts)
    line = expect_error(capsys, "evaluate.py", "--ckpt", path, "--loss", "--output", tmp_path)
    assert f"--data-path: {image_tree} has changed since {path} held out a part of it" in line


def test_val_share_holds_out_the_same_images_from_folder_and_cache(image_tree, tiny_vae, tmp_path):
    """An image of one side never replaces an unreadable image of the other side."""
    data = shutil.copytree(image_tree, tmp_path / "data")
    trained, held_out = split(open_images(str(data), 16), 0.3)
    assert len(held_out) == 12 and sorted([*trained, *held_out]) == list(range(40))
    assert set(split(open_images(str(data), 16), 0.1)[1]) < set(held_out)
    # The next image is on the other side.
    last = [index for index in range(39) if (index in held_out) != (index + 1 in held_out)]
    for index in last[:10]:
        (data / f"class-{index // 10}" / f"{index % 10:02d}.png").write_bytes(b"")
    images = open_images(str(data), 16)
    latents = tmp_path / "latents"
    flags = ("--data-path", data, "--vae-path", tiny_vae, "--image-size", 16, "--shard-images", 16)
    call_main("cache_latents.py", *flags, "--output", latents, "--num-workers", 0)
    for source in (images, CachedLatents(latents)):
        sides = split(source, 0.3)
        assert sorted(np.concatenate(sides)) == list(range(40)) and set(sides[1]) >= set(held_out)
        name = "image" if source is images else "moments"
        seen = [{source[i, False][0][name].numpy().tobytes() for i in side} for side in sides]
        assert not seen[0] & seen[1]


def test_a_run_never_trains_on_its_held_out_images(
    train_flags, image_tree, latent_cache, tmp_path, monkeypatch, capsys
):
    read, getitem = [], ImageTree.__getitem__
    noted = lambda images, key: read.append(key[0]) or getitem(images, key)  # noqa: E731
    monkeypatch.setattr(ImageTree, "__getitem__", noted)
    monkeypatch.setattr(start, "write_sheet", lambda *_, **__: None)  # it reads images as well
    flags = {
        "num_experts": 2, "global-batch-size": 5, "log-every": 1, "val-every": 1,
        "val-share": 0.5, "objective": "rectified_flow:times=uniform,shift=2", "run-name": "run",
    }  # fmt: skip
    call_main("train.py", *train_flags(tmp_path / "whole", **flags, **{"max-steps": 4}))
    held_out, trained = read[:20], read[20:]
    assert sorted([*held_out, *trained]) == list(range(40))
    for steps in (2, 4):
        read.clear()
        call_main("train.py", *train_flags(tmp_path / "two", **flags, **{"max-steps": steps}))
        assert read[:20] == held_out and read[20:] == trained[5 * steps - 10 : 5 * steps]
    losses, again = (
        [row["val_loss"] for row in rows(tmp_path / name) if "val_loss" in row]
        for name in ("whole", "two")
    )
    assert losses == again and len(set(losses)) == 4
    capsys.readouterr()
    call_main("evaluate.py", "--ckpt", only_run(tmp_path / "two"), "--loss", "--output", tmp_path)
    assert "the 20 images" in capsys.readouterr().out
    got = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert got["mean"] == pytest.approx(losses[-1], rel=1e-4) and got["num_images"] == 20
    copied = shutil.copytree(image_tree, tmp_path / "copied")
    run = ("--resume", only_run(tmp_path / "two"))
    call_main("train.py", *run, "--val-path", copied, "--max-steps", 5)  # replaces --val-share
    assert "--val-share: was 0.5, is 0.0" in rows(tmp_path / "two")[-2]["changed"]
    changes = {"val-share": None, "val-path": copied, "max-steps": 1}
    call_main("train.py", *train_flags(tmp_path / "same", **{**flags, **changes}))
    assert "the training images, so val_loss is not held out" in capsys.readouterr().out
    other = shutil.copytree(latent_cache, tmp_path / "other")
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"vae_sha256": "0" * 64}))
    evaluated = (
        "evaluate.py",
        "--ckpt",
        only_run(tmp_path / "two"),
        "--loss",
        "--latents-path",
        other,
    )
    assert "of a different autoencoder" in expect_error(capsys, *evaluated)
    for change, message in (
        ({"val-share": None, "val-path": other}, "--val-path: got latents of a different autoenc"),
        ({"val-share": 0.4}, "--val-share: got 16 held-out images, expected at least 20"),
        ({"val-path": tmp_path}, "--val-share: cannot be combined with --val-path"),
        ({"val-share": None, "val-path": tmp_path / "none"}, "--val-path: got "),
        ({"val-share": 1}, "--val-share: got 1.0, expected"),
    ):
        changed = train_flags(tmp_path / "bad", **{**flags, **change})
        line = expect_error(capsys, "train.py", *changed)
        assert message in line and not (tmp_path / "bad").exists()
