"""cache_latents.py and training from what it wrote: draws and losses of encoding on the fly."""

import copy
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_main, run_script
from hypothesis import given
from hypothesis import settings as fuzzed
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_training import assert_equal_runs, only_run, rows

from cache_latents import describe
from checkpoints import read_record
from latents import caching
from latents.autoencoder import encode, encode_moments, load_autoencoder
from latents.cache import CachedLatents
from latents.index import Index, parse_index, shard_name
from latents.loading import BatchStream, ImageTree, batches_of, make_loader
from runtime.errors import UserError
from runtime.processes import Distributed, reseed

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


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
    """40 images in shards of 16, 16 and 8."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    call_main("cache_latents.py", *cache_flags(folder))
    return folder


@pytest.fixture(scope="module")
def vae(tiny_vae):
    return load_autoencoder(str(tiny_vae), "cpu", torch.float32)


@pytest.fixture
def damaged(cache, tmp_path) -> Path:
    """A copy of the cache with one wrong bit, in the moments of image 39, the last of all."""
    folder = tmp_path / "damaged"
    shutil.copytree(cache, folder)
    path = folder / shard_name(2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the moments are the last of the file
    path.write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_cache_holds_the_posterior_of_every_image_and_of_its_mirror(cache, image_tree, vae):
    latents, tree = CachedLatents(cache), ImageTree(str(image_tree), 16)
    assert len(latents) == len(tree) == 40 and latents.classes == tree.classes
    for index in (0, 15, 16, 39):
        for flip in (False, True):
            image, label, _ = tree[index, flip]
            moments, got_label, unreadable = latents[index, flip]
            want = encode_moments(vae, image[None])[0]
            torch.testing.assert_close(moments.float(), want, atol=1e-4, rtol=1e-3)
            assert got_label == label and unreadable == []
    assert not torch.equal(latents[0, False][0], latents[0, True][0])


def test_two_processes_write_the_same_bytes(cache, cache_flags, tmp_path):
    result = run_script("cache_latents.py", *cache_flags(tmp_path / "two"), processes=2)
    assert contents(tmp_path / "two") == contents(cache)
    # 40 x 2 x 2 x 4 x 8 x 8 x 2 bytes
    assert "40 images at 16 take 8.19e-05 GB" in result.stdout
    assert "in 3 shards: 3 to write" in result.stdout


def test_a_folder_that_another_node_does_not_see_is_one_line(tmp_path):
    elsewhere = Distributed(rank=8, local_rank=0, world_size=16, device=torch.device("cpu"))
    with pytest.raises(UserError, match="cannot be seen from rank 8, expected a folder that all"):
        caching.check_shared(tmp_path, elsewhere)


def test_imagenet_takes_42_gb(cache):
    settings = CachedLatents(cache).settings
    imagenet = replace(settings, images=1_281_167, image_size=256, latent_shape=(4, 32, 32))
    said = describe(cache, imagenet, num_missing=313, free=10**12)
    assert said.startswith("1,281,167 images at 256 take 42 GB (2 flips x mean and log-variance x")


def test_another_batch_size_moves_the_last_place_at_most(cache, cache_flags, tmp_path):
    call_main("cache_latents.py", *cache_flags(tmp_path / "c", **{"batch-size": 5}))
    for shard in range(3):
        got, want = (load_file(folder / shard_name(shard)) for folder in (tmp_path / "c", cache))
        assert torch.equal(got["labels"], want["labels"])
        # fp16 has 11 bits, so the next number is at most 2^-10 of this one away
        torch.testing.assert_close(got["moments"], want["moments"], rtol=2**-10, atol=1e-6)


def test_a_killed_run_goes_on_to_the_same_bytes(cache_flags, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = {"shard-images": 1, "batch-size": 1, "image-size": 48}
    call_main("cache_latents.py", *cache_flags(whole, **flags))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cache_latents.py"), *cache_flags(killed, **flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    first = caching.note_path(killed, 2)
    deadline = time.time() + 120
    while not first.exists() and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "index.json").exists(), "killed too late to show anything"
    kept = {path: path.stat().st_mtime_ns for path in (killed / shard_name(i) for i in (1, 2))}
    with pytest.raises(UserError, match="expected a folder that cache_latents.py has finished"):
        CachedLatents(killed)
    (killed / "shard-00030.tmp").write_bytes(b"the beginning of a shard")
    damaged_shard = killed / shard_name(0)  # whole when it was written, but not any more
    damaged_shard.write_bytes(damaged_shard.read_bytes()[:-1])
    call_main("cache_latents.py", *cache_flags(killed, **flags))
    assert contents(killed) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_the_same_command_again_checks_and_changes_nothing(cache, cache_flags, capsys):
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    call_main("cache_latents.py", *cache_flags(cache))
    assert "3 shards were there and as they should be, 0 written" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_what_does_not_belong_together_is_refused(cache, cache_flags, image_tree, tmp_path, vae):
    other_vae, other_tree = tmp_path / "vae", tmp_path / "images"
    changed = copy.deepcopy(vae)
    next(changed.encoder.parameters()).data += 1
    changed.save_pretrained(other_vae)
    shutil.copytree(image_tree, other_tree)
    (other_tree / "class-0" / "03.png").unlink()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    before = contents(cache)
    for output, changes, message in (
        (cache, {"image-size": 8}, "image_size got 8, expected 16"),
        (cache, {"vae-path": other_vae}, "vae_sha256 got '.*', expected"),
        (cache, {"data-path": other_tree}, "images got 39, expected 40"),
        (cache, {"precision": "bf16"}, "precision got 'bf16', expected 'fp32'"),
        (cache, {"shard-images": 8}, "shard_images got 8, expected 16"),
        (tmp_path / "foreign", {}, "got something else there, expected a new or empty folder"),
        # 40 x 2 x 2 x 4 x 2^38 x 2 bytes are 352 TB
        (tmp_path / "huge", {"image-size": 2**20}, r"GB free on that disk, expected 35\d{4}\.\d\d"),
    ):
        with pytest.raises(UserError, match=message):
            call_main("cache_latents.py", *cache_flags(output, **changes))
    assert contents(cache) == before and not (tmp_path / "huge").exists()


def test_a_moved_tree_and_autoencoder_are_the_same(
    cache, cache_flags, image_tree, tiny_vae, tmp_path
):
    shutil.copytree(image_tree, tmp_path / "images")
    shutil.copytree(tiny_vae, tmp_path / "vae")
    before = contents(cache)
    flags = {"data-path": tmp_path / "images", "vae-path": tmp_path / "vae"}
    call_main("cache_latents.py", *cache_flags(cache, **flags))
    assert contents(cache) == before


def test_unreadable_images_are_replaced_as_in_training(
    cache_flags, image_tree, tmp_path, vae, capsys
):
    shutil.copytree(image_tree, tmp_path / "data")
    for name in ("class-1/05.png", "class-1/06.png", "class-3/09.png"):  # 15 and 16, and the last
        (tmp_path / "data" / name).write_bytes(b"not an image")
    folder = tmp_path / "latents"
    call_main("cache_latents.py", *cache_flags(folder, **{"data-path": tmp_path / "data"}))
    said = capsys.readouterr().out
    assert said.count("cannot be read: class-1/05.png") == 1 and "3 images skipped" in said
    latents, tree = CachedLatents(folder), ImageTree(str(tmp_path / "data"), 16)
    for index in (14, 15, 16, 17, 39):
        image, label, unreadable = tree[index, True]
        moments, got_label, names = latents[index, True]
        want = encode_moments(vae, image[None])[0]
        torch.testing.assert_close(moments.float(), want, atol=1e-4, rtol=1e-3)
        assert got_label == label
        assert [f"{tmp_path / 'data' / name}" for name in names] == unreadable


def test_a_damaged_shard_is_named_when_it_is_read_and_encoded_anew(cache, damaged, cache_flags):
    latents = CachedLatents(damaged)
    latents[39, False]
    with pytest.raises(UserError, match="shard-00002.safetensors: damaged at image 39"):
        latents[39, True]
    stream = BatchStream(40, micro_batch=40, end_step=2)
    loader = make_loader(latents, stream, num_workers=1, pin=False)
    with pytest.raises(UserError) as error:  # in a worker: one line all the same
        list(batches_of(loader))
    assert re.fullmatch(r"\S+/shard-00002.safetensors: damaged at image 39; .*", str(error.value))
    call_main("cache_latents.py", *cache_flags(damaged))
    assert contents(damaged) == contents(cache)


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_shard_of_another_size_is_refused_when_the_cache_is_opened(damaged, size):
    path = damaged / shard_name(1)
    content = path.read_bytes()
    path.write_bytes(content[:size] if size <= 0 else content + b"x")
    with pytest.raises(UserError, match=r"index.json: shard-00001.safetensors: got \d+, expected"):
        CachedLatents(damaged)
    path.unlink()
    with pytest.raises(UserError, match="shard-00001.safetensors: got 'no such file', expected"):
        CachedLatents(damaged)


def test_the_draws_are_those_of_encoding_on_the_fly(cache, image_tree, vae):
    """Images, labels, flips, posterior noise, and the generator's state for what is drawn after."""
    latents, tree = CachedLatents(cache), ImageTree(str(image_tree), 16)
    stream = BatchStream(40, micro_batch=3, accumulation=2, rank=1, world_size=2, end_step=9)
    loaders = [make_loader(data, stream, num_workers=0, pin=False) for data in (latents, tree)]
    for key, (cached, raw) in enumerate(zip(*map(batches_of, loaders), strict=True)):
        assert torch.equal(cached[1], raw[1])
        reseed(0, key)
        got, state = latents.sample(cached[0]), torch.get_rng_state()
        reseed(0, key)
        want = encode(vae, raw[0])
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        # noise like them is drawn in the order of their memory
        assert got.is_contiguous() and want.is_contiguous()
        assert (want - latents.sample(cached[0])).abs().mean() > 0.01  # other noise is far away


@pytest.fixture(scope="module")
def train_flags(image_tree, tiny_vae, cache):
    def make(results: Path, cached: bool, **changes) -> list[str]:
        images = {"data-path": image_tree, "vae-path": tiny_vae, "image-size": 16}
        values = {
            **({"latents-path": cache} if cached else images),
            "model": "DiT-Ti/2", "num_experts": 4, "global-batch-size": 8, "precision": "fp32",
            "results-dir": results, "run-name": "run", "log-every": 1, "num-workers": 0,
            "num-sample": 0, "max-steps": 4, "ckpt-every": 2, "lr": 1e-3, "ema-decay": 0.9,
            **changes,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in values.items()]

    return make


@pytest.fixture(scope="module")
def trained(train_flags, tmp_path_factory) -> Path:
    """The results folder of four steps from the cache."""
    results = tmp_path_factory.mktemp("cached")
    call_main("train.py", *train_flags(results, cached=True))
    return results


def assert_same_losses(got: Path, want: Path, rel: float) -> None:
    for a, b in zip(rows(got), rows(want), strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=rel), (a["step"], name)


@pytest.mark.parametrize("objective", ["gaussian", "flow"])
def test_losses_are_those_of_encoding_on_the_fly(trained, train_flags, tmp_path, objective):
    flow = {"rf": objective == "flow"}
    if flow["rf"]:
        trained = tmp_path / "cached"
        call_main("train.py", *train_flags(trained, cached=True, **flow))
    call_main("train.py", *train_flags(tmp_path / "images", cached=False, **flow))
    assert_same_losses(trained, tmp_path / "images", rel=2e-3)


def test_resume_from_a_cache_is_bit_exact(trained, train_flags, tmp_path):
    for steps in (2, 4):
        call_main("train.py", *train_flags(tmp_path, cached=True, **{"max-steps": steps}))
    assert_equal_runs(tmp_path, trained)


def test_deepspeed_on_two_processes_trains_from_the_cache_alike(train_flags, tmp_path):
    """Against train.py on one process, with as many micro-batches of the same size."""
    call_main("train.py", *train_flags(tmp_path / "one", cached=True, accum_iter=2))
    config = tmp_path / "zero1.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    flags = train_flags(tmp_path / "two", cached=True, deepspeed_config=config)
    flags = [flag.replace("global-batch-size=8", "train_batch_size=4") for flag in flags]
    run_script("train_deepspeed.py", *flags, processes=2)
    assert_same_losses(tmp_path / "two", tmp_path / "one", rel=1e-4)


def test_the_autoencoder_is_needed_for_samples_alone(cache, train_flags, tiny_vae, tmp_path, vae):
    """Its path and digest are in the checkpoint all the same."""
    alone = tmp_path / "latents"
    shutil.copytree(cache, alone)
    index = alone / "index.json"
    index.write_text(index.read_text().replace(str(tiny_vae), "/gone/vae"))
    flags = {"latents-path": alone, "max-steps": 1}
    call_main("train.py", *train_flags(tmp_path / "a", cached=True, **flags))
    record = read_record(only_run(tmp_path / "a") / "checkpoints" / "0000001")
    assert record.vae_path == "/gone/vae" and record.image_size == 16
    assert record.vae_sha256 == CachedLatents(cache).settings.vae_sha256
    flags["num-sample"] = 4
    with pytest.raises(UserError, match="--vae-path: got /gone/vae, expected a folder"):
        call_main("train.py", *train_flags(tmp_path / "b", cached=True, **flags))
    flags["vae-path"] = tiny_vae
    call_main("train.py", *train_flags(tmp_path / "b", cached=True, **flags))
    assert (only_run(tmp_path / "b") / "samples-0000001.png").is_file()
    changed = copy.deepcopy(vae)
    next(changed.decoder.parameters()).data += 1
    changed.save_pretrained(tmp_path / "vae")
    flags["vae-path"] = tmp_path / "vae"
    with pytest.raises(UserError, match="expected those of .*latents"):
        call_main("train.py", *train_flags(tmp_path / "c", cached=True, **flags))


def test_bad_input_is_refused(cache, train_flags, image_tree, tmp_path):
    for changes, message in (
        ({"data-path": image_tree}, "--latents-path: got it beside --data-path, expected one"),
        ({"latents-path": "/nowhere"}, "--latents-path: got /nowhere, expected a folder that"),
        ({"image-size": 32}, "--image-size: got 32, expected 16, that of"),
        ({"num-classes": 7}, "--num-classes: got 7, expected 4, the number of classes in"),
    ):
        with pytest.raises(UserError, match=message):
            call_main("train.py", *train_flags(tmp_path / "r", cached=True, **changes))
    with pytest.raises(UserError, match="--data-path: got nothing, expected"):
        call_main("train.py", "--num-sample=0", f"--results-dir={tmp_path / 'r'}")
    assert not (tmp_path / "r").exists()


def test_a_plan_takes_its_numbers_from_the_cache(train_flags, tmp_path, capsys):
    call_main("train.py", *train_flags(tmp_path, cached=True), "--dry-run")
    said = capsys.readouterr().out
    assert "input_size=8" in said and "num_classes=4" in said and "epochs of 40 images" in said


def test_the_benchmark_measures_images_and_cache(
    cache, image_tree, tiny_vae, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    call_main(
        "bench_data.py", "--data-path", image_tree, "--latents-path", cache, "--image-size", 16,
        "--vae-path", tiny_vae, "--workers", 0, "--batch-size", 8, "--seconds", 0.01,
        "--output", tmp_path / "bench.json",
    )  # fmt: skip
    said = json.loads((tmp_path / "bench.json").read_text())
    assert [row["row"] for row in said["rows"]] == ["decode", "encode", "cached", "cached"]
    assert all(row["images_per_sec"] > 0 for row in said["rows"])
    assert said["versions"]["torch"] == torch.__version__ and said["machine"]["cores"] >= 1


def memory_of_this_process() -> dict[str, int]:
    """Bytes in memory, by kind, as the kernel counts them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


class WatchedLatents(CachedLatents):
    """Gives the first and the last item with the memory of the process that reads it."""

    def __getitem__(self, key):
        moments, label, _ = super().__getitem__(key)
        watched = [memory_of_this_process()] if key[0] in (0, len(self) - 1) else []
        return moments[:1, :1, :1].clone(), label, watched


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts as Linux does")
def test_workers_share_the_pages_and_copy_nothing(cache, tmp_path):
    """A cache of 64 MiB: a worker that reads all of it grows by its pages, and by no own memory."""
    settings = CachedLatents(cache).settings
    wide = replace(settings, latent_shape=(4, 32, 32), images=2048, shard_images=512)
    caching.begin(tmp_path, wide, [])
    for shard in range(4):
        moments = torch.randn(512, 2, 8, 32, 32).half()
        caching.write_shard(tmp_path, shard, wide, moments, torch.zeros(512), {})
    caching.finish(tmp_path, wide, {})
    del moments
    latents, total = WatchedLatents(tmp_path), 2048 * wide.image_bytes
    assert len(pickle.dumps(latents)) < 10_000  # what a spawned worker gets: no tensors
    keys = [[(i + j, j % 2 == 1) for j in range(128)] for i in range(0, 2048, 128)]
    loader = torch.utils.data.DataLoader(
        latents, batch_sampler=keys, num_workers=1, collate_fn=list
    )
    seen = [memory for batch in loader for item in batch for memory in item[2]]
    mapped = seen[-1]["Rss"] - seen[-1]["Anonymous"] - (seen[0]["Rss"] - seen[0]["Anonymous"])
    assert mapped > 0.9 * total
    assert seen[-1]["Anonymous"] - seen[0]["Anonymous"] < 0.1 * total


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "shard-00001.safetensors", 10**400, -1, 0, 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)  # fmt: skip


def places_in(value, path=()):
    """Every path to a value inside nested lists and dictionaries."""
    yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(part, (*path, key))


def doubled(value):
    return [*value, *value] if isinstance(value, list) else [value]


def shortened(value):
    return value[:-1] if isinstance(value, list | str) else {}


def changed_at(value, path: tuple, change):
    """A copy of nested lists and dictionaries with another value, or `change` of it, at a path."""
    if not path:
        return change(value) if callable(change) else change
    copied = copy.copy(value)
    copied[path[0]] = changed_at(value[path[0]], path[1:], change)
    return copied


@fuzzed(
    max_examples=FUZZ_EXAMPLES or 80, derandomize=not FUZZ_EXAMPLES, deadline=None, database=None
)
@given(data=st.data())
def test_any_index_is_read_or_refused_with_one_line(cache, data):
    """Values replaced, removed and doubled anywhere in an index, cut text, and other sizes."""
    text = (cache / "index.json").read_text()
    sizes = {path.name: path.stat().st_size for path in cache.glob("*.safetensors")}
    values = json.loads(text)
    for _ in range(data.draw(st.integers(0, 3))):
        path = data.draw(st.sampled_from(list(places_in(values))))
        change = data.draw(st.sampled_from([doubled, shortened]) | JSON_VALUES)
        values = changed_at(values, path, change)
    content = json.dumps(values).encode()
    if data.draw(st.integers(0, 3)) == 0:
        cut = data.draw(st.integers(0, len(content)))
        content = content[:cut] + data.draw(st.binary(max_size=20))
    if data.draw(st.booleans()):
        sizes[data.draw(st.sampled_from(sorted(sizes)))] += data.draw(st.integers(-10, 10))
    try:
        index = parse_index(content, sizes)
    except UserError as error:
        assert len(str(error).splitlines()) <= 1 and len(str(error)) < 500
        return
    assert isinstance(index, Index)
    assert [shard.name for shard in index.shards] == sorted(sizes)
    assert all(sizes[shard.name] == shard.bytes for shard in index.shards)
    assert sum(shard.images for shard in index.shards) == index.settings.images
    assert parse_index(index.to_json().encode(), sizes) == index


def test_a_deeply_nested_index_is_refused():
    for content in (b"[" * 100_000, b'{"images": ' + b"9" * 5000 + b"}", b"\xff\xfe", b""):
        with pytest.raises(UserError, match="not JSON"):
            parse_index(content)
