"""The autoencoder, the reading order and the latent cache, which equals encoding on the fly."""

import copy
import json
import multiprocessing
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    call_main,
    expect_error,
    main_in_processes,
    only_run,
    rows,
    save_checkpoint,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_models import randomised

from checkpoints import read_checkpoint, read_record
from latents import sources
from latents.autoencoder import WEIGHTS_FILE, load_autoencoder, open_autoencoder
from latents.cache import CachedLatents, check_networks, lock_cache, open_data
from latents.loading import BatchStream, collate, loader_workers, read_batches
from latents.sources import open_images
from runtime.errors import UserError


@pytest.fixture(scope="module")
def cache_flags(image_tree, tiny_vae):
    def make(output: Path, **changes) -> list[str]:
        values = {
            "data-path": image_tree, "vae-path": tiny_vae, "image-size": 16, "output": output,
            "shard-images": 16, "batch-size": 8, "num-workers": 0, **changes,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in values.items()]

    return make


@pytest.fixture(scope="module")
def cache(cache_flags, tmp_path_factory) -> Path:
    """Latent cache of 40 images, in shards of 16, 16 and 8."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    call_main("cache_latents.py", *cache_flags(folder))
    return folder


@pytest.fixture(scope="module")
def vae(tiny_vae):
    return load_autoencoder(str(tiny_vae), "cpu", torch.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_holds(latents: CachedLatents, images, vae, index: int, flip: bool) -> None:
    """Asserts that a cache has the posterior, the label and the original size of an image."""
    image, _ = images[index, flip]
    item, _ = latents[index, flip]
    want = vae.posterior(image["image"][None])[0]
    torch.testing.assert_close(item["moments"].float(), want, atol=1e-4, rtol=1e-3)
    assert item["label"] == image["label"] and torch.equal(item["size"], image["size"])


def test_a_latent_cache_stores_the_posterior_of_every_image_and_mirror(cache, image_tree, vae):
    latents, images = CachedLatents(cache), open_images(str(image_tree), 16)
    assert len(latents) == len(images) == 40
    assert latents.classes == images.classes and latents.fingerprint == images.fingerprint
    for index in (0, 15, 16, 39):
        for flip in (False, True):
            assert_holds(latents, images, vae, index, flip)
    assert not torch.equal(latents[0, False][0]["moments"], latents[0, True][0]["moments"])


def test_a_latent_cache_and_an_image_folder_give_the_same_latents(cache, image_tree, tiny_vae, vae):
    latents, images = open_data(str(cache), None, "--val-path"), open_data(str(image_tree), 16, "")
    assert latents.vae_sha256 == vae.weights_sha256 and images.vae_sha256 is None
    assert latents.geometry("/gone") == images.geometry(str(tiny_vae)) == (8, 4)
    draws = [
        data.to_latents(vae, collate([data[3, False]])[0], noise_fn=torch.ones_like)["latents"]
        for data in (latents, images)
    ]
    torch.testing.assert_close(*draws, atol=1e-3, rtol=1e-3)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def test_who_may_read_the_index_of_a_latent_cache_may_read_the_shards(cache):
    assert len({path.stat().st_mode for path in cache.iterdir()}) == 1


def test_a_latent_cache_without_flips_has_each_image_once(
    cache_flags, run_flags, image_tree, vae, tmp_path, capsys
):
    """A run on it goes on without naming the flip, which nobody chose."""
    call_main("cache_latents.py", *cache_flags(tmp_path / "latents", flip=False))
    latents, images = CachedLatents(tmp_path / "latents"), open_images(str(image_tree), 16)
    assert not latents.can_flip and images.can_flip
    stream = BatchStream(range(40), micro_batch=8, end_step=5, flip=latents.can_flip)
    assert len(list(read_batches(latents, stream, 0, pin=False))) == 5
    assert_holds(latents, images, vae, 39, False)
    with pytest.raises(IndexError):
        latents[39, True]
    for steps in (1, 2):
        flags = {"latents-path": tmp_path / "latents", "max-steps": steps, "lr": 1e-3}
        call_main("train.py", *run_flags(tmp_path / "runs", cached=True, **flags))
    assert "--flip" not in capsys.readouterr().out


def test_flip_mirrors_half_of_the_images_and_changes_no_order():
    both, none = (
        sum(BatchStream(range(100), micro_batch=10, end_step=10, flip=flip), [])
        for flip in (True, False)
    )
    assert [index for index, _ in both] == [index for index, _ in none]
    assert sorted(index for index, _ in both) == list(range(100))
    assert 30 < sum(flip for _, flip in both) < 70 and not any(flip for _, flip in none)


def test_two_processes_write_the_same_latent_shards(cache, cache_flags, tmp_path):
    main_in_processes("cache_latents.py", *cache_flags(tmp_path / "two"))
    assert contents(tmp_path / "two") == contents(cache)


def test_a_killed_cache_latents_run_resumes_to_the_same_shards(cache, cache_flags, tmp_path):
    """The state after a kill: one shard is complete, one half written, and one missing."""
    killed = Path(shutil.copytree(cache, tmp_path / "killed"))
    kept, cut, missing = (shard_path(killed, number) for number in range(3))
    cut.rename(f"{cut}.tmp")
    os.truncate(f"{cut}.tmp", 1000)
    missing.unlink()
    before = kept.stat().st_mtime_ns
    with pytest.raises(UserError, match="--latents-path: .*lacks 2 of 3 shards"):
        CachedLatents(killed)
    call_main("cache_latents.py", *cache_flags(killed))
    assert contents(killed) == contents(cache)
    assert kept.stat().st_mtime_ns == before


def hold(folder: Path, pipe) -> None:
    lock = lock_cache(folder, is_main=True)
    pipe.send(lock.name)
    pipe.recv()


def test_a_second_command_cannot_write_to_a_cache_until_the_first_has_ended(
    cache, cache_flags, tmp_path, capsys
):
    copied = shutil.copytree(cache, tmp_path / "cache")
    flags = cache_flags(copied)
    ours, theirs = multiprocessing.Pipe()
    first = multiprocessing.get_context("fork").Process(target=hold, args=(copied, theirs))
    first.start()
    ours.recv()
    call_main("cache_latents.py", *flags)  # there is nothing to write
    (copied / "shard-00001.safetensors").unlink()
    line = expect_error(capsys, "cache_latents.py", *flags)
    assert f"--output: {copied}: another cache_latents.py writes to it; wait" in line
    first.kill()
    first.join()
    call_main("cache_latents.py", *flags)
    assert contents(copied) == contents(cache)


def test_a_folder_of_images_without_classes_may_be_renamed(image_tree, cache_flags, tmp_path):
    for name in ("before", "after"):
        images = shutil.copytree(image_tree / "class-0", tmp_path / name)
        call_main("cache_latents.py", *cache_flags(tmp_path / "cache", **{"data-path": images}))
    assert CachedLatents(tmp_path / "cache").classes == ["before"]


def test_cache_latents_accepts_moved_inputs_and_rejects_different_ones(
    cache, cache_flags, image_tree, tiny_vae, tmp_path, vae, capsys, monkeypatch
):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in cache.iterdir()}
    images = shutil.copytree(image_tree, tmp_path / "images")
    moved = {"data-path": images, "vae-path": shutil.copytree(tiny_vae, tmp_path / "moved")}
    capsys.readouterr()
    call_main("cache_latents.py", *cache_flags(cache, **moved))
    output = capsys.readouterr()
    # 40 x 2 x 2 x 4 x 8 x 8 x 2 bytes
    assert "40 images need 8.19e-05 GB; 0 of 3 shards to write" in output.out
    assert "image [" not in output.err  # no empty bar
    changed = copy.deepcopy(vae.model)
    next(changed.encoder.parameters()).data += 1
    changed.save_pretrained(tmp_path / "vae")
    (images / "class-0" / "03.png").unlink()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    for output, changes, name in (
        (cache, {"image-size": 8}, "image_size"),
        (cache, {"vae-path": tmp_path / "vae"}, "vae_sha256"),
        (cache, {"data-path": images}, "listing"),
        (cache, {"precision": "bf16"}, "precision"),
        (cache, {"flip": False}, "flip"),
        (tmp_path / "foreign", {}, "--output"),
    ):
        line = expect_error(capsys, "cache_latents.py", *cache_flags(output, **changes))
        assert name in line and "got" in line and "expected" in line
    monkeypatch.setattr("latents.cache.MAX_SHARDS", 2)
    line = expect_error(capsys, "cache_latents.py", *cache_flags(cache))
    assert "--shard-images: got 16 (got 3 shards, expected at most 2)" in line
    now = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in cache.iterdir()}
    assert now == before


def test_an_autoencoder_moved_with_its_cache_and_run_is_found(cache_flags, tiny_vae, tmp_path):
    before, now = tmp_path / "before", tmp_path / "now"
    vae = shutil.copytree(tiny_vae, before / "assets" / "vae")
    call_main("cache_latents.py", *cache_flags(before / "data" / "latents", **{"vae-path": vae}))
    (before / "results").mkdir()
    save_checkpoint(randomised(), before / "results" / "x.safetensors", vae_path=str(vae))
    before.rename(now)
    found = str(now / "assets" / "vae")
    assert CachedLatents(now / "data" / "latents").vae_path == found
    assert read_checkpoint(now / "results" / "x.safetensors").record.vae_path == found


def test_cache_latents_replaces_unreadable_images(cache_flags, image_tree, tmp_path, vae, capsys):
    shutil.copytree(image_tree, tmp_path / "data")
    for name in ("class-1/05.png", "class-1/06.png", "class-3/09.png"):  # images 15, 16 and 39
        (tmp_path / "data" / name).write_bytes(b"not an image")
    folder = tmp_path / "latents"
    call_main("cache_latents.py", *cache_flags(folder, **{"data-path": tmp_path / "data"}))
    assert "class-1/05.png" in capsys.readouterr().out
    latents, images = CachedLatents(folder), open_images(str(tmp_path / "data"), 16)
    for index in (14, 15, 16, 17, 39):
        assert_holds(latents, images, vae, index, True)


def test_a_damaged_latent_shard_is_a_one_line_error_until_it_is_written_again(
    cache, cache_flags, tmp_path
):
    damaged = Path(shutil.copytree(cache, tmp_path / "damaged"))
    path = shard_path(damaged, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="shard-00001.*expected .* run the command of cache_lat"):
        CachedLatents(damaged)
    call_main("cache_latents.py", *cache_flags(damaged))
    assert contents(damaged) == contents(cache)


def test_images_of_a_source_of_ones_own_are_cached(cache_flags, image_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", sources.SOURCES)  # the plugin changes it
    (tmp_path / "mine.py").write_text(
        "from latents import sources\n\n\nclass Mine(sources.ImageTree):\n"
        '    spelling = "mine:.*"\n\n    def __init__(self, path, image_size):\n'
        '        super().__init__(path.removeprefix("mine:"), image_size)\n\n\n'
        "sources.SOURCES = (Mine, *sources.SOURCES)\n"
    )
    flags = cache_flags(tmp_path / "own", **{"data-path": f"mine:{image_tree}"})
    call_main("cache_latents.py", *flags, "--plugin", tmp_path / "mine.py")
    assert len(CachedLatents(tmp_path / "own")) == 40


def test_a_damaged_index_of_a_latent_cache_is_an_error(cache, tmp_path):
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    index = damaged / "index.json"
    content = json.loads(index.read_text())
    for text in (index.read_text()[:-9], "[]", json.dumps(content | {"flip": "perhaps"})):
        index.write_text(text)
        with pytest.raises(UserError, match="^--latents-path: got .*, expected a folder"):
            CachedLatents(damaged)


def test_a_lie_in_a_latent_shard_is_an_error_when_the_cache_is_opened(cache, tmp_path):
    """A label equal to the number of classes would train as "no class"."""
    lying = shutil.copytree(cache, tmp_path / "lying")
    path = shard_path(lying, 1)
    good = load_file(path)
    for name, change in {
        "labels": lambda x: x + 4, "moments": lambda x: x[:, :, :3], "size": lambda x: x[:, :1],
        " labels": lambda x: x - 4, "labels ": lambda x: x.float(), " moments": lambda x: x[1:],
    }.items():  # fmt: skip
        changed = {key: change(v).clone() if key == name.strip() else v for key, v in good.items()}
        save_file(changed, path)
        with pytest.raises(UserError, match=f"shard-00001.*{name.strip()}"):
            CachedLatents(lying)


def test_loader_workers_map_latent_shards_instead_of_copying_them(cache):
    latents = CachedLatents(cache)
    content = pickle.dumps(latents)
    assert len(content) < 1000
    copy = pickle.loads(content)[17, True][0]["moments"]
    assert torch.equal(copy, latents[17, True][0]["moments"])


def test_the_autoencoder_keeps_its_dtype_under_autocast(tiny_vae):
    images, seen = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), set()
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        vae = load_autoencoder(str(tiny_vae), "cpu", dtype)
        for part in (*vae.model.encoder.modules(), *vae.model.decoder.modules()):
            part.register_forward_hook(lambda part, inputs, output: seen.add(output.dtype))
        with torch.autocast("cpu", other):
            latents = vae.encode(images)
            assert vae.decode(latents).dtype == vae.reconstruct(images).dtype == torch.uint8
        assert seen == {dtype} and latents.dtype == torch.float32
        seen.clear()


def test_autoencoder_folders_become_absolute_and_hub_ids_do_not(tiny_vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_vae.parent)
    assert open_autoencoder(tiny_vae.name).path == str(tiny_vae)
    shutil.copytree(tiny_vae, tmp_path / "pipeline" / "vae")
    path = str(tmp_path / "pipeline")
    assert open_autoencoder(path).path == load_autoencoder(path, "cpu", torch.float32).path
    assert open_autoencoder(path).path == str(tmp_path / "pipeline" / "vae")
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("assets/vae", "./vae", "/nowhere/vae", "vae", "a/b/vae"):
        with pytest.raises(UserError, match=f"--vae-path: got {path}, expected"):
            load_autoencoder(path, "cpu", torch.float32)


def test_held_out_features_must_be_of_the_network_that_the_model_was_trained_with(cache):
    latents = CachedLatents(cache)
    latents.features_sha256 = "a"
    check_networks(latents, latents.vae_sha256, None, "--val-path")
    with pytest.raises(UserError, match="--val-path: got features of a different network"):
        check_networks(latents, latents.vae_sha256, "b", "--val-path")


@pytest.mark.parametrize("place", [".", "vae"])  # the second one as in the pipelines of diffusers
def test_a_cached_hub_autoencoder_loads_without_output(
    monkeypatch, tiny_vae, tmp_path, vae, capfd, place
):
    """The cache has the layout of huggingface_hub, so nothing is downloaded."""
    repo, commit = tmp_path / "models--lab--vae", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_vae, repo / "snapshots" / commit / place)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_autoencoder("lab/vae", local_files_only=True)
        loaded = load_autoencoder("lab/vae", "cpu", torch.float32)
    assert opened.config["latent_channels"] == 4 and opened.path == loaded.path == "lab/vae"
    assert capfd.readouterr() == ("", "")
    assert loaded.weights_sha256 == vae.weights_sha256


@pytest.mark.parametrize("script", ["train.py", "cache_latents.py"])
def test_without_a_network_a_missing_autoencoder_names_the_recipe_that_needs_none(
    script, image_tree, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    output = ("--output", tmp_path / "latents") if script == "cache_latents.py" else ()
    line = expect_error(capsys, script, "--data-path", image_tree, "--image-size", 64, *output)
    assert "got stabilityai/sd-vae-ft-mse" in line and "or pixels" in line
    (recipe,) = re.findall(r"--config (\S+\.yaml)\)", line)
    assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("kind", ["missing", "unexpected", "nan", "no file"])
def test_an_autoencoder_with_missing_unexpected_or_nan_tensors_is_rejected(
    tiny_vae, tmp_path, kind, capfd
):
    shutil.copytree(tiny_vae, tmp_path / "vae")
    path = tmp_path / "vae" / WEIGHTS_FILE
    tensors = load_file(path)
    if kind == "missing":
        del tensors["decoder.conv_in.weight"], tensors["encoder.conv_in.bias"]
        expected = "2 missing tensors, such as decoder.conv_in.weight"
    elif kind == "unexpected":
        tensors["decoder.more"] = torch.ones(1)
        expected = "1 unexpected tensor, such as decoder.more"
    else:
        tensors["decoder.conv_in.bias"][0] = float("nan")
        expected = "decoder.conv_in.bias has values that are infinite or nan"
    save_file(tensors, path)
    if kind == "no file":
        path.unlink()
        expected = f"no file named {path.name}"
    with pytest.raises(UserError, match=rf"--vae-path .*{expected}"):
        load_autoencoder(str(tmp_path / "vae"), "cpu", torch.float32)
    assert capfd.readouterr() == ("", "")  # diffusers warns about some of these


def test_the_number_of_loader_workers_is_limited_to_the_cores(monkeypatch, image_tree):
    cores = len(os.sched_getaffinity(0))
    assert loader_workers(0) == 0 and loader_workers(1) == 1 and loader_workers(1000) == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert loader_workers(1000) == 1
    assert loader_workers(None) == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch warns of more processes than cores
        images = open_images(str(image_tree), 16)
        assert list(read_batches(images, [], num_workers=1000, pin=False)) == []


@pytest.fixture(scope="module")
def run_flags(train_flags, cache):
    def make(results: Path, cached: bool, **changes) -> list[str]:
        values = {"run-name": "run", "log-every": 1, "global-batch-size": 8, "max-steps": 4}
        if cached:
            values |= dict.fromkeys(("data-path", "vae-path", "image-size"))
            values["latents-path"] = cache
        return train_flags(results, **values | changes)

    return make


def test_training_on_cached_latents_gives_the_losses_of_encoding_on_the_fly(run_flags, tmp_path):
    call_main("train.py", *run_flags(tmp_path / "encoded", cached=False))
    call_main("train.py", *run_flags(tmp_path / "cached", cached=True))
    for got, want in zip(rows(tmp_path / "cached"), rows(tmp_path / "encoded"), strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=2e-3), (got["step"], name)


def test_cached_latents_need_the_autoencoder_only_to_sample(
    cache, run_flags, tiny_vae, tmp_path, vae
):
    """The checkpoint stores the path and the digest of the missing autoencoder."""
    moved = tmp_path / "latents"
    shutil.copytree(cache, moved)
    index = moved / "index.json"
    index.write_text(index.read_text().replace(str(tiny_vae), "/gone/vae"))
    flags = {"latents-path": moved, "max-steps": 1}
    call_main("train.py", *run_flags(tmp_path / "a", cached=True, **flags))
    record = read_record(only_run(tmp_path / "a") / "checkpoints" / "0000001")
    assert record.vae_path == "/gone/vae" and record.image_size == 16
    assert record.vae_sha256 == CachedLatents(cache).settings.vae_sha256
    flags["num-sample"] = 4
    with pytest.raises(UserError, match="--vae-path: got /gone/vae, expected a folder"):
        call_main("train.py", *run_flags(tmp_path / "b", cached=True, **flags))
    flags["vae-path"] = tiny_vae
    call_main("train.py", *run_flags(tmp_path / "b", cached=True, **flags))
    assert (only_run(tmp_path / "b") / "samples-0000001.png").is_file()
    changed = copy.deepcopy(vae.model)
    next(changed.decoder.parameters()).data += 1
    changed.save_pretrained(tmp_path / "vae")
    flags["vae-path"] = tmp_path / "vae"
    for changes in ({}, {"vae-path": "pixels"}):
        with pytest.raises(UserError, match="which encoded the latents of"):
            call_main("train.py", *run_flags(tmp_path / "c", cached=True, **flags | changes))


def test_flags_that_contradict_a_latent_cache_are_rejected(run_flags, image_tree, tmp_path):
    for changes, message in (
        ({"data-path": image_tree}, "--latents-path: cannot be combined with --data-path"),
        ({"latents-path": "/nowhere"}, "got /nowhere, expected a folder that"),
        ({"image-size": 32}, "--image-size: got 32, expected 16"),
        ({"num-classes": 7}, "--num-classes: got 7, expected 4"),
    ):
        with pytest.raises(UserError, match=message):
            call_main("train.py", *run_flags(tmp_path / "r", cached=True, **changes))
    assert not (tmp_path / "r").exists()
